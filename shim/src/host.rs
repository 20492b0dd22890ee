//! The mount namespace that the shim was started in: there the CRI mounts root file systems, and the kubelet volumes.
//!
//! ```text
//! the CRI's namespace ──open_tree──▶ a copy that is mounted nowhere ──move_mount──▶ the share, in the shim's namespace
//! ```
//!
//! The shim's own namespace is a slave of it, and so gets later mounts, but for those below a private mount: CRI-O
//! makes the home of its overlays one. So whatever a container is to see is looked up there, at the moment when it is
//! asked for, and nothing depends on how the node's mounts propagate.

use std::{fs::File, io, os::fd::OwnedFd, path::Path, sync::OnceLock, thread};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::chdir,
};

use crate::{
    error::{Context, Result},
    mountinfo, sys,
};

/// Kept from before the shim had a namespace of its own.
static NAMESPACE: OnceLock<File> = OnceLock::new();

/// Leaves for a mount namespace of its own: nothing of ours shows on the host, and all of it vanishes with the last
/// process of the sandbox. To be called once, by a process with one thread.
///
/// # Errors
/// The kernel refuses.
pub fn leave() -> Result<()> {
    let own = Path::new("/proc/self/ns/mnt");
    let kept = File::open(own).at("open", own)?;
    unshare(CloneFlags::CLONE_NEWNS).action("enter a mount namespace")?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).at("make a slave mount of", "/")?;
    NAMESPACE.get_or_init(|| kept);
    forget_private_roots()
}

/// Lets go of other containers' root file systems that are private mounts: their unmounting would not be heard of here,
/// and they would stay mounted for this pod's life. `containers/storage` mounts each at a folder `merged`
/// (`drivers/overlay`).
fn forget_private_roots() -> Result<()> {
    let mounts = mountinfo::mounts().at("read", "/proc/self/mountinfo")?;
    let unheard =
        |mount: &&mountinfo::Mount| mount.kind == "overlay" && !mount.follows && mount.point.ends_with("merged");
    for mount in mounts.iter().filter(unheard).rev() {
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&mount.point, flags).at("let go of", &mount.point)?;
    }
    Ok(())
}

/// Does some work with the host's paths: what it opens there is the host's, and what it mounts is seen by the host.
///
/// # Errors
/// The kernel does not let a thread into the namespace.
pub fn there<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let Some(namespace) = NAMESPACE.get() else {
        // This process has never left it.
        return Ok(work());
    };
    within(namespace, work)
}

/// Does some work in a mount namespace.
///
/// # Errors
/// The kernel does not let a thread into it.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> Result<T> {
    aside(
        || setns(namespace, CloneFlags::CLONE_NEWNS).action("enter a mount namespace"),
        work,
    )
}

/// Does some work with `folder` as the working folder.
///
/// # Errors
/// There is no such folder.
pub fn in_folder<T: Send>(folder: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    aside(|| chdir(folder).at("enter", folder), work)
}

/// Does some work in a thread that shares its root and working folder with no other: only such a one can change its
/// mount namespace (setns(2)).
fn aside<T: Send>(prepare: impl FnOnce() -> Result<()> + Send, work: impl FnOnce() -> T + Send) -> Result<T> {
    let work = || -> Result<T> {
        unshare(CloneFlags::CLONE_FS).action("leave the other threads' root")?;
        prepare()?;
        Ok(work())
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("mounts".into()).spawn_scoped(scope, work);
        let done = thread.action("start a thread")?.join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A part of the host's file tree.
#[derive(Debug)]
pub struct Tree {
    /// A copy of its mount that is mounted nowhere.
    pub mount: OwnedFd,
    /// A folder, or else a file.
    pub is_dir: bool,
}

impl Tree {
    /// Copies what the host has at `path`, with all that is mounted below it if `recursive`. Symbolic links are
    /// followed, as they lead on the host.
    ///
    /// # Errors
    /// There is nothing, or it cannot be bound. `action` says what it was for.
    pub fn of_host(action: &'static str, path: &Path, recursive: bool) -> Result<Tree> {
        let mount = there(|| sys::open_tree(path, recursive))?.at(action, path)?;
        Tree::new(mount).at(action, path)
    }

    /// The same of the shim's own mount namespace.
    ///
    /// # Errors
    /// As above.
    pub fn of_own(action: &'static str, path: &Path, recursive: bool) -> Result<Tree> {
        let mount = sys::open_tree(path, recursive).at(action, path)?;
        Tree::new(mount).at(action, path)
    }

    fn new(mount: OwnedFd) -> io::Result<Tree> {
        let mount = File::from(mount);
        let is_dir = mount.metadata()?.is_dir();
        Ok(Tree {
            mount: mount.into(),
            is_dir,
        })
    }
}
