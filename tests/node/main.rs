//! A whole node in an emulated machine: systemd, cgroup v2, KVM, kernel vsock, vhost-net, reboots and power cuts.
//!
//! Stories share one node, one after another; each leaves it fit for the next, and one that fails takes the node with
//! it. Those that take long play with `--include-ignored`.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use libtest_mimic::{Arguments, Trial};
use tests::{
    failure::Result,
    machine::{Machine, MachineSpec, Security},
    suite,
};

mod cgroups;
mod clock;
mod devices;
mod distribution;
mod inside;
mod install;
mod kubelet;
mod pods;
mod power;
mod selinux;
mod vfio;

/// A story of a node that stays up, and its name.
type Story = (&'static str, fn(&Machine) -> Result);

/// A story of a node that is shut down or cut off, and its name.
type PowerStory = (&'static str, fn(&mut Machine) -> Result);

/// So many stories of a run may fail and be played once more: a guest on an emulated node ends now and then, or waits
/// for ever, and how often depends on the emulator.
const REPLAYS: u32 = 2;

/// The place of the node.
#[derive(Default)]
struct Shared {
    node: Mutex<Option<Machine>>,
    replays: AtomicU32,
}

impl Shared {
    fn node(&self) -> MutexGuard<'_, Option<Machine>> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plays a story, and once more on a new node if it fails and is one of the first to do so.
    fn play(&self, spec: MachineSpec, story: impl Fn(&mut Machine) -> Result) -> Result {
        let Err(failure) = self.play_once(spec, &story) else {
            return Ok(());
        };
        if self.replays.fetch_add(1, Ordering::Relaxed) >= REPLAYS {
            return Err(failure);
        }
        eprintln!("failed, and is played once more on a new node:\n{failure}");
        self.play_once(spec, story)
    }

    /// Plays a story on a node, which is booted if there is none of that kind; there is one at a time.
    fn play_once(&self, spec: MachineSpec, story: impl FnOnce(&mut Machine) -> Result) -> Result {
        let mut place = self.node();
        let mut node = match place.take().filter(|node| node.spec() == spec) {
            Some(node) => node,
            None => Machine::boot(spec)?,
        };
        match story(&mut node) {
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
    let usual = MachineSpec::default();
    let selinux = MachineSpec {
        security: Security::SeLinux,
        ..usual
    };
    let with_devices = MachineSpec {
        spare_devices: true,
        ..usual
    };
    let trials_on = |spec: MachineSpec, kind: &str, stories: &[Story]| -> Vec<Trial> {
        let trial = |(name, story): &Story| {
            let (shared, story) = (Arc::clone(&shared), *story);
            suite::trial(format!("{kind}/{name}"), move || shared.play(spec, |node| story(node)))
        };
        stories.iter().map(trial).collect()
    };
    let trials_of = |kind: &str, stories: &[Story]| trials_on(usual, kind, stories);
    let trials_of_power = |stories: &[PowerStory]| -> Vec<Trial> {
        let trial = |(name, story): &PowerStory| {
            let (shared, story) = (Arc::clone(&shared), *story);
            suite::trial(format!("power/{name}"), move || shared.play(usual, story))
        };
        stories.iter().map(trial).collect()
    };
    let by_default = [
        trials_of("install", install::FIRST),
        trials_of("pods", pods::STORIES),
        trials_of("cgroups", cgroups::STORIES),
        trials_of("devices", devices::STORIES),
        trials_of("clock", clock::STORIES),
        trials_of("kubelet", kubelet::STORIES),
        trials_of("kvm", inside::STORIES),
        trials_of_power(power::STORIES),
        trials_of("install", install::LAST),
        trials_of("install", distribution::STORIES),
        trials_on(selinux, "selinux", selinux::STORIES),
    ];
    let at_length = [
        trials_on(with_devices, "devices", vfio::AT_LENGTH),
        trials_of("clock", clock::AT_LENGTH),
        trials_of_power(power::AT_LENGTH),
        trials_of("kvm", inside::AT_LENGTH),
    ];
    let at_length = at_length.into_iter().flatten();
    let mut trials: Vec<_> = by_default.into_iter().flatten().collect();
    trials.extend(at_length.map(|trial| trial.with_ignored_flag(true)));
    let conclusion = suite::run(&arguments, trials);
    // The exit would leave it.
    drop(shared.node().take());
    conclusion.exit()
}
