//! Real virtual machines, emulated: what `vmm` promises, seen from the host and from within the guest.
//!
//! This program packs itself as the `/init` of an initial RAM disk. As PID 1 of a guest it does what the host asks for
//! (`guest`); on the host it runs the stories, and once more as a process of one of them (`ends`).
//!
//! Needs root, `qemu-system-x86_64`, virtiofsd (`SANDPOD_TEST_VIRTIOFSD`, or else what `deploy/build-virtiofsd.sh`
//! prints), and the guest kernel (`SANDPOD_TEST_KERNEL`, or else what `deploy/guest/build-kernel.sh` prints). Debian's,
//! which has its `modules-load.list` beside it, does too, but gives memory back too slowly for one of the stories and
//! keeps too much for another.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

mod disks;
mod ends;
mod guest;
mod machine;
mod newc;
mod share;
mod sizes;
#[path = "../support/spec.rs"]
mod spec;
mod sys;
mod talk;

use std::{future::Future, pin::Pin, process::ExitCode, sync::Arc, time::Duration};

use libtest_mimic::{Arguments, Failed, Trial};
use machine::Kit;

/// For one story; most take a second, or three where the machine is busy.
const DEADLINE: Duration = Duration::from_secs(90);

/// A story about a VM.
struct Story {
    name: &'static str,
    tell: fn(Arc<Kit>) -> Told,
}

/// A story under way.
type Told = Pin<Box<dyn Future<Output = ()>>>;

/// Names async functions as stories.
#[macro_export]
macro_rules! stories {
    ($($name:ident),* $(,)?) => {
        [$($crate::Story { name: stringify!($name), tell: |kit| Box::pin($name(kit)) }),*]
    };
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::main();
    }
    if let Some(initrd) = std::env::var_os(ends::PARENT) {
        ends::start_a_vm_and_wait(initrd.into());
    }
    let mut arguments = Arguments::from_args();
    // An emulated guest keeps one CPU busy.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(cpus));
    if arguments.list {
        // Names need no kit.
        return libtest_mimic::run(&arguments, trials(|| Err("only listed".into()))).exit_code();
    }
    let kit = Kit::gather().map(Arc::new);
    let conclusion = libtest_mimic::run(&arguments, trials(|| kit.clone().map_err(Failed::from)));
    drop(kit);
    let left = machine::children();
    if !left.is_empty() && !conclusion.has_failed() {
        eprintln!("the stories are over and left processes: {left:?}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn trials(kit: impl Fn() -> Result<Arc<Kit>, Failed>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for story in talk::stories()
        .into_iter()
        .chain(sizes::stories())
        .chain(disks::stories())
        .chain(share::stories())
        .chain(ends::stories())
    {
        let kit = kit();
        trials.push(Trial::test(story.name, move || run(&story, kit?)));
    }
    trials
}

fn run(story: &Story, kit: Arc<Kit>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let told = runtime.block_on(async { tokio::time::timeout(DEADLINE, (story.tell)(kit)).await });
    told.map_err(|_| format!("the story takes longer than {DEADLINE:?}").into())
}
