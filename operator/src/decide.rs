//! What to do about a cluster: a pure function from everything that is known to what is said and done.
//!
//! One KataConfig is in force. It goes this way; `|` is what its condition `InProgress` says:
//!
//! ```text
//!  created ── finalizer ──▶ Installing ── all installed, RuntimeClass made ──▶ (steady)
//!     │                        │  ▲                                            │   ▲
//!     │                    Failed ┘ retried after 1, 2, 4, 8, 15, 15.. min     ▼   │ pool, version or log level changed, or a node is not as it was
//!     │                                                                      Updating (or Failed)
//!     ├── refused: PeerPodsNotSupported, ConfidentialNotSupported, InvalidSpec, InvalidSelector, NoEligibleNodes, Duplicate
//!     └── deleted ──▶ BlockedByExistingKataPods ── no pod uses kata ──▶ Uninstalling ── no node has kata ──▶ finalizer removed, gone
//! ```
//!
//! And each node, driven by the installer's pods, of which there is one at a time in the cluster:
//!
//! ```text
//!                       ┌────────── run failed, then due ─────────┐
//!                       ▼                                         │
//!  (nowhere) ──▶ waitingToInstall ──▶ installing ──▶ installed    failedToInstall
//!      ▲                                              │   ▲ │
//!      │                                              │   └─┘ verified anew after a boot, another kubelet or runtime, and daily
//!      └──── uninstalling ◀── waitingToUninstall ◀────┘
//!                  └──▶ failedToUninstall, then due ──▶ uninstalling
//! ```
//!
//! All of it is read back from the nodes' labels and annotations, the installer's pods and the RuntimeClass: a
//! controller that ends at any point is followed by one that goes on from there. Source of the words: the user guide of
//! OpenShift sandboxed containers 1.5, section 2.4; it is "the guide" here.

mod clock;
mod output;
mod pool;
mod results;
mod scene;
mod selector;
mod standing;
mod status;
mod turn;
mod world;

#[cfg(test)]
pub(crate) mod cluster;
#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use kube::ResourceExt;

use self::{
    clock::Clock,
    scene::Scene,
    status::{Facts, Reason},
};
pub use self::{
    output::{About, Action, Decision, End, Note, Step},
    pool::ELIGIBLE,
    selector::{Selector, SelectorError},
    world::{
        FEATURE_GATES, FINALIZER, Host, KATA, KataPod, LastRun, Node, ONCE, Order, Progress, RETRY, Record, Refused,
        Run, RuntimeClass, SKIP_NODES, Settings, UnreadRun, World,
    },
};
use crate::api::{KataConfig, KataNodes};

/// Decides. The same world always gives the same decision.
#[must_use]
pub fn decide(world: &World) -> Decision {
    let clock = Clock::new(world.now);
    let mut decision = Decision::default();
    let mut configs: Vec<&KataConfig> = world.configs.iter().collect();
    configs.sort_by_key(|config| (!has_finalizer(config), config.creation_timestamp(), config.name_any()));
    if let Some((active, others)) = configs.split_first() {
        for other in others {
            refuse_duplicate(other, active, &clock, &mut decision);
        }
        Scene::new(world, active, &clock).play(&mut decision);
    }
    decision.wake = clock.wake();
    decision
}

/// Whether this KataConfig has been in force: only then there is something to be taken away again.
fn has_finalizer(config: &KataConfig) -> bool {
    config.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

/// Where the admission policy is not there or was outrun: no node is ever touched for the later one.
fn refuse_duplicate(config: &KataConfig, active: &KataConfig, clock: &Clock, decision: &mut Decision) {
    let reason = Reason::Duplicate(active.name_any());
    tell_status(
        config,
        &reason,
        KataNodes::default(),
        &Facts::default(),
        clock,
        decision,
    );
    if has_finalizer(config) {
        decision.actions.push(Action::RemoveFinalizer(config.name_any()));
    }
}

/// Writes the status if it differs, and an event with it if an administrator has to do something.
fn tell_status(
    config: &KataConfig,
    reason: &Reason,
    lists: KataNodes,
    facts: &Facts,
    clock: &Clock,
    decision: &mut Decision,
) {
    let status = status::status(reason, lists, facts, config, clock.now());
    if config.status.as_ref() == Some(&status) {
        return;
    }
    let before = config.status.as_ref().and_then(|status| status.in_progress());
    let known = before.map_or("", |condition| condition.reason.as_str());
    decision.statuses.push((config.name_any(), status));
    if let Some((word, text)) = reason.calls_for_help().filter(|(word, _)| *word != known) {
        decision.notes.push(Note {
            about: About::Config(config.name_any()),
            warning: true,
            reason: word,
            text,
            after: Step::Statuses(decision.statuses.len()),
        });
    }
}
