//! From nothing to a guest that answers: every step first writes down how to undo it.
//!
//! ```text
//! cgroup ─▶ share ─▶ virtiofsd ─┐
//!                   network ────┴─▶ QEMU ─▶ agent ─▶ guest network ─▶ CreateSandbox
//! ```

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_protocol::{
    GUEST_SHARE,
    client::{Client, ClientError},
    idmap::IdMaps,
    protocol::agent::{CreateSandboxRequest, GuestDetailsRequest, KernelModule, Storage},
};
use config::{Accelerator, Config, NetworkModel};
use tokio::{sync::watch, time::timeout};
use vmm::{
    Child, ExitReason, Placement, Spawner, Virtiofsd, VirtiofsdSpec, Vm, VmError, VmFds,
    pcie::Passthrough,
    spec::{Channel, FsDevice, VmSpec},
};

use crate::{
    cgroup::{CpuList, OomKills, Processors, SandboxCgroup},
    clock,
    disks::Disks,
    error::{Context, Error, Result},
    forward,
    late::Late,
    manifest::Manifest,
    mirror::Mirrors,
    mountinfo,
    net::{self, Network},
    oom,
    pod::Pod,
    rootfs::Share,
    selinux,
    sizer::Sizer,
    sizing::Sizing,
    spec::{GUEST_SHM, NetNs},
    trace::{Mark, Trace},
    undo::{ProcessId, State, Undo, dir_of},
    user::User,
    vfio::{self, Devices},
    vm_end::{HANG_UP, VmEnd, vm_end},
};

/// KVM's device file.
const KVM: &str = "/dev/kvm";
/// Tag of the virtiofs device; a foreign agent expects this one.
const SHARE_TAG: &str = "kataShared";

/// How long an agent may take for all that comes before the first container, together.
const CONFIGURE: Duration = Duration::from_secs(60);

/// How long the processes of a failed start may take to end.
const END: Duration = Duration::from_secs(5);

/// Bytes that CRI-O and containerd give a pod's `/dev/shm` by default.
const DEFAULT_SHM: u64 = 64 << 20;

/// The most letters of the guest's console in an error.
const LONGEST_LINE: usize = 200;

/// A running guest.
pub struct Guest {
    /// The VM.
    pub vm: Arc<Vm>,
    /// The share's server.
    pub virtiofsd: Virtiofsd,
    /// The agent.
    pub agent: Client,
    /// What the agent said of itself.
    pub about: About,
    /// The share.
    pub share: Share,
    /// The volumes that the kubelet updates.
    pub mirrors: Mirrors,
    /// The pod's block volumes.
    pub disks: Disks,
    /// The host's devices that the VM has.
    pub devices: Devices,
    /// The owner of the VM's size.
    pub sizer: Sizer,
    /// How readily the OOM killer takes the VM.
    pub oom: oom::Scores,
    /// The pod's configuration.
    pub config: Config,
    /// What the pod's annotations say.
    pub pod: Pod,
    /// The sandbox's cgroup on the host.
    pub cgroup: Option<SandboxCgroup>,
    /// The owner of the processors that it is bound to.
    processors: Option<Processors>,
    /// What the host's kernel kills in it for want of memory.
    pub host_kills: Option<OomKills>,
    /// The network that comes later.
    late: Option<Late>,
    /// QEMU's user, as long as there is this guest.
    _user: User,
}

impl Guest {
    /// The processes that hold what the pod's containers use, as long as they run.
    pub fn processes(&self) -> Vec<u32> {
        let children = [self.vm.child(), self.virtiofsd.child()].into_iter();
        children.filter(|child| child.runs()).map(Child::pid).collect()
    }

    /// Connects the network that the pod got after its VM was started, once there is one.
    pub async fn connect_late_network(&self) -> Result<()> {
        match &self.late {
            Some(late) if self.config.runtime.network == NetworkModel::TcFilter => {
                late.connect(&self.vm, &self.agent, self.config.hypervisor.vhost_net)
                    .await
            }
            _ => Ok(()),
        }
    }
}

impl Guest {
    /// Gives a container its processors of the host, which the VM then runs on.
    pub async fn bind(&self, container: &str, cpus: CpuList) -> Result<()> {
        let Some(processors) = self.processors.clone() else {
            if cpus != CpuList::default() {
                tracing::warn!(%cpus, container, "the sandbox has no cgroup that could be bound to processors");
            }
            return Ok(());
        };
        let container = container.to_owned();
        in_thread("bind the pod to processors", move || processors.set(&container, cpus)).await
    }

    /// The container is gone, and the VM runs where the others may.
    pub fn unbind(&self, container: &str) {
        let Some(processors) = self.processors.clone() else {
            return;
        };
        let container = container.to_owned();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = processors.remove(&container) {
                tracing::warn!(%error, container, "the pod stays bound to its processors");
            }
        });
    }
}

/// What an agent says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    /// It is ours, not upstream's.
    pub own: bool,
    /// It keeps the guest's clock by the host's.
    pub keeps_clock: bool,
}

/// What a boot needs to know.
pub struct Plan<'a> {
    /// Sandbox id.
    pub sandbox: &'a str,
    /// Its configuration.
    pub config: Config,
    /// Its pod.
    pub pod: Pod,
    /// Why nobody waits for it any more.
    pub given_up: watch::Receiver<Option<String>>,
}

/// Boots the guest of a sandbox. When that fails, none of its processes is left.
pub async fn boot(plan: Plan<'_>, spawner: &Spawner, state: &mut State, trace: &mut Trace) -> Result<Guest> {
    let given_up = plan.given_up.clone();
    let booted = start(plan, spawner, state, trace)
        .await
        .and_then(|guest| match &*given_up.borrow() {
            Some(reason) => Err(Error::VmGone(reason.clone())),
            None => Ok(guest),
        });
    if booted.is_err() {
        // The caller undoes all steps without a pause, and only this runtime can reap the processes that it waits for.
        drop(timeout(END, spawner.end()).await);
    }
    booted
}

async fn start(mut plan: Plan<'_>, spawner: &Spawner, state: &mut State, trace: &mut Trace) -> Result<Guest> {
    let user = User::lease(plan.sandbox)?;
    let sizing = Sizing::new(&plan.config, plan.pod.resources)?;
    let labels = std::mem::take(&mut plan.pod.labels);
    plan.pod.labels = labels.in_force(plan.config.hypervisor.selinux, Path::new(selinux::SELINUXFS));
    let devices = find_devices(&plan)?;
    let cgroup = enter_cgroup(&plan, state).await?;
    let share = make_share(&plan, state)?;
    let network = match &plan.pod.netns {
        NetNs::Path(netns) if plan.config.runtime.network == NetworkModel::TcFilter => {
            // Recorded before it is touched. The snapshot refuses the host's network namespace.
            let netns = netns.clone();
            let snapshot = in_thread("look at the pod's network", move || net::snapshot(&netns)).await?;
            state.push(Undo::Network(snapshot.record()))?;
            Some(snapshot)
        }
        NetNs::Path(_) | NetNs::New => None,
    };
    let attach = async {
        match network {
            Some(snapshot) => in_thread("attach the pod's network", move || snapshot.attach())
                .await
                .map(Some),
            None => Ok(None),
        }
    };
    let serve = async { start_virtiofsd(&plan, spawner, &share) };
    let (mut network, (virtiofsd, fs)) = tokio::try_join!(attach, serve)?;
    share.served_by(virtiofsd.child().pid());
    state.virtiofsd = ProcessId::of(virtiofsd.child().pid());
    record(state, state.virtiofsd)?;

    let folder = lend_devices(&plan, &devices, &user, state)?;
    let netns = match &plan.pod.netns {
        NetNs::Path(path) => File::open(path).at("open the network namespace", path)?.into(),
        NetNs::New => net::empty_namespace()?,
    };
    let late = match &plan.pod.netns {
        NetNs::New => Some(Late::new(netns.try_clone().action("keep the network namespace")?)),
        NetNs::Path(_) => None,
    };
    let (mut spec, fds, placement) = describe(&plan, &sizing, network.as_ref(), fs, netns, &user)?;
    spec.passthrough = devices.functions.clone();
    let vm = Arc::new(start_vm(spawner, &spec, fds, &placement, &virtiofsd).await?);
    state.qemu = ProcessId::of(vm.child().pid());
    record(state, state.qemu)?;
    trace.set(Mark::QemuSpawned, vm.spawned_at());
    trace.set(Mark::QmpReady, vm.qmp_ready_at());
    trace.keep(plan.sandbox);

    let mut given_up = plan.given_up.clone();
    let ready = tokio::select! {
        ready = prepare(&vm, &plan, network.as_ref(), trace) => ready,
        end = vm_end(&vm, &virtiofsd) => Err(unready(&end)),
        // The sandbox, which tells, is there: it waits for this.
        Ok(reason) = given_up.wait_for(Option::is_some) => Err(Error::VmGone(reason.clone().unwrap_or_default())),
    };
    let (agent, about) = match ready {
        Ok(ready) => ready,
        Err(Error::Agent(ClientError::Gone)) => {
            let end = timeout(HANG_UP, vm_end(&vm, &virtiofsd)).await;
            let gone = end.map_or_else(|_| ClientError::Gone.into(), |end| unready(&end));
            return Err(explained(gone, &vm, &virtiofsd).await);
        }
        Err(error) => return Err(explained(error, &vm, &virtiofsd).await),
    };
    if let Some(loopback) = network.as_mut().and_then(Network::take_loopback) {
        forward::serve(loopback, agent.clone(), vm.clone());
    }
    let disks = Disks::new(vm.clone(), folder);
    let sizer = Sizer::new(vm.clone(), agent.clone(), sizing);
    clock::keep(&agent, &about, plan.config.hypervisor.accelerator == Accelerator::Tcg);
    Ok(Guest {
        vm,
        virtiofsd,
        agent,
        about,
        share,
        mirrors: Mirrors::default(),
        disks,
        devices,
        sizer,
        oom: oom::Scores::default(),
        config: plan.config,
        pod: plan.pod,
        processors: cgroup.clone().map(Processors::new),
        host_kills: cgroup.clone().map(OomKills::new),
        cgroup,
        late,
        _user: user,
    })
}

/// Starts QEMU. One that virtiofsd has left alone complains of its connection, so virtiofsd's words are told then.
async fn start_vm(
    spawner: &Spawner,
    spec: &VmSpec,
    fds: VmFds,
    placement: &Placement,
    virtiofsd: &Virtiofsd,
) -> Result<Vm> {
    let error = match Vm::start(spawner, spec, fds, placement).await {
        Ok(vm) => return Ok(vm),
        Err(error) => selinux::explained(error),
    };
    // virtiofsd ends well when QEMU does. It may also be on its way still.
    let ended = timeout(HANG_UP, virtiofsd.child().exited()).await;
    let error = match ended {
        Ok(reason) if reason != ExitReason::Code(0) => virtiofsd.died(reason).await.into(),
        _ => error,
    };
    let log = virtiofsd.log_tail();
    if !log.trim().is_empty() {
        tracing::error!("the last words of virtiofsd:\n{}", quoted(&log));
    }
    Err(error)
}

fn unready(end: &VmEnd) -> Error {
    Error::VmGone(format!("ended before its agent was ready: {end}"))
}

/// The devices that the VM is to have; none unless the node's administrator says so.
fn find_devices(plan: &Plan<'_>) -> Result<Devices> {
    let hypervisor = &plan.config.hypervisor;
    if !hypervisor.cold_plug_vfio {
        return Ok(Devices::default());
    }
    let devices = plan.pod.devices.find(Path::new("/"))?;
    devices.fit(&Manifest::beside(&hypervisor.kernel).kernel)?;
    vfio::are_free(&devices.groups)?;
    Ok(devices)
}

/// Gives QEMU's user the device files that QEMU opens by their names. Returns where further device files may be made.
fn lend_devices(plan: &Plan<'_>, devices: &Devices, user: &User, state: &mut State) -> Result<PathBuf> {
    let mut files = vfio::files(&devices.groups);
    if plan.config.hypervisor.accelerator == Accelerator::Kvm {
        // What is missing, if anything, is told better here.
        vmm_host::kvm_ready().map_err(VmError::from)?;
        files.push(KVM.into());
    }
    let folder = dir_of(plan.sandbox).join("devices");
    state.push(Undo::Dir(folder.clone()))?;
    state.push(Undo::Mount(folder.clone()))?;
    vfio::device_folder(&folder, plan.pod.labels.files.as_deref())?;
    vfio::lend(&files, &folder, user.id())?;
    Ok(folder)
}

/// The shim goes first: whatever it starts is then counted in the pod's cgroup from its first page on.
async fn enter_cgroup(plan: &Plan<'_>, state: &mut State) -> Result<Option<SandboxCgroup>> {
    let Some(path) = plan.pod.cgroups_path.as_deref().filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let cgroup = SandboxCgroup::plan(path)?;
    state.push(Undo::Cgroup(cgroup.record()))?;
    in_thread("enter the pod's cgroup", move || {
        cgroup.create(std::process::id()).map(|()| Some(cgroup))
    })
    .await
}

fn make_share(plan: &Plan<'_>, state: &mut State) -> Result<Share> {
    let sandbox = plan.sandbox;
    for path in [
        Share::path_of(sandbox),
        Share::export_of(sandbox),
        Share::staging_of(sandbox),
    ] {
        state.push(Undo::Dir(path.clone()))?;
        state.push(Undo::Mount(path))?;
    }
    Share::mount(sandbox, plan.pod.labels.files.as_deref())
}

fn start_virtiofsd(plan: &Plan<'_>, spawner: &Spawner, share: &Share) -> Result<(Virtiofsd, OwnedFd)> {
    let spec = VirtiofsdSpec {
        program: plan.config.hypervisor.virtio_fs_daemon.clone(),
        shared_dir: share.export().to_owned(),
        cache: plan.config.hypervisor.virtio_fs_cache.as_str().into(),
        extra_args: plan.config.hypervisor.virtio_fs_extra_args.clone(),
        label: plan.pod.labels.process.clone(),
        oom_score_adj: oom::of_class(plan.pod.cgroups_path.as_deref()),
    };
    Virtiofsd::start(spawner, &spec).map_err(selinux::explained)
}

fn describe(
    plan: &Plan<'_>,
    sizing: &Sizing,
    network: Option<&Network>,
    fs: OwnedFd,
    netns: OwnedFd,
    user: &User,
) -> Result<(VmSpec, VmFds, Placement)> {
    let config = &plan.config.hypervisor;
    let vsock = Path::new(vmm_host::VHOST_VSOCK);
    let vhost_vsock = vmm_host::open_device(vsock).at("open", vsock)?;
    let spec = VmSpec {
        name: format!("sandbox-{}", plan.sandbox),
        qemu: config.path.clone(),
        accelerator: match config.accelerator {
            Accelerator::Kvm => vmm::spec::Accelerator::Kvm,
            Accelerator::Tcg => vmm::spec::Accelerator::Tcg,
        },
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        kernel_params: kernel_params(plan),
        vcpus: sizing.vcpus(),
        memory: sizing.memory(),
        channel: match vhost_vsock {
            Some(_) => Channel::VhostVsock,
            None => Channel::VirtioSerial,
        },
        fs: Some(FsDevice {
            tag: SHARE_TAG.into(),
            queue_size: config.virtio_fs_queue_size,
        }),
        nics: network.map(Network::nics).unwrap_or_default(),
        passthrough: Passthrough::default(),
        nested: config.nested,
        seccomp: config.seccomp_sandbox,
    };
    let taps = match network {
        Some(network) => network.taps().action("pass the taps to QEMU")?,
        None => Vec::new(),
    };
    let vhost_net = if config.vhost_net {
        open_vhost_net(taps.len())?
    } else {
        Vec::new()
    };
    let fds = VmFds {
        fs: Some(fs),
        vhost_vsock,
        taps,
        vhost_net,
    };
    Ok((
        spec,
        fds,
        Placement {
            netns: Some(netns),
            uid: user.id(),
            gid: user.id(),
            label: plan.pod.labels.process.clone(),
            oom_score_adj: oom::of_class(plan.pod.cgroups_path.as_deref()),
        },
    ))
}

/// The configuration's, and what only a pod with a user namespace has.
fn kernel_params(plan: &Plan<'_>) -> Vec<String> {
    let mut params = plan.config.hypervisor.kernel_params.clone();
    params.extend(plan.pod.id_maps.iter().flat_map(IdMaps::kernel_parameters));
    params
}

/// One vhost-net device per card, where the host has vhost-net.
pub(crate) fn open_vhost_net(cards: usize) -> Result<Vec<OwnedFd>> {
    let device = Path::new(vmm_host::VHOST_NET);
    let opened = (0..cards).map(|_| vmm_host::open_device(device).at("open", device));
    let opened: Option<Vec<OwnedFd>> = opened.collect::<Result<_>>()?;
    Ok(opened.unwrap_or_default())
}

/// Waits for the agent and tells it what a sandbox begins with.
async fn prepare(vm: &Vm, plan: &Plan<'_>, network: Option<&Network>, trace: &mut Trace) -> Result<(Client, About)> {
    let deadline = plan.config.agent.connect_timeout;
    let agent = Client::new(vm.agent_stream(deadline).await?);
    agent.check(deadline).await?;
    trace.set(Mark::AgentConnected, SystemTime::now());
    trace.keep(plan.sandbox);
    let about = timeout(CONFIGURE, configure(&agent, plan, network, trace))
        .await
        .map_err(|_| ClientError::Deadline("what a sandbox begins with"))??;
    Ok((agent, about))
}

/// Ends the VM of a failed start, logs what everybody in it said last, and adds to the error what the guest said of it.
async fn explained(error: Error, vm: &Vm, virtiofsd: &Virtiofsd) -> Error {
    virtiofsd.child().kill();
    vm.stop().await;
    let words = last_words(vm, virtiofsd).await;
    if !words.is_empty() {
        tracing::error!("{words}");
    }
    match telling(&vm.console_tail()) {
        Some(line) => Error::Boot {
            error: Box::new(error),
            line,
        },
        None => error,
    }
}

/// What those who may know why a VM ended said last, 64 KiB of each at most: the guest's console, which has the agent's
/// log, QEMU, virtiofsd. Each line is marked as theirs: a guest could write what looks like a line of ours.
pub async fn last_words(vm: &Vm, virtiofsd: &Virtiofsd) -> String {
    let tails = [
        ("the guest's console", vm.console_last_words().await),
        ("QEMU", vm.log_tail()),
        ("virtiofsd", virtiofsd.log_tail()),
    ];
    let said = tails.iter().filter(|(_, tail)| !tail.trim().is_empty());
    said.map(|(who, tail)| format!("the last words of {who}:\n{}", quoted(tail)))
        .collect()
}

fn quoted(words: &str) -> String {
    let lines = words.trim_end().split(['\n', '\r']);
    lines
        .map(|line| format!("| {}\n", line.replace(char::is_control, " ")))
        .collect()
}

/// The line of a console that tells most: that of a panic, else the last. Made fit for a sentence that people read: the
/// guest is not to be trusted with control characters, nor with its length.
fn telling(console: &str) -> Option<String> {
    let lines = || console.lines().map(str::trim).filter(|line| !line.is_empty());
    let panic = lines().find(|line| line.contains("Kernel panic - not syncing"));
    let line = panic.or_else(|| lines().next_back())?;
    let plain = line.chars().filter(|letter| !letter.is_control());
    Some(plain.take(LONGEST_LINE).collect())
}

async fn configure(agent: &Client, plan: &Plan<'_>, network: Option<&Network>, trace: &mut Trace) -> Result<About> {
    if let Some(network) = network {
        network.set_up(agent).await?;
    }
    let mut request = CreateSandboxRequest::new();
    request.sandbox_id = plan.sandbox.into();
    request.hostname = plan.pod.host_name(plan.sandbox);
    request.dns = dns_lines(&plan.pod)?;
    request.sandbox_pidns = plan.pod.shared_pidns;
    request.storages = vec![share_storage(), shm_storage(&plan.pod)?];
    request.guest_hook_path = plan.config.hypervisor.guest_hook_path.clone();
    request.kernel_modules = plan.config.agent.kernel_modules.iter().map(kernel_module).collect();
    agent.create_sandbox(request).await?;

    let mut request = GuestDetailsRequest::new();
    request.mem_block_size = true;
    let details = agent.get_guest_details(request).await?;
    let answered = SystemTime::now();
    let features = &details.agent_details.extra_features;
    let clock = |key: &str| -> Option<u64> {
        features
            .iter()
            .find_map(|feature| feature.strip_prefix(key)?.parse().ok())
    };
    // Only our own agent tells its clock; a foreign one leaves two marks out of the waterfall.
    if let (Some(pid1), Some(now)) = (clock("sandpod.pid1_us="), clock("sandpod.now_us=")) {
        trace.set_guest(pid1, now, answered);
        trace.keep(plan.sandbox);
    }
    Ok(About::of(features))
}

impl About {
    /// By the features that the agent names: only ours has any of `sandpod.`.
    fn of(features: &[String]) -> About {
        About {
            own: features.iter().any(|feature| feature.starts_with("sandpod.")),
            keeps_clock: features.iter().any(|feature| feature == "sandpod.clock=host"),
        }
    }
}

fn kernel_module(module: &config::KernelModule) -> KernelModule {
    let mut request = KernelModule::new();
    request.name = module.name.clone();
    request.parameters = module.parameters.clone();
    request
}

fn share_storage() -> Storage {
    let mut storage = Storage::new();
    storage.driver = "virtio-fs".into();
    storage.source = SHARE_TAG.into();
    storage.fstype = "virtiofs".into();
    storage.mount_point = format!("{GUEST_SHARE}/");
    storage
}

/// The pod's `/dev/shm`, as large as the one that the CRI has made for it.
fn shm_storage(pod: &Pod) -> Result<Storage> {
    let size = match &pod.shm {
        // With hostIPC it is the host's own, of half the host's memory.
        Some(shm) if shm != Path::new("/dev/shm") => mountinfo::size(shm).at("look at", shm)?,
        Some(_) | None => DEFAULT_SHM,
    };

    let mut storage = Storage::new();
    storage.driver = "ephemeral".into();
    storage.source = "shm".into();
    storage.fstype = "tmpfs".into();
    storage.options = ["noexec", "nosuid", "nodev", "mode=1777"].map(str::to_owned).to_vec();
    storage.options.push(format!("size={size}"));
    if let Some((user, group)) = pod.id_maps.as_ref().and_then(|maps| maps.user(0).zip(maps.group(0))) {
        storage.options.extend([format!("uid={user}"), format!("gid={group}")]);
    }
    storage.mount_point = GUEST_SHM.into();
    Ok(storage)
}

fn record(state: &mut State, child: Option<ProcessId>) -> Result<()> {
    // A child that is dead already needs no undoing.
    child.map_or(Ok(()), |process| state.push(Undo::Process(process)))
}

/// Runs blocking set-up work beside the rest.
pub(crate) async fn in_thread<T: Send + 'static, E: Into<Error> + Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(std::io::Error::other(error)).action(action),
    }
}

/// The lines of the pod's resolv.conf, for the guest itself.
fn dns_lines(pod: &Pod) -> Result<Vec<String>> {
    let Some(path) = &pod.resolv_conf else {
        return Ok(Vec::new());
    };
    Ok(std::fs::read_to_string(path)
        .at("read", path)?
        .lines()
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_writes_does_not_pass_for_our_own_lines() {
        let words = "booting\r\n2026-01-01T00:00:00Z  INFO shim: all is well\n\x1b[2Jgone\n";
        for line in quoted(words).lines() {
            assert!(line.starts_with("| ") && !line.contains(char::is_control), "{line:?}");
        }
        assert_eq!(quoted("one"), "| one\n");
    }

    #[test]
    fn a_console_is_told_by_its_panic_or_its_last_line() {
        let panic = "[    0.9] VFS: Cannot open root device\r\n[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n\
                     [    1.1] Rebooting in 1 seconds..\r\n";
        assert_eq!(
            telling(panic).as_deref(),
            Some("[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs")
        );
        assert_eq!(telling("one\ntwo \u{1b}[31mred\n\n").as_deref(), Some("two [31mred"));
        assert_eq!(telling(&"x".repeat(70_000)).map(|line| line.len()), Some(LONGEST_LINE));
        assert_eq!(telling(" \n"), None);
    }
}
