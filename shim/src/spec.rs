//! From the host's OCI spec to the one the agent gets: what speaks of the host is shared, dropped with a reason, or
//! refused by name.
//!
//! Source of the edits: `virt_container/src/container_manager/container.rs` of kata-containers; of the fields, the OCI
//! runtime specification 1.3.

mod devices;
mod kubelet;
mod mounts;
mod resources;

pub use devices::{BlockDevice, Numbers};
pub use kubelet::MemoryVolume;
pub use mounts::{Propagation, ShareMount};
pub use resources::guest_resources;

use crate::annotations::Role;
use agent_protocol::{GUEST_SHARE, idmap::IdMaps};
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// The pod's `/dev/shm` in the guest.
pub const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";

/// What the annotations begin with by which the shim tells its own agent what the protocol has no field for.
const OUR_ANNOTATIONS: &str = "io.sandpod.";

/// The beginnings of the profiles that containerd and CRI-O give every container of a node that has AppArmor.
const DEFAULT_APPARMOR: &[&str] = &["cri-containerd.apparmor.d", "crio-default"];

/// The network namespace that a spec asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetNs {
    /// One that exists, by its path on the host.
    Path(PathBuf),
    /// A new one, which the shim has to make.
    New,
}

/// What a container becomes.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestContainer {
    /// The spec for the agent.
    pub spec: Spec,
    /// What has to be in the share before the agent is called.
    pub shares: Vec<ShareMount>,
    /// What the agent has to mount in the guest's memory.
    pub memory: Vec<MemoryVolume>,
    /// What has to be plugged into the VM.
    pub disks: Vec<BlockDevice>,
    /// The container is to run in the PID namespace of its pod.
    pub sandbox_pidns: bool,
    /// One sentence for each thing that was left out. For the log.
    pub warnings: Vec<String>,
    /// One sentence for each thing that such a node's CRI gives every container and the guest has no use for. For the
    /// log, once per pod.
    pub notes: Vec<&'static str>,
}

/// What the translation has to know besides the spec.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Id of the container.
    pub container_id: &'a str,
    /// Its bundle on the host.
    pub bundle: &'a Path,
    /// What it is to its pod.
    pub role: &'a Role,
    /// `disable_guest_seccomp`
    pub disable_guest_seccomp: bool,
    /// The pod has no PID namespace.
    pub pod_sees_guest: bool,
    /// The sysctls of the sandbox's spec: nothing runs in the guest for the sandbox itself, so its containers set them.
    pub pod_sysctls: &'a HashMap<String, String>,
    /// The container whose PID namespace it is to be in.
    pub pid_target: Option<&'a str>,
    /// What the IDs of the pod's containers are in the guest, if it has a user namespace.
    pub id_maps: Option<&'a IdMaps>,
    /// The VFIO groups that the VM has.
    pub vfio_groups: &'a BTreeSet<u32>,
    /// The soft and the hard limit of open files that the node's CRI has.
    pub open_files: (u64, u64),
}

/// Why a container cannot run in a guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// No network namespace, or the host's.
    #[error("a pod in a VM cannot use the host's network: remove `hostNetwork: true`")]
    HostNetwork,
    /// A part that every spec has.
    #[error("the OCI spec has no `{0}`")]
    Missing(&'static str),
    /// A volume cannot be looked at: its path, and what the kernel said.
    #[error("cannot use the volume {}: {_1}", _0.display())]
    Volume(PathBuf, String),
    /// ID mappings that contradict each other; one sentence.
    #[error("{0}")]
    IdMaps(String),
    /// A field that cannot be honoured.
    #[error("{what} cannot be had in a VM: {reason}")]
    Unsupported {
        /// The field and its value.
        what: String,
        /// Why, or what to do instead.
        reason: &'static str,
    },
}

pub(crate) fn unsupported(what: impl Into<String>, reason: &'static str) -> SpecError {
    SpecError::Unsupported {
        what: what.into(),
        reason,
    }
}

/// The network namespace that the spec of a pod (or of a single container) asks for.
///
/// # Errors
/// [`SpecError::HostNetwork`] when it asks for none of its own. A path may still lead to the host's namespace: the
/// network code checks that again by its inode.
pub fn pod_netns(spec: &Spec) -> Result<NetNs, SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces.and_then(|all| all.iter().find(|ns| ns.typ() == LinuxNamespaceType::Network));
    match network.ok_or(SpecError::HostNetwork)?.path() {
        None => Ok(NetNs::New),
        Some(path) if path.as_os_str().is_empty() => Ok(NetNs::New),
        Some(path) if path == Path::new("/proc/1/ns/net") || path == Path::new("/proc/self/ns/net") => {
            Err(SpecError::HostNetwork)
        }
        Some(path) => Ok(NetNs::Path(path.clone())),
    }
}

/// The ID mappings that a spec's user namespace has; `None` when it has no such namespace. A path, which leads to a
/// namespace of the host's, is not looked at.
///
/// # Errors
/// A namespace without mappings, or mappings that no kernel takes.
pub fn id_maps(spec: &Spec) -> Result<Option<IdMaps>, SpecError> {
    let Some(linux) = spec.linux().as_ref() else {
        return Ok(None);
    };
    let maps = IdMaps::of(linux)
        .map_err(|error| SpecError::IdMaps(format!("`linux.uidMappings` and `linux.gidMappings`: {error}")))?;
    let mut namespaces = linux.namespaces().iter().flatten();
    let has_namespace = namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    match (has_namespace, maps) {
        (true, None) => Err(SpecError::IdMaps(
            "the spec asks for a user namespace without `linux.uidMappings` and `linux.gidMappings`".into(),
        )),
        (false, Some(_)) => Err(SpecError::IdMaps(
            "the spec has `linux.uidMappings` without a user namespace".into(),
        )),
        (true, Some(maps)) if maps.user(0).zip(maps.group(0)).is_none() => Err(SpecError::IdMaps(format!(
            "the ID mappings {maps} have no root: a user namespace must map the IDs 0 of `linux.uidMappings` and `linux.gidMappings`"
        ))),
        (_, maps) => Ok(maps),
    }
}

/// The path of a container's rootfs on the host: absolute as CRI-O writes it, below the bundle as containerd does.
///
/// # Errors
/// A spec without root.
pub fn host_rootfs(spec: &Spec, bundle: &Path) -> Result<PathBuf, SpecError> {
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    Ok(bundle.join(root.path()))
}

/// Translates the spec of a container. Of the host it looks only at volumes of the kubelet, whose kind is not in the
/// spec.
///
/// # Errors
/// A field that would be silently lost in the guest, by name.
pub fn translate(spec: &Spec, context: &Context<'_>) -> Result<GuestContainer, SpecError> {
    let mut warnings = Vec::new();
    let mut guest = spec.clone();
    // containerd gives the containers of a pod with `hostPID` the path of the namespace that the pod's own task is in.
    let joins = PidNamespace::of(spec) == PidNamespace::Another;
    let guest_pids = sees_the_guest(spec) || (joins && context.pod_sees_guest);
    let root = guest.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    root.set_path(PathBuf::from(format!("{GUEST_SHARE}/{}/rootfs", context.container_id)));

    let process = guest.process_mut().take().ok_or(SpecError::Missing("process"))?;
    let mut notes = lost_labels(&process, &mut warnings);
    guest.set_process(Some(guest_process(process, context.open_files)?));

    let translated = mounts::translate(guest.mounts_mut().take().unwrap_or_default(), context, &mut warnings)?;
    guest.set_mounts(Some(translated.mounts));

    check_maps(spec, context)?;
    let mut linux = guest.linux_mut().take().ok_or(SpecError::Missing("linux"))?;
    if devices::leave_out_the_hosts(&mut linux) {
        notes.push("the host's devices are left out of privileged containers: they have those of their guest.");
    }
    devices::leave_to_the_guest(&mut linux, context.vfio_groups)?;
    let disks = devices::translate(&linux)?;
    if context.id_maps.is_some() && !disks.is_empty() {
        return Err(unsupported(
            "a block device in a pod with `hostUsers: false`",
            "its node belongs to the guest's root",
        ));
    }
    let (linux, sandbox_pidns) = guest_linux(linux, context, &mut warnings)?;
    guest.set_linux(Some(linux));

    if let Some(hooks) = guest.hooks().as_ref() {
        let kept = hooks.start_container().clone().filter(|kept| !kept.is_empty());
        let kept = kept.map(|kept| {
            let mut hooks = oci_spec::runtime::Hooks::default();
            hooks.set_start_container(Some(kept));
            hooks
        });
        if kept.as_ref() != Some(hooks) && *hooks != oci_spec::runtime::Hooks::default() {
            warnings
                .push("hooks that run on the host are left out: the container is not a process of the host.".into());
        }
        guest.set_hooks(kept);
    }
    if guest.domainname().as_ref().is_some_and(|name| !name.is_empty()) {
        return Err(unsupported("`domainname`", "the agent's protocol does not carry it"));
    }
    guest
        .set_domainname(None)
        .set_windows(None)
        .set_solaris(None)
        .set_vm(None)
        .set_zos(None);

    let annotations = guest.annotations_mut().get_or_insert_default();
    // These are ours to say.
    annotations.retain(|key, _| !key.starts_with(OUR_ANNOTATIONS));
    let kind = match context.role {
        Role::Sandbox => "pod_sandbox",
        Role::Container { .. } => "pod_container",
        Role::Single => "single_container",
    };
    annotations.insert("io.katacontainers.pkg.oci.container_type".into(), kind.into());
    if guest_pids {
        annotations.insert(agent_protocol::GUEST_PIDS.into(), "true".into());
    }
    if let Some(target) = context.pid_target {
        annotations.insert(agent_protocol::PID_TARGET.into(), target.into());
    }
    annotations.insert(
        "io.katacontainers.pkg.oci.bundle_path".into(),
        context.bundle.display().to_string(),
    );
    Ok(GuestContainer {
        spec: guest,
        shares: translated.shares,
        memory: translated.memory,
        disks,
        sandbox_pidns,
        warnings,
        notes,
    })
}

/// The process of a container, or of an exec, as the guest runs it.
///
/// # Errors
/// A scheduling attribute that the agent's protocol does not carry.
pub fn guest_process(mut process: Process, open_files: (u64, u64)) -> Result<Process, SpecError> {
    const LOST: &str = "the agent's protocol does not carry it";
    if process.io_priority().is_some() {
        return Err(unsupported("`process.ioPriority`", LOST));
    }
    if process.scheduler().is_some() {
        return Err(unsupported("`process.scheduler`", LOST));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(unsupported("`process.execCPUAffinity`", LOST));
    }
    process.set_selinux_label(None).set_apparmor_profile(None);
    limit_open_files(&mut process, open_files);
    Ok(process)
}

/// With runc a process that sets no limit of open files has those of the node's CRI, by inheritance.
fn limit_open_files(process: &mut Process, (soft, hard): (u64, u64)) {
    /// The most that Linux allows by default (`nr_open` of proc_sys_fs(5)); systemd raises it on nodes.
    const MOST: u64 = 1 << 20;
    let mut limits = process.rlimits().clone().unwrap_or_default();
    if limits.iter().all(|limit| limit.typ() != PosixRlimitType::RlimitNofile) {
        let limit = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(soft.min(MOST))
            .hard(hard.min(MOST));
        limits.extend(limit.build());
        process.set_rlimits(Some(limits));
    }
}

/// What is said of the labels that the node's security modules have for a process: notes of those that each container
/// has there, and a warning of a profile that somebody has chosen.
fn lost_labels(process: &Process, warnings: &mut Vec<String>) -> Vec<&'static str> {
    let mut notes = Vec::new();
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        notes.push("SELinux labels of containers are left out: the guest has no SELinux, the VM is the boundary.");
    }
    match process.apparmor_profile().as_deref() {
        None | Some("" | "unconfined") => {}
        Some(profile) if DEFAULT_APPARMOR.iter().any(|default| profile.starts_with(default)) => notes
            .push("the CRI's default AppArmor profile is left out: the guest has no AppArmor, the VM is the boundary."),
        Some(profile) => warnings.push(format!(
            "the AppArmor profile {profile:?} is left out: the guest has no AppArmor, the VM is the boundary."
        )),
    }
    notes
}

fn guest_linux(
    mut linux: Linux,
    context: &Context<'_>,
    warnings: &mut Vec<String>,
) -> Result<(Linux, bool), SpecError> {
    refuse_lost(&linux)?;
    let namespaces = linux.namespaces_mut().take().unwrap_or_default();
    let (namespaces, sandbox_pidns) = guest_namespaces(namespaces, context.role, warnings)?;
    linux.set_namespaces(Some(namespaces));

    let resources = linux.resources_mut().take();
    linux.set_resources(resources.map(|resources| guest_resources(resources, warnings)));
    linux.set_cgroups_path(Some(PathBuf::from(format!("/kata/{}", context.container_id))));

    if let Some(seccomp) = linux.seccomp() {
        if seccomp.listener_path().is_some() {
            return Err(unsupported("`linux.seccomp.listenerPath`", "its socket is the host's"));
        }
        if context.disable_guest_seccomp {
            warnings.push("the seccomp filter is left out: the configuration says `disable_guest_seccomp`.".into());
            linux.set_seccomp(None);
        }
    }
    // The label of the process has been spoken of already.
    linux.set_mount_label(None);

    if !context.pod_sysctls.is_empty() {
        let own = linux.sysctl_mut().take().unwrap_or_default();
        let mut all = context.pod_sysctls.clone();
        all.extend(own);
        linux.set_sysctl(Some(all));
    }
    Ok((linux, sandbox_pidns))
}

/// The containers of a pod have the user namespace that its VM was started with, or none.
fn check_maps(spec: &Spec, context: &Context<'_>) -> Result<(), SpecError> {
    match (id_maps(spec)?, context.id_maps) {
        (None, _) => Ok(()),
        (Some(wanted), Some(of_pod)) if wanted == *of_pod => Ok(()),
        (Some(wanted), of_pod) => Err(SpecError::IdMaps(format!(
            "the container's ID mappings, {wanted}, are not those of its pod, {}",
            of_pod.map_or("which has none".into(), ToString::to_string)
        ))),
    }
}

/// Fields of the host's kernel or hardware, and fields that the agent's protocol has no room for.
fn refuse_lost(linux: &Linux) -> Result<(), SpecError> {
    let resources = linux.resources().as_ref();
    let mut huge = resources
        .and_then(|all| all.hugepage_limits().as_ref())
        .into_iter()
        .flatten();
    if let Some(limit) = huge.find(|limit| limit.limit() != 0 && limit.page_size() != resources::HUGE_PAGE) {
        return Err(unsupported(
            format!("`hugepages` of {}", limit.page_size()),
            "the guest has pages of 2MB",
        ));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(unsupported(
            "`linux.netDevices`",
            "the host's devices are not passed to the guest",
        ));
    }
    if linux.intel_rdt().is_some() {
        return Err(unsupported(
            "`linux.intelRdt`",
            "the guest does not see the host's caches",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(unsupported("`linux.memoryPolicy`", "the guest has one NUMA node"));
    }
    if linux.personality().is_some() {
        return Err(unsupported(
            "`linux.personality`",
            "the agent's protocol does not carry it",
        ));
    }
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()) {
        return Err(unsupported(
            "`linux.timeOffsets`",
            "the agent's protocol does not carry it",
        ));
    }
    Ok(())
}

/// Whether a pod or a container has no PID namespace (`hostPID`), so that it sees all processes of the guest.
pub fn sees_the_guest(spec: &Spec) -> bool {
    PidNamespace::of(spec) == PidNamespace::Host
}

/// Whose PID namespace a container asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidNamespace {
    /// One of its own.
    Own,
    /// The pod's, or that of another container: the CRI names either by a process, and all of ours are one.
    Another,
    /// The host's, which is the guest's.
    Host,
}

impl PidNamespace {
    /// Of a spec.
    pub fn of(spec: &Spec) -> PidNamespace {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let mut namespaces = namespaces.into_iter().flatten();
        let pid = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
        match pid.map(LinuxNamespace::path) {
            None => PidNamespace::Host,
            Some(None) => PidNamespace::Own,
            Some(Some(_)) => PidNamespace::Another,
        }
    }
}

/// The agent makes the PID namespace and there is one network namespace, the guest's; the others lose the host's path.
fn guest_namespaces(
    namespaces: Vec<LinuxNamespace>,
    role: &Role,
    warnings: &mut Vec<String>,
) -> Result<(Vec<LinuxNamespace>, bool), SpecError> {
    let mut kept = Vec::new();
    let mut pid = None;
    let mut ipc = false;
    for mut namespace in namespaces {
        match namespace.typ() {
            LinuxNamespaceType::Pid => pid = Some(namespace.path().is_some()),
            LinuxNamespaceType::Network | LinuxNamespaceType::Time => {}
            other => {
                ipc |= other == LinuxNamespaceType::Ipc;
                namespace.set_path(None);
                kept.push(namespace);
            }
        }
    }
    // On a host with cgroup v1 the CRI asks for none, since there it would change nothing. The guest has v2, where a
    // program looks for its limits at the root of what it sees.
    if kept
        .iter()
        .all(|namespace| namespace.typ() != LinuxNamespaceType::Cgroup)
    {
        let mut cgroup = LinuxNamespace::default();
        cgroup.set_typ(LinuxNamespaceType::Cgroup);
        kept.push(cgroup);
    }
    if pid.is_none() {
        warnings.push("hostPID is the PID namespace of the guest: the host's processes are not in it.".into());
    }
    if !ipc {
        warnings.push("hostIPC is the IPC namespace of the guest: the host's segments are not in it.".into());
    }
    // A sandbox that is given a path would share with another pod; it is the one the others share with.
    let shared = pid.unwrap_or(true) && *role != Role::Sandbox;
    Ok((kept, shared))
}

#[cfg(test)]
mod tests;
