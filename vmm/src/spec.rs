//! What a VM is made of: plain data that is checked once, before anything is started.

use std::path::PathBuf;

use crate::pcie::{MOST_FUNCTIONS, Passthrough};

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// Name of the VM in process lists: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The QEMU program, 7.2 or later.
    pub qemu: PathBuf,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Uncompressed kernel with a PVH entry (`vmlinux`), readable by everybody.
    pub kernel: PathBuf,
    /// Initial RAM disk (uncompressed cpio boots fastest), readable by everybody.
    pub initrd: PathBuf,
    /// Kernel parameters, appended to those that [`crate::args`] renders.
    pub kernel_params: Vec<String>,
    /// Virtual CPUs.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Memory,
    /// How the agent in the guest is reached.
    pub channel: Channel,
    /// The virtiofs device, if any.
    pub fs: Option<FsDevice>,
    /// Network interfaces, in the guest's order.
    pub nics: Vec<Nic>,
    /// Devices of the host.
    pub passthrough: Passthrough,
    /// Whether the guest's processors can run virtual machines themselves, where the host's can. Under KVM only.
    pub nested: bool,
    /// Whether QEMU confines itself by seccomp (`-sandbox on,…`).
    pub seccomp: bool,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's KVM, strictly: without it nothing starts.
    Kvm,
    /// QEMU's translator: ten times slower, runs anywhere.
    Tcg,
}

/// Numbers of virtual CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vcpus {
    /// Present at boot, at least 1.
    pub boot: u32,
    /// What [`crate::Vm::set_vcpus`] may grow to, at most 240.
    pub max: u32,
}

/// Sizes of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Present at boot, in MiB; even.
    pub boot_mib: u64,
    /// What [`crate::Vm::set_memory`] may grow to, in MiB; even.
    pub max_mib: u64,
    /// The device that grows it.
    pub plug: MemoryPlug,
}

/// The device that grows and shrinks guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryPlug {
    /// One virtio-mem device, in steps of 2 MiB.
    VirtioMem,
    /// ACPI memory modules, in steps of 128 MiB (the guest's memory block).
    PcDimm {
        /// How many modules may be plugged at one time, 1 to 255.
        slots: u32,
    },
}

/// How the agent in the guest is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channel {
    /// The host kernel's vsock device; the agent listens on port 1024.
    VhostVsock,
    /// A virtio-serial port named `sandpod.agent` that carries one stream for the VM's life.
    VirtioSerial,
    /// vsock served by a process on the host. Known, and refused: the one such server there is, vhost-device-vsock 0.3,
    /// stops for good when a connection reaches it while the guest's driver starts, and at guest writes above 32 KiB.
    VhostUserVsock,
}

/// A virtiofs device, served by [`crate::Virtiofsd`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsDevice {
    /// The source that the guest mounts, 1 to 36 bytes.
    pub tag: String,
    /// Entries of the request queue: a power of two, at most 1024.
    pub queue_size: u16,
}

/// A virtio network interface on a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Hardware address, `xx:xx:xx:xx:xx:xx`.
    pub mac: String,
    /// Largest packet in bytes, 68 to 65535; the guest's driver takes it over.
    pub mtu: u32,
}

/// Why a [`VmSpec`] cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The name would need quoting in QEMU's arguments.
    #[error("the VM's name {0:?} is not made of letters, digits, '-', '_' and '.' only")]
    Name(String),
    /// CPU counts contradict each other.
    #[error("{boot} vCPUs at boot and at most {max} are not within 1 <= boot <= max <= {MAX_VCPUS}")]
    Vcpus {
        /// vCPUs at boot.
        boot: u32,
        /// Most vCPUs.
        max: u32,
    },
    /// Memory sizes contradict each other.
    #[error(
        "{boot_mib} MiB of memory at boot and at most {max_mib} MiB are not even numbers within 64 <= boot <= max <= 16 TiB"
    )]
    Memory {
        /// MiB at boot.
        boot_mib: u64,
        /// Most MiB.
        max_mib: u64,
    },
    /// QEMU knows 256 slots, one of which it keeps.
    #[error("{0} memory slots are not within 1 to 255")]
    Slots(u32),
    /// A kernel parameter would break the command line apart.
    #[error("the kernel parameter {0:?} is empty or holds a control character")]
    KernelParam(String),
    /// The kernel cuts a longer line without a word.
    #[error("the kernel command line has {0} bytes, more than the kernel's 2047")]
    CommandLine(usize),
    /// The channel is one that loses data.
    #[error(
        "the channel vhost-user-vsock is not supported: use virtio-serial, or vhost-vsock where the host has /dev/vhost-vsock"
    )]
    VhostUserVsock,
    /// The tag does not fit the device's field.
    #[error("the virtiofs tag {0:?} is not 1 to 36 letters, digits, '-', '_' and '.'")]
    Tag(String),
    /// The queue size is not one that virtio allows.
    #[error("a virtiofs queue of {0} entries is not a power of two from 2 to 1024")]
    QueueSize(u16),
    /// The hardware address is not one.
    #[error("{0:?} is not a unicast hardware address like 02:00:00:00:00:01")]
    Mac(String),
    /// The MTU is out of range.
    #[error("an MTU of {0} is not within 68 to 65535")]
    Mtu(u32),
    /// More interfaces than the root bus has room for.
    #[error("{0} network interfaces are more than {MAX_NICS}")]
    Nics(usize),
    /// More devices of the host than there are root ports for.
    #[error("{0} PCI functions of the host are more than {MOST_FUNCTIONS}")]
    Functions(usize),
    /// Not the address of a PCI function.
    #[error("{0:?} is not the address of a PCI function like 0000:3b:00.0")]
    PciAddress(String),
}

/// SeaBIOS and q35 without an IOMMU address 255 CPUs; some numbers are not theirs to use.
const MAX_VCPUS: u32 = 240;
/// The root bus has 32 places and the other devices take some.
const MAX_NICS: usize = 8;
/// Far above any node, far below what makes sums overflow.
const MAX_MEMORY_MIB: u64 = 16 << 20;

impl VmSpec {
    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !is_plain(&self.name) {
            return Err(SpecError::Name(self.name.clone()));
        }
        let Vcpus { boot, max } = self.vcpus;
        if boot < 1 || boot > max || max > MAX_VCPUS {
            return Err(SpecError::Vcpus { boot, max });
        }
        self.memory.validate()?;
        for param in &self.kernel_params {
            if param.trim().is_empty() || param.chars().any(char::is_control) {
                return Err(SpecError::KernelParam(param.clone()));
            }
        }
        if self.channel == Channel::VhostUserVsock {
            return Err(SpecError::VhostUserVsock);
        }
        if let Some(fs) = &self.fs {
            fs.validate()?;
        }
        if self.nics.len() > MAX_NICS {
            return Err(SpecError::Nics(self.nics.len()));
        }
        self.nics.iter().try_for_each(Nic::validate)
    }
}

impl Memory {
    fn validate(&self) -> Result<(), SpecError> {
        let Memory {
            boot_mib,
            max_mib,
            plug,
        } = *self;
        let even = boot_mib % 2 == 0 && max_mib % 2 == 0;
        if !even || boot_mib < 64 || boot_mib > max_mib || max_mib > MAX_MEMORY_MIB {
            return Err(SpecError::Memory { boot_mib, max_mib });
        }
        match plug {
            MemoryPlug::PcDimm { slots } if !(1..=255).contains(&slots) => Err(SpecError::Slots(slots)),
            _ => Ok(()),
        }
    }
}

impl FsDevice {
    fn validate(&self) -> Result<(), SpecError> {
        if !is_plain(&self.tag) || self.tag.len() > 36 {
            return Err(SpecError::Tag(self.tag.clone()));
        }
        if !self.queue_size.is_power_of_two() || !(2..=1024).contains(&self.queue_size) {
            return Err(SpecError::QueueSize(self.queue_size));
        }
        Ok(())
    }
}

impl Nic {
    pub(crate) fn validate(&self) -> Result<(), SpecError> {
        let octets: Vec<_> = self.mac.split(':').map(parse_octet).collect();
        let unicast = octets.len() == 6 && octets.iter().all(Option::is_some) && octets[0].is_some_and(|o| o & 1 == 0);
        if !unicast {
            return Err(SpecError::Mac(self.mac.clone()));
        }
        if !(68..=65535).contains(&self.mtu) {
            return Err(SpecError::Mtu(self.mtu));
        }
        Ok(())
    }
}

fn parse_octet(text: &str) -> Option<u8> {
    let hex = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex { u8::from_str_radix(text, 16).ok() } else { None }
}

/// Names that go into QEMU's comma-separated options unquoted.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}
