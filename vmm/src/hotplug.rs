//! Growing and shrinking a running VM.
//!
//! QEMU keeps the books: what is plugged is asked of it each time, never remembered here.
//!
//! ```text
//! set_memory ─▶ virtio-mem: set requested-size ─▶ look … until size = requested
//!            └▶ pc-dimm: object-add, device_add ─▶ ACPI_DEVICE_OST     (the guest has it)
//!                        device_del ─▶ DEVICE_DELETED ─▶ object-del    (the guest gave it back)
//! ```

use std::time::Duration;

use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    args::{VIRTIO_MEM_BLOCK, VIRTIO_MEM_ID},
    error::VmError,
    qmp::{CpuSlot, Event, MemoryDevice, PERIPHERAL, QmpError},
    spec::{Accelerator, Memory, MemoryPlug},
    vm::Vm,
};

/// How long a guest may do nothing visible before it is taken at its word.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest may go on to take and give back. A true one needs a second for some 8 GiB.
const LONGEST: Duration = Duration::from_secs(60);
/// How often to look at a virtio-mem device. It tells of changes by itself, but QEMU holds back all that follow the
/// first within a second, and guests need less than a tenth of that.
const LOOK: Duration = Duration::from_millis(5);
/// A guest's memory block: the least that ACPI memory hot-plug can add (x86, less than 64 GiB at boot).
const DIMM_STEP_MIB: u64 = 128;
const MIB: u64 = 1 << 20;

/// Guest memory as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryState {
    /// There since boot, in MiB.
    pub boot_mib: u64,
    /// On offer beyond that, in MiB.
    pub requested_mib: u64,
    /// What the guest has taken of it, in MiB. After a shrink it may be more than requested: the guest gives back what
    /// it can spare, and 2 MiB of virtio-mem stay behind.
    pub plugged_mib: u64,
}

impl Vm {
    /// Grows or shrinks guest memory to `total_mib` (boot + plugged), rounded up to what the device can do, and waits
    /// until the guest has taken it, which it puts to use within milliseconds, or given it back. A guest that does
    /// nothing for 3 s is taken at its word: the state says what it has.
    ///
    /// # Errors
    /// When `total_mib` is out of the VM's range, every slot for memory modules is taken, or QEMU refuses.
    pub async fn set_memory(&self, total_mib: u64) -> Result<MemoryState, VmError> {
        self.set_memory_while(total_mib, |_| true).await
    }

    /// The same, and no more waiting for the guest, nor a further module taken back, once `go_on` says so of the state.
    ///
    /// # Errors
    /// Those of [`Vm::set_memory`].
    pub async fn set_memory_while(
        &self,
        total_mib: u64,
        go_on: impl Fn(&MemoryState) -> bool,
    ) -> Result<MemoryState, VmError> {
        let Memory {
            boot_mib,
            max_mib,
            plug,
        } = self.spec.memory;
        if !(boot_mib..=max_mib).contains(&total_mib) {
            return Err(VmError::MemoryRange {
                asked_mib: total_mib,
                boot_mib,
                max_mib,
            });
        }
        let _one_at_a_time = self.resizing.lock().await;
        let wanted_mib = total_mib - boot_mib;
        if max_mib == boot_mib {
            return self.memory().await;
        }
        match plug {
            MemoryPlug::VirtioMem => self.resize_virtio_mem(wanted_mib, go_on).await,
            MemoryPlug::PcDimm { slots } => self.resize_dimms(wanted_mib, slots, go_on).await,
        }
    }

    /// Guest memory as it is.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn memory(&self) -> Result<MemoryState, VmError> {
        let (mut requested, mut plugged) = (0u64, 0u64);
        for device in self.qmp.memory_devices().await? {
            let (offered, taken) = match device {
                MemoryDevice::VirtioMem { size, requested_size } => (requested_size, size),
                MemoryDevice::Dimm { size, .. } => (size, size),
                MemoryDevice::Other => (0, 0),
            };
            requested = requested.saturating_add(offered);
            plugged = plugged.saturating_add(taken);
        }
        let boot_mib = self.spec.memory.boot_mib;
        Ok(MemoryState {
            boot_mib,
            requested_mib: requested / MIB,
            plugged_mib: plugged / MIB,
        })
    }

    /// Grows or shrinks the VM to `n` vCPUs and returns how many it has then. The vCPUs of the boot stay. A new vCPU
    /// is present in the guest, but whoever is in there has to bring it online. An emulated VM keeps what it has: QEMU
    /// 7.2 with its translator dies of a vCPU that comes after one has gone.
    ///
    /// # Errors
    /// When `n` is more than the VM can have, or QEMU refuses.
    pub async fn set_vcpus(&self, n: u32) -> Result<u32, VmError> {
        self.set_vcpus_while(n, || true).await
    }

    /// The same, and no further vCPU once it is not `wanted_still` any more.
    ///
    /// # Errors
    /// Those of [`Vm::set_vcpus`].
    pub async fn set_vcpus_while(&self, n: u32, wanted_still: impl Fn() -> bool) -> Result<u32, VmError> {
        let max = self.spec.vcpus.max;
        if n > max {
            return Err(VmError::TooManyVcpus { asked: n, max });
        }
        let _one_at_a_time = self.resizing.lock().await;
        let slots = self.qmp.cpus().await?;
        let present = slots.iter().filter(|slot| slot.qom_path.is_some()).count();
        let wanted = n as usize;
        if wanted > present {
            // QEMU lists the last place first.
            let free = slots.iter().rev().filter(|slot| slot.qom_path.is_none());
            for slot in free.take(wanted - present).take_while(|_| wanted_still()) {
                self.add_vcpu(slot).await?;
            }
        } else if self.spec.accelerator == Accelerator::Kvm {
            let plugged = slots
                .iter()
                .filter_map(|slot| slot.qom_path.as_deref()?.strip_prefix(PERIPHERAL));
            for id in plugged.take(present - wanted).take_while(|_| wanted_still()) {
                self.unplug(id).await?;
            }
        }
        let present = self
            .qmp
            .cpus()
            .await?
            .iter()
            .filter(|slot| slot.qom_path.is_some())
            .count();
        Ok(u32::try_from(present).unwrap_or(u32::MAX))
    }

    async fn resize_virtio_mem(
        &self,
        wanted_mib: u64,
        go_on: impl Fn(&MemoryState) -> bool,
    ) -> Result<MemoryState, VmError> {
        let before = self.memory().await?;
        let bytes = (wanted_mib * MIB).next_multiple_of(VIRTIO_MEM_BLOCK);
        self.qmp
            .set_property(&format!("{PERIPHERAL}{VIRTIO_MEM_ID}"), "requested-size", bytes)
            .await?;
        let mut state = self.memory().await?;
        let end = Instant::now() + LONGEST;
        let mut give_up = Instant::now() + PATIENCE;
        while go_on(&state) && !state.settled(&before) && Instant::now() < give_up.min(end) {
            sleep(LOOK).await;
            let now = self.memory().await?;
            if now != state {
                give_up = Instant::now() + PATIENCE;
            }
            state = now;
        }
        Ok(state)
    }

    async fn resize_dimms(
        &self,
        wanted_mib: u64,
        slots: u32,
        go_on: impl Fn(&MemoryState) -> bool,
    ) -> Result<MemoryState, VmError> {
        let mut dimms = self.dimms().await?;
        let plugged = dimms.iter().fold(0u64, |sum, (_, mib)| sum.saturating_add(*mib));
        let wanted = wanted_mib.next_multiple_of(DIMM_STEP_MIB);
        if wanted > plugged {
            // Rounding up may not lead past the end.
            let most = self.spec.memory.max_mib - self.spec.memory.boot_mib;
            let room = most.saturating_sub(plugged);
            let missing = (wanted - plugged).min(room / DIMM_STEP_MIB * DIMM_STEP_MIB);
            let free = (0..slots)
                .map(dimm_id)
                .find(|id| dimms.iter().all(|(taken, _)| taken != id));
            if missing > 0 {
                self.add_dimm(&free.ok_or(VmError::NoSlot(slots))?, missing).await?;
            }
        } else {
            let mut spare = plugged - wanted;
            // The largest that fit first: fewer steps for the guest.
            dimms.sort_by_key(|(_, mib)| std::cmp::Reverse(*mib));
            for (id, mib) in dimms {
                if !go_on(&self.memory().await?) {
                    break;
                }
                if mib <= spare && self.unplug(&id).await? {
                    self.qmp.delete_object(&backend(&id)).await?;
                    spare -= mib;
                }
            }
        }
        self.memory().await
    }

    async fn dimms(&self) -> Result<Vec<(String, u64)>, VmError> {
        let devices = self.qmp.memory_devices().await?.into_iter();
        Ok(devices
            .filter_map(|device| match device {
                MemoryDevice::Dimm { id: Some(id), size } => Some((id, size / MIB)),
                _ => None,
            })
            .collect())
    }

    async fn add_dimm(&self, id: &str, mib: u64) -> Result<(), VmError> {
        let mut events = self.qmp.events()?;
        self.qmp.add_memory(&backend(id), mib * MIB).await?;
        if let Err(error) = self.qmp.add_dimm(id, &backend(id)).await {
            self.qmp.delete_object(&backend(id)).await?;
            return Err(error.into());
        }
        self.report(&mut events, id).await
    }

    async fn add_vcpu(&self, slot: &CpuSlot) -> Result<(), VmError> {
        let id = vcpu_id(slot);
        let mut events = self.qmp.events()?;
        self.qmp.add_cpu(&id, slot).await?;
        self.report(&mut events, &id).await
    }

    /// Waits for the guest's word that it has dealt with a new device.
    async fn report(&self, events: &mut Receiver<Event>, id: &str) -> Result<(), VmError> {
        let told = wait_for(events, Instant::now() + PATIENCE, |event| match event {
            Event::GuestReport { device, done } if device == id => Some(done),
            _ => None,
        });
        if told.await? != Some(true) {
            tracing::warn!(device = id, "the guest has not taken a device that was plugged");
        }
        Ok(())
    }

    /// Asks the guest to give a device back; whether it did.
    pub(crate) async fn unplug(&self, id: &str) -> Result<bool, VmError> {
        let mut events = self.qmp.events()?;
        self.qmp.delete_device(id).await?;
        let gone = wait_for(&mut events, Instant::now() + PATIENCE, |event| match event {
            Event::DeviceDeleted(device) if device == id => Some(true),
            Event::DeviceKept(device) if device == id => Some(false),
            Event::GuestReport { device, done: false } if device == id => Some(false),
            _ => None,
        });
        Ok(gone.await?.unwrap_or(false))
    }
}

impl MemoryState {
    /// What the guest has in all, in MiB.
    pub fn total_mib(&self) -> u64 {
        self.boot_mib.saturating_add(self.plugged_mib)
    }

    /// Whether the guest is done. A shrink ends one block above its goal: Linux keeps the last one.
    fn settled(&self, before: &MemoryState) -> bool {
        let left = if before.plugged_mib > self.requested_mib {
            VIRTIO_MEM_BLOCK / MIB
        } else {
            0
        };
        (self.requested_mib..=self.requested_mib + left).contains(&self.plugged_mib)
    }
}

fn dimm_id(slot: u32) -> String {
    format!("dimm{slot}")
}

/// Id of the memory behind a module.
fn backend(dimm: &str) -> String {
    format!("{dimm}-ram")
}

fn vcpu_id(slot: &CpuSlot) -> String {
    let place: Vec<String> = ["socket-id", "core-id", "thread-id"]
        .iter()
        .map(|key| slot.props.get(*key).map_or(String::new(), |value| value.to_string()))
        .collect();
    format!("cpu-{}", place.join("-"))
}

/// The first event that `pick` takes, or nothing at `deadline`.
async fn wait_for<T>(
    events: &mut Receiver<Event>,
    deadline: Instant,
    mut pick: impl FnMut(Event) -> Option<T>,
) -> Result<Option<T>, QmpError> {
    loop {
        match timeout_at(deadline, events.recv()).await {
            Err(_) => return Ok(None),
            Ok(Ok(event)) => {
                if let Some(picked) = pick(event) {
                    return Ok(Some(picked));
                }
            }
            Ok(Err(RecvError::Lagged(_))) => {}
            Ok(Err(RecvError::Closed)) => return Err(QmpError::Closed),
        }
    }
}
