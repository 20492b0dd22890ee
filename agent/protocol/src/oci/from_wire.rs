//! From messages to OCI's types.

use std::path::PathBuf;

use oci_spec::runtime as oci;
use serde::de::{
    DeserializeOwned,
    value::{Error as NameError, StrDeserializer},
};

use super::OciError;
use crate::protocol::oci as wire;

type Result<T> = std::result::Result<T, OciError>;

/// A whole specification.
pub fn spec_from_wire(spec: &wire::Spec) -> Result<oci::Spec> {
    let mut result = oci::Spec::default();
    result
        .set_version(spec.Version.clone())
        .set_process(spec.Process.as_ref().map(process_from_wire).transpose()?)
        .set_root(spec.Root.as_ref().map(|root| {
            let mut result = oci::Root::default();
            result
                .set_path(PathBuf::from(&root.Path))
                .set_readonly(flag(root.Readonly));
            result
        }))
        .set_hostname(text(&spec.Hostname))
        .set_mounts(list(&spec.Mounts, mount))
        .set_hooks(spec.Hooks.as_ref().map(hooks))
        .set_annotations(map(&spec.Annotations))
        .set_linux(spec.Linux.as_ref().map(linux).transpose()?);
    Ok(result)
}

/// A process.
pub fn process_from_wire(process: &wire::Process) -> Result<oci::Process> {
    let mut user = oci::User::default();
    let sent = process.User.clone().unwrap_or_default();
    user.set_uid(sent.UID)
        .set_gid(sent.GID)
        .set_additional_gids(some(&sent.AdditionalGids))
        .set_username(text(&sent.Username))
        .set_umask(sent.Umask);
    let mut result = oci::Process::default();
    result
        .set_terminal(flag(process.Terminal))
        .set_console_size(process.ConsoleSize.as_ref().map(console_size).transpose()?)
        .set_user(user)
        .set_args(some(&process.Args))
        .set_env(some(&process.Env))
        .set_cwd(PathBuf::from(&process.Cwd))
        .set_capabilities(process.Capabilities.as_ref().map(capabilities).transpose()?)
        .set_rlimits(try_list(&process.Rlimits, |limit| {
            let kind: oci::PosixRlimitType = named("process.rlimits[].type", &limit.Type)?;
            built(
                oci::PosixRlimitBuilder::default()
                    .typ(kind)
                    .hard(limit.Hard)
                    .soft(limit.Soft)
                    .build(),
            )
        })?)
        .set_no_new_privileges(flag(process.NoNewPrivileges))
        .set_apparmor_profile(text(&process.ApparmorProfile))
        .set_oom_score_adj(number(process.OOMScoreAdj).map(|score| score as i32))
        .set_selinux_label(text(&process.SelinuxLabel));
    Ok(result)
}

/// Limits.
pub fn resources_from_wire(resources: &wire::LinuxResources) -> Result<oci::LinuxResources> {
    let mut result = oci::LinuxResources::default();
    result
        .set_devices(try_list(&resources.Devices, device_rule)?)
        .set_memory(resources.Memory.as_ref().map(memory))
        .set_cpu(resources.CPU.as_ref().map(cpu))
        .set_pids(resources.Pids.as_ref().map(|pids| {
            let mut result = oci::LinuxPids::default();
            result.set_limit(pids.Limit);
            result
        }))
        .set_block_io(resources.BlockIO.as_ref().map(block_io).transpose()?)
        .set_hugepage_limits(list(&resources.HugepageLimits, |limit| {
            let mut result = oci::LinuxHugepageLimit::default();
            result
                .set_page_size(limit.Pagesize.clone())
                .set_limit(i64::try_from(limit.Limit).unwrap_or(i64::MAX));
            result
        }))
        .set_network(resources.Network.as_ref().map(|network| {
            let mut result = oci::LinuxNetwork::default();
            result
                .set_class_id(number(network.ClassID))
                .set_priorities(list(&network.Priorities, |priority| {
                    let mut result = oci::LinuxInterfacePriority::default();
                    result.set_name(priority.Name.clone()).set_priority(priority.Priority);
                    result
                }));
            result
        }))
        .set_unified(map(&resources.Unified));
    Ok(result)
}

fn console_size(size: &wire::Box) -> Result<oci::Box> {
    let size = oci::BoxBuilder::default().height(size.Height).width(size.Width).build();
    built(size)
}

fn capabilities(sets: &wire::LinuxCapabilities) -> Result<oci::LinuxCapabilities> {
    let set = |names: &Vec<String>| {
        let set: Result<oci::Capabilities> = names.iter().map(|name| named("process.capabilities", name)).collect();
        set.map(Some)
    };
    let mut result = oci::LinuxCapabilities::default();
    result
        .set_bounding(set(&sets.Bounding)?)
        .set_effective(set(&sets.Effective)?)
        .set_inheritable(set(&sets.Inheritable)?)
        .set_permitted(set(&sets.Permitted)?)
        .set_ambient(set(&sets.Ambient)?);
    Ok(result)
}

fn mount(mount: &wire::Mount) -> oci::Mount {
    let mut result = oci::Mount::default();
    result
        .set_destination(PathBuf::from(&mount.destination))
        .set_source(text(&mount.source).map(PathBuf::from))
        .set_typ(text(&mount.type_))
        .set_options(some(&mount.options));
    result
}

#[allow(deprecated)] // prestart hooks: the protocol has them
fn hooks(hooks: &wire::Hooks) -> oci::Hooks {
    let hook = |hook: &wire::Hook| {
        let mut result = oci::Hook::default();
        result
            .set_path(PathBuf::from(&hook.Path))
            .set_args(some(&hook.Args))
            .set_env(some(&hook.Env))
            .set_timeout(number(hook.Timeout));
        result
    };
    let mut result = oci::Hooks::default();
    result
        .set_prestart(list(&hooks.Prestart, hook))
        .set_poststart(list(&hooks.Poststart, hook))
        .set_poststop(list(&hooks.Poststop, hook))
        .set_create_runtime(list(&hooks.CreateRuntime, hook))
        .set_create_container(list(&hooks.CreateContainer, hook))
        .set_start_container(list(&hooks.StartContainer, hook));
    result
}

fn linux(linux: &wire::Linux) -> Result<oci::Linux> {
    let mapping = |mapping: &wire::LinuxIDMapping| {
        let result = oci::LinuxIdMappingBuilder::default()
            .host_id(mapping.HostID)
            .container_id(mapping.ContainerID);
        built(result.size(mapping.Size).build())
    };
    let mut result = oci::Linux::default();
    result
        .set_uid_mappings(try_list(&linux.UIDMappings, mapping)?)
        .set_gid_mappings(try_list(&linux.GIDMappings, mapping)?)
        .set_sysctl(map(&linux.Sysctl))
        .set_resources(linux.Resources.as_ref().map(resources_from_wire).transpose()?)
        .set_cgroups_path(text(&linux.CgroupsPath).map(PathBuf::from))
        .set_namespaces(try_list(&linux.Namespaces, |namespace| {
            let mut result = oci::LinuxNamespace::default();
            result
                .set_typ(namespace_kind(&namespace.Type)?)
                .set_path(text(&namespace.Path).map(PathBuf::from));
            Ok(result)
        })?)
        .set_devices(try_list(&linux.Devices, device)?)
        .set_seccomp(linux.Seccomp.as_ref().map(seccomp).transpose()?)
        .set_rootfs_propagation(text(&linux.RootfsPropagation))
        .set_masked_paths(some(&linux.MaskedPaths))
        .set_readonly_paths(some(&linux.ReadonlyPaths))
        .set_mount_label(text(&linux.MountLabel))
        .set_intel_rdt(linux.IntelRdt.as_ref().map(|rdt| {
            let mut result = oci::LinuxIntelRdt::default();
            result.set_l3_cache_schema(text(&rdt.L3CacheSchema));
            result
        }));
    Ok(result)
}

fn device(device: &wire::LinuxDevice) -> Result<oci::LinuxDevice> {
    let mut result = oci::LinuxDevice::default();
    result
        .set_path(PathBuf::from(&device.Path))
        .set_typ(named("linux.devices[].type", &device.Type)?)
        .set_major(device.Major)
        .set_minor(device.Minor)
        .set_file_mode(number(device.FileMode))
        .set_uid(number(device.UID))
        .set_gid(number(device.GID));
    Ok(result)
}

fn device_rule(rule: &wire::LinuxDeviceCgroup) -> Result<oci::LinuxDeviceCgroup> {
    let kind = text(&rule.Type)
        .map(|kind| named("linux.resources.devices[].type", &kind))
        .transpose()?;
    let mut result = oci::LinuxDeviceCgroup::default();
    result
        .set_allow(rule.Allow)
        .set_typ(kind)
        .set_major((rule.Major >= 0).then_some(rule.Major))
        .set_minor((rule.Minor >= 0).then_some(rule.Minor))
        .set_access(text(&rule.Access));
    Ok(result)
}

fn seccomp(seccomp: &wire::LinuxSeccomp) -> Result<oci::LinuxSeccomp> {
    let mut result = oci::LinuxSeccomp::default();
    result
        .set_default_action(named("linux.seccomp.defaultAction", &seccomp.DefaultAction)?)
        .set_default_errno_ret(seccomp.DefaultErrnoRet)
        .set_architectures(try_list(&seccomp.Architectures, |a| {
            named("linux.seccomp.architectures", a)
        })?)
        .set_flags(try_list(&seccomp.Flags, |f| named("linux.seccomp.flags", f))?)
        .set_syscalls(try_list(&seccomp.Syscalls, syscall)?);
    Ok(result)
}

fn syscall(syscall: &wire::LinuxSyscall) -> Result<oci::LinuxSyscall> {
    let errno = syscall
        .ErrnoRet
        .as_ref()
        .map(|wire::linux_syscall::ErrnoRet::Errnoret(errno)| *errno);
    let mut result = oci::LinuxSyscall::default();
    result
        .set_names(syscall.Names.clone())
        .set_action(named("linux.seccomp.syscalls[].action", &syscall.Action)?)
        .set_errno_ret(errno)
        .set_args(try_list(&syscall.Args, |arg| {
            let op: oci::LinuxSeccompOperator = named("linux.seccomp.syscalls[].args[].op", &arg.Op)?;
            let mut result = oci::LinuxSeccompArgBuilder::default()
                .index(arg.Index as usize)
                .value(arg.Value)
                .op(op);
            if let Some(value) = number(arg.ValueTwo) {
                result = result.value_two(value);
            }
            built(result.build())
        })?);
    Ok(result)
}

#[allow(deprecated)] // kernel memory: the protocol has it
fn memory(memory: &wire::LinuxMemory) -> oci::LinuxMemory {
    let mut result = oci::LinuxMemory::default();
    result
        .set_limit(number(memory.Limit))
        .set_reservation(number(memory.Reservation))
        .set_swap(number(memory.Swap))
        .set_kernel(number(memory.Kernel))
        .set_kernel_tcp(number(memory.KernelTCP))
        .set_swappiness(number(memory.Swappiness))
        .set_disable_oom_killer(flag(memory.DisableOOMKiller));
    result
}

fn cpu(cpu: &wire::LinuxCPU) -> oci::LinuxCpu {
    let mut result = oci::LinuxCpu::default();
    result
        .set_shares(number(cpu.Shares))
        .set_quota(number(cpu.Quota))
        .set_period(number(cpu.Period))
        .set_realtime_runtime(number(cpu.RealtimeRuntime))
        .set_realtime_period(number(cpu.RealtimePeriod))
        .set_cpus(text(&cpu.Cpus))
        .set_mems(text(&cpu.Mems))
        .set_burst(number(cpu.Burst))
        .set_idle(number(cpu.Idle));
    result
}

fn block_io(io: &wire::LinuxBlockIO) -> Result<oci::LinuxBlockIo> {
    let throttle = |device: &wire::LinuxThrottleDevice| {
        let result = oci::LinuxThrottleDeviceBuilder::default()
            .major(device.Major)
            .minor(device.Minor);
        built(result.rate(device.Rate).build())
    };
    let weight = |weight: u32| number(weight).map(|weight| weight as u16);
    let mut result = oci::LinuxBlockIo::default();
    result
        .set_weight(weight(io.Weight))
        .set_leaf_weight(weight(io.LeafWeight))
        .set_weight_device(try_list(&io.WeightDevice, |device| {
            let mut result = oci::LinuxWeightDeviceBuilder::default()
                .major(device.Major)
                .minor(device.Minor);
            if let Some(weight) = weight(device.Weight) {
                result = result.weight(weight);
            }
            if let Some(weight) = weight(device.LeafWeight) {
                result = result.leaf_weight(weight);
            }
            built(result.build())
        })?)
        .set_throttle_read_bps_device(try_list(&io.ThrottleReadBpsDevice, throttle)?)
        .set_throttle_write_bps_device(try_list(&io.ThrottleWriteBpsDevice, throttle)?)
        .set_throttle_read_iops_device(try_list(&io.ThrottleReadIOPSDevice, throttle)?)
        .set_throttle_write_iops_device(try_list(&io.ThrottleWriteIOPSDevice, throttle)?);
    Ok(result)
}

fn some<T: Clone>(values: &[T]) -> Option<Vec<T>> {
    (!values.is_empty()).then(|| values.to_vec())
}

fn list<W, T>(values: &[W], convert: impl Fn(&W) -> T) -> Option<Vec<T>> {
    (!values.is_empty()).then(|| values.iter().map(convert).collect())
}

fn try_list<W, T>(values: &[W], convert: impl Fn(&W) -> Result<T>) -> Result<Option<Vec<T>>> {
    if values.is_empty() {
        return Ok(None);
    }
    values.iter().map(convert).collect::<Result<_>>().map(Some)
}

fn map<K: Clone + Eq + std::hash::Hash, V: Clone>(
    values: &std::collections::HashMap<K, V>,
) -> Option<std::collections::HashMap<K, V>> {
    (!values.is_empty()).then(|| values.clone())
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

fn number<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

fn flag(value: bool) -> Option<bool> {
    value.then_some(true)
}

/// A type without setters; its builder has a default for each field.
fn built<T>(result: std::result::Result<T, oci_spec::OciSpecError>) -> Result<T> {
    result.map_err(|error| OciError {
        field: "structure",
        value: error.to_string(),
    })
}

/// A namespace's type: `mount` and `network` as in `config.json`, or `mnt` and `net` as below `/proc/<pid>/ns`, which
/// is how one of upstream's shims names them. The other enumerations have the same name on both.
fn namespace_kind(name: &str) -> Result<oci::LinuxNamespaceType> {
    oci::LinuxNamespaceType::try_from(name).map_err(|_| OciError {
        field: "linux.namespaces[].type",
        value: name.to_owned(),
    })
}

/// An enumeration's value from its name in `config.json`.
fn named<T: DeserializeOwned>(field: &'static str, value: &str) -> Result<T> {
    T::deserialize(StrDeserializer::<NameError>::new(value)).map_err(|_| OciError {
        field,
        value: value.to_owned(),
    })
}
