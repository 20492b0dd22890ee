//! A process that leads a PID namespace, for the containers of a pod that share one, and does nothing else.

use std::path::Path;

use nix::{
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
    unistd::{Gid, Uid, chdir, pivot_root, setgid, setgroups, setuid},
};

use super::{sys, wire::Answer, worker::Outcome};

/// What the pause images of Kubernetes run as.
const NOBODY: u32 = 65535;

/// Forks it.
pub(super) fn start(user: Option<&Path>) -> Outcome {
    let failed = |doing: &str, error: nix::Error| format!("the pod's first process: {doing}: {}", error.desc());
    if let Some(user) = user {
        become_root_of(user).map_err(|e| failed("joining the pod's user namespace", e))?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| failed("making a PID namespace", e))?;
    match sys::fork().map_err(|e| failed("forking", e))? {
        Some(pid) => Ok((Answer::Started { pid: pid.as_raw() }, Vec::new())),
        None => match confine() {
            Ok(()) => sys::wait_forever(),
            Err(_) => sys::exit_now(1),
        },
    }
}

/// Root of a user namespace that this one made: only what is made from then on belongs to it.
fn become_root_of(namespace: &Path) -> nix::Result<()> {
    let namespace = open(namespace, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    setgid(Gid::from_raw(0))?;
    setuid(Uid::from_raw(0))
}

/// Containers see this process: through it they must not see the guest.
fn confine() -> nix::Result<()> {
    // The kernel reaps the orphans of the namespace.
    sys::ignore_children()?;
    nix::sys::prctl::set_name(c"pause")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_RDONLY, none)?;
    chdir("/run")?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    setgroups(&[])?;
    setgid(Gid::from_raw(NOBODY))?;
    setuid(Uid::from_raw(NOBODY))?;
    sys::close_all();
    Ok(())
}
