//! The pod: its containers and what they share.
//!
//! ```text
//! empty ──CreateSandbox──▶ there ──CreateContainer, …, RemoveContainer──▶ there ──DestroySandbox──▶ ends with its VM
//! ```
//!
//! A container goes created → running → stopped → gone (see `engine`). Bookkeeping is behind short locks that are
//! never held across an await; calls that mount take the lock of the storages, and so come one after the other.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use agent_protocol::{
    GUEST_SHARE, oci,
    protocol::agent::{
        CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest, RemoveContainerRequest, Storage,
    },
};
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Hooks;
use tokio::sync::Mutex as AsyncMutex;

use super::{
    container::{self, Container, Pids},
    devices, disk,
    error::{Doing, Error, Result},
    freezer, hooks,
    huge::{self, HugePages},
    memory::Memory,
    modules, namespaces,
    oom::Oom,
    process::{Process, UNREAD},
    reaper::{Exit, Reaper},
    sources::{Pinned, Volumes},
    stdio::Prepared,
    storage::Storages,
};
use crate::engine::{Create, Engine, Exec, Started};

/// The most characters of a host name that the kernel takes.
const LONGEST_HOSTNAME: usize = 64;

/// The pod of this guest.
#[derive(Debug)]
pub(super) struct Sandbox {
    /// Makes containers.
    pub(super) engine: Engine,
    /// Sees processes end.
    pub(super) reaper: Arc<Reaper>,
    /// Sees processes killed for want of memory.
    pub(super) oom: Arc<Oom>,
    id: OnceLock<String>,
    /// The guest's own, for each container.
    hooks: OnceLock<Hooks>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    storages: Arc<AsyncMutex<Storages>>,
    volumes: AsyncMutex<Volumes>,
    huge_pages: HugePages,
    memory: OnceLock<Arc<Memory>>,
    /// PID 1 of the PID namespace that containers share on demand.
    shared: AsyncMutex<Option<Exit>>,
}

impl Sandbox {
    /// An empty one.
    pub(super) fn new(engine: Engine, reaper: Arc<Reaper>, oom: Arc<Oom>) -> Sandbox {
        Sandbox {
            engine,
            reaper,
            oom,
            id: OnceLock::new(),
            hooks: OnceLock::new(),
            containers: Mutex::default(),
            storages: Arc::default(),
            volumes: AsyncMutex::default(),
            huge_pages: HugePages::default(),
            memory: OnceLock::new(),
            shared: AsyncMutex::default(),
        }
    }

    /// To be called once, when the guest is set up.
    pub(super) async fn begin(&self, memory: Memory) -> Result<()> {
        let _ = self.memory.set(Arc::new(memory));
        self.fit_memory().await
    }

    /// To be called when the guest has got memory, or lost some: the limits that depend on it follow.
    pub(super) async fn fit_memory(&self) -> Result<()> {
        let Some(memory) = self.memory.get().cloned() else {
            return Ok(());
        };
        let mut storages = Arc::clone(&self.storages).lock_owned().await;
        blocking(move || {
            let most = memory.fit()?;
            storages.fit(most)
        })
        .await
    }

    async fn take_huge_pages(&self, pages: u64) -> Result<()> {
        self.huge_pages.add(pages).await?;
        if pages > 0 { self.fit_memory().await } else { Ok(()) }
    }

    async fn give_huge_pages_back(&self, pages: u64) -> Result<()> {
        self.huge_pages.remove(pages).await?;
        if pages > 0 { self.fit_memory().await } else { Ok(()) }
    }

    /// Makes what the pod's containers share.
    pub(super) async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        container::check_id("sandbox_id", &request.sandbox_id)?;
        let taken = |id| Error::Invalid(format!("sandbox {id:?} cannot be made: this guest has a sandbox"));
        if self.id.get().is_some() {
            return Err(taken(request.sandbox_id));
        }
        if !request.guest_hook_path.is_empty() {
            let folder = PathBuf::from(request.guest_hook_path);
            let found = blocking(move || Ok(hooks::find(&folder))).await?;
            // One CreateSandbox succeeds; another that failed before it has asked for the same.
            let _ = self.hooks.set(found);
        }
        for module in request.kernel_modules {
            blocking(move || modules::load(&module.name, &module.parameters)).await?;
        }
        if !request.hostname.is_empty() {
            let name: String = request.hostname.chars().take(LONGEST_HOSTNAME).collect();
            nix::unistd::sethostname(&name).doing(|| format!("set the host name {name:?}"))?;
        }
        if !request.dns.is_empty() {
            let text = request.dns.join("\n") + "\n";
            fs::write("/etc/resolv.conf", text).doing(|| "write /etc/resolv.conf".into())?;
        }
        self.add_storages(request.storages).await?;
        // At the end: one that fails may be asked for again.
        self.id.set(request.sandbox_id).map_err(taken)
    }

    /// Ends every process and writes the data out.
    pub(super) async fn destroy(&self) -> Result<()> {
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for container in containers {
            let request = RemoveContainerRequest {
                container_id: container.id.clone(),
                ..Default::default()
            };
            self.remove_container(request).await?;
        }
        blocking(|| {
            nix::unistd::sync();
            Ok(())
        })
        .await
    }

    /// Makes a container.
    pub(super) async fn create_container(&self, mut request: CreateContainerRequest) -> Result<()> {
        container::check_create(&request)?;
        let spec = request
            .OCI
            .take()
            .ok_or_else(|| Error::Invalid("CreateContainer has no OCI".into()))?;
        let input = !spec.Process.NoInput;
        let mut spec = oci::spec_from_wire(&spec)?;
        let id = request.container_id;
        let is_sandbox = self.id.get().is_some_and(|sandbox| *sandbox == id);
        let pids = match container::pid_target(&spec) {
            _ if container::wants_guest_pids(&spec) => Pids::Guest,
            Some(target) => Pids::At(self.processes_of(&target)?),
            None if request.sandbox_pidns && !is_sandbox => Pids::At(self.shared_processes().await?),
            None => Pids::New,
        };
        container::join_pod(&mut spec, &pids, namespaces::of_pod().map(|pod| &pod.maps))?;
        if let Some(guest) = self.hooks.get() {
            hooks::append(&mut spec, guest);
        }
        let devices = request.devices;
        if !devices.is_empty() {
            spec = blocking(move || disk::give(&devices, &mut spec).map(|()| spec)).await?;
        }
        let (prepared, stdio) = Prepared::new(container::has_terminal(&spec)?, input)?;
        let storages = self.add_storages(request.storages).await?;
        let huge_pages = huge::wanted(&spec);
        let volumes = Volumes::of(&spec);
        self.volumes.lock().await.take(&volumes);
        let made = async {
            let name = id.clone();
            let prepare = move || {
                devices::give_all(&mut spec)?;
                Ok((Pinned::new(&name, &mut spec)?, spec))
            };
            let (pinned, spec) = blocking(prepare).await?;
            self.take_huge_pages(huge_pages).await?;
            let create = Create {
                id: id.clone(),
                spec,
                stdio,
            };
            let made = self.make(create, prepared, is_sandbox).await;
            if made.is_err() {
                // As below.
                let _ = self.give_huge_pages_back(huge_pages).await;
            }
            // The container has mounts of its own by now.
            blocking(move || {
                drop(pinned);
                Ok(())
            })
            .await?;
            made
        };
        let init = match made.await {
            Ok(init) => init,
            Err(error) => {
                // The first error is the one to tell.
                let _ = self.leave_volumes(&volumes).await;
                let _ = self.remove_storages(storages).await;
                return Err(error);
            }
        };
        let container = Container::new(id.clone(), init, storages, huge_pages, volumes);
        self.containers().insert(id, Arc::new(container));
        Ok(())
    }

    async fn make(&self, create: Create, streams: Prepared, is_sandbox: bool) -> Result<Arc<Process>> {
        let id = create.id.clone();
        let expected = self.reaper.expect();
        let Started { pid, pty } = self.engine.create(create).await?;
        let exit = expected.claim(pid);
        let completed = async {
            let init = Arc::new(Process::new(exit, streams.complete(pty)?));
            if is_sandbox {
                // The pause container of upstream's shims leads the PID namespace that the others share.
                *self.shared.lock().await = Some(init.exit.clone());
            } else {
                let watched = self.oom.watch(&id, &self.engine.cgroup(&id)?);
                watched.doing(|| format!("watch container {id:?} for OOM kills"))?;
            }
            Ok(init)
        };
        let completed = completed.await;
        if completed.is_err() {
            // As above.
            let _ = self.engine.delete(&id).await;
        }
        completed
    }

    /// Starts a further process.
    pub(super) async fn exec(&self, mut request: ExecProcessRequest) -> Result<()> {
        container::check_exec(&request)?;
        let container = self.container(&request.container_id)?;
        let process = request
            .process
            .take()
            .ok_or_else(|| Error::Invalid("ExecProcess has no process".into()))?;
        let input = !process.NoInput;
        let process = oci::process_from_wire(&process)?;
        // It would freeze before it became the program, and whoever waits for its start with it.
        if freezer::is_set(&self.engine.cgroup(&container.id)?)? {
            let text = format!("container {} is paused: resume it first", container.id);
            return Err(Error::Invalid(text));
        }
        container.reserve(&request.exec_id)?;
        let started = async {
            let (prepared, stdio) = Prepared::new(process.terminal() == Some(true), input)?;
            let expected = self.reaper.expect();
            let exec = Exec {
                id: container.id.clone(),
                process,
                stdio,
            };
            let Started { pid, pty } = self.engine.exec(exec).await?;
            let exit = expected.claim(pid);
            Ok(Arc::new(Process::new(exit, prepared.complete(pty)?)))
        };
        let (process, result) = match started.await {
            Ok(process) => (Some(process), Ok(())),
            Err(error) => (None, Err(error)),
        };
        container.fill(&request.exec_id, process);
        result
    }

    /// Waits for the end of a process; a further process is then forgotten, once its output is read.
    pub(super) async fn wait(&self, container: &str, exec: &str) -> Result<i32> {
        let container = self.container(container)?;
        let process = container.process(exec)?;
        let status = process.wait().await;
        if !container.is_init(exec) {
            let exec = exec.to_owned();
            let forgotten = forget(Arc::downgrade(&container), exec, Arc::downgrade(&process));
            drop((container, process));
            tokio::spawn(forgotten);
        }
        Ok(status)
    }

    /// Removes a container with all its processes.
    pub(super) async fn remove_container(&self, request: RemoveContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let deleted = self.engine.delete(&container.id);
        match request.timeout {
            0 => deleted.await?,
            seconds => tokio::time::timeout(Duration::from_secs(seconds.into()), deleted)
                .await
                .map_err(|_| Error::Late(format!("removing container {:?}", container.id)))??,
        }
        self.containers().remove(&container.id);
        let id = container.id.clone();
        blocking(move || detach(|below| is_of(&id, below))).await?;
        self.leave_volumes(&container.volumes).await?;
        // Nobody waits for this.
        tokio::task::spawn_blocking(forget_files);
        self.remove_storages(container.storages.clone()).await?;
        self.give_huge_pages_back(container.huge_pages).await
    }

    /// Finds a container.
    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// The PID namespace of the pod.
    async fn shared_processes(&self) -> Result<PathBuf> {
        let mut shared = self.shared.lock().await;
        let leader = match shared.as_ref().filter(|leader| leader.now().is_none()) {
            Some(leader) => leader.clone(),
            None => {
                let expected = self.reaper.expect();
                expected.claim(
                    self.engine
                        .pause(namespaces::of_pod().map(|_| namespaces::USER.into()))
                        .await?,
                )
            }
        };
        let path = PathBuf::from(format!("/proc/{}/ns/pid", leader.pid()));
        *shared = Some(leader);
        Ok(path)
    }

    /// The PID namespace of a container.
    fn processes_of(&self, container: &str) -> Result<PathBuf> {
        let leader = &self.container(container)?.init.exit;
        match leader.now() {
            None => Ok(format!("/proc/{}/ns/pid", leader.pid()).into()),
            Some(_) => Err(Error::Invalid(format!(
                "container {container:?}, whose processes are to be seen, has ended"
            ))),
        }
    }

    async fn add_storages(&self, storages: Vec<Storage>) -> Result<Vec<String>> {
        if storages.is_empty() {
            return Ok(Vec::new());
        }
        let mut all = Arc::clone(&self.storages).lock_owned().await;
        blocking(move || all.add(&storages)).await
    }

    /// Changes the options of volumes in the guest's memory.
    pub(super) async fn update_storages(&self, storages: Vec<Storage>) -> Result<()> {
        let mut all = Arc::clone(&self.storages).lock_owned().await;
        blocking(move || all.update(&storages)).await
    }

    async fn remove_storages(&self, points: Vec<String>) -> Result<()> {
        if points.is_empty() {
            return Ok(());
        }
        let mut all = Arc::clone(&self.storages).lock_owned().await;
        blocking(move || all.remove(&points)).await
    }

    /// Lets go of the volumes that a container was the last to use. Nobody takes one meanwhile: the next container would
    /// have the guest's old file system for it, and the one after that another.
    async fn leave_volumes(&self, used: &HashSet<PathBuf>) -> Result<()> {
        let mut volumes = self.volumes.lock().await;
        let unused = volumes.leave(used);
        if unused.is_empty() {
            return Ok(());
        }
        blocking(move || detach(|below| unused.iter().any(|volume| below.starts_with(volume)))).await
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets a process whose end was told, once its output is read or nobody seems to read it.
async fn forget(container: Weak<Container>, exec: String, process: Weak<Process>) {
    while let (Some(container), Some(process)) = (container.upgrade(), process.upgrade()) {
        let left = UNREAD.saturating_sub(process.idle());
        if process.is_over() || left.is_zero() {
            return container.forget(&exec, &process);
        }
        drop((container, process));
        tokio::time::sleep(left).await;
    }
}

/// Runs what blocks beside the runtime.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Panic(error.to_string())),
    }
}

/// Lets the file server close what no process of the guest uses: for the names that the kernel remembers it keeps files
/// open, which keeps a container's file systems busy on the host.
fn forget_files() {
    // Without a message each time; then names and inodes. A kernel that refuses forgets in its own time.
    for order in ["4", "2"] {
        let _ = fs::write("/proc/sys/vm/drop_caches", order);
    }
}

/// Whether something below the share is a container's: `<id>/…` or `…/<id>/rootfs` or `<id>-<random>-<name>`.
fn is_of(container: &str, below: &Path) -> bool {
    let mut names = below.components().map(|part| part.as_os_str().to_string_lossy());
    names.any(|name| {
        let rest = name.strip_prefix(container);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

/// Lets go of what the host has taken away.
pub(super) fn release_stale() -> Result<()> {
    detach(|below| fs::metadata(Path::new(GUEST_SHARE).join(below)).is_err())
}

/// Detaches mounts below the share, by their paths in it. What the host has mounted there, the guest's kernel mounts on
/// the first access; one that is of use after all comes back on the next.
fn detach(gone: impl Fn(&Path) -> bool) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").doing(|| "read the mounts".into())?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    let below: Vec<_> = points
        .filter(|point| point.strip_prefix(GUEST_SHARE).is_ok_and(&gone))
        .collect();
    // What is mounted on another mount was mounted after it.
    for point in below.into_iter().rev() {
        // It may be gone with the one that it was on.
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_mounts_are_known_by_their_names() {
        for own in [
            "c1/rootfs",
            "c1/mounts/0-data",
            "passthrough/c1/rootfs",
            "c1-0123456789abcdef-hosts",
        ] {
            assert!(is_of("c1", Path::new(own)), "{own}");
        }
        for other in ["c12/rootfs", "passthrough/c", "sandbox-c1/data", ""] {
            assert!(!is_of("c1", Path::new(other)), "{other}");
        }
    }
}
