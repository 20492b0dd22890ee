//! A pod's network namespace: opened once, never the host's, entered by a thread of its own.

use super::NetError;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);

#[derive(Debug)]
pub(super) struct Namespace {
    path: PathBuf,
    file: File,
    id: (u64, u64),
}

impl Namespace {
    /// Opens the namespace at `path`; refuses the host's and this process's.
    pub(super) fn open(path: &Path) -> Result<Self, NetError> {
        let at = |source| NetError::Open {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(at)?;
        if fstatfs(&file).map_err(|error| at(error.into()))?.filesystem_type() != NSFS {
            return Err(NetError::NotANamespace(path.to_owned()));
        }
        let id = identity(&file.metadata().map_err(at)?);
        for host in ["/proc/1/ns/net", "/proc/self/ns/net"] {
            match std::fs::metadata(host) {
                Ok(metadata) if identity(&metadata) == id => return Err(NetError::Host(path.to_owned())),
                Ok(_) => {}
                // Where the shim runs in a container it may not look at process 1; its own namespace, which is the one
                // that its CRI runs in, it always can.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && host != "/proc/self/ns/net" => {}
                Err(error) => {
                    return Err(NetError::system(
                        format!("tell the host's network namespace by {host}"),
                        error,
                    ));
                }
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            id,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode: what makes it this namespace and no other.
    pub(super) fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Runs `work` with a netlink connection of the namespace, on a thread that is in it and ends with the work.
    pub(super) fn inside<T: Send>(
        &self,
        work: impl AsyncFnOnce(rtnetlink::Handle) -> Result<T, NetError> + Send,
    ) -> Result<T, NetError> {
        self.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .map_err(|error| NetError::system("start a runtime", error))?;
            runtime.block_on(async {
                let (connection, handle, _) =
                    rtnetlink::new_connection().map_err(|error| NetError::system("open a netlink socket", error))?;
                tokio::spawn(connection);
                work(handle).await
            })
        })
    }

    /// Runs `work` on a thread that is in the namespace and ends with the work.
    pub(super) fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T, NetError> + Send) -> Result<T, NetError> {
        in_thread(|| {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|error| NetError::system(format!("enter {}", self.path.display()), error))?;
            work()
        })
    }
}

/// Makes a namespace that has no name.
pub(super) fn new_anonymous() -> Result<OwnedFd, NetError> {
    in_new(|| {
        let namespace = File::open("/proc/thread-self/ns/net");
        namespace
            .map(Into::into)
            .map_err(|error| NetError::system("open a new network namespace", error))
    })
}

/// Runs `work` on a thread that is in a new namespace, which goes with it.
pub(super) fn in_new<T: Send>(work: impl FnOnce() -> Result<T, NetError> + Send) -> Result<T, NetError> {
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetError::system("make a network namespace", error))?;
        work()
    })
}

fn in_thread<T: Send>(run: impl FnOnce() -> Result<T, NetError> + Send) -> Result<T, NetError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, run)
            .map_err(|error| NetError::system("start a thread", error))?;
        thread.join().unwrap_or_else(|_| {
            Err(NetError::system(
                "look after the pod's network",
                io::Error::other("the thread panicked"),
            ))
        })
    })
}

fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
