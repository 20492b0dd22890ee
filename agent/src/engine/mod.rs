//! Container creation in the guest, by youki's `libcontainer`, behind a single-threaded zygote process.
//!
//! `libcontainer` forks and joins namespaces, which a process with threads must not do. So PID 1 forks a zygote
//! before it has threads, and asks it (see `zygote` for the picture). [`Engine`] is the asking side.
//!
//! ```text
//! create ──▶ created ──start──▶ running ──(init exits)──▶ stopped ──delete──▶ gone
//!               └──────────────────delete kills────────────────┘
//! ```

mod cgroup;
mod executor;
mod inside;
mod pause;
mod seccomp;
mod spec;
pub(crate) mod sys;
mod trace;
mod wire;
mod worker;
mod zygote;

pub(crate) use inside::open_in;
pub(crate) use spec::{POD_CGROUP, is_bind};

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixStream, unix::pipe},
};
use wire::{Answer, Request, Stage};

/// Handle to the zygote, held by PID 1.
#[derive(Debug)]
pub struct Engine {
    zygote: OwnedFd,
    pid: i32,
    root: PathBuf,
    containers: Mutex<HashMap<String, Entry>>,
    sequence: AtomicU64,
}

/// What a container is made from.
#[derive(Debug)]
pub struct Create {
    /// Container id.
    pub id: String,
    /// The final specification: absolute `root.path`, namespaces, mounts.
    pub spec: Spec,
    /// Standard streams of the container's init process.
    pub stdio: Stdio,
}

/// A further process in a running container.
#[derive(Debug)]
pub struct Exec {
    /// Container id.
    pub id: String,
    /// The process. Absent capabilities mean those of the container's init, as do an absent OOM score and a
    /// `no_new_privileges` that is not set; seccomp is always the container's.
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
    /// A new terminal of the container's devpts, which must go with `process.terminal`; its master comes back in
    /// [`Started::pty`]. Its size is `process.consoleSize`.
    Terminal,
}

/// A process that exists.
#[derive(Debug)]
pub struct Started {
    /// Its pid as PID 1 sees it. It becomes a child of PID 1, so that PID 1 sees its exit; not before this value
    /// was sent, but perhaps before it is received.
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
    /// A system call around the zygote failed.
    #[error("container engine: {0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// A container of this id was created and not deleted.
    #[error("container {0} exists")]
    Exists(String),
    /// No container of this id was created.
    #[error("container {0} does not exist")]
    NotFound(String),
    /// The container's init has exited, or was never created.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The container was started before.
    #[error("container {0} was started before")]
    StartedBefore(String),
    /// The container could not be created, or its process could not be executed.
    #[error("{0}")]
    Failed(String),
}

/// What PID 1 knows of a container.
#[derive(Debug)]
enum Entry {
    Creating { cgroup: PathBuf },
    Created(Arc<Init>),
}

#[derive(Debug)]
struct Init {
    pid: i32,
    /// Readable once init has exited: a pid alone may by then be another process's.
    pidfd: OwnedFd,
    cgroup: PathBuf,
    /// Socket that init waits on.
    notify: PathBuf,
    /// Exec status; taken by the first start.
    status: Mutex<Option<OwnedFd>>,
    poststart: bool,
    poststop: bool,
}

impl Init {
    fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl Engine {
    /// Forks the zygote, which inherits PID 1's limits and OOM score. `root` (say `/run/kata-containers/engine`,
    /// at most 80 bytes) is a folder for its sockets; it is made, or emptied.
    ///
    /// Must be called before the process has a second thread, and so before a runtime exists.
    pub fn spawn(root: &Path) -> Result<Engine, EngineError> {
        let io = |doing| move |e: io::Error| EngineError::Io(doing, e);
        if root.exists() {
            fs::remove_dir_all(root).map_err(io("emptying its folder"))?;
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(io("making its folder"))?;
        let (ours, theirs) = wire::pair().map_err(|e| EngineError::Io("making a socket", e.into()))?;
        let Some(pid) = sys::fork().map_err(|e| EngineError::Io("forking", e.into()))? else {
            drop(ours);
            sys::exit_now(zygote::serve(&theirs));
        };
        Ok(Engine {
            zygote: ours,
            pid: pid.as_raw(),
            root: root.to_owned(),
            containers: Mutex::default(),
            sequence: AtomicU64::new(0),
        })
    }

    /// The zygote, a child of this process. Without it nothing can be made any more.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Makes a container and its init process, which waits for [`Engine::start`]. A container that cannot be
    /// made leaves nothing.
    pub async fn create(&self, req: Create) -> Result<Started, EngineError> {
        let Create { id, spec, stdio } = req;
        let linux = spec.linux().as_ref();
        let cgroup = spec::cgroup_path(linux.and_then(|l| l.cgroups_path().as_deref()), &id)
            .map_err(|e| EngineError::Failed(e.to_string()))?;
        let hooks = spec.hooks().as_ref();
        let some = |list: Option<&Option<Vec<_>>>| list.is_some_and(|l| l.as_ref().is_some_and(|l| !l.is_empty()));
        let (poststart, poststop) = (some(hooks.map(|h| h.poststart())), some(hooks.map(|h| h.poststop())));
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                return Err(EngineError::Exists(id));
            }
            containers.insert(id.clone(), Entry::Creating { cgroup: cgroup.clone() });
        }
        let notify = self.socket_path();
        let (streams, fds) = wire::split(stdio);
        let request = Request::Create {
            id: id.clone(),
            notify: notify.clone(),
            spec: Box::new(spec),
            streams,
        };
        let started = self.started(request, fds).await.and_then(|(pid, fds)| {
            let mut fds = fds.into_iter();
            let (pidfd, status) = fds.next().zip(fds.next()).ok_or(EngineError::Gone)?;
            Ok((pid, pidfd, status, fds.next()))
        });
        match started {
            Ok((pid, pidfd, status, pty)) => {
                let status = Mutex::new(Some(status));
                let init = Init {
                    pid,
                    pidfd,
                    cgroup,
                    notify,
                    status,
                    poststart,
                    poststop,
                };
                self.containers().insert(id, Entry::Created(Arc::new(init)));
                Ok(Started { pid, pty })
            }
            Err(error) => {
                self.ask(Request::Forget { id: id.clone() }, Vec::new()).await?;
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    /// Lets the init process of a created container run its program; returns when it does.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        let init = self.init(id)?;
        let status = init.status.lock().unwrap_or_else(PoisonError::into_inner).take();
        let status = status.ok_or_else(|| EngineError::StartedBefore(id.to_owned()))?;
        let notified = async {
            let mut socket = UnixStream::connect(&init.notify).await?;
            socket.write_all(b"start container").await
        };
        let notified: io::Result<()> = notified.await;
        let _ = fs::remove_file(&init.notify);
        notified.map_err(|_| EngineError::NotRunning(id.to_owned()))?;
        let mut text = String::new();
        let mut status = pipe::Receiver::from_owned_fd(status).map_err(|e| EngineError::Io("the exec status", e))?;
        status
            .read_to_string(&mut text)
            .await
            .map_err(|e| EngineError::Io("the exec status", e))?;
        if !text.is_empty() {
            return Err(EngineError::Failed(text));
        }
        if init.poststart {
            self.done(Request::Hooks {
                id: id.to_owned(),
                init: init.pid,
                stage: Stage::Poststart,
            })
            .await?;
        }
        Ok(())
    }

    /// Starts a further process in a container; returns when its program runs. A program that cannot be executed
    /// leaves nothing, and the error names it.
    pub async fn exec(&self, req: Exec) -> Result<Started, EngineError> {
        let Exec { id, process, stdio } = req;
        let init = self.init(&id)?;
        if init.has_exited() {
            return Err(EngineError::NotRunning(id));
        }
        let notify = self.socket_path();
        let (streams, fds) = wire::split(stdio);
        let request = Request::Exec {
            id: id.clone(),
            init: init.pid,
            notify,
            process: Box::new(process),
            streams,
        };
        let started = self.started(request, fds).await;
        if self.init(&id).is_ok_and(|now| Arc::ptr_eq(&now, &init)) {
            let (pid, fds) = started?;
            return Ok(Started {
                pid,
                pty: fds.into_iter().next(),
            });
        }
        // The container was deleted meanwhile. The process may have come into its cgroup before or after that was
        // removed, and in the latter case the cgroup is there again.
        if let Ok((pid, _)) = started {
            // One that has ended already needs no end.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if matches!(self.init(&id), Err(EngineError::NotFound(_))) {
            remove_cgroup(&init.cgroup).await?;
        }
        Err(EngineError::NotFound(id))
    }

    /// Removes what the engine holds of a container: its cgroup, with all processes in it, and its state.
    /// Idempotent.
    pub async fn delete(&self, id: &str) -> Result<(), EngineError> {
        let (cgroup, init) = match self.containers().get(id) {
            None => return Ok(()),
            Some(Entry::Creating { cgroup }) => (cgroup.clone(), None),
            Some(Entry::Created(init)) => (init.cgroup.clone(), Some(Arc::clone(init))),
        };
        remove_cgroup(&cgroup).await?;
        if let Some(init) = init {
            let _ = fs::remove_file(&init.notify);
            if init.poststop {
                let hooks = Request::Hooks {
                    id: id.to_owned(),
                    init: init.pid,
                    stage: Stage::Poststop,
                };
                match self.done(hooks).await {
                    // The container is gone all the same (`config.md` of the runtime specification, "Lifecycle").
                    Err(EngineError::Failed(text)) => eprintln!("container {id}: {text}"),
                    other => other?,
                }
            }
        }
        self.ask(Request::Forget { id: id.to_owned() }, Vec::new()).await?;
        self.containers().remove(id);
        // An exec that began before may have made it again; one that comes there later sees that the container is gone.
        remove_cgroup(&cgroup).await
    }

    /// Changes the cgroup limits of a container; what `resources` does not mention stays.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), EngineError> {
        self.init(id)?;
        self.done(Request::Update {
            id: id.to_owned(),
            resources: Box::new(resources.clone()),
        })
        .await
    }

    /// Makes a process that does nothing but lead a new PID namespace, which belongs to the user namespace `user` if
    /// there is one, for containers that share it; returns its pid.
    pub async fn pause(&self, user: Option<PathBuf>) -> Result<i32, EngineError> {
        self.started(Request::Pause { user }, Vec::new())
            .await
            .map(|(pid, _)| pid)
    }

    /// The folder of a container's cgroup.
    pub fn cgroup(&self, id: &str) -> Result<PathBuf, EngineError> {
        self.init(id).map(|init| cgroup::folder(&init.cgroup))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn init(&self, id: &str) -> Result<Arc<Init>, EngineError> {
        match self.containers().get(id) {
            None => Err(EngineError::NotFound(id.to_owned())),
            Some(Entry::Creating { .. }) => Err(EngineError::NotRunning(id.to_owned())),
            Some(Entry::Created(init)) => Ok(Arc::clone(init)),
        }
    }

    /// A short name: the path of a socket may have 107 bytes, a container's id has 64.
    fn socket_path(&self) -> PathBuf {
        self.root
            .join(self.sequence.fetch_add(1, Ordering::Relaxed).to_string())
    }

    async fn started(&self, request: Request, fds: Vec<OwnedFd>) -> Result<(i32, Vec<OwnedFd>), EngineError> {
        match self.ask(request, fds).await? {
            (Answer::Started { pid }, fds) => Ok((pid, fds)),
            _ => Err(EngineError::Gone),
        }
    }

    async fn done(&self, request: Request) -> Result<(), EngineError> {
        self.ask(request, Vec::new()).await.map(drop)
    }

    async fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> Result<(Answer, Vec<OwnedFd>), EngineError> {
        let lost = |e: io::Error| EngineError::Io("asking the helper process", e);
        let (ours, theirs) = wire::pair().map_err(|e| lost(e.into()))?;
        wire::send_request(self.zygote.as_fd(), &request, &theirs, &fds).map_err(|e| match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => EngineError::Gone,
            _ => lost(e),
        })?;
        // Theirs must be the only ones, so that a dead worker is noticed and a pipe ends with its process.
        drop((theirs, fds, request));
        // A packet socket, for whose readiness any type of socket will do.
        let socket = std::os::unix::net::UnixStream::from(ours);
        socket.set_nonblocking(true).map_err(lost)?;
        let socket = UnixStream::from_std(socket).map_err(lost)?;
        let mut buf = vec![0; wire::MAX_ANSWER];
        let receive = || Ok(sys::receive(socket.as_fd(), &mut buf)?);
        let (bytes, fds) = socket.async_io(Interest::READABLE, receive).await.map_err(lost)?;
        if bytes == 0 {
            return Err(EngineError::Gone);
        }
        match serde_json::from_slice(&buf[..bytes]).map_err(|e| lost(e.into()))? {
            Answer::Failed(text) => Err(EngineError::Failed(text)),
            answer => Ok((answer, fds)),
        }
    }
}

/// Kills what is in a container's cgroup, and removes it.
async fn remove_cgroup(path: &Path) -> Result<(), EngineError> {
    let folder = cgroup::folder(path);
    let removed = tokio::task::spawn_blocking(move || cgroup::remove(&folder)).await;
    removed
        .map_err(io::Error::from)
        .and_then(|r| r)
        .map_err(|e| EngineError::Io("removing a cgroup", e))
}
