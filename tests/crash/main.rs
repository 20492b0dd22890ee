//! What breaks, breaks loudly and leaves nothing: dead processes, starts that fail, and long use.
//!
//! Trials are named `<containerd>/<runtime>/<story>`. Every story plays with the newest containerd, those in which
//! containerd has a part with Debian's too; the rest, and runc, which proves the stories themselves, run with
//! `--include-ignored`.

use tests::{
    config::{Guest, Runtime},
    failure::Result,
    node::{Containerd, Node, NodeSpec},
    stage::{self, Stage},
};

mod cycles;
mod deaths;
mod matrix;
mod refusals;

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime) -> Result);

/// Stories that hold for every runtime.
const COMMON: &[&[Story]] = &[cycles::STORIES, deaths::COMMON, refusals::COMMON];

/// Stories about the virtual machine.
const OF_A_VM: &[&[Story]] = &[deaths::OF_A_VM, refusals::OF_A_VM];

/// What containerd itself does something about: it hears of a death, cleans up after a shim, passes a refusal on.
const BY_CONTAINERD: &[&str] = &[
    "the_shim_dies_idle",
    "the_shim_dies_during_an_exec",
    "qemu_dies_during_an_exec",
    "a_frozen_machine_is_removed",
    "a_missing_kernel",
    "an_unreadable_root",
    "a_network_that_is_gone",
];

/// Whether a combination plays a story by default.
fn plays(containerd: Containerd, runtime: Runtime, story: &str) -> bool {
    runtime != Runtime::Runc && (containerd == Containerd::Newest || BY_CONTAINERD.contains(&story))
}

fn main() {
    let containerds = [Containerd::Newest, Containerd::Debian];
    let stages = containerds.map(|containerd| {
        Stage::new(NodeSpec {
            handlers: refusals::handlers(),
            ..NodeSpec::new(containerd)
        })
    });
    let mut trials = Vec::new();
    for (containerd, stage) in containerds.into_iter().zip(&stages) {
        for (kind, runtime) in [("own", Runtime::Kata(Guest::Own)), ("runc", Runtime::Runc)] {
            let of_a_vm = if runtime == Runtime::Runc { &[] } else { OF_A_VM };
            for (story, tell) in COMMON.iter().chain(of_a_vm).copied().flatten().copied() {
                let name = format!("{}/{kind}/{story}", containerd.name());
                let trial = stage::trial(name, stage, move |node| tell(node, runtime));
                trials.push(trial.with_ignored_flag(!plays(containerd, runtime, story)));
            }
            for cell in matrix::cells().filter(|_| runtime != Runtime::Runc) {
                let name = format!("{}/{kind}/{}", containerd.name(), cell.name());
                let trial = stage::trial(name, stage, move |node| cell.play(node, runtime));
                let by_default = containerd == Containerd::Newest && cell.by_default();
                trials.push(trial.with_ignored_flag(!by_default));
            }
        }
    }
    let blind = Stage::new(NodeSpec {
        handlers: refusals::handlers(),
        without_kvm: true,
        ..NodeSpec::new(Containerd::Newest)
    });
    trials.push(stage::trial("without-kvm/own/no_kvm".into(), &blind, refusals::no_kvm));
    let [newest, debian] = stages;
    stage::perform(trials, &[newest, debian, blind])
}
