//! Block devices of the host in a running VM.
//!
//! They hang on one virtio-scsi controller, which is plugged with the first of them: a VM without disks pays nothing,
//! and one with disks has any number behind one slot. Each is a target of its own, with unit 0.
//!
//! ```text
//! add_disk ─▶ (the first: device_add virtio-scsi-pci) ─▶ add-fd, blockdev-add, device_add scsi-hd
//! remove_disk ─▶ device_del ─▶ DEVICE_DELETED ─▶ blockdev-del, remove-fd
//! ```

use std::{collections::BTreeSet, os::fd::OwnedFd};

use crate::{args::ROOT_PORTS, error::VmError, qmp::QmpError, vm::Vm};

/// Id of the controller.
const CONTROLLER: &str = "scsi0";
/// Targets of a virtio-scsi controller (virtio 1.2, section 5.6.4, `max_target`).
const TARGETS: u8 = u8::MAX;

/// A block device that has been plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk(u8);

/// What a VM has.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    controller: bool,
    taken: BTreeSet<Disk>,
}

impl Disk {
    /// Its address on the guest's controller, `target:unit`.
    pub fn address(self) -> String {
        format!("{}:0", self.0)
    }

    fn id(self) -> String {
        format!("disk{}", self.0)
    }

    /// QEMU's number for the open file.
    fn file(self) -> u64 {
        u64::from(self.0)
    }
}

impl Vm {
    /// Plugs a block device of the host, opened for what the guest may do: `read_only` or both. QEMU has it when this
    /// returns; the guest finds it some milliseconds later, and says so to whoever listens there.
    ///
    /// # Errors
    /// When the VM has 255 already, or QEMU refuses.
    pub async fn add_disk(&self, device: OwnedFd, read_only: bool) -> Result<Disk, VmError> {
        let mut disks = self.disks.lock().await;
        if !disks.controller {
            self.qmp
                .add_scsi_controller(CONTROLLER, &format!("rp{ROOT_PORTS}"))
                .await?;
            disks.controller = true;
        }
        let free = (0..TARGETS).map(Disk).find(|disk| !disks.taken.contains(disk));
        let disk = free.ok_or(VmError::TooManyDisks(TARGETS))?;
        self.qmp.add_file(disk.file(), device).await?;
        let plugged = async {
            self.qmp.add_block_device(&disk.id(), disk.file(), read_only).await?;
            self.qmp.add_scsi_disk(&disk.id(), CONTROLLER, disk.0).await
        };
        if let Err(error) = plugged.await {
            // The first refusal is the one to tell: what follows only takes back what there is of it.
            let _ = self.forget(disk).await;
            return Err(error.into());
        }
        disks.taken.insert(disk);
        Ok(disk)
    }

    /// Takes a block device away; the guest is told, not asked. Nothing to do for one that is gone.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn remove_disk(&self, disk: Disk) -> Result<(), VmError> {
        let mut disks = self.disks.lock().await;
        if !disks.taken.contains(&disk) {
            return Ok(());
        }
        if !self.unplug(&disk.id()).await? {
            return Err(VmError::DiskKept(disk.address()));
        }
        self.forget(disk).await?;
        disks.taken.remove(&disk);
        Ok(())
    }

    /// Tells the guest that the device behind a disk has another size now, in bytes.
    ///
    /// # Errors
    /// When QEMU refuses, as when the device is smaller than that.
    pub async fn resize_disk(&self, disk: Disk, bytes: u64) -> Result<(), VmError> {
        Ok(self.qmp.resize_block_device(&disk.id(), bytes).await?)
    }

    async fn forget(&self, disk: Disk) -> Result<(), QmpError> {
        let deleted = self.qmp.delete_block_device(&disk.id()).await;
        deleted.and(self.qmp.remove_file(disk.file()).await)
    }
}
