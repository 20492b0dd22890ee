//! End to end: a real containerd starts pods through our shim, and what its users see is what they were promised.
//!
//! Trials are named `<containerd>/<runtime>/<story>`. Those with runc prove the stories themselves; they run with `--include-ignored`.

use tests::{
    config::{Guest, Runtime},
    failure::Result,
    node::{Containerd, Node, NodeSpec},
    stage::{self, Stage},
};

mod isolation;
mod lifecycle;
mod memory;
mod network;
mod stdio;
mod volumes;

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime) -> Result);

/// Stories that hold for containers of every runtime.
const COMMON: &[&[Story]] = &[
    lifecycle::STORIES,
    stdio::STORIES,
    isolation::COMMON,
    volumes::STORIES,
    network::STORIES,
    memory::COMMON,
];

/// Stories about the virtual machine.
const OF_A_VM: &[&[Story]] = &[isolation::OF_A_VM, memory::OF_A_VM];

fn main() {
    let containerds = [Containerd::Newest, Containerd::Debian];
    let stages = containerds.map(|containerd| Stage::new(NodeSpec::new(containerd)));
    let runtimes = [
        ("own", Runtime::Kata(Guest::Own)),
        ("debian", Runtime::Kata(Guest::Debian)),
        ("runc", Runtime::Runc),
    ];
    let mut trials = Vec::new();
    for (kind, runtime) in runtimes {
        let of_a_vm = if runtime == Runtime::Runc { &[] } else { OF_A_VM };
        for (name, story) in COMMON.iter().chain(of_a_vm).copied().flatten().copied() {
            // Neighbours are on different nodes, so that two can play at once.
            for (containerd, stage) in containerds.iter().zip(&stages) {
                let name = format!("{}/{kind}/{name}", containerd.name());
                let trial = stage::trial(name, stage, move |node| story(node, runtime));
                trials.push(trial.with_ignored_flag(runtime == Runtime::Runc));
            }
        }
    }
    stage::perform(trials, &stages)
}
