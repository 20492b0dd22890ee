//! How a VM ends: asked, killed, stuck, forgotten, orphaned.

use std::{
    env,
    future::Future,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::{
        prctl,
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::time::timeout;
use vmm::{ExitReason, Vm};

use crate::{
    Story,
    machine::{Kit, Machine, signal, until},
    stories,
};

/// With the path of a RAM disk: makes this program one that starts a VM and is killed.
pub const PARENT: &str = "SANDPOD_TEST_PARENT";
/// More than a kill takes, on a machine that is busy with other stories.
const AT_ONCE: Duration = Duration::from_secs(3);

pub fn stories() -> impl IntoIterator<Item = Story> {
    stories![
        stopping_twice_is_stopping_once,
        a_guest_may_turn_itself_off,
        a_qemu_that_is_killed_has_ended,
        a_frozen_qemu_is_ended_too,
        a_vm_that_is_dropped_ends,
        a_vm_ends_with_the_process_that_started_it,
        qemus_last_words_are_kept,
    ]
}

async fn at_once(end: impl Future<Output = ExitReason>) -> String {
    timeout(AT_ONCE, end).await.expect("an end").to_string()
}

async fn stopping_twice_is_stopping_once(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    let stop = || machine.vm.stop();
    let (one, other) = tokio::join!(at_once(stop()), at_once(stop()));
    assert_eq!([&one, &other], ["was killed by signal 9"; 2]);
    assert_eq!(at_once(stop()).await, "was killed by signal 9");
    assert!(machine.vm.memory().await.is_err());
}

async fn a_guest_may_turn_itself_off(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    assert_eq!(machine.ask("off").await, "");
    assert_eq!(at_once(machine.vm.child().exited()).await, "exited with code 0");
    assert_eq!(at_once(machine.vm.stop()).await, "exited with code 0");
}

async fn a_qemu_that_is_killed_has_ended(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let asked = machine.vm.set_memory(4096);
    signal(machine.vm.child().pid(), Signal::SIGKILL);
    let failed = asked.await.unwrap_err().to_string();
    assert_eq!(failed, "QEMU has closed its monitor");
    assert_eq!(at_once(machine.vm.child().exited()).await, "was killed by signal 9");
    assert_eq!(machine.heard().await, "");
    assert_eq!(at_once(machine.vm.stop()).await, "was killed by signal 9");
}

async fn a_frozen_qemu_is_ended_too(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    signal(machine.vm.child().pid(), Signal::SIGSTOP);
    assert_eq!(at_once(machine.vm.stop()).await, "was killed by signal 9");
}

async fn a_vm_that_is_dropped_ends(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    let (pid, stream) = (machine.vm.child().pid(), machine.into_stream());
    // The stream is all that is left of it, and ends with QEMU.
    let mut rest = Vec::new();
    let read = async { tokio::io::copy(&mut { stream }, &mut rest).await };
    timeout(AT_ONCE, read).await.expect("an end").unwrap();
    until("the process is gone", || !Path::new(&format!("/proc/{pid}")).exists()).await;
}

/// A process that starts a VM and is killed.
pub fn start_a_vm_and_wait(initrd: PathBuf) -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let machine = Machine::boot(&Kit::with(initrd).unwrap().spec()).await;
        println!("{}", machine.vm.child().pid());
        std::io::stdout().flush().unwrap();
        std::future::pending::<()>().await;
    });
    unreachable!("it is killed before");
}

async fn a_vm_ends_with_the_process_that_started_it(kit: Arc<Kit>) {
    // Orphans below us become our children, so that their end can be waited for.
    prctl::set_child_subreaper(true).unwrap();
    let mut parent = Command::new(env::current_exe().unwrap());
    let mut parent = parent
        .env(PARENT, &kit.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(parent.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let qemu = Pid::from_raw(line.trim().parse().unwrap());

    parent.kill().unwrap();
    parent.wait().unwrap();
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || tell.send(waitpid(qemu, None)));
    let ended = timeout(AT_ONCE, told).await.expect("QEMU to end").unwrap();
    assert_eq!(ended, Ok(WaitStatus::Signaled(qemu, Signal::SIGKILL, false)));
}

async fn qemus_last_words_are_kept(kit: Arc<Kit>) {
    let machine = Machine::boot(&kit.spec()).await;
    let vm: &Vm = &machine.vm;
    signal(vm.child().pid(), Signal::SIGTERM);
    assert_eq!(at_once(vm.child().exited()).await, "exited with code 0");
    until("QEMU's log", || vm.log_tail().contains("terminating on signal 15")).await;
}
