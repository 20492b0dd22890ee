//! Errors.
use crate::spec::SpecError;

/// Why a VM could not be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The description contradicts itself.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Not there yet.
    #[error("this part of the VM is not built yet")]
    Unready,
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not there yet.
    #[error("the KVM check is not built yet")]
    Unready,
}
