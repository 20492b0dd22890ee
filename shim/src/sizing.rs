//! How large a VM is: one pure function from the configuration, the host, the CRI's hints and the containers' limits.
//!
//! ```text
//! memory  boot = default_memory     target = boot + limits of the containers that exist, rounded up once   max = the host's
//! vCPUs   boot = default_vcpus      target = CPU limits of the containers, summed, rounded up once, at least boot
//! ```
//!
//! A limit beyond the host does not fail a pod: it is clamped. What the CRI says about the whole pod (see
//! [`crate::annotations::pod_resources`]) counts only when `static_sandbox_resource_mgmt` asks for it: it is what the pod began with, and Kubernetes raises the limits of pods
//! that run.

pub use crate::annotations::PodResources as Limits;
use crate::annotations::milli_cpus;
use crate::config::Config;
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, Spec};
use std::io;
use vmm::spec::{Memory, MemoryPlug, Vcpus};

/// virtio-mem's block, and what every size is rounded to.
const BLOCK_MIB: u64 = 2;
/// The guest's memory block: a DIMM of less cannot be used.
const DIMM_MIB: u64 = 128;
/// A limit from here on is one of the many spellings of "unlimited" (cgroup v1 writes the largest page-aligned `i64`).
const UNLIMITED: u64 = 1 << 62;
/// The most that QEMU's q35 and the VM's description take.
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
        Ok(Self::on(Host::read()?, config, pod))
    }

    /// Settles the bounds of a VM: `pod` is what the CRI says about all containers together, if it says anything.
    pub fn on(host: Host, config: &Config, pod: Option<Limits>) -> Self {
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

        let most_vcpus = settings
            .max_vcpus
            .unwrap_or(host.cpus)
            .clamp(1, host.cpus.min(MOST_VCPUS));
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
        };
        if config.runtime.static_sizing {
            let pod = pod.unwrap_or_default();
            let said_mib = pod.memory.map(|bytes| boot_mib.saturating_add(plugged(bytes, plug)));
            let said_vcpus = pod.milli_cpus.map(|milli| whole(milli).max(boot_vcpus));
            sizing.boot_mib = said_mib.map_or(boot_mib, |mib| mib.min(most_mib));
            sizing.max_mib = sizing.boot_mib;
            sizing.boot_vcpus = said_vcpus.map_or(boot_vcpus, |vcpus| vcpus.min(most_vcpus));
            sizing.max_vcpus = sizing.boot_vcpus;
        }
        sizing
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

    /// These limits after an update, which names only what changes: what it leaves out stays, and a limit of zero or less ends it.
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOST: Host = Host {
        memory_mib: 16_001,
        cpus: 8,
    };
    const GIB: u64 = 1 << 30;

    fn config(text: &str) -> Config {
        Config::parse(text, &[]).unwrap()
    }

    fn limits(memory: u64, milli: u64) -> Limits {
        Limits {
            memory: (memory > 0).then_some(memory),
            milli_cpus: (milli > 0).then_some(milli),
            huge_pages: 0,
        }
    }

    /// (configuration, the pod's hint, the containers) and the VM: boot and target MiB, boot and target vCPUs.
    #[test]
    fn the_cases_users_have_met() {
        let tcg = "[hypervisor.qemu]\ndefault_memory = 256\n";
        let dimms = "[hypervisor.qemu]\nenable_virtio_mem = false\n";
        let odd = "[hypervisor.qemu]\nenable_virtio_mem = false\ndefault_memory = 2000\n";
        let two = "[hypervisor.qemu]\ndefault_vcpus = 2\n";
        let small = "[hypervisor.qemu]\ndefault_maxvcpus = 2\ndefault_maxmemory = 4096\n";
        let fixed = "[runtime]\nstatic_sandbox_resource_mgmt = true\n";
        let all = "[hypervisor.qemu]\ndefault_vcpus = -1\n";
        let none = limits(0, 0);
        type Case<'a> = (
            &'a str,
            &'a str,
            Option<Limits>,
            &'a [Limits],
            (u64, u64),
            (u32, u32),
            bool,
        );
        let cases: &[Case<'_>] = &[
            (
                "no limit: the VM of the configuration",
                "",
                None,
                &[none],
                (2048, 2048),
                (1, 1),
                false,
            ),
            ("no container yet", "", None, &[], (2048, 2048), (1, 1), false),
            (
                "a limit is what the container can use, beside the guest itself",
                "",
                None,
                &[limits(4 * GIB, 0)],
                (2048, 6144),
                (1, 1),
                false,
            ),
            (
                "a CPU limit alone does not change the memory",
                "",
                None,
                &[limits(0, 500)],
                (2048, 2048),
                (1, 1),
                false,
            ),
            (
                "a limit above the host's RAM is clamped",
                "",
                None,
                &[limits(1_024_000 << 20, 0)],
                (2048, 16_000),
                (1, 1),
                true,
            ),
            (
                "so is a default above it",
                "[hypervisor.qemu]\ndefault_memory = 64000",
                None,
                &[none],
                (16_000, 16_000),
                (1, 1),
                false,
            ),
            (
                "a byte takes a block",
                tcg,
                None,
                &[limits(1, 0)],
                (256, 258),
                (1, 1),
                false,
            ),
            (
                "the sum is rounded, not each",
                tcg,
                None,
                &[limits(GIB + 1, 0), limits(GIB + 1, 0)],
                (256, 256 + 2050),
                (1, 1),
                false,
            ),
            (
                "a byte takes a DIMM where DIMMs are plugged",
                dimms,
                None,
                &[limits(1, 0)],
                (2048, 2176),
                (1, 1),
                false,
            ),
            (
                "DIMMs fill the host too",
                dimms,
                None,
                &[limits(64 * GIB, 0)],
                (2048, 16_000),
                (1, 1),
                true,
            ),
            (
                "cut off at the maximum, DIMMs stay whole",
                odd,
                None,
                &[limits(64 * GIB, 0)],
                (2000, 2000 + 13_952),
                (1, 1),
                true,
            ),
            (
                "250m + 250m is one CPU, not two",
                "",
                None,
                &[limits(0, 250), limits(0, 250)],
                (2048, 2048),
                (1, 1),
                false,
            ),
            (
                "1500m + 500m is two CPUs, not three",
                "",
                None,
                &[limits(0, 1500), limits(0, 500)],
                (2048, 2048),
                (1, 2),
                false,
            ),
            (
                "2 CPUs are 2 vCPUs, not one more",
                "",
                None,
                &[limits(0, 2000)],
                (2048, 2048),
                (1, 2),
                false,
            ),
            (
                "2100m are 3 vCPUs",
                "",
                None,
                &[limits(0, 2100)],
                (2048, 2048),
                (1, 3),
                false,
            ),
            (
                "fewer than the default stay the default",
                two,
                None,
                &[limits(0, 500)],
                (2048, 2048),
                (2, 2),
                false,
            ),
            (
                "more CPUs than the host has are clamped",
                "",
                None,
                &[limits(0, 64_000)],
                (2048, 2048),
                (1, 8),
                true,
            ),
            ("all of the host's", all, None, &[none], (2048, 2048), (8, 8), false),
            (
                "the node's maxima hold",
                small,
                None,
                &[limits(8 * GIB, 4000)],
                (2048, 4096),
                (1, 2),
                true,
            ),
            (
                "what the CRI says alone plugs nothing",
                "",
                Some(limits(GIB, 2000)),
                &[],
                (2048, 2048),
                (1, 1),
                false,
            ),
            (
                "limits that were raised since the pod began",
                "",
                Some(limits(GIB, 2000)),
                &[limits(2 * GIB, 4000)],
                (2048, 4096),
                (1, 4),
                false,
            ),
            (
                "a pod that said nothing of itself",
                "",
                Some(none),
                &[limits(2 * GIB, 4000)],
                (2048, 4096),
                (1, 4),
                false,
            ),
            (
                "fixed: all of it at boot",
                fixed,
                Some(limits(GIB, 1500)),
                &[limits(GIB, 1500)],
                (3072, 3072),
                (2, 2),
                false,
            ),
            (
                "fixed without a hint: the default",
                fixed,
                None,
                &[limits(GIB, 0)],
                (2048, 2048),
                (1, 1),
                false,
            ),
            (
                "fixed with a CPU limit only: the default memory",
                fixed,
                Some(limits(0, 3000)),
                &[none],
                (2048, 2048),
                (3, 3),
                false,
            ),
        ];
        for (name, text, pod, containers, memory, vcpus, clamped) in cases {
            let sizing = Sizing::on(HOST, &config(text), *pod);
            let target = sizing.target(*containers);
            assert_eq!((sizing.memory().boot_mib, target.memory_mib), *memory, "{name}");
            assert_eq!((sizing.boot_vcpus(), target.vcpus), *vcpus, "{name}");
            assert_eq!(target.clamped, *clamped, "{name}");
        }
    }

    #[test]
    fn limits_are_read_from_a_spec_as_the_kernel_would() {
        let of = |json: &str| Limits::of_resources(&serde_json::from_str(json).unwrap());
        assert_eq!(
            of(r#"{"memory":{"limit":1048576},"cpu":{"quota":150000,"period":100000}}"#),
            limits(1 << 20, 1500)
        );
        assert_eq!(
            of(r#"{"cpu":{"quota":33333}}"#),
            limits(0, 334),
            "the kernel's default period is 100 ms"
        );
        assert_eq!(
            of(r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"period":100000}}"#),
            limits(0, 0)
        );
        assert_eq!(
            of(r#"{"memory":{"limit":9223372036854771712}}"#),
            limits(0, 0),
            "unlimited, as cgroup v1 writes it"
        );
        assert_eq!(of("{}"), limits(0, 0));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let update = |json: &str| limits(GIB, 1000).updated(&serde_json::from_str(json).unwrap());
        assert_eq!(update(r#"{"cpu":{"quota":200000,"period":100000}}"#), limits(GIB, 2000));
        assert_eq!(
            update(r#"{"memory":{"limit":2147483648},"cpu":{"shares":512}}"#),
            limits(2 * GIB, 1000)
        );
        assert_eq!(update(r#"{"memory":{"limit":-1}}"#), limits(0, 1000));
    }

    #[test]
    fn this_host_has_memory_and_cpus() {
        let host = Host::read().unwrap();
        assert!(host.memory_mib > 64 && host.cpus >= 1);
    }

    fn any_limits() -> impl Strategy<Value = Limits> {
        (
            proptest::option::of(0..UNLIMITED),
            proptest::option::of(0..u64::MAX),
            0..u64::MAX,
        )
            .prop_map(|(memory, milli_cpus, huge_pages)| Limits {
                memory,
                milli_cpus,
                huge_pages,
            })
    }

    fn any_sizing() -> impl Strategy<Value = Sizing> {
        (1u64..1 << 24, 1u32..1024, 128u64..1 << 22, -1i64..512, 0u32..512, 0u64..1 << 22, any::<(bool, bool)>(), proptest::option::of(any_limits()))
            .prop_map(|(memory_mib, cpus, boot, vcpus, max_vcpus, max_mib, (virtio, fixed), pod)| {
                let text = format!(
                    "[hypervisor.qemu]\ndefault_memory = {boot}\ndefault_vcpus = {vcpus}\ndefault_maxvcpus = {max_vcpus}\n\
                     default_maxmemory = {max_mib}\nenable_virtio_mem = {virtio}\n[runtime]\nstatic_sandbox_resource_mgmt = {fixed}"
                );
                Sizing::on(Host { memory_mib, cpus }, &config(&text), pod)
            })
    }

    proptest! {
        #[test]
        fn a_vm_always_fits_the_host_and_itself(sizing in any_sizing(), containers in prop::collection::vec(any_limits(), 0..5)) {
            let (memory, vcpus) = (sizing.memory(), sizing.vcpus());
            prop_assert!(memory.boot_mib % 2 == 0 && memory.max_mib % 2 == 0);
            prop_assert!(2 <= memory.boot_mib && memory.boot_mib <= memory.max_mib);
            prop_assert!(1 <= vcpus.boot && vcpus.boot <= vcpus.max && vcpus.max <= MOST_VCPUS);
            let target = sizing.target(&containers);
            prop_assert!(memory.boot_mib <= target.memory_mib && target.memory_mib <= memory.max_mib);
            prop_assert!(vcpus.boot <= target.vcpus && target.vcpus <= vcpus.max);
            prop_assert_eq!((target.memory_mib - memory.boot_mib) % step(sizing.plug), 0);
        }

        #[test]
        fn more_containers_never_make_a_smaller_vm(sizing in any_sizing(), mut containers in prop::collection::vec(any_limits(), 1..5)) {
            let all = sizing.target(&containers);
            let fewer = sizing.target(&containers[1..]);
            prop_assert!(fewer.memory_mib <= all.memory_mib && fewer.vcpus <= all.vcpus);
            containers.reverse();
            prop_assert_eq!(sizing.target(&containers), all);
            containers.push(Limits::default());
            prop_assert_eq!(sizing.target(&containers), all);
        }

        #[test]
        fn what_is_not_clamped_is_there_in_full(virtio: bool, sizes in prop::collection::vec((0..4 * GIB, 0u64..3000), 0..4)) {
            let sizing = Sizing::on(HOST, &config(&format!("[hypervisor.qemu]\nenable_virtio_mem = {virtio}")), None);
            let containers: Vec<_> = sizes.iter().map(|(memory, milli)| limits(*memory, *milli)).collect();
            let target = sizing.target(&containers);
            prop_assume!(!target.clamped);
            let bytes: u64 = sizes.iter().map(|(memory, _)| memory).sum();
            let milli: u64 = sizes.iter().map(|(_, milli)| milli).sum();
            let plugged = (target.memory_mib - sizing.boot_mib) << 20;
            // Rounded once: less than one step, and less than one CPU, is wasted.
            prop_assert!(bytes <= plugged && plugged < bytes + (step(sizing.plug) << 20));
            prop_assert!(milli <= u64::from(target.vcpus) * 1000 && u64::from(target.vcpus) * 1000 < milli.max(1) + 1000);
        }
    }
}
