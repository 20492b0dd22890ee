//! A driver for the virtio-fs device that sends whatever it is told to send.
//!
//! ```text
//! configuration space ──window──▶ registers         pages of this process ◀──DMA──▶ the request queue
//! ```
//!
//! The kernel's driver is taken off the device first. The registers are reached through the window that each virtio
//! device has in its PCI configuration space, so nothing of the device is mapped. Source: virtio 1.3, sections 2.7
//! (split virtqueues), 4.1.4 (PCI capabilities) and 5.11 (file system device).

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use nix::sys::mman::{MlockAllFlags, mlockall};
use tests::{
    failure::{Failure, Result, Trying, claim},
    wait::Bell,
};
use vm_memory::{Bytes, VolatileMemory, mmap::MmapRegion};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// A descriptor goes on with the one that `next` names.
pub const NEXT: u16 = 1;
/// The device may write to the descriptor's buffer.
pub const WRITE: u16 = 2;

/// Entries of the queue: as many descriptors as one page holds.
const SIZE: u16 = 256;
/// Pages before the buffers: the descriptors, what the driver has made available, what the device has used.
const RINGS: usize = 3;
/// How long an answer is waited for without a pause.
const BUSY: Duration = Duration::from_millis(20);

/// How long it may take at all; the machine of a server that has ended is ended long before.
const ANSWER: Duration = Duration::from_secs(15);

/// The vendor and the device of a virtio file system.
const FILE_SYSTEM: (&str, &str) = ("0x1af4", "0x105a");
/// The second queue; the first takes urgent messages.
const REQUESTS: u16 = 1;
/// The status of a driver that has found the device, knows it, and has agreed on its features.
const AGREED: u8 = 1 | 2 | 8;
/// The status of a driver that is ready.
const READY: u8 = AGREED | 4;

/// One entry of the descriptor table.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// The guest's physical address of a buffer.
    pub address: u64,
    /// Its bytes.
    pub length: u32,
    /// [`NEXT`] and [`WRITE`].
    pub flags: u16,
    /// The next descriptor's number.
    pub next: u16,
}

/// Pages of this process whose physical addresses are known, and stay.
struct Memory {
    region: MmapRegion,
    frames: Vec<u64>,
}

impl Memory {
    fn new(pages: usize) -> Result<Memory> {
        // Locked pages are not swapped out, and with this they are not moved either.
        fs::write("/proc/sys/vm/compact_unevictable_allowed", "0").trying("keeping pages where they are")?;
        mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).trying("locking memory")?;
        let region: MmapRegion = MmapRegion::new(pages * PAGE).map_err(wrong("mapping memory"))?;
        let pagemap = File::open("/proc/self/pagemap").trying("opening pagemap")?;
        let first = region.as_ptr() as u64 / PAGE as u64;
        let mut memory = Memory {
            region,
            frames: Vec::new(),
        };
        for page in 0..pages {
            memory.write(page * PAGE, &[0; PAGE])?;
            let mut entry = [0; 8];
            let place = (first + page as u64) * 8;
            pagemap.read_exact_at(&mut entry, place).trying("reading pagemap")?;
            // Bits 0 to 54 are the frame's number: Documentation/admin-guide/mm/pagemap.rst of Linux.
            let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
            claim(frame != 0, "pagemap does not tell where a page is")?;
            memory.frames.push(frame * PAGE as u64);
        }
        Ok(memory)
    }

    fn write(&self, place: usize, bytes: &[u8]) -> Result {
        let all = self.region.as_volatile_slice();
        all.write_slice(bytes, place).map_err(wrong("writing memory"))
    }

    fn read(&self, place: usize, bytes: &mut [u8]) -> Result {
        let all = self.region.as_volatile_slice();
        all.read_slice(bytes, place).map_err(wrong("reading memory"))
    }

    /// The ring's index, with everything that was written before it.
    fn index(&self, place: usize) -> Result<u16> {
        let all = self.region.as_volatile_slice();
        all.load(place, Ordering::Acquire).map_err(wrong("reading a ring"))
    }

    fn set_index(&self, place: usize, index: u16) -> Result {
        let all = self.region.as_volatile_slice();
        all.store(index, place, Ordering::Release)
            .map_err(wrong("writing a ring"))
    }
}

/// The device's registers.
struct Registers {
    config: File,
    /// Where the window is in the configuration space.
    window: u64,
    common: u32,
    notify: u32,
    /// Bytes between the doorbells of two queues.
    multiplier: u32,
}

impl Registers {
    /// Takes the device from the kernel.
    fn take() -> Result<Registers> {
        let folder = find()?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::write(folder.join("driver/unbind"), &name).trying(format!("taking {name} from its driver"))?;
        let config = OpenOptions::new().read(true).write(true).open(folder.join("config"));
        let config = config.trying(format!("opening the configuration space of {name}"))?;
        let mut registers = Registers {
            config,
            window: 0,
            common: 0,
            notify: 0,
            multiplier: 0,
        };
        registers.find_capabilities()?;
        // The device may use memory, and interrupts nobody.
        let command: u16 = 2 | 4 | 1 << 10;
        registers.write(4, &command.to_le_bytes())?;
        Ok(registers)
    }

    fn find_capabilities(&mut self) -> Result {
        let mut place = u64::from(self.read::<1>(0x34)?[0]);
        while place != 0 {
            let [id, next, _, kind] = self.read::<4>(place)?;
            let offset = u32::from_le_bytes(self.read(place + 8)?);
            match (id, kind) {
                (9, 1) => self.common = offset,
                (9, 2) => {
                    self.notify = offset;
                    self.multiplier = u32::from_le_bytes(self.read(place + 16)?);
                }
                (9, 5) => self.window = place,
                _ => {}
            }
            place = u64::from(next);
        }
        claim(self.window != 0, "the device has no window in its configuration space")
    }

    fn read<const N: usize>(&self, place: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let read = self.config.read_exact_at(&mut bytes, place);
        read.trying("reading the configuration space").map(|()| bytes)
    }

    fn write(&self, place: u64, bytes: &[u8]) -> Result {
        let written = self.config.write_all_at(bytes, place);
        written.trying("writing the configuration space")
    }

    fn aim(&self, register: u32, width: usize) -> Result {
        self.write(self.window + 8, &register.to_le_bytes())?;
        self.write(self.window + 12, &u32::try_from(width).unwrap_or(0).to_le_bytes())
    }

    fn get<const N: usize>(&self, register: u32) -> Result<[u8; N]> {
        self.aim(register, N)?;
        self.read(self.window + 16)
    }

    fn set(&self, register: u32, value: &[u8]) -> Result {
        self.aim(register, value.len())?;
        self.write(self.window + 16, value)
    }

    fn set_status(&self, status: u8) -> Result {
        self.set(self.common + 20, &[status])?;
        let seen = self.get::<1>(self.common + 20)?[0];
        claim(
            seen == status,
            format!("the device says {seen:#x} to the status {status:#x}"),
        )
    }

    /// Makes the device serve the request queue at these addresses. Returns its doorbell.
    fn start(&self, rings: &[u64]) -> Result<u32> {
        self.set_status(0)?;
        self.set_status(1 | 2)?;
        // Of all features only "version 1", bit 32.
        for (half, bits) in [(0_u32, 0_u32), (1, 1)] {
            self.set(self.common + 8, &half.to_le_bytes())?;
            self.set(self.common + 12, &bits.to_le_bytes())?;
        }
        self.set_status(AGREED)?;
        self.set(self.common + 22, &REQUESTS.to_le_bytes())?;
        self.set(self.common + 24, &SIZE.to_le_bytes())?;
        for (register, address) in [32, 40, 48].into_iter().zip(rings) {
            let (low, high) = ((*address as u32).to_le_bytes(), ((*address >> 32) as u32).to_le_bytes());
            self.set(self.common + register, &low)?;
            self.set(self.common + register + 4, &high)?;
        }
        self.set(self.common + 28, &1_u16.to_le_bytes())?;
        let doorbell = u16::from_le_bytes(self.get(self.common + 30)?);
        self.set_status(READY)?;
        Ok(self.notify + u32::from(doorbell) * self.multiplier)
    }
}

fn find() -> Result<PathBuf> {
    let devices = fs::read_dir("/sys/bus/pci/devices").trying("looking for PCI devices")?;
    let is = |folder: &PathBuf| {
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        (text("vendor").trim_end(), text("device").trim_end()) == FILE_SYSTEM
    };
    let found = devices.flatten().map(|entry| entry.path()).find(is);
    found.ok_or_else(|| Failure::Claim("there is no virtio-fs device".into()))
}

/// The request queue.
pub struct Queue {
    memory: Memory,
    registers: Registers,
    doorbell: u32,
    /// Requests so far.
    sent: u16,
}

impl Queue {
    /// Takes the device from the kernel and starts it.
    ///
    /// # Errors
    /// There is none, or it does not do what it should.
    pub fn take() -> Result<Queue> {
        let registers = Registers::take()?;
        let memory = Memory::new(RINGS + usize::from(SIZE))?;
        let doorbell = registers.start(&memory.frames[..RINGS])?;
        Ok(Queue {
            memory,
            registers,
            doorbell,
            sent: 0,
        })
    }

    /// The physical address of a page for buffers.
    pub fn page(&self, number: usize) -> u64 {
        self.memory.frames[RINGS + number]
    }

    /// Fills pages for buffers, from this one on.
    ///
    /// # Errors
    /// There are not so many.
    pub fn fill(&self, page: usize, bytes: &[u8]) -> Result {
        self.memory.write((RINGS + page) * PAGE, bytes)
    }

    /// Sends a message and waits for its answer, of so many bytes at most. There is one buffer per page.
    ///
    /// # Errors
    /// They do not fit the queue.
    pub fn exchange(&mut self, message: &[u8], room: usize) -> Result<Vec<u8>> {
        let pages = message.len().div_ceil(PAGE);
        self.fill(0, message)?;
        let lengths = |all: usize| (0..all).step_by(PAGE).map(move |done| (all - done).min(PAGE));
        let out = lengths(message.len()).map(|length| (length, 0));
        let buffers = out.chain(lengths(room).map(|length| (length, WRITE)));
        let mut chain: Vec<_> = (0..)
            .zip(buffers)
            .map(|(number, (length, flags))| Descriptor {
                address: self.page(usize::from(number)),
                length: u32::try_from(length).unwrap_or(0),
                flags: flags | NEXT,
                next: number + 1,
            })
            .collect();
        if let Some(last) = chain.last_mut() {
            last.flags &= WRITE;
        }
        let used = self.send(&chain)?.min(room);
        let mut answer = vec![0; used];
        self.memory.read((RINGS + pages) * PAGE, &mut answer)?;
        Ok(answer)
    }

    /// Sends a chain as it is, and waits for it to come back. Returns how many bytes the device says it has written.
    ///
    /// # Errors
    /// It does not fit the queue.
    pub fn send(&mut self, chain: &[Descriptor]) -> Result<usize> {
        claim(chain.len() <= usize::from(SIZE), "the chain is longer than the queue")?;
        let mut table = Vec::new();
        for descriptor in chain {
            table.extend(descriptor.address.to_le_bytes());
            table.extend(descriptor.length.to_le_bytes());
            table.extend(descriptor.flags.to_le_bytes());
            table.extend(descriptor.next.to_le_bytes());
        }
        self.memory.write(0, &table)?;
        let slot = usize::from(self.sent % SIZE);
        // The chain begins with descriptor 0.
        self.memory.write(PAGE + 4 + 2 * slot, &[0; 2])?;
        self.sent = self.sent.wrapping_add(1);
        self.memory.set_index(PAGE + 2, self.sent)?;
        self.registers.set(self.doorbell, &REQUESTS.to_le_bytes())?;
        self.back()?;
        let mut written = [0; 4];
        self.memory.read(2 * PAGE + 4 + 8 * slot + 4, &mut written)?;
        Ok(u32::from_le_bytes(written) as usize)
    }

    /// Waits until the device is done with everything.
    fn back(&self) -> Result {
        let done = || match self.memory.index(2 * PAGE + 2) {
            Ok(index) if index == self.sent => Ok(()),
            Ok(index) => Err(format!("{index} of {} answers", self.sent)),
            Err(failure) => Err(failure.to_string()),
        };
        let begun = Instant::now();
        while begun.elapsed() < BUSY {
            if done().is_ok() {
                return Ok(());
            }
            thread::yield_now();
        }
        Bell::default().until("the device's answer", ANSWER, done)
    }
}

fn wrong<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Failure {
    move |error| Failure::Claim(format!("{what}: {error}"))
}
