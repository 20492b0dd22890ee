//! What a pod holds of the node's memory, each page counted once.
//!
//! Guest RAM is one memory object that QEMU and virtiofsd both map. Adding up what `ps` shows of the two counts its
//! pages twice; here they are taken from the object itself, and the processes count only for what is their own.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::PathBuf};

use crate::{
    census,
    failure::{Failure, Result},
    procs::{Memory, Process},
};

/// The parts of a pod's memory in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The shim's proportional set size, with that of its keeper, which is a copy of it without anything to do.
    pub shim_kib: u64,
    /// Of it, what no other pod has a share of: all but mapped files.
    pub shim_unshared_kib: u64,
    /// virtiofsd's, without guest RAM.
    pub virtiofsd_kib: u64,
    /// QEMU's, without guest RAM.
    pub qemu_kib: u64,
    /// Of QEMU's, mapped files: the kernel and initrd it loaded, its own program. Several VMs share them.
    pub qemu_files_kib: u64,
    /// Of all three, mapped files. The proportional share changes whenever another pod that maps the same ones comes or
    /// goes.
    pub files_kib: u64,
    /// Guest RAM that the host has given: what the guest's kernel and processes ever touched and have not given back.
    pub guest_kib: u64,
}

impl Footprint {
    /// Looks at a pod's shim and everything below it.
    #[must_use]
    pub fn of(processes: &[Process]) -> Footprint {
        let sum = |name: &str, part: fn(Memory) -> u64| {
            let named = processes.iter().filter(|process| process.program().starts_with(name));
            named.map(|process| part(process.memory())).sum()
        };
        let own = |name: &str| sum(name, |memory| memory.own_kib);
        let files = |name: &str| sum(name, |memory| memory.files_kib);
        let of_shim = |part: &dyn Fn(&str) -> u64| part("containerd-shim-") + part("vm-keeper");
        let objects: BTreeMap<u64, u64> = processes.iter().flat_map(memory_objects).collect();
        Footprint {
            shim_kib: of_shim(&own),
            shim_unshared_kib: of_shim(&own) - of_shim(&files),
            virtiofsd_kib: own("virtiofsd"),
            qemu_kib: own("qemu-system-"),
            qemu_files_kib: files("qemu-system-"),
            files_kib: of_shim(&files) + files("virtiofsd") + files("qemu-system-"),
            guest_kib: objects.values().sum(),
        }
    }

    /// All of it, once.
    #[must_use]
    pub fn total_kib(&self) -> u64 {
        self.shim_kib + self.virtiofsd_kib + self.qemu_kib + self.guest_kib
    }

    /// What no other pod has a share of.
    #[must_use]
    pub fn unshared_kib(&self) -> u64 {
        self.total_kib() - self.files_kib
    }
}

/// The memory objects (memfd_create(2)) that a process has open: inode, and KiB that they hold.
fn memory_objects(process: &Process) -> Vec<(u64, u64)> {
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid));
    let object = |path: PathBuf| {
        let target = fs::read_link(&path).ok()?;
        let metadata = target
            .to_string_lossy()
            .starts_with("/memfd:")
            .then(|| fs::metadata(&path))?
            .ok()?;
        // stat(2): blocks are of 512 bytes.
        Some((metadata.ino(), metadata.blocks() / 2))
    };
    open.into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| object(entry.path()))
        .collect()
}

/// What the kernel has charged to a cgroup and those below it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Charge {
    /// Everything, in KiB.
    pub usage_kib: u64,
    /// Pages of files on disks, in KiB: given back when somebody needs them. Guest RAM is not among them.
    pub files_kib: u64,
}

impl Charge {
    /// Reads the memory controller, version 1 or 2.
    ///
    /// # Errors
    /// When the cgroup does not exist in it.
    pub fn of(cgroup: &str) -> Result<Charge> {
        let folders = census::hierarchies()
            .into_iter()
            .map(|hierarchy| hierarchy.join(cgroup.trim_start_matches('/')));
        let read = |folder: PathBuf| {
            let text = |file: &str| fs::read_to_string(folder.join(file)).ok();
            let usage = text("memory.usage_in_bytes").or_else(|| text("memory.current"))?;
            let stat = text("memory.stat")?;
            let field = |names: &[&str]| {
                let value = |line: &str| {
                    let (name, value) = line.split_once(' ')?;
                    names.contains(&name).then(|| value.parse::<u64>().ok())?
                };
                stat.lines().find_map(value).unwrap_or(0)
            };
            // Version 1 has the sums with those below under names of their own, and both versions count shared memory
            // as a file's.
            let files = if folder.join("memory.current").exists() {
                field(&["file"]) - field(&["shmem"]).min(field(&["file"]))
            } else {
                field(&["total_cache"]) - field(&["total_shmem"]).min(field(&["total_cache"]))
            };
            Some(Charge {
                usage_kib: usage.trim().parse::<u64>().ok()? >> 10,
                files_kib: files >> 10,
            })
        };
        folders
            .into_iter()
            .find_map(read)
            .ok_or_else(|| Failure::Claim(format!("no memory controller knows the cgroup {cgroup}")))
    }
}

/// KiB as MiB with one digit.
#[must_use]
pub fn mib(kib: u64) -> String {
    let tenths = (kib * 10 + 512) / 1024;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kibibytes_are_rounded_to_a_tenth_of_a_mebibyte() {
        assert_eq!([mib(0), mib(1024), mib(6700), mib(1023)], ["0.0", "1.0", "6.5", "1.0"]);
    }
}
