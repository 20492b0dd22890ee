//! Container creation in the guest, by youki's `libcontainer`, behind a single-threaded zygote process.

use std::{os::fd::OwnedFd, path::Path};

use oci_spec::runtime::{LinuxResources, Process, Spec};

/// Handle to the zygote, held by PID 1.
#[derive(Debug)]
pub struct Engine {}

/// What a container is made from.
#[derive(Debug)]
pub struct Create {
    /// Container id.
    pub id: String,
    /// The final spec: absolute `root.path`, namespaces, mounts.
    pub spec: Spec,
    /// Standard streams of the container's init process.
    pub stdio: Stdio,
}

/// A further process in a running container.
#[derive(Debug)]
pub struct Exec {
    /// Container id.
    pub id: String,
    /// The process; absent capabilities mean the container's own.
    pub process: Process,
    /// Its standard streams.
    pub stdio: Stdio,
}

/// The container's side of a process's standard streams.
#[derive(Debug)]
pub enum Stdio {
    /// Pipes (or any other files); without `stdin` the process reads `/dev/null`.
    Pipes {
        /// Read end.
        stdin: Option<OwnedFd>,
        /// Write end.
        stdout: OwnedFd,
        /// Write end.
        stderr: OwnedFd,
    },
    /// A new pseudo-terminal of the container's devpts; its master comes back in [`Started::pty`].
    Terminal,
}

/// A process that exists.
#[derive(Debug)]
pub struct Started {
    /// Its pid as PID 1 sees it; it is a child of PID 1.
    pub pid: i32,
    /// The terminal's master, for [`Stdio::Terminal`].
    pub pty: Option<OwnedFd>,
}

/// Why the engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The zygote is gone.
    #[error("the container engine's helper process is gone")]
    Gone,
}

impl Engine {
    /// Forks the zygote. Must be called before the process has a second thread.
    pub fn spawn(_root: &Path) -> Result<Engine, EngineError> {
        Err(EngineError::Gone)
    }

    /// Makes a container and its init process, which waits for [`Engine::start`].
    pub async fn create(&self, _req: Create) -> Result<Started, EngineError> {
        Err(EngineError::Gone)
    }

    /// Lets the init process of a created container run its program.
    pub async fn start(&self, _id: &str) -> Result<(), EngineError> {
        Err(EngineError::Gone)
    }

    /// Starts a further process in a container.
    pub async fn exec(&self, _req: Exec) -> Result<Started, EngineError> {
        Err(EngineError::Gone)
    }

    /// Removes what the engine holds of a container: its cgroup and its state. Idempotent.
    pub async fn delete(&self, _id: &str) -> Result<(), EngineError> {
        Err(EngineError::Gone)
    }

    /// Changes the cgroup limits of a container.
    pub async fn update(&self, _id: &str, _resources: &LinuxResources) -> Result<(), EngineError> {
        Err(EngineError::Gone)
    }
}
