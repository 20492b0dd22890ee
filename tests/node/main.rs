//! A whole node in an emulated machine: systemd, cgroup v2, KVM, kernel vsock, vhost-net, reboots and power cuts.
//!
//! Stories that do not harm their node share one; a story that fails takes its node with it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libtest_mimic::{Arguments, Trial};
use tests::{
    failure::Result,
    machine::{Machine, MachineSpec},
};

mod cgroups;
mod install;

/// A story of a node that others use after it, and its name.
type Story = (&'static str, fn(&Machine) -> Result);

/// The node that stories share.
#[derive(Default)]
struct Shared(Mutex<Option<Machine>>);

impl Shared {
    fn node(&self) -> MutexGuard<'_, Option<Machine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plays a story on the node, which is booted if there is none.
    fn play(&self, story: fn(&Machine) -> Result) -> Result {
        let mut place = self.node();
        let node = match place.take() {
            Some(node) => node,
            None => Machine::boot(MachineSpec::default())?,
        };
        match story(&node) {
            Ok(()) => {
                *place = Some(node);
                Ok(())
            }
            Err(failure) => Err(node.with_evidence(&failure)),
        }
    }
}

fn main() {
    let arguments = Arguments::from_args();
    let shared = Arc::new(Shared::default());
    let stories = [("installed", install::STORIES), ("cgroups", cgroups::STORIES)];
    let stories = stories
        .iter()
        .flat_map(|(chapter, stories)| stories.iter().map(move |story| (chapter, story)));
    let trials = stories.map(|(chapter, (name, story))| {
        let (shared, story) = (Arc::clone(&shared), *story);
        Trial::test(format!("{chapter}/{name}"), move || Ok(shared.play(story)?))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // Statics and what an exit leaves alone would keep it.
    drop(shared.node().take());
    conclusion.exit()
}
