//! Devices of the host that a pod's VM has from its start.
//!
//! ```text
//! /dev/vfio/<group> in the sandbox's linux.devices ──┐
//! cdi.k8s.io/* annotation ──CDI specification────────┴─▶ groups ──sysfs──▶ functions of the VM, and device files for QEMU
//! ```
//!
//! They have to be known before the VM starts: none is plugged later. A group is what the IOMMU can keep apart, so all
//! of it goes to one VM.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, mknod},
    unistd::{Gid, Uid, chown},
};
use node_check::iommu_groups;
use oci_spec::runtime::Spec;
use vmm::{
    pcie::{HostFunction, Passthrough, PciAddress},
    spec::SpecError,
};

use crate::{
    cdi::{self, CdiError},
    error::{Context, Result},
    manifest::Kernel,
    selinux,
};

/// Where the kernel has the device files of groups, and beside them `vfio`, which all of them need (vfio.rst of Linux).
pub const FOLDER: &str = "/dev/vfio";
/// The driver that hands a device to another program.
const DRIVER: &str = "vfio-pci";
/// Class of the bridges between PCI buses, which belong to no one (`PCI_CLASS_BRIDGE_PCI` of Linux, without the
/// interface).
const BRIDGE: &str = "0x0604";
/// Flags of a region in a device's `resource` file (`include/linux/ioport.h` of Linux): memory, and of 64 bits.
const MEMORY_64: u64 = 0x0010_0200;

/// What a sandbox's specification asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Names below [`FOLDER`].
    files: Vec<String>,
    /// Names of CDI devices, `vendor/class=name`.
    cdi: Vec<String>,
}

/// What a VM gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// Numbers of the groups.
    pub groups: BTreeSet<u32>,
    /// Their PCI functions.
    pub functions: Passthrough,
    /// What the functions are: group, address, and `modalias` where sysfs has one.
    pub kinds: Vec<(u32, PciAddress, Option<String>)>,
}

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The file's name is no group's.
    #[error("{FOLDER}/{0} cannot be given to a pod: devices are passed by their group, {FOLDER}/<number>")]
    NoNumber(String),
    /// Nothing keeps the device from the host's memory.
    #[error(
        "VFIO group {0} cannot be given to a pod: the node has no IOMMU; switch it on in the firmware, and with `intel_iommu=on` where the kernel needs to be told"
    )]
    NoIommu(u32),
    /// There are others.
    #[error("VFIO group {0} cannot be given to a pod: the node has no IOMMU group of this number")]
    NoGroup(u32),
    /// A group of something else, such as a mediated device.
    #[error("VFIO group {group} cannot be given to a pod: {what} is no PCI function")]
    NotPci {
        /// Which group.
        group: u32,
        /// What is in it.
        what: String,
    },
    /// Some other driver has it.
    #[error("VFIO group {group} cannot be given to a pod: {address} has {driver}, and needs to be bound to {DRIVER}")]
    Driver {
        /// Which group.
        group: u32,
        /// Where the function is.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// A group is one program's at a time.
    #[error(
        "VFIO group {0} cannot be given to a pod: another program has it, such as the virtual machine of another pod"
    )]
    Taken(u32),
    /// There are bridges at most.
    #[error("VFIO group {0} cannot be given to a pod: no device is in it")]
    Empty(u32),
    /// The guest could do nothing with it.
    #[error(
        "VFIO group {group} cannot be given to a pod: the guest's kernel has no driver for {devices}; name a kernel that has one in `kernel`"
    )]
    NoGuestDriver {
        /// Which group.
        group: u32,
        /// What is in it.
        devices: String,
    },
    /// The kernel's word cannot be had.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Too many.
    #[error(transparent)]
    Topology(#[from] SpecError),
    /// A CDI device that leads nowhere.
    #[error(transparent)]
    Cdi(#[from] CdiError),
}

impl Asked {
    /// Reads the devices and annotations of a sandbox.
    pub fn of(spec: &Spec) -> Asked {
        let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
        let names = devices.into_iter().flatten().filter_map(|device| name(device.path()));
        let mut annotations: Vec<_> = spec.annotations().iter().flatten().collect();
        annotations.sort();
        let named = annotations.into_iter().filter(|(key, _)| key.starts_with(cdi::PREFIX));
        let words = named.flat_map(|(_, value)| value.split(',')).map(str::trim);
        Asked {
            files: names.filter(|name| name != "vfio").collect(),
            cdi: words.filter(|word| !word.is_empty()).map(str::to_owned).collect(),
        }
    }

    /// Finds the devices on the host, whose file system is at `root`. Changes nothing.
    ///
    /// # Errors
    /// A device that does not exist, or that is not ready to be handed over: by its group.
    pub fn find(&self, root: &Path) -> std::result::Result<Devices, VfioError> {
        let mut files = self.files.clone();
        for device in &self.cdi {
            files.extend(cdi::device_files(device, root)?.iter().filter_map(|path| name(path)));
        }
        let mut devices = Devices::default();
        for file in files.iter().filter(|file| *file != "vfio") {
            devices.groups.insert(number(file)?);
        }
        let mut functions = Vec::new();
        for group in &devices.groups {
            for (function, modalias) in members(*group, root)? {
                devices.kinds.push((*group, function.address, modalias));
                functions.push(function);
            }
        }
        devices.kinds.sort();
        devices.functions = Passthrough::new(functions)?;
        Ok(devices)
    }
}

impl Devices {
    /// Refuses a group that the guest's kernel could do nothing with, and logs single functions without a driver: a
    /// group holds what the IOMMU cannot keep apart, and not all of it is what the pod wants. Says nothing of a kernel
    /// that nothing is known of.
    ///
    /// # Errors
    /// No function of a group has a driver.
    pub fn fit(&self, kernel: &Kernel) -> std::result::Result<(), VfioError> {
        let lost = |(_, _, modalias): &&(u32, PciAddress, Option<String>)| {
            modalias.as_deref().and_then(|name| kernel.drives(name)) == Some(false)
        };
        for group in &self.groups {
            let members: Vec<_> = self.kinds.iter().filter(|(of, ..)| of == group).collect();
            let lost: Vec<_> = members.iter().copied().filter(lost).collect();
            let names = lost.iter().map(|(_, address, modalias)| {
                let name = modalias.as_deref().unwrap_or_default();
                format!("{address} ({name})")
            });
            let devices = names.collect::<Vec<_>>().join(", ");
            if !lost.is_empty() && lost.len() == members.len() {
                return Err(VfioError::NoGuestDriver { group: *group, devices });
            }
            if !lost.is_empty() {
                tracing::warn!(
                    group,
                    devices,
                    "the guest's kernel has no driver for devices of a VFIO group"
                );
            }
        }
        Ok(())
    }
}

/// The name below [`FOLDER`] of a device's file; `None` for other files.
pub fn name(path: &Path) -> Option<String> {
    let name = path.strip_prefix(FOLDER).ok()?.to_str()?;
    (!name.is_empty()).then(|| name.to_owned())
}

fn number(file: &str) -> std::result::Result<u32, VfioError> {
    let digits = !file.is_empty() && file.bytes().all(|byte| byte.is_ascii_digit());
    let number = file.parse().ok().filter(|_| digits);
    number.ok_or_else(|| VfioError::NoNumber(file.to_owned()))
}

/// The functions of a group, ready for QEMU, each with its `modalias`.
fn members(group: u32, root: &Path) -> std::result::Result<Vec<(HostFunction, Option<String>)>, VfioError> {
    let groups = root.join("sys/kernel/iommu_groups");
    let folder = groups.join(group.to_string()).join("devices");
    let read = |path: &Path| {
        let path = path.to_owned();
        |source| VfioError::Read { path, source }
    };
    if iommu_groups(root).map_err(read(&groups))? == 0 {
        return Err(VfioError::NoIommu(group));
    }
    if !folder.exists() {
        return Err(VfioError::NoGroup(group));
    }
    let mut functions = Vec::new();
    for entry in fs::read_dir(&folder).map_err(read(&folder))? {
        let entry = entry.map_err(read(&folder))?;
        let what = entry.file_name().to_string_lossy().into_owned();
        let address = what.parse().map_err(|_| VfioError::NotPci { group, what })?;
        let (class, resource) = (entry.path().join("class"), entry.path().join("resource"));
        if fs::read_to_string(&class).map_err(read(&class))?.starts_with(BRIDGE) {
            continue;
        }
        let driver = driver_of(&entry.path());
        if driver != DRIVER {
            return Err(VfioError::Driver { group, address, driver });
        }
        let regions = fs::read_to_string(&resource).map_err(read(&resource))?;
        let function = HostFunction {
            address,
            window: window(&regions),
        };
        let modalias = fs::read_to_string(entry.path().join("modalias")).ok();
        functions.push((function, modalias.map(|name| name.trim_end().to_owned())));
    }
    match functions.is_empty() {
        true => Err(VfioError::Empty(group)),
        false => Ok(functions),
    }
}

fn driver_of(device: &Path) -> String {
    let link = fs::read_link(device.join("driver")).unwrap_or_default();
    let name = link.file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "no driver".into())
}

/// Bytes of all 64-bit regions of memory: each line of a `resource` file has the first and the last address of a region
/// and its flags (sysfs-pci.rst of Linux).
fn window(resource: &str) -> u64 {
    let size = |line: &str| {
        let mut numbers = line
            .split_whitespace()
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let (start, end, flags) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        (flags & MEMORY_64 == MEMORY_64).then(|| end.checked_sub(start)?.checked_add(1))?
    };
    resource.lines().filter_map(size).fold(0, u64::saturating_add)
}

/// Refuses groups that someone has. QEMU would do so too, in words of its own; it has the last word, for a group that
/// is taken between now and then.
///
/// # Errors
/// The first group that is not free, or whose file cannot be opened.
pub fn are_free(groups: &BTreeSet<u32>) -> std::result::Result<(), VfioError> {
    for group in groups {
        let path = Path::new(FOLDER).join(group.to_string());
        // The kernel lets one program have a group's file, and resets nothing when it is closed unused.
        match File::options().read(true).write(true).open(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(VfioError::Taken(*group)),
            Err(source) => return Err(VfioError::Read { path, source }),
        }
    }
    Ok(())
}

/// The host's files that QEMU opens for these groups, none for no group.
pub fn files(groups: &BTreeSet<u32>) -> Vec<PathBuf> {
    if groups.is_empty() {
        return Vec::new();
    }
    let names = groups.iter().map(u32::to_string);
    let names = ["vfio".to_owned()].into_iter().chain(names);
    names.map(|name| Path::new(FOLDER).join(name)).collect()
}

/// Mounts a file system for device files at `folder`, in the calling process's mount namespace only. `label` is that of
/// the pod's files, where SELinux is on.
///
/// # Errors
/// The kernel's.
pub fn device_folder(folder: &Path, label: Option<&str>) -> Result<()> {
    fs::create_dir_all(folder).at("create", folder)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    selinux::mount_tmpfs(folder, flags, "mode=0755,size=64k", label)
}

/// Gives device files to QEMU's user, in the calling process's mount namespace only: each is covered by one with the
/// same numbers in `folder`, one of [`device_folder`]. On the host they stay root's, and nobody has to give them back.
///
/// # Errors
/// A file that is missing or is no character device; a mount that fails.
pub fn lend(files: &[PathBuf], folder: &Path, user: u32) -> Result<()> {
    const NONE: Option<&str> = None;
    for file in files {
        let host = fs::metadata(file).at("use the device", file)?;
        if !host.file_type().is_char_device() {
            return Err(io::Error::other("it is no character device")).at("use the device", file);
        }
        let own = folder.join(file.file_name().unwrap_or_default());
        mknod(&own, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, host.rdev()).at("make", &own)?;
        chown(&own, Some(Uid::from_raw(user)), Some(Gid::from_raw(user))).at("give to QEMU's user", &own)?;
        mount(Some(&own), file, NONE, MsFlags::MS_BIND, NONE).at("cover", file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
