//! Long use and much at once: no byte is lost, no exit code is wrong, nothing hangs, grows or is left.
//!
//! Each story plays with one of two sets of counts: `brief/<story>` in `make test`, `full/<story>` in `make soak`. What
//! was counted and measured is printed.

use tests::{
    config::{Guest, Runtime},
    failure::Result,
    node::{Containerd, Node, NodeSpec},
    stage::{self, Stage},
};

mod load;
mod restarts;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Containers that run side by side in a pod.
    containers: usize,
    /// Pods that run side by side.
    pods: usize,
    /// Execs, in ten streams.
    execs: usize,
    /// Pods that are made, used and removed, two at a time.
    cycles: usize,
    /// Restarts of containerd under load.
    restarts: usize,
}

const BRIEF: Counts = Counts {
    containers: 20,
    pods: 6,
    execs: 150,
    cycles: 6,
    restarts: 3,
};

const FULL: Counts = Counts {
    containers: 50,
    pods: 30,
    execs: 10_000,
    cycles: 500,
    restarts: 60,
};

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime, Counts) -> Result);

const STORIES: &[&[Story]] = &[load::STORIES, restarts::STORIES];

fn main() {
    let stage = Stage::new(NodeSpec::new(Containerd::Newest));
    let mut trials = Vec::new();
    for (size, counts) in [("brief", BRIEF), ("full", FULL)] {
        for (story, tell) in STORIES.iter().copied().flatten().copied() {
            let name = format!("{size}/{story}");
            let trial = stage::trial(name, &stage, move |node| tell(node, Runtime::Kata(Guest::Own), counts));
            trials.push(trial.with_ignored_flag(size == "full"));
        }
    }
    stage::perform(trials, &[stage])
}
