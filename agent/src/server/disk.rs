//! Block devices that the host plugs for a container or a storage.
//!
//! They are named as in `src/agent/src/device` of kata-containers: `scsi` by `target:unit` on the only controller,
//! `blk` (virtio-blk) by its PCI path, the slots in hexadecimal from the root bus on, `02/01`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use agent_protocol::protocol::agent::Device;
use oci_spec::runtime::{LinuxDeviceType, Spec};

use super::{
    boot::write,
    container::missing,
    error::{Doing, Error, Result},
    modules,
    uevent::Uevents,
};
/// How long a device may take to come: upstream's `agent.hotplug_timeout`.
const APPEARS: Duration = Duration::from_secs(3);

/// How the kernel looks for SCSI devices.
const SCAN: &str = "/sys/module/scsi_mod/parameters/scan";

/// Keeps the kernel from looking for SCSI devices by itself: an emulated machine spends seconds on the 256 targets of a
/// controller, while it takes note of nothing else there. The host says what there is. Nothing to do for a kernel
/// without SCSI, or whose modules come later.
pub(super) fn scan_on_demand() -> Result<()> {
    match Path::new(SCAN).exists() {
        true => write(SCAN, "manual"),
        false => Ok(()),
    }
}

/// A block device of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// Its file.
    pub(super) path: PathBuf,
    major: i64,
    minor: i64,
}

/// Whether a type of device, or a storage's driver, is a disk.
pub(super) fn is_disk(kind: &str) -> bool {
    matches!(kind, "scsi" | "blk")
}

/// Waits until a disk is there. Blocks.
pub(super) fn wait_for(kind: &str, address: &str) -> Result<Disk> {
    let place = Place::parse(kind, address)?;
    for (driver, module) in place.drivers() {
        if !Path::new(driver).exists() {
            modules::load(module, &[])?;
            scan_on_demand()?;
        }
    }
    let what = || format!("find the {kind} device {address:?}");
    let appearing = Uevents::listen().doing(what)?;
    let mut found = None;
    let deadline = Instant::now() + APPEARS;
    let there = appearing.block_until(deadline, || {
        found = if_there(place.look())?.flatten();
        if found.is_none() {
            if_there(place.scan())?;
        }
        Ok(found.is_some())
    });
    there.doing(what)?;
    found.ok_or_else(|| Error::Invalid(format!("no {kind} device {address:?} has come within {APPEARS:?}")))
}

/// Gives a container's device files the numbers that the disks have here, and the same to the rules about them. Blocks.
pub(super) fn give(devices: &[Device], spec: &mut Spec) -> Result<()> {
    let mut linux = spec.linux().clone().ok_or_else(|| missing("linux"))?;
    for device in devices {
        let disk = wait_for(&device.type_, &device.id)?;
        let files = linux.devices_mut().as_mut().into_iter().flatten();
        let mut files = files.filter(|file| file.path() == Path::new(&device.container_path));
        let file = files.next().ok_or_else(|| {
            let text = format!("the specification has no device {:?}", device.container_path);
            Error::Invalid(text)
        })?;
        let host = (Some(file.major()), Some(file.minor()));
        file.set_typ(LinuxDeviceType::B);
        file.set_major(disk.major);
        file.set_minor(disk.minor);
        let rules = linux
            .resources_mut()
            .as_mut()
            .and_then(|resources| resources.devices_mut().as_mut());
        for rule in rules.into_iter().flatten() {
            if rule.typ() == Some(LinuxDeviceType::B) && (rule.major(), rule.minor()) == host {
                rule.set_major(Some(disk.major));
                rule.set_minor(Some(disk.minor));
            }
        }
    }
    spec.set_linux(Some(linux));
    Ok(())
}

/// Where a disk hangs.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Scsi {
        target: u32,
        unit: u32,
    },
    /// Slot and function on each bus, from the root on.
    Pci(Vec<(u8, u8)>),
}

impl Place {
    fn parse(kind: &str, address: &str) -> Result<Place> {
        let place = match kind {
            "scsi" => address.split_once(':').and_then(|(target, unit)| {
                let (target, unit) = (target.parse().ok()?, unit.parse().ok()?);
                Some(Place::Scsi { target, unit })
            }),
            "blk" => address.split('/').map(slot).collect::<Option<_>>().map(Place::Pci),
            _ => return Err(Error::Unimplemented(format!("a device of type {kind:?}"))),
        };
        place.ok_or_else(|| Error::Invalid(format!("{address:?} is no address of a {kind} device")))
    }

    /// What has to be there to see it: a driver's folder, and the module that brings it.
    fn drivers(&self) -> &'static [(&'static str, &'static str)] {
        match self {
            Place::Scsi { .. } => &[
                ("/sys/bus/scsi", "scsi_mod"),
                ("/sys/bus/virtio/drivers/virtio_scsi", "virtio_scsi"),
                ("/sys/bus/scsi/drivers/sd", "sd_mod"),
            ],
            Place::Pci(_) => &[("/sys/bus/virtio/drivers/virtio_blk", "virtio_blk")],
        }
    }

    /// Has the kernel look for it, where it does so on demand only (`scan` of a SCSI host, sysfs). The controller may
    /// be still to come.
    fn scan(&self) -> io::Result<()> {
        let Place::Scsi { target, unit } = self else {
            return Ok(());
        };
        match child(Path::new("/sys/class/scsi_host"), |_| true)? {
            Some(host) => fs::write(host.join("scan"), format!("0 {target} {unit}")),
            None => Ok(()),
        }
    }

    fn look(&self) -> io::Result<Option<Disk>> {
        let block = match self {
            Place::Scsi { target, unit } => {
                let end = format!(":0:{target}:{unit}");
                child(Path::new("/sys/class/scsi_device"), |name| name.ends_with(&end))?
                    .map(|device| device.join("device/block"))
            }
            Place::Pci(slots) => {
                let mut bus = Some(PathBuf::from("/sys/devices/pci0000:00"));
                for (slot, function) in slots {
                    let end = format!(":{slot:02x}.{function:x}");
                    let Some(above) = bus else { return Ok(None) };
                    bus = child(&above, |name| name.ends_with(&end))?;
                }
                let Some(device) = bus else { return Ok(None) };
                child(&device, |name| name.starts_with("virtio"))?.map(|device| device.join("block"))
            }
        };
        let Some(block) = block else { return Ok(None) };
        let Some(device) = child(&block, |_| true)? else {
            return Ok(None);
        };
        let numbers = fs::read_to_string(device.join("dev"))?;
        let path = Path::new("/dev").join(device.file_name().unwrap_or_default());
        let numbers = numbers.trim().split_once(':');
        // The file comes after the device.
        Ok(numbers.filter(|_| path.exists()).and_then(|(major, minor)| {
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            Some(Disk { path, major, minor })
        }))
    }
}

/// `02` or `02.1`, in hexadecimal.
fn slot(text: &str) -> Option<(u8, u8)> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let number = |text, most| u8::from_str_radix(text, 16).ok().filter(|number| *number < most);
    Some((number(slot, 32)?, number(function, 8)?))
}

/// A device comes piece by piece, and goes so: what is not there is nothing yet.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The entry of a folder with such a name; none where there is no folder.
fn child(folder: &Path, fits: impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    for entry in if_there(fs::read_dir(folder))?.into_iter().flatten() {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&fits) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_targets_or_slots() {
        assert_eq!(Place::parse("scsi", "3:0").unwrap(), Place::Scsi { target: 3, unit: 0 });
        assert_eq!(
            Place::parse("blk", "02/1f.1").unwrap(),
            Place::Pci(vec![(2, 0), (31, 1)])
        );
        for (kind, address) in [
            ("scsi", "3"),
            ("scsi", "a:0"),
            ("blk", "20"),
            ("blk", "2/"),
            ("blk", ""),
        ] {
            let error = Place::parse(kind, address).unwrap_err().to_string();
            assert_eq!(error, format!("{address:?} is no address of a {kind} device"));
        }
        let error = Place::parse("vfio-pci", "0000:01:00.0").unwrap_err().to_string();
        assert_eq!(error, "a device of type \"vfio-pci\" is not implemented by this agent");
    }
}
