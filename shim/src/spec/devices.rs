//! A container's devices: which every kernel has, which are block volumes, which cannot be had.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use agent_protocol::oci::allows_every_device;
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{SpecError, unsupported};
use crate::vfio;

/// A block device of the host that the guest is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Which one.
    pub numbers: Numbers,
    /// Its file in the container.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// The numbers of a device, `major:minor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "device numbers are what they are called")]
pub struct Numbers {
    pub major: i64,
    pub minor: i64,
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The block volumes of a container. A block device is one if a rule allows it by its numbers: to a privileged
/// container the CRI gives every device that the host has, by a rule for all of them.
///
/// # Errors
/// A device that the guest cannot have, by name.
pub fn translate(linux: &Linux) -> Result<Vec<BlockDevice>, SpecError> {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_ref());
    let mut volumes = Vec::new();
    for device in linux.devices().iter().flatten() {
        let block = device.typ() == LinuxDeviceType::B;
        let rule = rules.and_then(|rules| rules.iter().find(|rule| block && allows(rule, device)));
        match rule {
            Some(rule) => volumes.push(BlockDevice {
                numbers: Numbers {
                    major: device.major(),
                    minor: device.minor(),
                },
                path: device.path().clone(),
                read_only: !rule.access().as_ref().is_some_and(|access| access.contains('w')),
            }),
            None => check_device(device)?,
        }
    }
    Ok(volumes)
}

/// Takes the host's devices out of a container that may open every device: the CRI gives a privileged container all
/// that the host has, and the agent gives it all that the guest has. What a rule names is a volume, or was asked for
/// by itself, and stays. Returns whether there were any.
pub fn leave_out_the_hosts(linux: &mut Linux) -> bool {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone());
    let rules = rules.unwrap_or_default();
    if !allows_every_device(&rules) {
        return false;
    }
    let Some(devices) = linux.devices_mut() else {
        return false;
    };
    let before = devices.len();
    devices.retain(|device| is_standard(device) || rules.iter().any(|rule| allows(rule, device)));
    devices.len() < before
}

/// Takes the files of the VFIO groups that the VM has out of a container, and the rules about them: in the guest the
/// devices are those of its kernel (`vfio_mode = "guest-kernel"`, `update_spec_devices` of kata-containers).
///
/// # Errors
/// A group that the VM was started without, by name.
pub fn leave_to_the_guest(linux: &mut Linux, groups: &BTreeSet<u32>) -> Result<(), SpecError> {
    let Some(devices) = linux.devices_mut() else {
        return Ok(());
    };
    let mut left = Vec::new();
    for device in devices.iter() {
        let Some(name) = vfio::name(device.path()) else {
            continue;
        };
        let there = match name.as_str() {
            "vfio" => !groups.is_empty(),
            number => number.parse().is_ok_and(|number| groups.contains(&number)),
        };
        if !there {
            return Err(unsupported(
                format!("the VFIO device {}", device.path().display()),
                "the pod's VM was started without it, and gets none later: set `cold_plug_vfio = \"root-port\"`, and name it by an annotation \
                 `cdi.k8s.io/<any>: <vendor>/<class>=<name>` of the pod",
            ));
        }
        left.push((Some(device.major()), Some(device.minor())));
    }
    devices.retain(|device| vfio::name(device.path()).is_none());
    let resources = linux.resources_mut().as_mut();
    if let Some(rules) = resources.and_then(|resources| resources.devices_mut().as_mut()) {
        rules.retain(|rule| rule.typ() != Some(LinuxDeviceType::C) || !left.contains(&(rule.major(), rule.minor())));
    }
    Ok(())
}

fn allows(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let numbers = (Some(device.major()), Some(device.minor()));
    rule.allow() && rule.typ() == Some(device.typ()) && (rule.major(), rule.minor()) == numbers
}

/// Devices that every Linux kernel has under the same numbers: (type, major, minor).
const STANDARD_DEVICES: &[(LinuxDeviceType, i64, i64)] = &[
    (LinuxDeviceType::C, 1, 3),    // null
    (LinuxDeviceType::C, 1, 5),    // zero
    (LinuxDeviceType::C, 1, 7),    // full
    (LinuxDeviceType::C, 1, 8),    // random
    (LinuxDeviceType::C, 1, 9),    // urandom
    (LinuxDeviceType::C, 1, 11),   // kmsg
    (LinuxDeviceType::C, 5, 0),    // tty
    (LinuxDeviceType::C, 5, 1),    // console
    (LinuxDeviceType::C, 5, 2),    // ptmx
    (LinuxDeviceType::C, 10, 200), // net/tun
    (LinuxDeviceType::C, 10, 229), // fuse
];

fn is_standard(device: &LinuxDevice) -> bool {
    // `u` is an unbuffered character device, the same as `c`.
    let typ = if device.typ() == LinuxDeviceType::U {
        LinuxDeviceType::C
    } else {
        device.typ()
    };
    typ == LinuxDeviceType::P || STANDARD_DEVICES.contains(&(typ, device.major(), device.minor()))
}

fn check_device(device: &LinuxDevice) -> Result<(), SpecError> {
    if is_standard(device) {
        return Ok(());
    }
    let what = format!(
        "host device {} ({} {}:{})",
        device.path().display(),
        device.typ().as_str(),
        device.major(),
        device.minor()
    );
    Err(unsupported(
        what,
        "only block volumes and VFIO devices are passed to the guest",
    ))
}
