//! End to end: a real containerd starts pods through our shim, and what its users see is what they were promised.
//!
//! Trials are named `<containerd>/<runtime>/<story>`. Those with runc prove the stories themselves; they run with `--include-ignored`.

use tests::{
    config::{Guest, Runtime},
    node::{Containerd, NodeSpec},
    stage::{self, Stage},
};

mod lifecycle;

fn main() {
    let containerds = [Containerd::Newest, Containerd::Debian];
    let stages = containerds.map(|containerd| Stage::new(NodeSpec::new(containerd)));
    let runtimes = [("own", Runtime::Kata(Guest::Own)), ("debian", Runtime::Kata(Guest::Debian)), ("runc", Runtime::Runc)];
    let mut trials = Vec::new();
    for (kind, runtime) in runtimes {
        for (name, story) in lifecycle::STORIES {
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
