//! A container's devices: which every kernel has, which are block volumes, which cannot be had.

use std::{fmt, path::PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{SpecError, unsupported};

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

/// The block volumes of a container. A block device is one if a rule allows it by its numbers: to a privileged container the CRI gives every device that the
/// host has, by a rule for all of them.
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

fn allows(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let numbers = (Some(device.major()), Some(device.minor()));
    rule.allow() && rule.typ() == Some(LinuxDeviceType::B) && (rule.major(), rule.minor()) == numbers
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

fn check_device(device: &LinuxDevice) -> Result<(), SpecError> {
    // `u` is an unbuffered character device, the same as `c`.
    let typ = if device.typ() == LinuxDeviceType::U {
        LinuxDeviceType::C
    } else {
        device.typ()
    };
    let standard = STANDARD_DEVICES.contains(&(typ, device.major(), device.minor()));
    if standard || typ == LinuxDeviceType::P {
        return Ok(());
    }
    let what = format!(
        "host device {} ({} {}:{})",
        device.path().display(),
        typ.as_str(),
        device.major(),
        device.minor()
    );
    Err(unsupported(
        what,
        "no host device is passed to the guest; for privileged pods set `privileged_without_host_devices = true` in the CRI's runtime",
    ))
}
