//! Boot, the stream to the agent, the console, and who QEMU is.

use std::{fs, sync::Arc};

use nix::sched::{CloneFlags, unshare};
use tokio::io::AsyncWriteExt;
use vmm::{Placement, Spawner, Vm, VmError, VmFds};

use crate::{
    Story,
    machine::{Kit, Machine, PATIENCE, USER, placement, until},
    stories,
};

pub fn stories() -> impl IntoIterator<Item = Story> {
    stories![
        a_guest_boots_and_speaks,
        what_is_written_before_the_guest_is_up_arrives,
        the_stream_is_given_once,
        kernel_parameters_reach_the_guest,
        a_megabyte_goes_both_ways,
        the_console_is_kept,
        a_guest_whose_init_ends_says_so_on_its_console,
        qemu_is_nobody_and_confined,
        qemu_runs_in_the_network_namespace_it_is_given,
    ]
}

/// A VM that nobody has waited for.
async fn started(kit: &Kit, placement: &Placement) -> Vm {
    let spawner = Spawner::new().unwrap();
    Vm::start(&spawner, &kit.spec(), VmFds::default(), placement)
        .await
        .unwrap()
}

async fn a_guest_boots_and_speaks(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    assert_eq!(machine.ask("echo hello").await, "hello");
    assert!(machine.vm.spawned_at() <= machine.vm.qmp_ready_at());
    machine.end().await;
}

async fn what_is_written_before_the_guest_is_up_arrives(kit: Arc<Kit>) {
    let vm = started(&kit, &placement()).await;
    let mut stream = vm.agent_stream(PATIENCE).await.unwrap();
    stream.write_all(b"echo early\n").await.unwrap();
    let mut machine = Machine::of(vm, stream);
    assert_eq!(machine.heard().await, "up");
    assert_eq!(machine.heard().await, "early");
    machine.end().await;
}

async fn the_stream_is_given_once(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    let again = machine.vm.agent_stream(PATIENCE).await;
    assert!(matches!(again, Err(VmError::StreamTaken)), "{again:?}");
    machine.end().await;
}

async fn kernel_parameters_reach_the_guest(kit: Arc<Kit>) {
    let mut spec = kit.spec();
    spec.kernel_params = vec!["agent.words=\"one, two\"".into(), "agent.last=1".into()];
    let mut machine = Machine::boot(&spec).await;
    let line = machine.ask("cmdline").await;
    assert!(line.ends_with(" agent.words=\"one, two\" agent.last=1"), "{line}");
    machine.end().await;
}

async fn a_megabyte_goes_both_ways(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let long: String = ('a'..='z').cycle().take(1 << 20).collect();
    assert!(machine.ask(&format!("echo {long}")).await == long);
    machine.end().await;
}

async fn the_console_is_kept(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    assert_eq!(machine.ask("say here I am").await, "done");
    until("the console", || machine.vm.console_tail().contains("here I am")).await;
    machine.end().await;
}

async fn a_guest_whose_init_ends_says_so_on_its_console(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    assert_eq!(machine.ask("exit").await, "");
    assert_eq!(machine.vm.child().exited().await.to_string(), "exited with code 0");
    let console = || machine.vm.console_tail();
    until("the console", || {
        console().contains("Attempted to kill init! exitcode=0x00000300")
    })
    .await;
}

async fn qemu_is_nobody_and_confined(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    let qemu = format!("/proc/{}", machine.vm.child().pid());
    // Each thread has credentials and a filter of its own.
    let mut threads = 0;
    for thread in fs::read_dir(format!("{qemu}/task")).unwrap() {
        threads += 1;
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        let four = |id: u32| Some([id; 4].map(|id| id.to_string()).join(" "));
        assert_eq!(field("Uid"), four(USER));
        assert_eq!(field("Gid"), four(USER));
        assert_eq!(field("Groups"), Some(String::new()));
        assert_eq!(field("CapPrm"), Some("0000000000000000".into()));
        assert_eq!(field("NoNewPrivs"), Some("1".into()));
        assert_eq!(field("Seccomp"), Some("2".into()), "of a filter");
    }
    assert!(threads > 1, "the main loop and a vCPU");
    assert_eq!(fs::read(format!("{qemu}/environ")).unwrap(), b"");
    machine.end().await;
}

async fn qemu_runs_in_the_network_namespace_it_is_given(kit: Arc<Kit>) {
    let fresh = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let name = fs::read_link("/proc/thread-self/ns/net").unwrap();
        (name, fs::File::open("/proc/thread-self/ns/net").unwrap())
    });
    let (name, netns) = fresh.join().unwrap();
    let there = Placement {
        netns: Some(netns.into()),
        ..placement()
    };
    let vm = started(&kit, &there).await;
    let qemu = format!("/proc/{}/ns/net", vm.child().pid());
    assert_eq!(fs::read_link(qemu).unwrap(), name);
    assert_ne!(fs::read_link("/proc/self/ns/net").unwrap(), name);
    vm.stop().await;
}
