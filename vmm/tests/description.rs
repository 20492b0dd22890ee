//! A VM's description: what is refused, and the QEMU arguments that the rest becomes.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "support/spec.rs"]
mod support;

use std::{ffi::OsString, fs, path::Path};

use proptest::prelude::*;
use support::{nic, pod};
use vmm::{
    args::{self, ChannelFd, FdNumbers},
    pcie::{HostFunction, Passthrough, PciAddress},
    spec::{Accelerator, Channel, FsDevice, Memory, MemoryPlug, Nic, Vcpus, VmSpec},
};

/// Set to rewrite `tests/golden/*.txt` instead of comparing with them; then read what git shows as changed.
const REWRITE: &str = "SANDPOD_REWRITE_GOLDEN";

/// File numbers as a start hands them out.
fn numbers(spec: &VmSpec) -> FdNumbers {
    FdNumbers {
        kernel: 10,
        initrd: 11,
        qmp: 12,
        console: 13,
        channel: match spec.channel {
            Channel::VhostVsock => ChannelFd::VhostVsock {
                fd: 14,
                cid: 4_000_000_000,
                ready_port: 1030,
            },
            _ => ChannelFd::VirtioSerial(14),
        },
        fs: spec.fs.as_ref().map(|_| 15),
        taps: (20..).take(spec.nics.len()).collect(),
        vhost_net: Vec::new(),
        tsc_khz: 2_596_122,
    }
}

fn rendered(spec: &VmSpec, fds: &FdNumbers) -> Vec<String> {
    spec.validate().unwrap();
    let text = OsString::into_string;
    args::render(spec, fds)
        .into_iter()
        .map(text)
        .map(Result::unwrap)
        .collect()
}

/// A flag and its value per line.
fn pairs(args: &[String]) -> String {
    let mut text = String::new();
    for arg in args {
        if !text.is_empty() {
            text.push(if arg.starts_with('-') { '\n' } else { ' ' });
        }
        text += arg;
    }
    text + "\n"
}

#[track_caller]
fn matches_golden(name: &str, spec: &VmSpec, fds: &FdNumbers) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    let now = pairs(&rendered(spec, fds));
    if std::env::var_os(REWRITE).is_some() {
        fs::write(&file, &now).unwrap();
    }
    let golden = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        golden == now,
        "{} does not say so; if it should, run this with {REWRITE}=1:\n{now}",
        file.display()
    );
}

#[test]
fn a_pod_with_kvm_and_kernel_vhost() {
    let mut spec = pod();
    spec.accelerator = Accelerator::Kvm;
    spec.channel = Channel::VhostVsock;
    spec.nics = vec![nic(1)];
    let mut fds = numbers(&spec);
    fds.vhost_net = vec![30];
    matches_golden("kvm-vhost-vsock-vhost-net", &spec, &fds);
}

#[test]
fn a_pod_with_tcg_and_virtio_serial() {
    let mut spec = pod();
    spec.nics = vec![nic(1)];
    matches_golden("tcg-virtio-serial", &spec, &numbers(&spec));
}

#[test]
fn memory_modules_instead_of_virtio_mem() {
    let mut spec = pod();
    spec.memory.plug = MemoryPlug::PcDimm { slots: 10 };
    matches_golden("pc-dimm", &spec, &numbers(&spec));
}

#[test]
fn memory_and_vcpus_that_stay_as_they_are() {
    let mut spec = pod();
    spec.memory.max_mib = spec.memory.boot_mib;
    spec.vcpus = Vcpus { boot: 4, max: 4 };
    matches_golden("static-size", &spec, &numbers(&spec));
}

#[test]
fn no_shared_folder() {
    let mut spec = pod();
    spec.fs = None;
    matches_golden("no-fs", &spec, &numbers(&spec));
}

#[test]
fn many_interfaces() {
    let mut spec = pod();
    spec.nics = (1..=8).map(nic).collect();
    spec.nics[7].mtu = 9000;
    matches_golden("many-nics", &spec, &numbers(&spec));
}

#[test]
fn kernel_parameters_come_last() {
    let mut spec = pod();
    let params = ["agent.log=debug", "systemd.show_status=\"a, b\"", "quiet=0"];
    spec.kernel_params = params.map(str::to_owned).to_vec();
    matches_golden("kernel-params", &spec, &numbers(&spec));
}

#[test]
fn a_guest_that_may_run_virtual_machines_itself() {
    let mut spec = pod();
    spec.accelerator = Accelerator::Kvm;
    spec.nested = true;
    matches_golden("nested", &spec, &numbers(&spec));
}

#[test]
fn without_qemus_own_sandbox() {
    let mut spec = pod();
    spec.seccomp = false;
    matches_golden("no-seccomp", &spec, &numbers(&spec));
}

fn function(address: &str, window: u64) -> HostFunction {
    HostFunction {
        address: address.parse().unwrap(),
        window,
    }
}

#[test]
fn a_card_of_the_host_with_two_functions() {
    let mut spec = pod();
    let functions = [function("0000:3b:00.0", 288 << 20), function("0000:3b:00.1", 0)];
    spec.passthrough = Passthrough::new(functions).unwrap();
    matches_golden("vfio-card", &spec, &numbers(&spec));
}

/// Nine large cards, the first of them named twice: the ninth port needs a second place, and all of them a larger
/// window.
#[test]
fn large_cards_of_the_host() {
    let mut spec = pod();
    spec.accelerator = Accelerator::Kvm;
    let mut functions: Vec<_> = (1..=9)
        .map(|bus| function(&format!("0001:{bus:02x}:00.0"), (128 << 30) + (32 << 20)))
        .collect();
    functions.push(functions[0]);
    spec.passthrough = Passthrough::new(functions).unwrap();
    matches_golden("vfio-large-cards", &spec, &numbers(&spec));
}

#[test]
fn devices_that_have_no_port_are_refused() {
    let many = |count: u32| (0..count).map(|n| function(&format!("0000:{:02x}:{:02x}.0", n / 32, n % 32), 0));
    assert_eq!(Passthrough::new(many(32)).unwrap().addresses().count(), 32);
    let sentence = "33 PCI functions of the host are more than 32";
    assert_eq!(Passthrough::new(many(33)).unwrap_err().to_string(), sentence);
    for text in [
        "",
        "3b:00.0",
        "0000:3b:20.0",
        "0000:3b:00.8",
        "0000:3b:00",
        "0000:+b:00.0",
        "0000:3b:00.0,x",
    ] {
        let sentence = format!("{text:?} is not the address of a PCI function like 0000:3b:00.0");
        assert_eq!(text.parse::<PciAddress>().unwrap_err().to_string(), sentence);
    }
    assert_eq!(
        "10000:E1:1f.7".parse::<PciAddress>().unwrap().to_string(),
        "10000:e1:1f.7"
    );
}

#[track_caller]
fn refused(spoil: impl FnOnce(&mut VmSpec), sentence: &str) {
    let mut spec = pod();
    spoil(&mut spec);
    assert_eq!(spec.validate().expect_err(sentence).to_string(), sentence);
}

#[test]
fn names_that_need_quotes_are_refused() {
    for name in ["", "a,b", "a b", "sandbox\n", "é"] {
        let sentence = format!("the VM's name {name:?} is not made of letters, digits, '-', '_' and '.' only");
        refused(|spec| spec.name = name.into(), &sentence);
    }
    for tag in ["", "a,b", "0123456789012345678901234567890123456"] {
        let sentence = format!("the virtiofs tag {tag:?} is not 1 to 36 letters, digits, '-', '_' and '.'");
        refused(|spec| spec.fs = fs_device(tag, 64), &sentence);
    }
    for param in ["", " ", "a\nb", "\0"] {
        let sentence = format!("the kernel parameter {param:?} is empty or holds a control character");
        refused(|spec| spec.kernel_params.push(param.into()), &sentence);
    }
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    for (boot, max) in [(0, 1), (3, 2), (1, 241)] {
        let sentence = format!("{boot} vCPUs at boot and at most {max} are not within 1 <= boot <= max <= 240");
        refused(|spec| spec.vcpus = Vcpus { boot, max }, &sentence);
    }
    for (boot_mib, max_mib) in [
        (2048, 1024),
        (62, 1024),
        (129, 1024),
        (128, 1025),
        (128, (16 << 20) + 2),
    ] {
        let sentence = format!(
            "{boot_mib} MiB of memory at boot and at most {max_mib} MiB are not even numbers within 64 <= boot <= max <= 16 TiB"
        );
        let resize = |spec: &mut VmSpec| (spec.memory.boot_mib, spec.memory.max_mib) = (boot_mib, max_mib);
        refused(resize, &sentence);
    }
    for slots in [0, 256] {
        let sentence = format!("{slots} memory slots are not within 1 to 255");
        refused(|spec| spec.memory.plug = MemoryPlug::PcDimm { slots }, &sentence);
    }
    for queue in [0, 1, 1000, 2048] {
        let sentence = format!("a virtiofs queue of {queue} entries is not a power of two from 2 to 1024");
        refused(|spec| spec.fs = fs_device("share", queue), &sentence);
    }
}

#[test]
fn interfaces_that_cannot_be_are_refused() {
    for mac in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:+1",
        "02:00:00:00:00:01:02",
        "03:00:00:00:00:01",
        "02-00-00-00-00-01",
    ] {
        let sentence = format!("{mac:?} is not a unicast hardware address like 02:00:00:00:00:01");
        let nics = vec![Nic {
            mac: mac.into(),
            ..nic(1)
        }];
        refused(|spec| spec.nics = nics, &sentence);
    }
    for mtu in [67, 65536] {
        let sentence = format!("an MTU of {mtu} is not within 68 to 65535");
        refused(|spec| spec.nics = vec![Nic { mtu, ..nic(1) }], &sentence);
    }
    refused(
        |spec| spec.nics = (1..=9).map(nic).collect(),
        "9 network interfaces are more than 8",
    );
}

#[test]
fn a_channel_that_loses_data_is_refused_with_what_to_use_instead() {
    refused(
        |spec| spec.channel = Channel::VhostUserVsock,
        "the channel vhost-user-vsock is not supported: use virtio-serial, or vhost-vsock where the host has /dev/vhost-vsock",
    );
}

fn fs_device(tag: &str, queue_size: u16) -> Option<FsDevice> {
    Some(FsDevice {
        tag: tag.into(),
        queue_size,
    })
}

/// Mostly valid names, with what QEMU's options would trip over.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![8 => "[-_.a-zA-Z0-9]{1,40}", 1 => "[a,=\"' %\\\\\n]{1,6}", 1 => any::<String>()]
}

fn spec() -> impl Strategy<Value = VmSpec> {
    let sizes = (
        1..6_u32,
        1..6_u32,
        30..3000_u64,
        0..3000_u64,
        prop::option::of(0..300_u32),
    );
    let texts = (name(), prop::option::of(name()), prop::collection::vec(name(), 0..4));
    let nics = prop::collection::vec(("0[02468ace](:[0-9a-f]{2}){5}", 66..65600_u32), 0..9);
    (sizes, texts, nics, 0..11_u32).prop_map(|(sizes, (name, tag, params), nics, queue)| {
        let mut spec = pod();
        spec.name = name;
        spec.vcpus = Vcpus {
            boot: sizes.0,
            max: sizes.0 + sizes.1,
        };
        spec.memory = Memory {
            boot_mib: sizes.2 * 2,
            max_mib: (sizes.2 + sizes.3) * 2,
            plug: match sizes.4 {
                Some(slots) => MemoryPlug::PcDimm { slots },
                None => MemoryPlug::VirtioMem,
            },
        };
        spec.fs = tag.and_then(|tag| fs_device(&tag, 1 << queue));
        spec.kernel_params = params;
        spec.nics = nics.into_iter().map(|(mac, mtu)| Nic { mac, mtu }).collect();
        spec
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, max_global_rejects: 100_000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_in_a_valid_description_breaks_an_argument_apart(spec in spec()) {
        prop_assume!(spec.validate().is_ok());
        let args = rendered(&spec, &numbers(&spec));
        let values = |flag: &str| {
            let with_flag = args.windows(2).filter(|pair| pair[0] == flag);
            with_flag.map(|pair| pair[1].clone()).collect::<Vec<_>>()
        };
        prop_assert_eq!(values("-name"), std::slice::from_ref(&spec.name));
        let line = &values("-append")[0];
        prop_assert!(!line.contains(char::is_control));
        prop_assert!(spec.kernel_params.iter().all(|param| line.contains(param.as_str())));
        for value in [values("-device"), values("-object"), values("-netdev"), values("-chardev")].concat() {
            // Only the first option of a list may go without a name, and none may be empty or quoted.
            let options: Vec<_> = value.split(',').collect();
            let named = options[1..].iter().all(|option| option.split('=').count() == 2 && !option.starts_with('='));
            prop_assert!(!options[0].is_empty() && named, "{}", value);
            prop_assert!(!value.contains(['"', '\'', ' ', '\\', '\n']), "{}", value);
        }
        let devices = values("-device");
        prop_assert_eq!(devices.iter().filter(|device| device.starts_with("virtio-net-pci")).count(), spec.nics.len());
        if let Some(fs) = &spec.fs {
            let tag = format!(",tag={},", fs.tag);
            prop_assert!(devices.iter().any(|device| device.contains(&tag)));
        }
    }
}
