//! Memory and vCPUs that come and go.

use std::{
    future::Future,
    panic::Location,
    sync::Arc,
    time::{Duration, Instant},
};

use vmm::{
    MemoryState, VmError,
    spec::{Memory, MemoryPlug, Vcpus},
};

use crate::{
    Story,
    machine::{Kit, Machine},
    stories,
};

pub fn stories() -> impl IntoIterator<Item = Story> {
    stories![
        most_of_the_memory_is_the_pods,
        virtio_mem_comes_and_goes,
        virtio_mem_takes_memory_in_use_along,
        what_the_guest_cannot_spare_stays,
        a_shrink_is_left_for_who_needs_the_memory,
        memory_modules_come_and_go,
        memory_modules_run_out_of_slots,
        memory_that_cannot_change,
        vcpus_come_and_stay,
    ]
}

/// What a change of size may take, on a machine that is busy with other stories.
const SOON: Duration = Duration::from_secs(2);

/// The result of a change that is to be done in [`SOON`].
#[track_caller]
fn soon<T>(change: impl Future<Output = Result<T, VmError>>) -> impl Future<Output = T> {
    let whose = Location::caller();
    async move {
        let began = Instant::now();
        let changed = change
            .await
            .unwrap_or_else(|error| panic!("the change at {whose}: {error}"));
        let took = began.elapsed();
        assert!(took < SOON, "the change at {whose} took {took:?}");
        changed
    }
}

/// Waits until the guest counts so much memory. It puts what it has taken to use block by block.
async fn counted(machine: &mut Machine, expected: u64) {
    let began = Instant::now();
    loop {
        let found = machine.meminfo("MemTotal").await;
        // 16 KiB in each MiB describe its pages, and come out of the same memory.
        if found.abs_diff(expected) <= expected / 64 {
            return;
        }
        assert!(began.elapsed() < SOON, "{found} MiB instead of {expected} MiB");
    }
}

async fn most_of_the_memory_is_the_pods(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let available = machine.meminfo("MemAvailable").await;
    assert!(available >= 1950, "{available} of 2048 MiB");
    machine.end().await;
}

async fn virtio_mem_comes_and_goes(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let before = machine.meminfo("MemTotal").await;
    let state = |requested_mib, plugged_mib| MemoryState {
        boot_mib: 2048,
        requested_mib,
        plugged_mib,
    };
    assert_eq!(machine.vm.memory().await.unwrap(), state(0, 0));

    assert_eq!(soon(machine.vm.set_memory(2048 + 512)).await, state(512, 512));
    counted(&mut machine, before + 512).await;
    // An odd size is rounded up to what the device can do.
    assert_eq!(soon(machine.vm.set_memory(2048 + 513)).await, state(514, 514));

    let after = soon(machine.vm.set_memory(2048)).await;
    assert_eq!(after.requested_mib, 0);
    assert!(after.plugged_mib <= 2, "{after:?}");
    counted(&mut machine, before).await;
    assert_eq!(machine.vm.memory().await.unwrap(), after);

    assert_eq!(soon(machine.vm.set_memory(8192)).await, state(6144, 6144));
    counted(&mut machine, before + 6144).await;
    machine.end().await;
}

/// A machine that can have 512 MiB more than the 256 it boots with.
async fn small(kit: &Kit) -> Machine {
    let mut spec = kit.spec();
    spec.memory = Memory {
        boot_mib: 256,
        max_mib: 768,
        plug: MemoryPlug::VirtioMem,
    };
    Machine::boot(&spec).await
}

async fn virtio_mem_takes_memory_in_use_along(kit: Arc<Kit>) {
    let mut machine = small(&kit).await;
    soon(machine.vm.set_memory(768)).await;
    assert_eq!(machine.ask("hold 100").await, "done");
    let after = machine.vm.set_memory(256).await.unwrap();
    assert!(after.plugged_mib <= 2, "{after:?}");
    assert_eq!(machine.ask("check").await, "true");
    machine.end().await;
}

async fn what_the_guest_cannot_spare_stays(kit: Arc<Kit>) {
    let mut machine = small(&kit).await;
    soon(machine.vm.set_memory(768)).await;
    assert_eq!(machine.ask("hold 400").await, "done");
    let after = machine.vm.set_memory(256).await.unwrap();
    assert_eq!(after.requested_mib, 0);
    assert!((150..512).contains(&after.plugged_mib), "{after:?}");
    assert_eq!(machine.ask("check").await, "true");

    // What it lets go of later is taken back then.
    assert_eq!(machine.ask("hold 0").await, "done");
    let after = machine.vm.set_memory(256).await.unwrap();
    assert!(after.plugged_mib <= 2, "{after:?}");
    machine.end().await;
}

async fn a_shrink_is_left_for_who_needs_the_memory(kit: Arc<Kit>) {
    let mut machine = small(&kit).await;
    soon(machine.vm.set_memory(768)).await;
    assert_eq!(machine.ask("hold 400").await, "done");
    // Nobody waits for what the guest cannot give back.
    let left = soon(machine.vm.set_memory_while(256, |_| false)).await;
    assert_eq!(left.requested_mib, 0);
    assert!(left.total_mib() > 600, "{left:?}");
    let lacks = |wanted: u64| move |state: &MemoryState| state.total_mib() < wanted;
    // What the guest has still is enough.
    let enough = soon(machine.vm.set_memory_while(512, lacks(512))).await;
    assert!(enough.requested_mib == 256 && enough.total_mib() >= 512, "{enough:?}");
    let all = soon(machine.vm.set_memory_while(768, lacks(768))).await;
    assert_eq!(all.total_mib(), 768);
    assert_eq!(machine.ask("check").await, "true");
    machine.end().await;
}

async fn memory_modules_come_and_go(kit: Arc<Kit>) {
    let mut spec = kit.spec();
    spec.memory.plug = MemoryPlug::PcDimm { slots: 10 };
    let mut machine = Machine::boot(&spec).await;
    let before = machine.meminfo("MemTotal").await;
    let state = |mib| MemoryState {
        boot_mib: 2048,
        requested_mib: mib,
        plugged_mib: mib,
    };

    assert_eq!(soon(machine.vm.set_memory(2048 + 512)).await, state(512));
    counted(&mut machine, before + 512).await;
    // Rounded up to the guest's memory block.
    assert_eq!(soon(machine.vm.set_memory(2048 + 513)).await, state(640));
    counted(&mut machine, before + 640).await;
    // A module that is larger than what is spare stays.
    assert_eq!(soon(machine.vm.set_memory(2048 + 256)).await, state(512));
    assert_eq!(soon(machine.vm.set_memory(2048)).await, state(0));
    counted(&mut machine, before).await;
    // Names and slots are free again.
    assert_eq!(soon(machine.vm.set_memory(2048 + 128)).await, state(128));
    machine.end().await;
}

async fn memory_modules_run_out_of_slots(kit: Arc<Kit>) {
    let mut spec = kit.spec();
    spec.memory.plug = MemoryPlug::PcDimm { slots: 2 };
    let machine = Machine::boot(&spec).await;
    soon(machine.vm.set_memory(2048 + 128)).await;
    soon(machine.vm.set_memory(2048 + 256)).await;
    let third = machine.vm.set_memory(2048 + 384).await.unwrap_err();
    assert_eq!(third.to_string(), "all 2 slots for memory modules are taken");
    machine.end().await;
}

async fn memory_that_cannot_change(kit: Arc<Kit>) {
    let mut spec = kit.spec();
    spec.memory.max_mib = 2048;
    let machine = Machine::boot(&spec).await;
    let state = soon(machine.vm.set_memory(2048)).await;
    assert_eq!((state.requested_mib, state.plugged_mib), (0, 0));
    for asked in [2046, 2050] {
        let refused = machine.vm.set_memory(asked).await.unwrap_err();
        let sentence = format!("{asked} MiB of memory are not within 2048 MiB (at boot) and 2048 MiB (at most)");
        assert_eq!(refused.to_string(), sentence);
    }
    machine.end().await;
}

async fn vcpus_come_and_stay(kit: Arc<Kit>) {
    let mut spec = kit.spec();
    spec.vcpus = Vcpus { boot: 1, max: 4 };
    let mut machine = Machine::boot(&spec).await;
    assert_eq!(machine.ask("online").await, "1");
    assert_eq!(soon(machine.vm.set_vcpus(3)).await, 3);
    assert_eq!(machine.ask("online").await, "3");
    // With emulation, one that went would take QEMU along when the next one comes.
    for fewer in [3, 2, 0] {
        assert_eq!(soon(machine.vm.set_vcpus(fewer)).await, 3);
    }
    assert_eq!(soon(machine.vm.set_vcpus(4)).await, 4);
    assert_eq!(machine.ask("online").await, "4");
    let refused = machine.vm.set_vcpus(5).await.unwrap_err();
    assert_eq!(refused.to_string(), "5 vCPUs are more than the 4 that this VM can have");
    machine.end().await;
}
