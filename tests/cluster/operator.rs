//! The operator: the real controller, with the rights of its own service account, on a real API server. Its nodes are
//! played by [`kubelet::Kubelet`], which really runs the installer, in a folder per node.

use libtest_mimic::Trial;
use tests::{failure::Result, suite};

use self::{ground::Stage, rig::Rig};

mod controller;
mod deletion;
mod failing;
mod ground;
mod history;
mod host;
mod installing;
mod kubelet;
mod objects;
mod pool;
mod restarts;
mod rig;
mod rights;
mod scale;
mod singleton;
mod tables;
mod unkind;

/// A story and its name.
type Story = (&'static str, fn(&mut Rig<'_>) -> Result);

const STORIES: &[&[Story]] = &[
    tables::STORIES,
    pool::STORIES,
    failing::STORIES,
    deletion::STORIES,
    restarts::STORIES,
    installing::STORIES,
    singleton::STORIES,
    objects::STORIES,
    rights::STORIES,
    scale::STORIES,
    unkind::STORIES,
];

/// All stories of the operator, and the ground that they play on one after another.
pub fn trials() -> (Vec<Trial>, Stage) {
    let stage = Stage::default();
    let stories = STORIES.iter().copied().flatten();
    let trials = stories.map(|(name, tell)| {
        let stage = stage.clone();
        suite::trial(format!("operator/{name}"), move || stage.play(tell))
    });
    let long = scale::LONG.iter().map(|(name, tell)| {
        let trial = suite::trial(format!("operator/{name}"), move || ground::alone(tell));
        trial.with_ignored_flag(true)
    });
    (trials.chain(long).collect(), stage)
}
