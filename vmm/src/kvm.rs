//! Whether this node's KVM can run our VMs.

use std::{fs, io};

use kvm_ioctls::{Cap, Kvm};

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The CPU's flags, which the kernel shows only where hardware virtualisation can be used.
    #[error("the CPU offers no hardware virtualisation: neither vmx nor svm is among its flags in /proc/cpuinfo")]
    NoVirtualisation,
    /// `/proc/cpuinfo` is unreadable.
    #[error("cannot read /proc/cpuinfo: {0}")]
    CpuInfo(io::Error),
    /// The device cannot be opened.
    #[error("cannot open /dev/kvm: {0}")]
    Device(io::Error),
    /// The API is not the one that is stable since Linux 2.6.22.
    #[error("/dev/kvm speaks version {0} of its interface instead of 12")]
    Version(i32),
    /// A capability that QEMU relies on.
    #[error("/dev/kvm lacks the capability {0}")]
    Capability(&'static str),
}

/// What QEMU asks of the kernel for a q35 machine with in-kernel interrupt controllers and vhost.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
];

/// Whether KVM works here. A `/dev/kvm` that opens proves nothing: software KVMs offer it too, and cannot boot a guest.
///
/// # Errors
/// The first thing that is missing, in a sentence.
pub fn kvm_ready() -> Result<(), KvmError> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(KvmError::CpuInfo)?;
    if !virtualises(&cpuinfo) {
        return Err(KvmError::NoVirtualisation);
    }
    let kvm = Kvm::new().map_err(|error| KvmError::Device(io::Error::from_raw_os_error(error.errno())))?;
    if kvm.get_api_version() != 12 {
        return Err(KvmError::Version(kvm.get_api_version()));
    }
    match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(()),
    }
}

fn virtualises(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags");
    flags
        .flat_map(|(_, flags)| flags.split_whitespace())
        .any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cpus_own_flags_count() {
        assert!(virtualises("processor\t: 0\nflags\t\t: fpu vme vmx ssse3\n"));
        assert!(virtualises("flags\t\t: fpu svm\n"));
        assert!(!virtualises(
            "model name\t: vmx svm\nflags\t\t: fpu svm_lock vmxoff\nvmx flags\t: vnmi\n"
        ));
        assert!(!virtualises(""));
    }
}
