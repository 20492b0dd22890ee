//! From OCI's types to messages.

use std::path::{Path, PathBuf};

use oci_spec::runtime as oci;
use protobuf::MessageField;
use serde::Serialize;

use crate::protocol::oci as wire;

/// A whole specification.
pub fn spec_to_wire(spec: &oci::Spec) -> wire::Spec {
    wire::Spec {
        Version: spec.version().clone(),
        Process: message(spec.process(), process_to_wire),
        Root: message(spec.root(), |root| wire::Root {
            Path: path(root.path()),
            Readonly: root.readonly().unwrap_or_default(),
            ..Default::default()
        }),
        Hostname: text(spec.hostname()),
        Mounts: list(spec.mounts(), mount),
        Hooks: message(spec.hooks(), hooks),
        Annotations: spec.annotations().clone().unwrap_or_default(),
        Linux: message(spec.linux(), linux),
        ..Default::default()
    }
}

/// A process.
pub fn process_to_wire(process: &oci::Process) -> wire::Process {
    wire::Process {
        Terminal: process.terminal().unwrap_or_default(),
        ConsoleSize: message(&process.console_size(), |size| wire::Box {
            Height: size.height() as u32,
            Width: size.width() as u32,
            ..Default::default()
        }),
        User: MessageField::some(wire::User {
            UID: process.user().uid(),
            GID: process.user().gid(),
            AdditionalGids: process.user().additional_gids().clone().unwrap_or_default(),
            Username: text(process.user().username()),
            Umask: process.user().umask(),
            ..Default::default()
        }),
        Args: process.args().clone().unwrap_or_default(),
        Env: process.env().clone().unwrap_or_default(),
        Cwd: path(process.cwd()),
        Capabilities: message(process.capabilities(), |sets| wire::LinuxCapabilities {
            Bounding: capabilities(sets.bounding()),
            Effective: capabilities(sets.effective()),
            Inheritable: capabilities(sets.inheritable()),
            Permitted: capabilities(sets.permitted()),
            Ambient: capabilities(sets.ambient()),
            ..Default::default()
        }),
        Rlimits: list(process.rlimits(), |limit| wire::POSIXRlimit {
            Type: name(&limit.typ()),
            Hard: limit.hard(),
            Soft: limit.soft(),
            ..Default::default()
        }),
        NoNewPrivileges: process.no_new_privileges().unwrap_or_default(),
        ApparmorProfile: text(process.apparmor_profile()),
        OOMScoreAdj: process.oom_score_adj().unwrap_or_default().into(),
        SelinuxLabel: text(process.selinux_label()),
        ..Default::default()
    }
}

/// Limits.
pub fn resources_to_wire(resources: &oci::LinuxResources) -> wire::LinuxResources {
    wire::LinuxResources {
        Devices: list(resources.devices(), |rule| wire::LinuxDeviceCgroup {
            Allow: rule.allow(),
            Type: rule.typ().as_ref().map(name).unwrap_or_default(),
            // Zero is a device number, and "any" is below it.
            Major: rule.major().unwrap_or(-1),
            Minor: rule.minor().unwrap_or(-1),
            Access: text(rule.access()),
            ..Default::default()
        }),
        Memory: message(resources.memory(), memory),
        CPU: message(resources.cpu(), cpu),
        Pids: message(resources.pids(), |pids| wire::LinuxPids {
            Limit: pids.limit(),
            ..Default::default()
        }),
        BlockIO: message(resources.block_io(), block_io),
        HugepageLimits: list(resources.hugepage_limits(), |limit| wire::LinuxHugepageLimit {
            Pagesize: limit.page_size().clone(),
            // Negative is "no limit", which the kernel takes as its largest number.
            Limit: u64::try_from(limit.limit()).unwrap_or(i64::MAX as u64),
            ..Default::default()
        }),
        Network: message(resources.network(), |network| wire::LinuxNetwork {
            ClassID: network.class_id().unwrap_or_default(),
            Priorities: list(network.priorities(), |priority| wire::LinuxInterfacePriority {
                Name: priority.name().clone(),
                Priority: priority.priority(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        Unified: resources.unified().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn mount(mount: &oci::Mount) -> wire::Mount {
    wire::Mount {
        destination: path(mount.destination()),
        source: some_path(mount.source()),
        type_: text(mount.typ()),
        options: mount.options().clone().unwrap_or_default(),
        ..Default::default()
    }
}

#[allow(deprecated)] // prestart hooks: the protocol has them
fn hooks(hooks: &oci::Hooks) -> wire::Hooks {
    let hook = |hook: &oci::Hook| wire::Hook {
        Path: path(hook.path()),
        Args: hook.args().clone().unwrap_or_default(),
        Env: hook.env().clone().unwrap_or_default(),
        Timeout: hook.timeout().unwrap_or_default(),
        ..Default::default()
    };
    wire::Hooks {
        Prestart: list(hooks.prestart(), hook),
        Poststart: list(hooks.poststart(), hook),
        Poststop: list(hooks.poststop(), hook),
        CreateRuntime: list(hooks.create_runtime(), hook),
        CreateContainer: list(hooks.create_container(), hook),
        StartContainer: list(hooks.start_container(), hook),
        ..Default::default()
    }
}

fn linux(linux: &oci::Linux) -> wire::Linux {
    let mapping = |mapping: &oci::LinuxIdMapping| wire::LinuxIDMapping {
        HostID: mapping.host_id(),
        ContainerID: mapping.container_id(),
        Size: mapping.size(),
        ..Default::default()
    };
    wire::Linux {
        UIDMappings: list(linux.uid_mappings(), mapping),
        GIDMappings: list(linux.gid_mappings(), mapping),
        Sysctl: linux.sysctl().clone().unwrap_or_default(),
        Resources: message(linux.resources(), resources_to_wire),
        CgroupsPath: some_path(linux.cgroups_path()),
        Namespaces: list(linux.namespaces(), |namespace| wire::LinuxNamespace {
            Type: name(&namespace.typ()),
            Path: some_path(namespace.path()),
            ..Default::default()
        }),
        Devices: list(linux.devices(), |device| wire::LinuxDevice {
            Path: path(device.path()),
            Type: name(&device.typ()),
            Major: device.major(),
            Minor: device.minor(),
            FileMode: device.file_mode().unwrap_or_default(),
            UID: device.uid().unwrap_or_default(),
            GID: device.gid().unwrap_or_default(),
            ..Default::default()
        }),
        Seccomp: message(linux.seccomp(), seccomp),
        RootfsPropagation: text(linux.rootfs_propagation()),
        MaskedPaths: linux.masked_paths().clone().unwrap_or_default(),
        ReadonlyPaths: linux.readonly_paths().clone().unwrap_or_default(),
        MountLabel: text(linux.mount_label()),
        IntelRdt: message(linux.intel_rdt(), |rdt| wire::LinuxIntelRdt {
            L3CacheSchema: text(rdt.l3_cache_schema()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn seccomp(seccomp: &oci::LinuxSeccomp) -> wire::LinuxSeccomp {
    wire::LinuxSeccomp {
        DefaultAction: name(&seccomp.default_action()),
        Architectures: list(seccomp.architectures(), name),
        Flags: list(seccomp.flags(), name),
        Syscalls: list(seccomp.syscalls(), |syscall| wire::LinuxSyscall {
            Names: syscall.names().clone(),
            Action: name(&syscall.action()),
            ErrnoRet: syscall.errno_ret().map(wire::linux_syscall::ErrnoRet::Errnoret),
            Args: list(syscall.args(), |arg| wire::LinuxSeccompArg {
                Index: arg.index() as u64,
                Value: arg.value(),
                ValueTwo: arg.value_two().unwrap_or_default(),
                Op: name(&arg.op()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        DefaultErrnoRet: seccomp.default_errno_ret(),
        ..Default::default()
    }
}

#[allow(deprecated)] // kernel memory: the protocol has it
fn memory(memory: &oci::LinuxMemory) -> wire::LinuxMemory {
    wire::LinuxMemory {
        Limit: memory.limit().unwrap_or_default(),
        Reservation: memory.reservation().unwrap_or_default(),
        Swap: memory.swap().unwrap_or_default(),
        Kernel: memory.kernel().unwrap_or_default(),
        KernelTCP: memory.kernel_tcp().unwrap_or_default(),
        Swappiness: memory.swappiness().unwrap_or_default(),
        DisableOOMKiller: memory.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    }
}

fn cpu(cpu: &oci::LinuxCpu) -> wire::LinuxCPU {
    wire::LinuxCPU {
        Shares: cpu.shares().unwrap_or_default(),
        Quota: cpu.quota().unwrap_or_default(),
        Period: cpu.period().unwrap_or_default(),
        RealtimeRuntime: cpu.realtime_runtime().unwrap_or_default(),
        RealtimePeriod: cpu.realtime_period().unwrap_or_default(),
        Cpus: text(cpu.cpus()),
        Mems: text(cpu.mems()),
        Burst: cpu.burst().unwrap_or_default(),
        Idle: cpu.idle().unwrap_or_default(),
        ..Default::default()
    }
}

fn block_io(io: &oci::LinuxBlockIo) -> wire::LinuxBlockIO {
    let throttle = |device: &oci::LinuxThrottleDevice| wire::LinuxThrottleDevice {
        Major: device.major(),
        Minor: device.minor(),
        Rate: device.rate(),
        ..Default::default()
    };
    wire::LinuxBlockIO {
        Weight: io.weight().unwrap_or_default().into(),
        LeafWeight: io.leaf_weight().unwrap_or_default().into(),
        WeightDevice: list(io.weight_device(), |device| wire::LinuxWeightDevice {
            Major: device.major(),
            Minor: device.minor(),
            Weight: device.weight().unwrap_or_default().into(),
            LeafWeight: device.leaf_weight().unwrap_or_default().into(),
            ..Default::default()
        }),
        ThrottleReadBpsDevice: list(io.throttle_read_bps_device(), throttle),
        ThrottleWriteBpsDevice: list(io.throttle_write_bps_device(), throttle),
        ThrottleReadIOPSDevice: list(io.throttle_read_iops_device(), throttle),
        ThrottleWriteIOPSDevice: list(io.throttle_write_iops_device(), throttle),
        ..Default::default()
    }
}

fn message<T, W>(value: &Option<T>, convert: impl FnOnce(&T) -> W) -> MessageField<W> {
    MessageField::from_option(value.as_ref().map(convert))
}

fn list<T, W>(values: &Option<Vec<T>>, convert: impl Fn(&T) -> W) -> Vec<W> {
    values.iter().flatten().map(convert).collect()
}

fn text(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn some_path(value: &Option<PathBuf>) -> String {
    value.as_deref().map(path).unwrap_or_default()
}

fn capabilities(set: &Option<oci::Capabilities>) -> Vec<String> {
    let mut names: Vec<_> = set.iter().flatten().map(name).collect();
    names.sort();
    names
}

/// The name that an enumeration's value has in `config.json`.
pub fn name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        other => unreachable!("OCI's enumerations are strings, not {other:?}"),
    }
}
