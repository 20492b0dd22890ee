//! Whether this node's KVM can run our VMs.

use std::{ffi::CString, fs, io, os::unix::ffi::OsStrExt, path::Path};

use kvm_ioctls::{Cap, Kvm};

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The CPU's flags, which the kernel shows only where hardware virtualisation can be used.
    #[error(
        "the CPU offers no hardware virtualisation, neither vmx nor svm in /proc/cpuinfo; enable it in the firmware, or take a bare-metal machine"
    )]
    NoVirtualisation,
    /// `/proc/cpuinfo` is unreadable.
    #[error("cannot read /proc/cpuinfo: {0}")]
    CpuInfo(io::Error),
    /// The device is not there.
    #[error("there is no /dev/kvm, although the CPU can virtualise: load the kernel module kvm_intel or kvm_amd")]
    NoDevice,
    /// The device is there for others.
    #[error("/dev/kvm may not be opened by this user: {0}")]
    Forbidden(io::Error),
    /// The device cannot be opened for some other reason.
    #[error("cannot open /dev/kvm: {0}")]
    Device(io::Error),
    /// What opens is not KVM, or its API is not the one that is stable since Linux 2.6.22.
    #[error("/dev/kvm speaks version {0} of its interface instead of 12")]
    Version(i32),
    /// A capability that QEMU relies on.
    #[error("/dev/kvm lacks the capability {0}")]
    Capability(&'static str),
}

impl From<io::Error> for KvmError {
    /// Of the device's opening.
    fn from(error: io::Error) -> KvmError {
        match error.kind() {
            // Without the module a device node may still be there, and opening it says ENXIO or ENODEV.
            io::ErrorKind::NotFound => KvmError::NoDevice,
            _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => KvmError::NoDevice,
            io::ErrorKind::PermissionDenied => KvmError::Forbidden(error),
            _ => KvmError::Device(error),
        }
    }
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
    kvm_ready_below(Path::new("/"))
}

/// As [`kvm_ready`], for a node whose root folder, with its `/dev`, is at `root`.
///
/// # Errors
/// Those of [`kvm_ready`].
pub fn kvm_ready_below(root: &Path) -> Result<(), KvmError> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(KvmError::CpuInfo)?;
    let device = root.join("dev/kvm");
    // A path that no kernel could open is one to no device.
    let device = CString::new(device.as_os_str().as_bytes()).map_err(|_| KvmError::NoDevice)?;
    check(&cpuinfo, device)
}

fn check(cpuinfo: &str, device: CString) -> Result<(), KvmError> {
    if !virtualises(cpuinfo) {
        return Err(KvmError::NoVirtualisation);
    }
    let opened = Kvm::new_with_path(device);
    let kvm = opened.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
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

    const CAPABLE: &str = "flags\t\t: fpu vmx\n";

    #[test]
    fn each_thing_that_is_missing_has_its_sentence() {
        let said = |result: Result<(), KvmError>| result.unwrap_err().to_string();
        assert_eq!(
            said(check("flags : fpu\n", c"/dev/null".into())),
            "the CPU offers no hardware virtualisation, neither vmx nor svm in /proc/cpuinfo; enable it in the firmware, or take a bare-metal machine"
        );
        let absent =
            "there is no /dev/kvm, although the CPU can virtualise: load the kernel module kvm_intel or kvm_amd";
        assert_eq!(said(check(CAPABLE, c"/nonexistent/kvm".into())), absent);
        assert_eq!(
            said(check(CAPABLE, c"/dev/null".into())),
            "/dev/kvm speaks version -1 of its interface instead of 12"
        );
        for (errno, sentence) in [
            (libc::ENODEV, absent),
            (
                libc::EACCES,
                "/dev/kvm may not be opened by this user: Permission denied (os error 13)",
            ),
            (
                libc::EPERM,
                "/dev/kvm may not be opened by this user: Operation not permitted (os error 1)",
            ),
            (libc::EMFILE, "cannot open /dev/kvm: Too many open files (os error 24)"),
        ] {
            assert_eq!(
                KvmError::from(io::Error::from_raw_os_error(errno)).to_string(),
                sentence
            );
        }
        assert_eq!(
            KvmError::Capability("KVM_CAP_IRQFD").to_string(),
            "/dev/kvm lacks the capability KVM_CAP_IRQFD"
        );
    }

    #[test]
    fn a_device_that_opens_does_not_make_up_for_the_cpus_flags() {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
        if !virtualises(&cpuinfo) {
            assert!(matches!(kvm_ready(), Err(KvmError::NoVirtualisation)));
        }
    }
}
