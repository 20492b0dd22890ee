//! What a run of the installer means for its node.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    clock::{Clock, after},
    scene::settings_hash,
    world::{LastRun, Node, Order, Progress, Record, Run, Settings},
};
use crate::report::{Code, Phase, Report, Verb};

/// A pod whose container does not start although its kubelet tried.
const START: SignedDuration = SignedDuration::from_mins(2);
/// A pod of which nothing is heard. Longer than the pod's own deadline, which its kubelet sees to.
const END: SignedDuration = SignedDuration::from_mins(25);
/// The longest error that is kept on a node, in bytes.
const LONGEST: usize = 1024;
/// Sandboxes end by themselves: no long wait for that.
const SANDBOXES: SignedDuration = SignedDuration::from_secs(10);

/// How a run ended.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) ended: Timestamp,
    pub(super) failure: Option<Failure>,
    /// Its container may still run: only its pod has been given up.
    pub(super) given_up: bool,
    /// The container runtime was restarted, or may have been.
    pub(super) restarted: bool,
}

/// Why it did not do what it was asked for.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) text: String,
    pub(super) harm: Harm,
}

/// What a run that failed has done to its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Harm {
    /// Nothing: it did not start, only looked, or was refused.
    None,
    /// It changed something, and put it back: this version is the current one.
    Undone(String),
    /// Nobody knows.
    Unknown,
}

impl Failure {
    /// Whether kata works on the node as well as before: then other pods may still come to it. Of a node that was out
    /// of service already nobody knows: a run may have been lost.
    pub(super) fn leaves_as_it_was(&self, order: &Order, before: &Record) -> bool {
        let untouched = match &self.harm {
            _ if order.verb == Verb::Verify => true,
            Harm::None => true,
            Harm::Undone(version) => before.version.as_ref() == Some(version),
            Harm::Unknown => false,
        };
        untouched && order.in_service && before.version.is_some() && !self.code.is_about_the_node()
    }
}

/// How a run ended; none while it is under way.
pub(super) fn outcome(run: &Run, clock: &Clock) -> Option<Outcome> {
    // The node's clock may be far from the API server's and the controller's. What cannot be is not believed.
    let clamped = |ended: Timestamp| match ended >= run.created && ended <= clock.now() {
        true => ended,
        false => run.created,
    };
    let given_up = |ended: Timestamp, harm, text: String| Outcome {
        ended,
        failure: Some(Failure {
            code: Code::Other,
            text,
            harm,
        }),
        given_up: true,
        restarted: false,
    };
    match &run.progress {
        Progress::Done { ended, report } => Some(Outcome {
            ended: clamped(*ended),
            failure: disbelief(&run.order, report),
            given_up: false,
            restarted: report.restarted,
        }),
        Progress::Failed { ended, report, text } => {
            let problem = report.as_ref().and_then(|report| report.error.as_ref());
            Some(Outcome {
                ended: clamped(*ended),
                failure: Some(Failure {
                    code: problem.map_or(Code::Other, |problem| problem.code),
                    text: text.clone(),
                    harm: report.as_ref().map_or(Harm::Unknown, harm),
                }),
                given_up: false,
                restarted: report.as_ref().is_none_or(|report| report.restarted),
            })
        }
        Progress::Pending(Some(why)) if clock.passed(run.created, START) => {
            let text = format!("the installer's pod does not start: {why}");
            Some(given_up(after(run.created, START), Harm::None, text))
        }
        Progress::Pending(_) | Progress::Running if clock.passed(run.created, END) => {
            let text = format!("the installer has not ended after {} minutes", END.as_mins());
            Some(given_up(after(run.created, END), Harm::Unknown, text))
        }
        Progress::Pending(_) | Progress::Running => None,
    }
}

fn harm(report: &Report) -> Harm {
    match report.phase {
        Phase::Refused => Harm::None,
        Phase::Failed if !report.changed && report.handler_seen != Some(false) => Harm::Undone(report.version.clone()),
        _ => Harm::Unknown,
    }
}

/// Why a report of success is none.
fn disbelief(order: &Order, report: &Report) -> Option<Failure> {
    let phase = match order.verb {
        Verb::Install => Phase::Installed,
        Verb::Verify => Phase::Verified,
        Verb::Uninstall => Phase::Uninstalled,
    };
    let (code, text) = if report.phase != phase {
        let text = format!(
            "the installer was asked to {} and says {:?}",
            order.verb.as_str(),
            report.phase
        );
        (Code::Other, text)
    } else if order.verb != Verb::Uninstall && report.handler_seen == Some(false) {
        let text = "the container runtime does not list the handler kata".to_owned();
        (Code::HandlerAbsent, text)
    } else if order.verb == Verb::Install && report.version != order.version {
        let text = format!(
            "the installer's image carries version {}, and the controller was told {}; give both the same",
            report.version, order.version
        );
        (Code::Other, text)
    } else {
        return None;
    };
    Some(Failure {
        code,
        text,
        harm: Harm::Unknown,
    })
}

/// What is to be noted on the node after a run.
pub(super) fn record(
    run: &Run,
    outcome: &Outcome,
    node: &Node,
    wanted: bool,
    settings: &Settings,
    now: Timestamp,
) -> Record {
    let order = &run.order;
    let before = &node.record;
    let last_run = Some(last_run(run, outcome, settings, now));
    match (&outcome.failure, order.verb) {
        (None, Verb::Uninstall) => Record {
            member: wanted,
            ..Record::default()
        },
        (None, Verb::Install | Verb::Verify) => Record {
            member: before.member,
            claim: true,
            ready: Some(wanted),
            prefix: Some(order.prefix.clone()).filter(|prefix| !prefix.is_empty()),
            version: match order.verb {
                Verb::Verify => before.version.clone(),
                _ => Some(order.version.clone()),
            },
            log_level: match order.verb {
                Verb::Verify => before.log_level.clone(),
                _ => Some(order.log_level.clone()),
            },
            configuration: match order.verb {
                Verb::Verify => before.configuration.clone(),
                _ => settings_hash(&order.configuration, &order.runtime_classes),
            },
            boot_id: Some(order.boot_id.clone()),
            software: Some(order.software.clone()),
            last_error: None,
            last_run,
        },
        (Some(failure), _) if failure.leaves_as_it_was(order, before) => Record {
            claim: true,
            ready: Some(wanted),
            last_error: Some(shortened(&failure.text)),
            last_run,
            ..before.clone()
        },
        (Some(failure), verb) => Record {
            member: before.member,
            claim: true,
            ready: Some(false),
            prefix: before.prefix.clone(),
            // After a failure nobody knows what is there.
            version: before.version.clone().filter(|_| verb == Verb::Uninstall),
            last_error: Some(shortened(&failure.text)),
            last_run,
            ..Record::default()
        },
    }
}

/// Whether the node's record tells of this run already.
pub(super) fn noted(run: &Run, outcome: &Outcome, node: &Node) -> bool {
    match (&outcome.failure, run.order.verb) {
        (None, Verb::Uninstall) => !node.record.claimed(),
        _ => node.record.last_run.as_ref().is_some_and(|last| last.run == run.uid),
    }
}

/// All times in it are of the controller's clock, with which they will be compared.
fn last_run(run: &Run, outcome: &Outcome, settings: &Settings, now: Timestamp) -> LastRun {
    let order = &run.order;
    let failures = outcome.failure.as_ref().map_or(0, |_| order.failures.saturating_add(1));
    let delay = match &outcome.failure {
        None => SignedDuration::ZERO,
        Some(failure) if failure.code == Code::SandboxesExist => SANDBOXES.min(settings.retry_first),
        Some(_) => backoff(settings.retry_first, failures),
    };
    LastRun {
        run: run.uid.clone(),
        verb: order.verb,
        failures,
        ended: Time(now),
        due: Time(after(now, delay)),
        purpose: order.purpose.clone(),
        refused: outcome.failure.as_ref().is_some_and(|failure| {
            !outcome.given_up && failure.harm == Harm::None && failure.code != Code::SandboxesExist
        }),
    }
}

/// 1, 2, 4, 8, 15, 15.. times the first delay.
fn backoff(first: SignedDuration, failures: u32) -> SignedDuration {
    let factor = 1_i32 << failures.saturating_sub(1).min(4);
    first.saturating_mul(factor.min(15))
}

/// At most so many bytes, cut at a character.
fn shortened(text: &str) -> String {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_fifteen_times_the_first() {
        let minutes: Vec<i64> = (1..=7)
            .map(|failures| backoff(SignedDuration::from_mins(1), failures).as_mins())
            .collect();
        assert_eq!(minutes, [1, 2, 4, 8, 15, 15, 15]);
    }

    #[test]
    fn a_long_error_is_cut_at_a_character() {
        assert_eq!(shortened(&"ä".repeat(600)).len(), 1024);
        assert_eq!(shortened(&format!("a{}", "ä".repeat(600))).len(), 1023);
    }
}
