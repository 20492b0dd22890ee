//! Devices of the host in a VM: each function alone behind a root port, in a layout that cannot be a wrong one.
//!
//! ```text
//! pcie.0 ─┬─ 1b.0 vfio-rp0 ── 00.0 the first function
//!         ├─ 1b.1 vfio-rp1 ── 00.0 the second
//!         ┆
//!         └─ 1e.7 vfio-rp31 ── 00.0 the last that there is room for
//! ```
//!
//! The ports are functions of few places, as in a real machine, and far from those that QEMU gives to what comes
//! without one.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{args::ROOT_PORTS, spec::SpecError};

/// The first place of the root bus that holds ports, and how many do.
const FIRST_SLOT: usize = 0x1b;
const SLOTS: usize = 4;
/// Functions of a place (PCI Local Bus 3.0, section 6.1).
const FUNCTIONS: usize = 8;
/// The most functions of the host that a VM can have.
pub const MOST_FUNCTIONS: usize = SLOTS * FUNCTIONS;
/// Bytes above all memory where QEMU lets q35's guest map devices, if nobody asks for more
/// (`Q35_PCI_HOST_HOLE64_SIZE_DEFAULT` of `hw/pci-host/q35.c`).
const WINDOW: u64 = 32 << 30;

/// Where a PCI function is on the host, `0000:3b:00.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    slot: u8,
    function: u8,
}

/// A PCI function of the host, bound to vfio-pci.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Bytes that its 64-bit regions take together.
    pub window: u64,
}

/// The functions of the host that a VM has from its start, in the order of their addresses. Which port each has follows
/// from that, so no port has two, and no function is there twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passthrough(BTreeMap<PciAddress, u64>);

impl Passthrough {
    /// All of these.
    ///
    /// # Errors
    /// More than there are ports for.
    pub fn new(functions: impl IntoIterator<Item = HostFunction>) -> Result<Passthrough, SpecError> {
        let functions = functions.into_iter();
        let all: BTreeMap<_, _> = functions.map(|function| (function.address, function.window)).collect();
        match all.len() {
            0..=MOST_FUNCTIONS => Ok(Passthrough(all)),
            more => Err(SpecError::Functions(more)),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where they are on the host.
    pub fn addresses(&self) -> impl Iterator<Item = PciAddress> {
        self.0.keys().copied()
    }

    /// GiB of address space that the guest needs above its memory, where that is more than it has anyway. Regions are
    /// aligned to their size, so each function takes the next power of two.
    pub(crate) fn window_gib(&self) -> Option<u64> {
        let aligned = self.0.values().map(|bytes| bytes.next_power_of_two());
        let all = aligned.fold(0, u64::saturating_add);
        let all = all.checked_next_power_of_two().unwrap_or(1 << 63);
        (all > WINDOW).then_some(all >> 30)
    }

    /// QEMU's devices, each port before what is behind it.
    pub(crate) fn devices(&self) -> impl Iterator<Item = String> {
        self.addresses().enumerate().flat_map(|(port, address)| {
            let (slot, function) = (FIRST_SLOT + port / FUNCTIONS, port % FUNCTIONS);
            // The first function of a place says that there are more.
            let more = if function == 0 { ",multifunction=on" } else { "" };
            // Unique among all ports of the machine.
            let number = ROOT_PORTS as usize + 1 + port;
            let root = format!(
                "pcie-root-port,id=vfio-rp{port},bus=pcie.0,addr={slot:02x}.{function}{more},chassis={number},slot={number}"
            );
            [root, format!("vfio-pci,host={address},bus=vfio-rp{port},addr=00.0")]
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress {
            domain,
            bus,
            slot,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{slot:02x}.{function}")
    }
}

impl FromStr for PciAddress {
    type Err = SpecError;

    /// Reads `0000:3b:00.1`, the name of a PCI function in sysfs.
    fn from_str(text: &str) -> Result<PciAddress, SpecError> {
        let hex = |text: &str, most: u32| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let number = u32::from_str_radix(text, 16).ok().filter(|_| digits);
            number.filter(|number| *number <= most)
        };
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (slot, function) = rest.split_once('.')?;
            Some(PciAddress {
                domain: hex(domain, u32::MAX)?,
                bus: u8::try_from(hex(bus, 0xff)?).ok()?,
                slot: u8::try_from(hex(slot, 0x1f)?).ok()?,
                function: u8::try_from(hex(function, 7)?).ok()?,
            })
        };
        parse().ok_or_else(|| SpecError::PciAddress(text.to_owned()))
    }
}
