//! Where a node is on its way.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::{
    clock::{Clock, after},
    results::{self, Outcome},
    world::{KATA, Node, Record, Refused, Run, Settings, UnreadRun},
};
use crate::{api::Rollout, report::Verb};

/// How long a node may be not Ready before that is called a failure of what was done to it.
const UNREADY: SignedDuration = SignedDuration::from_mins(5);
/// How long a node has to be Ready after a run that did not restart its container runtime, at most.
const BRIEFLY: SignedDuration = SignedDuration::from_secs(5);
/// How long after a run a kubelet may take to list the handler.
const LISTED: SignedDuration = SignedDuration::from_mins(10);
/// A node that stops being Ready so soon after a run was probably hurt by it.
const AFTERMATH: SignedDuration = SignedDuration::from_mins(10);
/// How often a node is looked at although nothing happened.
const DAILY: SignedDuration = SignedDuration::from_hours(24);

/// The list of `status.kataNodes` that a node is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In none.
    Nowhere,
    Installed,
    Installing,
    WaitingToInstall,
    FailedToInstall,
    Uninstalling,
    WaitingToUninstall,
    FailedToUninstall,
}

/// What every node is measured against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measure<'a> {
    pub(super) settings: &'a Settings,
    pub(super) log_level: &'a str,
    pub(super) configuration: &'a str,
    pub(super) runtime_classes: &'a BTreeMap<String, String>,
    /// Stands for both.
    pub(super) settings_hash: Option<&'a str>,
    /// What is asked for is known.
    pub(super) understood: bool,
    pub(super) purpose: &'a str,
    pub(super) clock: &'a Clock,
    pub(super) refused: Option<&'a Refused>,
    pub(super) rollout: &'a Rollout,
    pub(super) unread_runs: &'a [UnreadRun],
}

/// A node and where it is.
#[derive(Debug)]
pub(super) struct Standing<'a> {
    pub(super) node: &'a Node,
    pub(super) wanted: bool,
    pub(super) place: Place,
    /// What is wrong with it, when its place is a failed one.
    pub(super) trouble: Option<String>,
    /// The installer's pod on it, with how it ended.
    pub(super) run: Option<(&'a Run, Option<Outcome>)>,
    /// It ended, and the node's record tells of it.
    pub(super) noted: bool,
}

impl<'a> Standing<'a> {
    pub(super) fn of(node: &'a Node, wanted: bool, runs: &'a [Run], measure: Measure<'_>) -> Standing<'a> {
        // There is one at most; were there two, the one that is not over would count.
        let run = runs
            .iter()
            .filter(|run| run.order.node_uid == node.uid)
            .map(|run| (run, results::outcome(run, measure.clock)))
            .min_by_key(|(_, outcome)| outcome.is_some());
        let noted = match &run {
            Some((run, Some(outcome))) => results::noted(run, outcome, node),
            _ => false,
        };
        let mut standing = Standing {
            node,
            wanted,
            place: Place::Nowhere,
            trouble: None,
            run,
            noted,
        };
        (standing.place, standing.trouble) = standing.place(measure);
        standing
    }

    fn place(&self, measure: Measure<'_>) -> (Place, Option<String>) {
        match &self.run {
            Some((run, _)) if !self.noted && run.order.verb == Verb::Install => (Place::Installing, None),
            Some((run, _)) if !self.noted && run.order.verb == Verb::Uninstall => (Place::Uninstalling, None),
            Some((_, Some(outcome))) if self.noted && self.lost(outcome, measure.clock) => {
                let text = "it is not Ready since the installer ended".to_owned();
                (self.failed(), Some(text))
            }
            // Whatever it is wanted for now, nothing happens before the pod is gone.
            Some((run, Some(outcome))) if self.noted && outcome.given_up && run.order.verb != Verb::Verify => {
                let text = outcome.failure.as_ref().map(|failure| failure.text.clone());
                (self.failed(), text)
            }
            _ => self.place_by_record(measure),
        }
    }

    /// The run worked, and the node did not come back.
    fn lost(&self, outcome: &Outcome, clock: &Clock) -> bool {
        outcome.failure.is_none() && !self.node.ready && clock.passed(self.ended(outcome), UNREADY)
    }

    /// When the run on it ended, by the controller's clock where that was noted.
    fn ended(&self, outcome: &Outcome) -> Timestamp {
        let noted = self.node.record.last_run.as_ref().filter(|_| self.noted);
        noted.map_or(outcome.ended, |last| last.ended.0)
    }

    /// It stopped being Ready soon after kata was put on it, for what is asked for now: the next node may fare the
    /// same.
    pub(super) fn hurt(&self, measure: Measure<'_>) -> bool {
        let last = self.node.record.last_run.as_ref();
        let ours =
            last.filter(|last| last.verb == Verb::Install && last.failures == 0 && last.purpose == measure.purpose);
        !self.node.ready
            && ours.is_some_and(|last| {
                self.node
                    .since
                    .is_none_or(|since| since <= after(last.ended.0, AFTERMATH))
            })
    }

    /// Nothing is done to it, whatever is asked for: an administrator has to act first.
    pub(super) fn barred(&self, measure: Measure<'_>) -> Option<String> {
        let record = &self.node.record;
        if self.wanted && record.foreign() {
            let text = "another installation of kata has put the label katacontainers.io/kata-runtime on it; remove \
                        that installation and the label, or let kataConfigPoolSelector leave the node out";
            return Some(text.to_owned());
        }
        let (there, asked) = (record.prefix.as_ref()?, &measure.settings.prefix);
        (self.wanted && there != asked).then(|| {
            format!(
                "kata is installed in {there}, and the operator was told {asked}: give it the former prefix again, or \
                 delete the KataConfig first"
            )
        })
    }

    /// What is wrong with it concerns no other node.
    pub(super) fn unfit(&self, measure: Measure<'_>) -> bool {
        let last = self.node.record.last_run.as_ref();
        self.barred(measure).is_some() || (self.failures(measure) > 0 && last.is_some_and(|last| last.refused))
    }

    /// The scheduler may give it pods with our kata.
    pub(super) fn takes_pods(&self) -> bool {
        let record = &self.node.record;
        let ours = record.ready == Some(true) && !record.foreign();
        self.node.ready && !self.node.unschedulable && ours
    }

    /// Its turn may come: it is a canary, where there are some.
    pub(super) fn chosen(&self, measure: Measure<'_>) -> bool {
        let mut canary = measure.rollout.canary.iter().flatten();
        canary.all(|(label, value)| self.node.labels.get(label) == Some(value))
    }

    /// Nothing is known to be done on it.
    pub(super) fn idle(&self, measure: Measure<'_>) -> bool {
        self.run.is_none() && measure.unread_runs.iter().all(|run| run.node != self.node.name)
    }

    /// It is being changed, or has not recovered from it.
    pub(super) fn changing(&self, measure: Measure<'_>) -> bool {
        let looked_at = |(run, _): &(&Run, _)| run.order.verb == Verb::Verify;
        self.hurt(measure) || !(self.idle(measure) || self.run.as_ref().is_some_and(looked_at))
    }

    /// Kata cannot be put on it now, for a reason of its own: the cluster is complete without it.
    pub(super) fn unable(&self, measure: Measure<'_>) -> bool {
        match self.place {
            Place::FailedToInstall => self.unfit(measure),
            Place::WaitingToInstall => !self.node.ready || self.node.unschedulable || !self.chosen(measure),
            _ => false,
        }
    }

    fn failed(&self) -> Place {
        if self.wanted {
            Place::FailedToInstall
        } else {
            Place::FailedToUninstall
        }
    }

    fn place_by_record(&self, measure: Measure<'_>) -> (Place, Option<String>) {
        let record = &self.node.record;
        if let Some(text) = self.barred(measure) {
            return (Place::FailedToInstall, Some(text));
        }
        if self.wanted && self.current(measure) {
            let since = self.node.since.filter(|_| self.hurt(measure));
            return match since.is_some_and(|since| measure.clock.passed(since, UNREADY)) {
                true => (
                    Place::FailedToInstall,
                    Some("it is not Ready since the installer ended".to_owned()),
                ),
                false => (Place::Installed, None),
            };
        }
        if !self.wanted && !record.claimed() {
            return (Place::Nowhere, None);
        }
        if self.failures(measure) > 0 {
            return (self.failed(), record.last_error.clone());
        }
        if let Some(refused) = self.refused(measure) {
            return (
                self.failed(),
                Some(format!("the installer's pod is refused: {}", refused.text)),
            );
        }
        if self.wanted {
            return (Place::WaitingToInstall, None);
        }
        let unready = !self.node.ready && self.node.since.is_none_or(|since| measure.clock.passed(since, UNREADY));
        if unready {
            let text = "it is not Ready; kata is removed when it is, or stays if the KataConfig's annotation sandpod.io/skip-nodes names the node";
            return (Place::FailedToUninstall, Some(text.to_owned()));
        }
        (Place::WaitingToUninstall, None)
    }

    /// What it lacks.
    pub(super) fn needs(&self) -> Verb {
        if self.wanted { Verb::Install } else { Verb::Uninstall }
    }

    /// It has what is asked for, verified.
    fn current(&self, measure: Measure<'_>) -> bool {
        let record = &self.node.record;
        record.ready == Some(true)
            && record.version.as_deref() == Some(&measure.settings.version)
            && (!measure.understood
                || record.log_level.as_deref() == Some(measure.log_level)
                    && record.configuration.as_deref() == measure.settings_hash)
    }

    /// How often in a row it failed at what it needs now. A failure at something else, or for another purpose, is no
    /// reason to wait.
    fn failures(&self, measure: Measure<'_>) -> u32 {
        self.failures_at(self.needs(), measure)
    }

    /// How often in a row it failed at this.
    pub(super) fn failures_at(&self, verb: Verb, measure: Measure<'_>) -> u32 {
        let last = self.node.record.last_run.as_ref();
        last.filter(|last| last.verb == verb && last.purpose == measure.purpose)
            .map_or(0, |last| last.failures)
    }

    fn refused<'m>(&self, measure: Measure<'m>) -> Option<&'m Refused> {
        let refused = measure.refused;
        refused.filter(|refused| {
            (&refused.node, refused.verb) == (&self.node.name, self.needs()) && refused.purpose == measure.purpose
        })
    }

    /// A failed node may be tried again.
    pub(super) fn due(&self, clock: &Clock) -> bool {
        let last = self.node.record.last_run.as_ref();
        last.is_none_or(|last| clock.passed(last.due.0, SignedDuration::ZERO))
    }

    /// The run on it has ended, and the node has been Ready for a while since.
    pub(super) fn settled(&self, outcome: &Outcome, measure: Measure<'_>) -> bool {
        let settle = match outcome.restarted {
            true => measure.settings.settle,
            false => measure.settings.settle.min(BRIEFLY),
        };
        let ready = self.node.ready && self.node.since.is_none_or(|since| measure.clock.passed(since, settle));
        measure.clock.passed(self.ended(outcome), settle) && ready
    }

    /// Something about the node is not as it was when it was verified last, or that is a day ago.
    pub(super) fn to_be_verified(&self, measure: Measure<'_>) -> bool {
        let clock = measure.clock;
        if self.failures_at(Verb::Verify, measure) > 0 {
            return self.due(clock);
        }
        let Node {
            record, host, handlers, ..
        } = self.node;
        let Record { boot_id, software, .. } = record;
        let changed = |now: &str, then: &Option<String>| !now.trim().is_empty() && then.as_deref() != Some(now);
        let Some(last) = &record.last_run else {
            return true;
        };
        let forgotten = !handlers.is_empty() && !handlers.contains(KATA) && clock.passed(last.ended.0, LISTED);
        forgotten
            || changed(&host.boot_id, boot_id)
            || changed(&host.software(), software)
            || clock.passed(last.ended.0, DAILY)
    }
}
