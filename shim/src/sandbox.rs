//! One sandbox: the verbs of its containers.
//!
//! ```text
//! Empty ──Create(sandbox or single)──▶ Up ──stop, or VM or virtiofsd died──▶ Down ──last Delete, Shutdown──▶ ended
//!   │ boot failed: everything is undone, and the shim ends when its caller lets go
//! ```
//!
//! In `Down` every verb still answers: what ran has exits, Kill and Delete succeed, and nothing waits for the guest.
//! Bookkeeping is behind short locks that are never held across an await; each container's exit has one task that
//! follows it.

use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use agent::{client::ClientError, protocol::agent as wire};
use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::well_known_types::any::Any,
    topics,
};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::watch;
use vmm::Spawner;

use crate::{
    annotations::{Role, identify},
    boot::{self, Guest, Plan},
    config::Config,
    container::{Container, Exec, Kind},
    error::{Context, Error, Result, decode},
    events::Events,
    follow::{self, KILLED},
    io::{ProcessName, Stdio},
    log, options,
    pod::Pod,
    process::{Exit, Process, Status},
    service::timestamp,
    sizing::Limits,
    spec,
    start::read_spec,
    stats,
    trace::{Mark, Trace},
    undo::State,
};

/// After a killing signal the guest has this long before the whole VM is killed.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// A shim whose sandbox could not be created stays this long for its caller's Delete and Shutdown.
const FAILED_CREATE_GRACE: Duration = Duration::from_secs(2);

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
        let container = Arc::new(Container::new(&request.id, kind, bundle, Process::new(stdio)));
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
        let mut trace = Trace::load(&self.id).unwrap_or_default();
        let mark = state.mark();
        let result = async {
            let pod = Pod::of(spec)?;
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
            };
            boot::boot(plan, &self.spawner, &mut state, &mut trace).await
        }
        .await;
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
        let context = spec::Context {
            container_id: &container.id,
            bundle: &container.bundle,
            role,
            disable_guest_seccomp: guest.config.runtime.disable_guest_seccomp,
            pod_sees_guest: guest.pod.sees_guest,
            pod_sysctls: &guest.pod.sysctls,
        };
        let guest_spec = spec::translate(spec, &context)?;
        for warning in &guest_spec.warnings {
            tracing::warn!(container = container.id, "{warning}");
        }
        let mounted = spec::host_rootfs(spec, &container.bundle)?;
        let result = async {
            let share = guest.share.clone();
            let (id, mounts, shares) = (container.id.clone(), request.rootfs.clone(), guest_spec.shares.clone());
            let mount = tokio::task::spawn_blocking(move || {
                share.add_rootfs(&id, &mounts, &mounted)?;
                shares.iter().try_for_each(|volume| share.add_volume(volume))
            });
            // The memory is there before the container: it may use its limit from its first instruction on.
            let limits = Limits::of(spec);
            let (mount, resize) = tokio::join!(mount, guest.sizer.set(&container.id, limits));
            mount
                .map_err(std::io::Error::other)
                .action("mount the container's files")??;
            resize?;
            let mut create = wire::CreateContainerRequest::new();
            create.container_id = container.id.clone();
            create.exec_id = container.id.clone();
            create.sandbox_pidns = guest_spec.sandbox_pidns;
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

    /// Takes back what the host holds for a container.
    pub fn let_go(&self, container: &str) {
        let Some(guest) = self.guest.get() else { return };
        if let Err(error) = guest.share.remove(container) {
            tracing::warn!(%error, container, "the container's files stay mounted");
        }
        guest.sizer.remove(container);
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

    /// Starts a container's init (empty exec id) or an exec; returns the pid.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.begin_start(if exec.is_empty() { id } else { exec })?;
        let result = if exec.is_empty() {
            self.start_init(&container).await
        } else {
            self.start_exec(&container, exec).await
        };
        if result.is_err() {
            process.end_start(false);
        }
        result.map(|()| self.pid())
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let guest = self.guest()?;
        if container.kind == Kind::Sandbox {
            container.init.end_start(true);
        } else {
            let streams = container.init.stdio.open()?;
            let mut request = wire::StartContainerRequest::new();
            request.container_id = container.id.clone();
            guest.agent.start_container(request).await?;
            self.mark_first_container();
            let name = container.init_name();
            self.apply_size(guest, &container.init, &name).await;
            follow::process(self.clone(), container.clone(), None, name, streams);
        }
        let event = TaskStart {
            container_id: container.id.clone(),
            pid: self.pid(),
            ..TaskStart::default()
        };
        self.events.send(topics::TASK_START_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, id: &str) -> Result<()> {
        let guest = self.guest()?;
        let exec = container.exec(id)?;
        let streams = exec.process.stdio.open()?;
        let name = container.exec_name(id);
        let mut request = wire::ExecProcessRequest::new();
        request.container_id = container.id.clone();
        request.exec_id = id.into();
        request.process = Some(agent::oci::process_to_wire(&exec.spec)).into();
        guest.agent.exec_process(request).await?;
        self.apply_size(guest, &exec.process, &name).await;
        follow::process(self.clone(), container.clone(), Some(id.into()), name, streams);
        let event = TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: id.into(),
            pid: self.pid(),
            ..TaskExecStarted::default()
        };
        self.events.send(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        Ok(())
    }

    fn mark_first_container(&self) {
        let mut trace = lock(&self.trace);
        if !trace.has(Mark::ContainerExec) {
            trace.set(Mark::ContainerExec, SystemTime::now());
            if let Err(error) = trace.save(&self.id) {
                tracing::warn!(%error, "the start-up waterfall is lost");
            }
        }
    }

    /// A terminal's size that was asked for before the terminal was there.
    async fn apply_size(&self, guest: &Guest, process: &Process, name: &ProcessName) {
        let size = *process.size.borrow();
        if let Some((rows, columns)) = size
            && let Err(error) = guest.agent.tty_win_resize(resize_request(name, rows, columns)).await
        {
            tracing::debug!(%error, ?name, "the terminal was not resized");
        }
    }

    /// Records an exec; it runs at its start.
    pub fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        if container.kind == Kind::Sandbox {
            return Err(Error::Invalid(
                "exec in the sandbox itself is refused: no process of the guest belongs to it; name a container".into(),
            ));
        }
        if request.exec_id.is_empty() || request.exec_id == request.id {
            return Err(Error::Invalid("exec_id is empty or the container's own".into()));
        }
        if container.init.status() != Status::Running {
            return Err(Error::Precondition(format!(
                "container {} is {}",
                container.id,
                container.init.status().word()
            )));
        }
        let spec: oci_spec::runtime::Process =
            serde_json::from_slice(&request.spec.value).map_err(decode("the exec's process"))?;
        let mut spec = spec::guest_process(spec, &mut Vec::new())?;
        // CRI-O sends the container's process with other args: only the request says whether this one has a terminal.
        spec.set_terminal(Some(request.terminal));
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.add_exec(
            &request.exec_id,
            Exec {
                process: Arc::new(Process::new(stdio)),
                spec,
            },
        )?;
        let event = TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        };
        self.events.send(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Signals a process. What has ended already is a success, except for the probe with signal 0.
    pub async fn kill(self: &Arc<Self>, id: &str, exec: &str, signal: u32) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let alive = process.exit().is_none();
        if signal == 0 {
            return if alive {
                Ok(())
            } else {
                Err(Error::NotFound(format!("a process of {id}")))
            };
        }
        if !alive {
            return Ok(());
        }
        if container.kind == Kind::Sandbox {
            if matches!(
                signal as i32,
                nix::libc::SIGTERM | nix::libc::SIGKILL | nix::libc::SIGINT | nix::libc::SIGQUIT | nix::libc::SIGHUP
            ) {
                self.bring_down("was stopped", 128 + signal).await;
            }
            return Ok(());
        }
        let Ok(guest) = self.guest() else { return Ok(()) };
        let killing = signal == nix::libc::SIGKILL as u32;
        let created = process.status() == Status::Created;
        let mut request = wire::SignalProcessRequest::new();
        request.container_id = id.into();
        request.signal = signal;
        request.exec_id = match exec {
            // With SIGKILL the empty exec id means every process of the container: they would not outlive the init anyway.
            "" if killing => String::new(),
            "" => id.into(),
            exec => exec.into(),
        };
        let sent = guest.agent.with_deadline(KILL_DEADLINE).signal_process(request).await;
        match (sent, created && killing) {
            (Ok(()) | Err(ClientError::NotFound(_)), true) => {
                follow::ended(self, &container, exec, &process, Exit::now(KILLED)).await;
                Ok(())
            }
            (Ok(()), false) => {
                if killing {
                    self.kill_for_sure(process, container.id.clone());
                }
                Ok(())
            }
            (Err(ClientError::NotFound(_) | ClientError::Gone), _) => Ok(()),
            (Err(error), _) if killing => {
                self.bring_down(&format!("did not obey SIGKILL for {id}: {error}"), KILLED)
                    .await;
                Ok(())
            }
            // It may still arrive. An error would end the CRI's attempt to stop the container before it comes to SIGKILL.
            (Err(error @ ClientError::Deadline(_)), _) => {
                tracing::warn!(%error, signal, container = id, "the guest is slow to take a signal");
                Ok(())
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    /// Every stop ends: a guest that does not end a killed process is ended itself.
    fn kill_for_sure(self: &Arc<Self>, process: Arc<Process>, id: String) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            if tokio::time::timeout(KILL_DEADLINE, process.wait()).await.is_err() {
                let reason = format!("was killed: {id} did not end within {KILL_DEADLINE:?} of SIGKILL");
                sandbox.bring_down(&reason, KILLED).await;
            }
        });
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
        // Killed, not asked: QEMU holds nothing that it would have to write out, and a guest that has broken into it has no say.
        guest.vm.child().kill();
        guest.virtiofsd.child().kill();
        guest.vm.child().exited().await;
        guest.virtiofsd.child().exited().await;
        tracing::info!("the virtual machine has ended");
        tracing::debug!("{}", boot::last_words(&guest.vm, &guest.virtiofsd));
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

    /// Freezes or thaws a container.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        if container.kind == Kind::Sandbox {
            return Err(Error::Invalid(
                "pausing the sandbox itself is refused; pause its containers".into(),
            ));
        }
        if paused {
            let mut request = wire::PauseContainerRequest::new();
            request.container_id = id.into();
            guest.agent.pause_container(request).await?;
            self.events.send(
                topics::TASK_PAUSED_EVENT_TOPIC,
                &TaskPaused {
                    container_id: id.into(),
                    ..TaskPaused::default()
                },
            );
        } else {
            let mut request = wire::ResumeContainerRequest::new();
            request.container_id = id.into();
            guest.agent.resume_container(request).await?;
            self.events.send(
                topics::TASK_RESUMED_EVENT_TOPIC,
                &TaskResumed {
                    container_id: id.into(),
                    ..TaskResumed::default()
                },
            );
        }
        container.init.set_paused(paused);
        Ok(())
    }

    /// Resizes a terminal, now or when it is there.
    pub async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.size.send_replace(Some((rows, columns)));
        if process.status() != Status::Running {
            return Ok(());
        }
        let name = if exec.is_empty() {
            container.init_name()
        } else {
            container.exec_name(exec)
        };
        self.guest()?
            .agent
            .tty_win_resize(resize_request(&name, rows, columns))
            .await?;
        Ok(())
    }

    /// Changes a container's resources. The VM grows before the limit does, and shrinks after it.
    pub async fn update(&self, id: &str, resources: Option<&Any>) -> Result<()> {
        let container = self.container(id)?;
        let value = resources.map(|any| any.value.as_slice()).unwrap_or_default();
        let resources: LinuxResources = serde_json::from_slice(value).map_err(decode("the resources to update"))?;
        if container.kind == Kind::Sandbox {
            return Ok(());
        }
        let guest = self.guest()?;
        let mut warnings = Vec::new();
        let mut request = wire::UpdateContainerRequest::new();
        request.container_id = id.into();
        request.resources = Some(agent::oci::resources_to_wire(&spec::guest_resources(
            resources.clone(),
            &mut warnings,
        )))
        .into();
        let before = guest.sizer.grow(id, Limits::of_resources(&resources)).await?;
        let updated = guest.agent.update_container(request).await;
        let limits = if updated.is_ok() {
            before.updated(&resources)
        } else {
            before
        };
        guest.sizer.set(id, limits).await?;
        Ok(updated?)
    }

    /// A container's statistics from its guest cgroup; the sandbox's from the host's. The two are never added.
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let container = self.container(id)?;
        if container.kind == Kind::Sandbox {
            return stats::of_host(self.guest.get().and_then(|guest| guest.cgroup.as_ref()));
        }
        // What has ended, or is about to because its VM has, is asked for once more by containerd.
        if let (None, Ok(guest)) = (container.init.exit(), self.guest()) {
            let mut request = wire::StatsContainerRequest::new();
            request.container_id = id.into();
            match guest.agent.stats_container(request).await {
                Ok(stats) => container.keep_stats(stats),
                Err(ClientError::Gone) => {}
                Err(error) => return Err(error.into()),
            }
        }
        stats::of_guest(&container.last_stats(), container.oom.load(Ordering::SeqCst))
    }

    /// Forgets a task that has ended, or never began; returns its pid and exit.
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = self.pid();
        let exit = match process.status() {
            Status::Stopped(exit) => exit,
            Status::Created => {
                let exit = Exit::now(KILLED);
                if exec.is_empty() {
                    self.delete_created(&container, exit).await;
                }
                exit
            }
            status => {
                let name = if exec.is_empty() { id } else { exec };
                return Err(Error::Precondition(format!(
                    "{name} cannot be deleted: it is {}",
                    status.word()
                )));
            }
        };
        if exec.is_empty() {
            lock(&self.containers).remove(id);
        } else {
            container.remove_exec(exec);
        }
        let event = TaskDelete {
            container_id: id.into(),
            id: exec.into(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskDelete::default()
        };
        self.events.send(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok((pid, exit))
    }

    async fn delete_created(self: &Arc<Self>, container: &Arc<Container>, exit: Exit) {
        match container.kind {
            Kind::Sandbox => {
                self.bring_down("was deleted before it was started", exit.status).await;
            }
            Kind::Member | Kind::Single => follow::ended(self, container, "", &container.init, exit).await,
        }
    }

    /// Ends the shim when no container is left, or at once when told so.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> Result<()> {
        if !now && !lock(&self.containers).is_empty() {
            return Ok(());
        }
        self.bring_down("is not needed any more", KILLED).await;
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

fn resize_request(name: &ProcessName, rows: u32, columns: u32) -> wire::TtyWinResizeRequest {
    let mut request = wire::TtyWinResizeRequest::new();
    request.container_id = name.container.clone();
    request.exec_id = name.exec.clone();
    request.row = rows;
    request.column = columns;
    request
}
