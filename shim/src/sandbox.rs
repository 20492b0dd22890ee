//! One sandbox: its life, and the containers in it.
//!
//! ```text
//! Empty ──Create(sandbox or single)──▶ Up ──stop, or VM or virtiofsd died──▶ Down ──last Delete, Shutdown──▶ ended
//!   │ boot failed: everything is undone, and the shim ends when its caller lets go
//! ```
//!
//! In `Down` every verb still answers: what ran has exits, Kill and Delete succeed, and nothing waits for the guest.
//! Bookkeeping is behind short locks that are never held across an await; each container's exit has one task that
//! follows it.

mod verbs;

use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use agent::{client::Durations, protocol::agent as wire};
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
    protobuf::well_known_types::any::Any,
    topics,
};
use oci_spec::runtime::Spec;
use tokio::sync::watch;
use vmm::Spawner;

use crate::{
    annotations::{Role, identify},
    boot::{self, Guest, Plan},
    cgroup::CpuList,
    config::Config,
    container::{Container, Kind},
    error::{Context, Error, Result},
    events::Events,
    follow::{self, KILLED},
    io::Stdio,
    log, options,
    pod::Pod,
    process::{Exit, Process, Status},
    sizing::Limits,
    spec::{self, MemoryVolume, PidNamespace},
    start::read_spec,
    trace::Trace,
    undo::State,
};

/// A shim whose sandbox could not be created stays this long for its caller's Delete and Shutdown.
const FAILED_CREATE_GRACE: Duration = Duration::from_secs(2);
/// How soon a boot is over that was given up; what is left of it then is for the next start's sweep.
const BOOT_ENDS: Duration = Duration::from_secs(5);

/// A shim that nobody asks for anything stays this long: a caller that lives creates its sandbox at once.
const FIRST_CREATE: Duration = Duration::from_secs(30);

/// One sandbox and its containers.
pub struct Sandbox {
    id: String,
    events: Events,
    spawner: Spawner,
    guest: OnceLock<Guest>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// `None` once everything is undone.
    state: Mutex<Option<State>>,
    trace: Mutex<Trace>,
    /// Whether Create has the state.
    booting: watch::Sender<bool>,
    /// How long the calls of the task API took, by their names.
    durations: Mutex<Durations>,
    /// Why the VM has ended.
    down: watch::Sender<Option<String>>,
    ended: watch::Sender<bool>,
}

impl Sandbox {
    /// An empty sandbox. Must be called in the runtime.
    pub fn new(id: &str, events: Events, state: State) -> Result<Arc<Sandbox>> {
        Ok(Arc::new(Sandbox {
            id: id.into(),
            events,
            spawner: Spawner::new().action("start the thread that owns children")?,
            guest: OnceLock::new(),
            containers: Mutex::default(),
            state: Mutex::new(Some(state)),
            trace: Mutex::default(),
            booting: watch::Sender::new(false),
            durations: Mutex::default(),
            down: watch::Sender::new(None),
            ended: watch::Sender::new(false),
        }))
    }

    /// Resolves when the shim may end.
    pub fn ended(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.subscribe();
        async move {
            // An error means that the sandbox itself is gone: ended as well.
            ended.wait_for(|ended| *ended).await.map(drop).unwrap_or_default();
        }
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The process that stands for every task: QEMU, which lives in the pod's network namespace. 0 without a VM.
    pub fn pid(&self) -> u32 {
        self.guest.get().map_or(0, |guest| guest.vm.child().pid())
    }

    /// Notes how long a call took.
    pub fn took(&self, call: &'static str, duration: Duration) {
        lock(&self.durations).entry(call).or_default().observe(duration);
    }

    /// How long calls took, by their names.
    pub fn durations(&self) -> Durations {
        lock(&self.durations).clone()
    }

    /// Finds a container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// All containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// The guest, while it lives.
    pub fn guest(&self) -> Result<&Guest> {
        if let Some(reason) = self.down.borrow().as_ref() {
            return Err(Error::VmGone(reason.clone()));
        }
        self.guest
            .get()
            .ok_or_else(|| Error::Precondition(format!("sandbox {} is not created yet", self.id)))
    }

    /// Whether the host's kernel has killed the VM, or what serves it, for want of memory.
    pub fn out_of_memory(&self) -> bool {
        let kills = self.guest.get().and_then(|guest| guest.host_kills.as_ref());
        kills.is_some_and(|kills| kills.any())
    }

    /// Whether the caller is CRI-O, which has contracts of its own.
    pub fn under_crio(&self) -> bool {
        self.guest.get().is_some_and(|guest| guest.pod.is_crio())
    }

    /// Creates a task; returns its pid.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        if !crate::cli::is_name(&request.id) {
            return Err(Error::Invalid(format!("container id '{}' is not a name", request.id)));
        }
        let bundle = PathBuf::from(&request.bundle);
        let spec = read_spec(&bundle)?;
        let role = identify(spec.annotations().as_ref().unwrap_or(&HashMap::new()))?.role;
        let kind = match &role {
            Role::Sandbox => Kind::Sandbox,
            Role::Single => Kind::Single,
            Role::Container { sandbox_id } if *sandbox_id == self.id => Kind::Member,
            Role::Container { sandbox_id } => {
                return Err(Error::Invalid(format!(
                    "container {} is of sandbox {sandbox_id}, this is {}",
                    request.id, self.id
                )));
            }
        };
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let own_pids = PidNamespace::of(&spec) == PidNamespace::Own;
        let init = Process::new(stdio);
        let container = Arc::new(Container::new(&request.id, kind, bundle, own_pids, init));
        self.reserve(&container)?;
        if let Err(error) = self.fill(&container, &request, &spec, &role).await {
            lock(&self.containers).remove(&container.id);
            return Err(error);
        }
        self.announce_create(&container, request);
        Ok(self.pid())
    }

    fn reserve(&self, container: &Arc<Container>) -> Result<()> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(&container.id) {
            return Err(Error::AlreadyExists(format!("container {}", container.id)));
        }
        if container.kind != Kind::Member && !containers.is_empty() {
            return Err(Error::AlreadyExists(format!("sandbox {}", self.id)));
        }
        containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    async fn fill(
        self: &Arc<Self>,
        container: &Container,
        request: &CreateTaskRequest,
        spec: &Spec,
        role: &Role,
    ) -> Result<()> {
        if container.kind != Kind::Member {
            self.boot(spec, request.options.as_ref()).await?;
        }
        if container.kind == Kind::Sandbox {
            return Ok(());
        }
        let result = self.create_in_guest(container, request, spec, role).await;
        if result.is_err() && container.kind == Kind::Single {
            self.bring_down("is not needed: its only container could not be created", KILLED)
                .await;
            self.end_soon();
        }
        result
    }

    async fn boot(self: &Arc<Self>, spec: &Spec, options: Option<&Any>) -> Result<()> {
        let Some(mut state) = lock(&self.state).take() else {
            return Err(Error::Precondition(format!(
                "sandbox {} is being created or has ended",
                self.id
            )));
        };
        self.booting.send_replace(true);
        let mut trace = Trace::load(&self.id).unwrap_or_default();
        let mark = state.mark();
        let result = async {
            let pod = Pod::of(spec)?;
            state.pod = pod.identity.name();
            let config = Config::load(options::config_path(options)?.as_deref())?.with_annotations(&pod.annotations)?;
            if config.hypervisor.debug || config.agent.debug || config.runtime.debug {
                log::verbose();
            }
            for sentence in &config.report {
                tracing::info!("configuration: {sentence}");
            }
            let plan = Plan {
                sandbox: &self.id,
                config,
                pod,
                given_up: self.down.subscribe(),
            };
            boot::boot(plan, &self.spawner, &mut state, &mut trace).await
        }
        .await;
        let booted = self.booted(result, state, mark, trace);
        self.booting.send_replace(false);
        booted
    }

    /// Keeps the guest, or takes back what was made for it.
    fn booted(self: &Arc<Self>, result: Result<Guest>, mut state: State, mark: usize, trace: Trace) -> Result<()> {
        match result {
            Ok(guest) => {
                // Whoever gave up on the sandbox while it booted found no VM to end.
                if let Some(reason) = self.down.borrow().clone() {
                    drop(guest);
                    state.unwind_to(mark);
                    *lock(&self.state) = Some(state);
                    return Err(Error::VmGone(reason));
                }
                *lock(&self.state) = Some(state);
                *lock(&self.trace) = trace;
                self.guest
                    .set(guest)
                    .map_err(|_| Error::AlreadyExists(format!("sandbox {}", self.id)))?;
                follow::watch_guest(self.clone());
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the sandbox could not be started");
                state.unwind_to(mark);
                *lock(&self.state) = Some(state);
                self.end_soon();
                Err(error)
            }
        }
    }

    /// Ends the shim if its caller dies between `start` and the first Create, after which nobody knows of it.
    pub fn expect_create(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let mut booting = sandbox.booting.subscribe();
            let begun = tokio::time::timeout(FIRST_CREATE, booting.wait_for(|booting| *booting)).await;
            if begun.is_err() && lock(&sandbox.containers).is_empty() && sandbox.guest.get().is_none() {
                tracing::warn!("nothing was created within {FIRST_CREATE:?}: the shim ends");
                sandbox.end();
            }
        });
    }

    /// Ends the shim of a sandbox that could not be created, even when nobody calls Shutdown.
    fn end_soon(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FAILED_CREATE_GRACE).await;
            if lock(&sandbox.containers).is_empty() {
                sandbox.end();
            }
        });
    }

    async fn create_in_guest(
        &self,
        container: &Container,
        request: &CreateTaskRequest,
        spec: &Spec,
        role: &Role,
    ) -> Result<()> {
        let guest = self.guest()?;
        let pid_target = self.pid_target(spec)?;
        let context = spec::Context {
            container_id: &container.id,
            bundle: &container.bundle,
            role,
            disable_guest_seccomp: guest.config.runtime.disable_guest_seccomp,
            pod_sees_guest: guest.pod.sees_guest,
            pod_sysctls: &guest.pod.sysctls,
            pid_target: pid_target.as_deref(),
            id_maps: guest.pod.id_maps.as_ref(),
            vfio_groups: &guest.devices.groups,
        };
        let guest_spec = spec::translate(spec, &context)?;
        for warning in &guest_spec.warnings {
            tracing::warn!(container = container.id, "{warning}");
        }
        let mounted = spec::host_rootfs(spec, &container.bundle)?;
        let result = async {
            guest.oom.add(&container.id, spec, &guest.processes());
            let share = guest.share.clone();
            let (mirrored, shares): (Vec<_>, Vec<_>) = guest_spec.shares.into_iter().partition(|volume| volume.updates);
            let (id, mounts) = (container.id.clone(), request.rootfs.clone());
            let mount = tokio::task::spawn_blocking(move || {
                share.add_rootfs(&id, &mounts, &mounted)?;
                shares.iter().try_for_each(|volume| share.add_volume(volume))
            });
            // The memory is there before the container: it may use its limit from its first instruction on.
            let limits = Limits::of(spec);
            let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
            guest
                .bind(&container.id, resources.map_or(Ok(CpuList::default()), CpuList::of)?)
                .await?;
            let (mount, resize, network) = tokio::join!(
                mount,
                guest.sizer.set(&container.id, limits),
                guest.connect_late_network(),
            );
            mount
                .map_err(std::io::Error::other)
                .action("mount the container's files")??;
            resize?;
            network?;
            for volume in &mirrored {
                guest.mirrors.add(volume, &guest.share, &guest.agent).await?;
            }
            let mut create = wire::CreateContainerRequest::new();
            create.container_id = container.id.clone();
            create.exec_id = container.id.clone();
            create.sandbox_pidns = guest_spec.sandbox_pidns;
            create.devices = guest.disks.add(&container.id, &guest_spec.disks).await?;
            create.storages = guest_spec.memory.iter().map(MemoryVolume::storage).collect();
            create.OCI = Some(agent::oci::spec_to_wire(&guest_spec.spec)).into();
            guest
                .agent
                .with_deadline(guest.config.agent.create_container_timeout)
                .create_container(create)
                .await?;
            Ok(())
        }
        .await;
        if result.is_err() {
            self.let_go(&container.id);
        }
        result
    }

    /// The container whose processes another one is to see. In a pod that shares its PID namespace no container has one of its own; in any other pod, one that asks for
    /// another's is there to debug it.
    fn pid_target(&self, spec: &Spec) -> Result<Option<String>> {
        if PidNamespace::of(spec) != PidNamespace::Another {
            return Ok(None);
        }
        let others = self.all();
        let has_own = |other: &&Arc<Container>| {
            other.kind == Kind::Member && other.own_pids && other.init.status() == Status::Running
        };
        let with_own: Vec<_> = others.iter().filter(has_own).collect();
        match with_own.as_slice() {
            [] => Ok(None),
            [target] => Ok(Some(target.id.clone())),
            several => Err(Error::Invalid(format!(
                "it cannot be told which of the pod's {} containers is the target (`kubectl debug --target`): the CRI names it by its process, which in a VM is one for all",
                several.len()
            ))),
        }
    }

    /// Takes back what the host holds for a container.
    pub fn let_go(&self, container: &str) {
        let Some(guest) = self.guest.get() else { return };
        if let Err(error) = guest.share.remove(container) {
            tracing::warn!(%error, container, "the container's files stay mounted");
        }
        guest.disks.remove(container);
        guest.sizer.remove(container);
        guest.oom.remove(container, &guest.processes());
        guest.unbind(container);
    }

    fn announce_create(&self, container: &Container, request: CreateTaskRequest) {
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        };
        let event = TaskCreate {
            container_id: container.id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            pid: self.pid(),
            ..TaskCreate::default()
        };
        self.events.send(topics::TASK_CREATE_EVENT_TOPIC, &event);
    }

    /// Ends the VM and everything in it, once; returns when the host is free of it. `status` is the exit of the sandbox's
    /// own task.
    pub async fn bring_down(self: &Arc<Self>, reason: &str, status: u32) {
        let first = self.down.send_if_modified(|down| {
            let first = down.is_none();
            if first {
                *down = Some(reason.to_owned());
            }
            first
        });
        let Some(guest) = self.guest.get() else { return };
        if !first {
            guest.vm.child().exited().await;
            return;
        }
        tracing::info!(reason, "the virtual machine ends");
        guest.virtiofsd.child().kill();
        guest.vm.stop().await;
        guest.virtiofsd.child().exited().await;
        tracing::info!("the virtual machine has ended");
        if tracing::enabled!(tracing::Level::DEBUG) {
            tracing::debug!("{}", boot::last_words(&guest.vm, &guest.virtiofsd).await);
        }
        for container in self.all() {
            if let Err(error) = guest.share.remove(&container.id) {
                tracing::warn!(%error, container = container.id, "the container's files stay mounted");
            }
            // Whatever runs is followed by a task that has just lost its agent; what was only created has none.
            for process in container.processes() {
                let followed = !matches!(process.status(), Status::Created | Status::Starting);
                if container.kind != Kind::Sandbox && !followed {
                    process.stop(Exit::now(KILLED));
                }
            }
            if container.kind == Kind::Sandbox {
                let exit = Exit::now(status);
                if container.init.stop(exit) {
                    follow::announce(self, &container, "", exit);
                }
            }
        }
    }

    /// Ends the shim when no container is left, or at once when told so.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> Result<()> {
        if !now && !lock(&self.containers).is_empty() {
            return Ok(());
        }
        self.bring_down("is not needed any more", KILLED).await;
        // A boot that has just been given up takes back what it has made.
        let mut booting = self.booting.subscribe();
        drop(tokio::time::timeout(BOOT_ENDS, booting.wait_for(|booting| !booting)).await);
        self.end();
        Ok(())
    }

    fn end(&self) {
        if let Some(state) = lock(&self.state).take()
            && let Err(error) = state.remove()
        {
            tracing::error!(%error, "something is left of the sandbox");
        }
        self.ended.send_replace(true);
    }
}

/// A lock whose holder panicked is still good: every critical section is one map operation.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
