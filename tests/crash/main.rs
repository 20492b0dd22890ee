//! What breaks, breaks loudly and leaves nothing: dead processes, starts that fail, and long use.
//!
//! Trials are named `<containerd>/<runtime>/<story>`. Those with runc prove the stories themselves; they run with `--include-ignored`.

use tests::{
    config::{Guest, Runtime},
    failure::Result,
    node::{Containerd, Node, NodeSpec},
    stage::{self, Stage},
};

mod cycles;
mod deaths;
mod refusals;

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime) -> Result);

fn main() {
    let containerds = [Containerd::Debian, Containerd::Newest];
    let stages = containerds.map(|containerd| {
        Stage::new(NodeSpec {
            handlers: refusals::handlers(),
            ..NodeSpec::new(containerd)
        })
    });
    let mut trials = Vec::new();
    for (kind, runtime) in [("own", Runtime::Kata(Guest::Own)), ("runc", Runtime::Runc)] {
        let of_a_vm: &[&[Story]] = if runtime == Runtime::Runc {
            &[]
        } else {
            &[deaths::OF_A_VM, refusals::OF_A_VM]
        };
        for (name, story) in [deaths::COMMON, refusals::COMMON]
            .iter()
            .chain(of_a_vm)
            .copied()
            .flatten()
            .copied()
        {
            for (containerd, stage) in containerds.iter().zip(&stages) {
                let name = format!("{}/{kind}/{name}", containerd.name());
                let trial = stage::trial(name, stage, move |node| story(node, runtime));
                trials.push(trial.with_ignored_flag(runtime == Runtime::Runc));
            }
        }
    }
    for (kind, runtime, stage) in [
        ("own", Runtime::Kata(Guest::Own), &stages[0]),
        ("runc", Runtime::Runc, &stages[1]),
    ] {
        let name = format!(
            "{}/{kind}/two_hundred_cycles",
            containerds[usize::from(runtime == Runtime::Runc)].name()
        );
        let trial = stage::trial(name, stage, move |node| cycles::two_hundred_cycles(node, runtime));
        trials.push(trial.with_ignored_flag(runtime == Runtime::Runc));
    }
    stage::perform(trials, &stages)
}
