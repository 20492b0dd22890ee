//! Descriptions to start from.

use vmm::pcie::Passthrough;
use vmm::spec::{Accelerator, Channel, FsDevice, Memory, MemoryPlug, Nic, Vcpus, VmSpec};

/// A pod's VM on a host with 16 GiB and 4 CPUs.
pub fn pod() -> VmSpec {
    VmSpec {
        name: "sandbox-3f2a".into(),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        accelerator: Accelerator::Tcg,
        kernel: "/opt/vmlinux".into(),
        initrd: "/opt/initrd".into(),
        kernel_params: Vec::new(),
        vcpus: Vcpus { boot: 1, max: 4 },
        memory: Memory {
            boot_mib: 2048,
            max_mib: 16384,
            plug: MemoryPlug::VirtioMem,
        },
        channel: Channel::VirtioSerial,
        fs: Some(FsDevice {
            tag: "share".into(),
            queue_size: 1024,
        }),
        nics: Vec::new(),
        passthrough: Passthrough::default(),
        nested: false,
        seccomp: true,
    }
}

/// The interface number `n`.
#[allow(dead_code, reason = "not every user has a network")]
pub fn nic(n: u8) -> Nic {
    Nic {
        mac: format!("02:00:00:00:00:{n:02x}"),
        mtu: 1500,
    }
}
