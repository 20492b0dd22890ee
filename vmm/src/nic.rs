//! A network interface that comes to a running VM: there is one place for one.

use std::os::fd::OwnedFd;

use crate::{error::VmError, spec::Nic, vm::Vm};

/// The root port that waits for it.
const PORT: &str = "rp1";

impl Vm {
    /// Plugs an interface on its tap, with an open `/dev/vhost-net` where the host has it. QEMU has it when this
    /// returns; the guest finds it some milliseconds later.
    ///
    /// # Errors
    /// When the VM has been given one already, the interface is not one, or QEMU refuses.
    pub async fn add_nic(&self, nic: &Nic, tap: OwnedFd, vhost_net: Option<OwnedFd>) -> Result<(), VmError> {
        nic.validate()?;
        let mut taken = self.late_nic.lock().await;
        if *taken {
            return Err(VmError::NoPlaceForInterface);
        }
        self.qmp.add_tap("late", tap, vhost_net).await?;
        if let Err(error) = self.qmp.add_nic("late", nic, PORT).await {
            // The first refusal is the one to tell.
            let _ = self.qmp.delete_tap("late").await;
            return Err(error.into());
        }
        *taken = true;
        Ok(())
    }
}
