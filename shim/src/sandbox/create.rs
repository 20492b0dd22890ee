//! How a container comes to be: in the sandbox's books, on the host, in the guest.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use agent_protocol::protocol::agent as wire;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
    topics,
};
use oci_spec::runtime::Spec;
use tokio::time::timeout;

use super::{
    Sandbox,
    files::{self, Files},
    lock,
};
use crate::{
    annotations::{Role, identify},
    cgroup::CpuList,
    container::{Container, Kind},
    error::{Error, Result},
    follow,
    io::Stdio,
    process::{Process, Status},
    sizing::Limits,
    spec::{self, MemoryVolume, PidNamespace},
    start::read_spec,
};

impl Sandbox {
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
        let init = Process::of_new_container(stdio);
        let container = Arc::new(Container::new(&request.id, kind, bundle, own_pids, init));
        self.reserve(&container)?;
        let mut filled = self.fill(&container, &request, &spec, &role).await;
        if filled.is_ok() && !container.init.created() {
            // Who has deleted or killed it, or ended the VM, found nothing in the guest to end.
            if let Ok(guest) = self.guest()
                && container.kind == Kind::Member
            {
                follow::remove(self, guest, &container).await;
            }
            filled = Err(Error::Precondition(format!(
                "container {} was ended while it was being created",
                container.id
            )));
        }
        if let Err(error) = filled {
            // Its id may be another's by now.
            lock(&self.containers).retain(|_, other| !Arc::ptr_eq(other, &container));
            return Err(error);
        }
        self.keep_record();
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
            self.not_needed().await;
        }
        result
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
            open_files: self.spawner.open_files(),
        };
        let mut guest_spec = spec::translate(spec, &context)?;
        for warning in &guest_spec.warnings {
            tracing::warn!(container = container.id, "{warning}");
        }
        for note in &guest_spec.notes {
            if lock(&self.noted).insert(note) {
                tracing::info!("{note}");
            }
        }
        let mounted = spec::host_rootfs(spec, &container.bundle)?;
        let patience = guest.config.agent.create_container_timeout;
        let result = async {
            guest.oom.add(&container.id, spec, &guest.processes());
            let (mirrored, shares): (Vec<_>, Vec<_>) = std::mem::take(&mut guest_spec.shares)
                .into_iter()
                .partition(|volume| volume.updates);
            let files = Files {
                container: container.id.clone(),
                rootfs: request.rootfs.clone(),
                mounted,
                volumes: shares,
                in_parts: guest.about.own,
            };
            // The memory is there before the container: it may use its limit from its first instruction on.
            let limits = Limits::of(spec);
            let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
            guest
                .bind(&container.id, resources.map_or(Ok(CpuList::default()), CpuList::of)?)
                .await?;
            let (mount, resize, network) = tokio::join!(
                self.files.mount(files, &guest.share, patience),
                guest.sizer.set(&container.id, limits),
                guest.connect_late_network(),
            );
            for (volume, placed) in mount? {
                volume.is_at(&placed, &mut guest_spec.spec);
            }
            resize?;
            network?;
            for volume in &mirrored {
                let copied = timeout(patience, guest.mirrors.add(volume, &guest.share, &guest.agent));
                copied.await.map_err(|_| files::late(&volume.source, patience))??;
            }
            let mut create = wire::CreateContainerRequest::new();
            create.container_id = container.id.clone();
            create.exec_id = container.id.clone();
            create.sandbox_pidns = guest_spec.sandbox_pidns;
            create.devices = guest.disks.add(&container.id, &guest_spec.disks).await?;
            create.storages = guest_spec.memory.iter().map(MemoryVolume::storage).collect();
            let mut specification = agent_protocol::oci::spec_to_wire(&guest_spec.spec);
            specification.Process.mut_or_insert_default().NoInput = !container.init.stdio.has_input();
            create.OCI = Some(specification).into();
            guest.agent.with_deadline(patience).create_container(create).await?;
            Ok(())
        }
        .await;
        if result.is_err() {
            self.let_go(&container.id);
        }
        result
    }

    /// The container whose processes another one is to see. In a pod that shares its PID namespace no container has one
    /// of its own; in any other pod, one that asks for another's is there to debug it.
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
}
