use super::*;
use proptest::prelude::*;

const HOST: Host = Host {
    memory_mib: 16_001,
    cpus: 8,
};
const GUEST: Kernel = Kernel {
    cpus: Some(240),
    pci: None,
};
const GIB: u64 = 1 << 30;

fn config(text: &str) -> Config {
    Config::parse(text, &[]).unwrap()
}

fn limits(memory: u64, milli: u64) -> Limits {
    Limits {
        memory: (memory > 0).then_some(memory),
        milli_cpus: (milli > 0).then_some(milli),
        huge_pages: 0,
    }
}

/// (configuration, the pod's hint, the containers) and the VM: boot and target MiB, boot and target vCPUs.
#[test]
fn the_cases_users_have_met() {
    let tcg = "[hypervisor.qemu]\ndefault_memory = 256\n";
    let dimms = "[hypervisor.qemu]\nenable_virtio_mem = false\n";
    let odd = "[hypervisor.qemu]\nenable_virtio_mem = false\ndefault_memory = 2000\n";
    let two = "[hypervisor.qemu]\ndefault_vcpus = 2\n";
    let small = "[hypervisor.qemu]\ndefault_maxvcpus = 2\ndefault_maxmemory = 4096\n";
    let fixed = "[runtime]\nstatic_sandbox_resource_mgmt = true\n";
    let all = "[hypervisor.qemu]\ndefault_vcpus = -1\n";
    let none = limits(0, 0);
    type Case<'a> = (
        &'a str,
        &'a str,
        Option<Limits>,
        &'a [Limits],
        (u64, u64),
        (u32, u32),
        bool,
    );
    let cases: &[Case<'_>] = &[
        (
            "no limit: the VM of the configuration",
            "",
            None,
            &[none],
            (2048, 2048),
            (1, 1),
            false,
        ),
        ("no container yet", "", None, &[], (2048, 2048), (1, 1), false),
        (
            "a limit is what the container can use, beside the guest itself",
            "",
            None,
            &[limits(4 * GIB, 0)],
            (2048, 6144),
            (1, 1),
            false,
        ),
        (
            "a CPU limit alone does not change the memory",
            "",
            None,
            &[limits(0, 500)],
            (2048, 2048),
            (1, 1),
            false,
        ),
        (
            "a limit above the host's RAM is clamped",
            "",
            None,
            &[limits(1_024_000 << 20, 0)],
            (2048, 16_000),
            (1, 1),
            true,
        ),
        (
            "so is a default above it",
            "[hypervisor.qemu]\ndefault_memory = 64000",
            None,
            &[none],
            (16_000, 16_000),
            (1, 1),
            false,
        ),
        (
            "a byte takes a block",
            tcg,
            None,
            &[limits(1, 0)],
            (256, 258),
            (1, 1),
            false,
        ),
        (
            "the sum is rounded, not each",
            tcg,
            None,
            &[limits(GIB + 1, 0), limits(GIB + 1, 0)],
            (256, 256 + 2050),
            (1, 1),
            false,
        ),
        (
            "a byte takes a DIMM where DIMMs are plugged",
            dimms,
            None,
            &[limits(1, 0)],
            (2048, 2176),
            (1, 1),
            false,
        ),
        (
            "DIMMs fill the host too",
            dimms,
            None,
            &[limits(64 * GIB, 0)],
            (2048, 16_000),
            (1, 1),
            true,
        ),
        (
            "cut off at the maximum, DIMMs stay whole",
            odd,
            None,
            &[limits(64 * GIB, 0)],
            (2000, 2000 + 13_952),
            (1, 1),
            true,
        ),
        (
            "250m + 250m is one CPU, not two",
            "",
            None,
            &[limits(0, 250), limits(0, 250)],
            (2048, 2048),
            (1, 1),
            false,
        ),
        (
            "1500m + 500m is two CPUs, not three",
            "",
            None,
            &[limits(0, 1500), limits(0, 500)],
            (2048, 2048),
            (1, 2),
            false,
        ),
        (
            "2 CPUs are 2 vCPUs, not one more",
            "",
            None,
            &[limits(0, 2000)],
            (2048, 2048),
            (1, 2),
            false,
        ),
        (
            "2100m are 3 vCPUs",
            "",
            None,
            &[limits(0, 2100)],
            (2048, 2048),
            (1, 3),
            false,
        ),
        (
            "fewer than the default stay the default",
            two,
            None,
            &[limits(0, 500)],
            (2048, 2048),
            (2, 2),
            false,
        ),
        (
            "more CPUs than the host has are clamped",
            "",
            None,
            &[limits(0, 64_000)],
            (2048, 2048),
            (1, 8),
            true,
        ),
        ("all of the host's", all, None, &[none], (2048, 2048), (8, 8), false),
        (
            "the node's maxima hold",
            small,
            None,
            &[limits(8 * GIB, 4000)],
            (2048, 4096),
            (1, 2),
            true,
        ),
        (
            "what the CRI says alone plugs nothing",
            "",
            Some(limits(GIB, 2000)),
            &[],
            (2048, 2048),
            (1, 1),
            false,
        ),
        (
            "limits that were raised since the pod began",
            "",
            Some(limits(GIB, 2000)),
            &[limits(2 * GIB, 4000)],
            (2048, 4096),
            (1, 4),
            false,
        ),
        (
            "a pod that said nothing of itself",
            "",
            Some(none),
            &[limits(2 * GIB, 4000)],
            (2048, 4096),
            (1, 4),
            false,
        ),
        (
            "fixed: all of it at boot",
            fixed,
            Some(limits(GIB, 1500)),
            &[limits(GIB, 1500)],
            (3072, 3072),
            (2, 2),
            false,
        ),
        (
            "fixed without a hint: the default",
            fixed,
            None,
            &[limits(GIB, 0)],
            (2048, 2048),
            (1, 1),
            false,
        ),
        (
            "fixed with a CPU limit only: the default memory",
            fixed,
            Some(limits(0, 3000)),
            &[none],
            (2048, 2048),
            (3, 3),
            false,
        ),
    ];
    for (name, text, pod, containers, memory, vcpus, clamped) in cases {
        let sizing = Sizing::on(HOST, &GUEST, &config(text), *pod);
        let target = sizing.target(*containers);
        assert_eq!((sizing.memory().boot_mib, target.memory_mib), *memory, "{name}");
        assert_eq!((sizing.boot_vcpus(), target.vcpus), *vcpus, "{name}");
        assert_eq!(target.clamped, *clamped, "{name}");
    }
}

/// (CPUs of the host, of the guest's kernel, of the configuration) and the most vCPUs of a VM.
#[test]
fn a_large_host_is_no_larger_than_what_the_guests_kernel_takes() {
    let kernel = |cpus| Kernel { cpus, pci: None };
    let cases = [
        (128, Some(64), "", 64),
        (128, Some(240), "", 128),
        (512, Some(240), "", 240),
        // Debian's.
        (512, Some(8192), "", 240),
        // Nothing is known of a foreign kernel.
        (512, None, "", 240),
        (128, Some(64), "default_maxvcpus = 96", 64),
        (128, Some(64), "default_maxvcpus = 16", 16),
        (128, Some(0), "", 1),
    ];
    for (cpus, known, text, most) in cases {
        let host = Host {
            memory_mib: 16_001,
            cpus,
        };
        let config = config(&format!("[hypervisor.qemu]\n{text}"));
        let sizing = Sizing::on(host, &kernel(known), &config, None);
        assert_eq!(sizing.vcpus().max, most, "{cpus} {known:?} {text}");
        let target = sizing.target(&[limits(0, 96_000)]);
        assert_eq!(
            (target.vcpus, target.clamped),
            (most.min(96), most < 96),
            "{cpus} {known:?} {text}"
        );
    }
}

#[test]
fn a_fixed_size_that_was_cut_is_told() {
    let fixed = config("[runtime]\nstatic_sandbox_resource_mgmt = true\n");
    let cut = |memory, milli| Sizing::on(HOST, &GUEST, &fixed, Some(limits(memory, milli))).is_cut();
    assert!(!cut(4 * GIB, 8000) && cut(64 * GIB, 0) && cut(0, 9000));
    assert!(!Sizing::on(HOST, &GUEST, &fixed, None).is_cut());
}

#[test]
fn limits_are_read_from_a_spec_as_the_kernel_would() {
    let of = |json: &str| Limits::of_resources(&serde_json::from_str(json).unwrap());
    assert_eq!(
        of(r#"{"memory":{"limit":1048576},"cpu":{"quota":150000,"period":100000}}"#),
        limits(1 << 20, 1500)
    );
    assert_eq!(
        of(r#"{"cpu":{"quota":33333}}"#),
        limits(0, 334),
        "the kernel's default period is 100 ms"
    );
    assert_eq!(
        of(r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"period":100000}}"#),
        limits(0, 0)
    );
    assert_eq!(
        of(r#"{"memory":{"limit":9223372036854771712}}"#),
        limits(0, 0),
        "unlimited, as cgroup v1 writes it"
    );
    assert_eq!(of("{}"), limits(0, 0));
}

#[test]
fn an_update_changes_what_it_names() {
    let update = |json: &str| limits(GIB, 1000).updated(&serde_json::from_str(json).unwrap());
    assert_eq!(update(r#"{"cpu":{"quota":200000,"period":100000}}"#), limits(GIB, 2000));
    assert_eq!(
        update(r#"{"memory":{"limit":2147483648},"cpu":{"shares":512}}"#),
        limits(2 * GIB, 1000)
    );
    assert_eq!(update(r#"{"memory":{"limit":-1}}"#), limits(0, 1000));
}

#[test]
fn this_host_has_memory_and_cpus() {
    let host = Host::read().unwrap();
    assert!(host.memory_mib > 64 && host.cpus >= 1);
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (
        proptest::option::of(0..UNLIMITED),
        proptest::option::of(0..u64::MAX),
        0..u64::MAX,
    )
        .prop_map(|(memory, milli_cpus, huge_pages)| Limits {
            memory,
            milli_cpus,
            huge_pages,
        })
}

fn any_sizing() -> impl Strategy<Value = Sizing> {
    (1u64..1 << 24, 1u32..1024, 128u64..1 << 22, -1i64..512, 0u32..512, 0u64..1 << 22, any::<(bool, bool)>(), proptest::option::of(any_limits()),
     proptest::option::of(0u32..9000))
        .prop_map(|(memory_mib, cpus, boot, vcpus, max_vcpus, max_mib, (virtio, fixed), pod, kernel)| {
            let text = format!(
                "[hypervisor.qemu]\ndefault_memory = {boot}\ndefault_vcpus = {vcpus}\ndefault_maxvcpus = {max_vcpus}\n\
                 default_maxmemory = {max_mib}\nenable_virtio_mem = {virtio}\n[runtime]\nstatic_sandbox_resource_mgmt = {fixed}"
            );
            Sizing::on(Host { memory_mib, cpus }, &Kernel { cpus: kernel, pci: None }, &config(&text), pod)
        })
}

proptest! {
    #[test]
    fn a_vm_always_fits_the_host_and_itself(sizing in any_sizing(), containers in prop::collection::vec(any_limits(), 0..5)) {
        let (memory, vcpus) = (sizing.memory(), sizing.vcpus());
        prop_assert!(memory.boot_mib % 2 == 0 && memory.max_mib % 2 == 0);
        prop_assert!(2 <= memory.boot_mib && memory.boot_mib <= memory.max_mib);
        prop_assert!(1 <= vcpus.boot && vcpus.boot <= vcpus.max && vcpus.max <= MOST_VCPUS);
        let target = sizing.target(&containers);
        prop_assert!(memory.boot_mib <= target.memory_mib && target.memory_mib <= memory.max_mib);
        prop_assert!(vcpus.boot <= target.vcpus && target.vcpus <= vcpus.max);
        prop_assert_eq!((target.memory_mib - memory.boot_mib) % step(sizing.plug), 0);
    }

    #[test]
    fn more_containers_never_make_a_smaller_vm(sizing in any_sizing(), mut containers in prop::collection::vec(any_limits(), 1..5)) {
        let all = sizing.target(&containers);
        let fewer = sizing.target(&containers[1..]);
        prop_assert!(fewer.memory_mib <= all.memory_mib && fewer.vcpus <= all.vcpus);
        containers.reverse();
        prop_assert_eq!(sizing.target(&containers), all);
        containers.push(Limits::default());
        prop_assert_eq!(sizing.target(&containers), all);
    }

    #[test]
    fn what_is_not_clamped_is_there_in_full(virtio: bool, sizes in prop::collection::vec((0..4 * GIB, 0u64..3000), 0..4)) {
        let sizing = Sizing::on(HOST, &GUEST, &config(&format!("[hypervisor.qemu]\nenable_virtio_mem = {virtio}")), None);
        let containers: Vec<_> = sizes.iter().map(|(memory, milli)| limits(*memory, *milli)).collect();
        let target = sizing.target(&containers);
        prop_assume!(!target.clamped);
        let bytes: u64 = sizes.iter().map(|(memory, _)| memory).sum();
        let milli: u64 = sizes.iter().map(|(_, milli)| milli).sum();
        let plugged = (target.memory_mib - sizing.boot_mib) << 20;
        // Rounded once: less than one step, and less than one CPU, is wasted.
        prop_assert!(bytes <= plugged && plugged < bytes + (step(sizing.plug) << 20));
        prop_assert!(milli <= u64::from(target.vcpus) * 1000 && u64::from(target.vcpus) * 1000 < milli.max(1) + 1000);
    }
}
