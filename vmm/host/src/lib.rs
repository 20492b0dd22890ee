//! What a virtual machine needs of its host: KVM that can run one, and the devices that make it faster.

mod device;
mod kvm;

pub use device::{VHOST_NET, VHOST_VSOCK, open_device};
pub use kvm::{KvmError, kvm_ready, kvm_ready_below};
