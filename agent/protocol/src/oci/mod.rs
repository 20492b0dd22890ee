//! The OCI runtime specification, between its types and the protocol's messages.
//!
//! On the wire a scalar that is zero or empty is unset, so `Some(0)` comes back as `None`. What the messages have no
//! field for is dropped here; [`not_carried`] names it, for the sender to refuse or to tell.

mod from_wire;
mod to_wire;

#[cfg(test)]
mod tests;

pub use from_wire::{process_from_wire, resources_from_wire, spec_from_wire};
pub use to_wire::name;
pub use to_wire::{process_to_wire, resources_to_wire, spec_to_wire};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, Process, Spec};

/// A specification that its messages cannot be turned into.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the specification's {field} is {value:?}, which OCI does not know")]
pub struct OciError {
    field: &'static str,
    value: String,
}

/// Whether a container may open every device: the last of its rules that speaks of all devices allows them. To a
/// privileged container the CRI gives such a rule.
pub fn allows_every_device(rules: &[LinuxDeviceCgroup]) -> bool {
    let of_all = |rule: &&LinuxDeviceCgroup| {
        rule.typ().is_none_or(|typ| typ == LinuxDeviceType::A) && rule.major().is_none() && rule.minor().is_none()
    };
    rules.iter().rev().find(of_all).is_some_and(LinuxDeviceCgroup::allow)
}

/// The fields of a specification that the protocol cannot carry, as paths in `config.json`.
pub fn not_carried(spec: &Spec) -> Vec<&'static str> {
    let mut fields = Vec::new();
    let mut note = |present: bool, field| {
        if present {
            fields.push(field);
        }
    };
    note(spec.domainname().is_some(), "domainname");
    note(spec.vm().is_some(), "vm");
    let mapped = |m: &oci_spec::runtime::Mount| m.uid_mappings().is_some() || m.gid_mappings().is_some();
    note(spec.mounts().iter().flatten().any(mapped), "mounts[].uidMappings");
    if let Some(process) = spec.process() {
        process_fields(process, &mut note);
    }
    if let Some(linux) = spec.linux() {
        note(linux.net_devices().is_some(), "linux.netDevices");
        note(linux.memory_policy().is_some(), "linux.memoryPolicy");
        note(linux.personality().is_some(), "linux.personality");
        note(linux.time_offsets().is_some(), "linux.timeOffsets");
        let rdt = linux.intel_rdt().as_ref();
        note(rdt.is_some_and(|r| r.l3_cache_schema().is_none()), "linux.intelRdt");
        let seccomp = linux.seccomp().as_ref();
        note(
            seccomp.is_some_and(|s| s.listener_path().is_some()),
            "linux.seccomp.listenerPath",
        );
        if let Some(resources) = linux.resources() {
            resource_fields(resources, &mut note);
        }
    }
    fields
}

fn process_fields(process: &Process, note: &mut impl FnMut(bool, &'static str)) {
    note(process.io_priority().is_some(), "process.ioPriority");
    note(process.scheduler().is_some(), "process.scheduler");
    note(process.exec_cpu_affinity().is_some(), "process.execCPUAffinity");
}

fn resource_fields(resources: &LinuxResources, note: &mut impl FnMut(bool, &'static str)) {
    note(resources.rdma().is_some(), "linux.resources.rdma");
    let memory = resources.memory().as_ref();
    let check = memory.and_then(|m| m.check_before_update());
    note(check == Some(true), "linux.resources.memory.checkBeforeUpdate");
}
