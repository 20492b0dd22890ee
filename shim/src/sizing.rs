//! How large a VM is: one pure function from the configuration, the host, the CRI's hints and the containers' limits.
//!
//! ```text
//! memory  boot = default_memory     target = boot + limits of the containers that exist, rounded up once   max = the host's
//! vCPUs   boot = default_vcpus      target = CPU limits of the containers, summed, rounded up once, at least boot
//! ```
//!
//! A limit beyond the host, or beyond what the guest's kernel takes, does not fail a pod: it is clamped. What the CRI
//! says about the whole pod (see
//! [`crate::annotations::pod_resources`]) counts only when `static_sandbox_resource_mgmt` asks for it: it is what the
//! pod began with, and Kubernetes raises the limits of pods that run.

pub use crate::annotations::PodResources as Limits;
use crate::annotations::milli_cpus;
use crate::manifest::{Kernel, Manifest};
use config::Config;
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, Spec};
use std::io;
use vmm::spec::{Memory, MemoryPlug, Vcpus};

/// virtio-mem's block, and what every size is rounded to.
const BLOCK_MIB: u64 = 2;
/// The guest's memory block: a DIMM of less cannot be used.
const DIMM_MIB: u64 = 128;
/// A limit from here on is one of the many spellings of "unlimited" (cgroup v1 writes the largest page-aligned `i64`).
const UNLIMITED: u64 = 1 << 62;
/// The most that QEMU's q35 and the VM's description take; our own kernel takes as many.
const MOST_VCPUS: u32 = 240;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// RAM, MiB.
    pub memory_mib: u64,
    /// CPUs that are online.
    pub cpus: u32,
}

/// The bounds of one VM, settled when its sandbox is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizing {
    boot_mib: u64,
    max_mib: u64,
    plug: MemoryPlug,
    boot_vcpus: u32,
    max_vcpus: u32,
    cut: bool,
}

/// The size that the containers of a moment ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Guest memory in all, MiB.
    pub memory_mib: u64,
    /// vCPUs in all.
    pub vcpus: u32,
    /// The containers asked for more than the VM may have.
    pub clamped: bool,
}

/// Why the host's size is not known.
#[derive(Debug, thiserror::Error)]
#[error("cannot tell the host's memory and CPUs: {0}")]
pub struct HostError(#[from] io::Error);

impl Host {
    /// Asks the kernel.
    ///
    /// # Errors
    /// No `/proc`.
    pub fn read() -> Result<Self, HostError> {
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let total = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB")?.trim().parse().ok());
        let total: u64 = total.ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
        // Not available_parallelism(): the quota of the cgroup that the shim starts in says nothing about its pod.
        let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).map_err(io::Error::from)?;
        let cpus = online.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(1).max(1);
        Ok(Self {
            memory_mib: total / 1024,
            cpus,
        })
    }
}

impl Sizing {
    /// Settles the bounds of a VM on this host.
    ///
    /// # Errors
    /// The host's size cannot be read.
    pub fn new(config: &Config, pod: Option<Limits>) -> Result<Self, HostError> {
        let guest = Manifest::beside(&config.hypervisor.kernel);
        Ok(Self::on(Host::read()?, &guest.kernel, config, pod))
    }

    /// Settles the bounds of a VM: `pod` is what the CRI says about all containers together, if it says anything.
    pub fn on(host: Host, guest: &Kernel, config: &Config, pod: Option<Limits>) -> Self {
        let settings = &config.hypervisor;
        let plug = match settings.virtio_mem {
            true => MemoryPlug::VirtioMem,
            // QEMU has 256 slots and keeps one.
            false => MemoryPlug::PcDimm {
                slots: settings.memory_slots.clamp(1, 255),
            },
        };
        let ram = even(host.memory_mib).max(BLOCK_MIB);
        let most_mib = settings.max_memory_mib.map_or(ram, even).clamp(BLOCK_MIB, ram);
        let boot_mib = even(settings.default_memory_mib).clamp(BLOCK_MIB, ram);

        let room = guest.cpus.unwrap_or(MOST_VCPUS).min(host.cpus).clamp(1, MOST_VCPUS);
        let most_vcpus = settings.max_vcpus.unwrap_or(room).clamp(1, room);
        let boot_vcpus = settings
            .default_milli_vcpus
            .map_or(most_vcpus, whole)
            .clamp(1, most_vcpus);

        let most_mib = most_mib.max(boot_mib);
        let mut sizing = Self {
            boot_mib,
            max_mib: most_mib,
            plug,
            boot_vcpus,
            max_vcpus: most_vcpus,
            cut: false,
        };
        if config.runtime.static_sizing {
            let pod = pod.unwrap_or_default();
            let said_mib = pod.memory.map(|bytes| boot_mib.saturating_add(plugged(bytes, plug)));
            let said_vcpus = pod.milli_cpus.map(|milli| whole(milli).max(boot_vcpus));
            sizing.boot_mib = said_mib.map_or(boot_mib, |mib| mib.min(most_mib));
            sizing.max_mib = sizing.boot_mib;
            sizing.boot_vcpus = said_vcpus.map_or(boot_vcpus, |vcpus| vcpus.min(most_vcpus));
            sizing.max_vcpus = sizing.boot_vcpus;
            sizing.cut = said_mib > Some(sizing.boot_mib) || said_vcpus > Some(sizing.boot_vcpus);
        }
        sizing
    }

    /// Whether the pod said that it is larger than the VM can be.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// The VM's memory: what it boots with, and the most it can grow to.
    pub fn memory(&self) -> Memory {
        Memory {
            boot_mib: self.boot_mib,
            max_mib: self.max_mib,
            plug: self.plug,
        }
    }

    /// The VM's vCPUs: what it boots with, and the most it can grow to.
    pub fn vcpus(&self) -> Vcpus {
        Vcpus {
            boot: self.boot_vcpus,
            max: self.max_vcpus,
        }
    }

    /// vCPUs at boot.
    pub fn boot_vcpus(&self) -> u32 {
        self.boot_vcpus
    }

    /// The size for the containers that exist now.
    pub fn target<'a>(&self, containers: impl IntoIterator<Item = &'a Limits>) -> Target {
        let (mut bytes, mut milli) = (0u64, 0u64);
        for limits in containers {
            bytes = bytes
                .saturating_add(limits.memory.unwrap_or(0))
                .saturating_add(limits.huge_pages);
            milli = milli.saturating_add(limits.milli_cpus.unwrap_or(0));
        }
        let wanted_mib = self.boot_mib.saturating_add(plugged(bytes, self.plug));
        let wanted_vcpus = whole(milli).max(self.boot_vcpus);
        // What is cut off at the maximum still has to be whole blocks, or whole DIMMs.
        let room = (self.max_mib - self.boot_mib) / step(self.plug) * step(self.plug);
        let memory_mib = wanted_mib.min(self.boot_mib + room);
        let vcpus = wanted_vcpus.min(self.max_vcpus);
        // Sized once at boot, a VM is as large as its pod was said to be.
        let is_static = self.max_mib == self.boot_mib && self.max_vcpus == self.boot_vcpus;
        Target {
            memory_mib,
            vcpus,
            clamped: !is_static && (memory_mib < wanted_mib || vcpus < wanted_vcpus),
        }
    }
}

impl Limits {
    /// The limits of a container, from its spec.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map(Self::of_resources).unwrap_or_default()
    }

    /// The limits of a container, from its resources.
    pub fn of_resources(resources: &LinuxResources) -> Self {
        Self::default().updated(resources)
    }

    /// These limits after an update, which names only what changes: what it leaves out stays, and a limit of zero or
    /// less ends it.
    #[must_use]
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let limit = resources.memory().as_ref().and_then(LinuxMemory::limit);
        let memory = match limit {
            None => self.memory,
            Some(limit) => u64::try_from(limit).ok().filter(|bytes| (1..UNLIMITED).contains(bytes)),
        };
        let cpu = resources.cpu().as_ref();
        let milli_cpus = match cpu.and_then(LinuxCpu::quota) {
            None => self.milli_cpus,
            quota => milli_cpus(quota, cpu.and_then(LinuxCpu::period)),
        };
        let huge_pages = match resources.hugepage_limits() {
            None => self.huge_pages,
            Some(all) => all.iter().map(huge_bytes).fold(0, u64::saturating_add),
        };
        Self {
            memory,
            milli_cpus,
            huge_pages,
        }
    }

    /// Whichever is more, of each.
    #[must_use]
    pub fn larger(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            milli_cpus: self.milli_cpus.max(other.milli_cpus),
            huge_pages: self.huge_pages.max(other.huge_pages),
        }
    }
}

fn huge_bytes(limit: &LinuxHugepageLimit) -> u64 {
    u64::try_from(limit.limit()).unwrap_or(0)
}

fn step(plug: MemoryPlug) -> u64 {
    match plug {
        MemoryPlug::VirtioMem => BLOCK_MIB,
        MemoryPlug::PcDimm { .. } => DIMM_MIB,
    }
}

/// MiB to plug for so many bytes.
fn plugged(bytes: u64, plug: MemoryPlug) -> u64 {
    bytes.div_ceil(1 << 20).next_multiple_of(step(plug))
}

fn even(mib: u64) -> u64 {
    mib / BLOCK_MIB * BLOCK_MIB
}

/// Whole CPUs for so many thousandths.
fn whole(milli: u64) -> u32 {
    u32::try_from(milli.div_ceil(1000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
