//! What a run of the installer means for its node.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    clock::{Clock, after},
    world::{LastRun, Node, Order, Progress, Record, Run, Settings},
};
use crate::report::{Code, Phase, Report, Verb};

/// A pod whose container does not start although its kubelet tried.
const START: SignedDuration = SignedDuration::from_mins(2);
/// A pod of which nothing is heard. Longer than the pod's own deadline, which its kubelet sees to.
const END: SignedDuration = SignedDuration::from_mins(15);
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
}

/// Why it did not do what it was asked for.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) text: String,
}

/// How a run ended; none while it is under way.
pub(super) fn outcome(run: &Run, clock: &Clock) -> Option<Outcome> {
    let failed = |ended: Timestamp, given_up, code, text: String| Outcome {
        ended,
        failure: Some(Failure { code, text }),
        given_up,
    };
    match &run.progress {
        Progress::Done { ended, report } => Some(Outcome {
            ended: *ended,
            failure: disbelief(&run.order, report),
            given_up: false,
        }),
        Progress::Failed { ended, code, text } => {
            Some(failed(*ended, false, code.unwrap_or(Code::Other), text.clone()))
        }
        Progress::Pending(Some(why)) if clock.passed(run.created, START) => {
            let text = format!("the installer's pod does not start: {why}");
            Some(failed(after(run.created, START), true, Code::Other, text))
        }
        Progress::Pending(_) | Progress::Running if clock.passed(run.created, END) => {
            let text = format!("the installer has not ended after {} minutes", END.as_mins());
            Some(failed(after(run.created, END), true, Code::Other, text))
        }
        Progress::Pending(_) | Progress::Running => None,
    }
}

/// Why a report of success is none.
fn disbelief(order: &Order, report: &Report) -> Option<Failure> {
    let phase = match order.verb {
        Verb::Install => Phase::Installed,
        Verb::Verify => Phase::Verified,
        Verb::Uninstall => Phase::Uninstalled,
    };
    let text = if report.phase != phase {
        format!(
            "the installer was asked to {} and says {:?}",
            order.verb.as_str(),
            report.phase
        )
    } else if order.verb != Verb::Uninstall && report.handler_seen == Some(false) {
        "the container runtime does not list the handler kata".to_owned()
    } else if order.verb == Verb::Install && report.version != order.version {
        format!(
            "the installer's image carries version {}, and the controller was told {}; give both the same",
            report.version, order.version
        )
    } else {
        return None;
    };
    Some(Failure {
        code: Code::Other,
        text,
    })
}

/// What is to be noted on the node after a run.
pub(super) fn record(run: &Run, outcome: &Outcome, node: &Node, wanted: bool, settings: &Settings) -> Record {
    let order = &run.order;
    let before = &node.record;
    let last_run = Some(last_run(run, outcome, settings));
    match (&outcome.failure, order.verb) {
        (None, Verb::Uninstall) => Record {
            member: wanted,
            ..Record::default()
        },
        (None, Verb::Install | Verb::Verify) => Record {
            member: before.member,
            ready: Some(wanted),
            version: match order.verb {
                Verb::Verify => before.version.clone(),
                _ => Some(order.version.clone()),
            },
            log_level: match order.verb {
                Verb::Verify => before.log_level.clone(),
                _ => Some(order.log_level.clone()),
            },
            boot_id: Some(order.boot_id.clone()),
            software: Some(order.software.clone()),
            last_error: None,
            last_run,
        },
        (Some(failure), verb) => Record {
            member: before.member,
            ready: Some(false),
            // After a failure nobody knows what is there.
            version: before.version.clone().filter(|_| verb == Verb::Uninstall),
            last_error: Some(shortened(&failure.text)),
            last_run,
            ..Record::default()
        },
    }
}

/// Whether the node's record tells of this run already.
pub(super) fn noted(run: &Run, outcome: &Outcome, node: &Node, settings: &Settings) -> bool {
    match (&outcome.failure, run.order.verb) {
        (None, Verb::Uninstall) => !node.record.claimed(),
        _ => node.record.last_run.as_ref() == Some(&last_run(run, outcome, settings)),
    }
}

fn last_run(run: &Run, outcome: &Outcome, settings: &Settings) -> LastRun {
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
        ended: Time(outcome.ended),
        due: Time(after(outcome.ended, delay)),
        purpose: order.purpose.clone(),
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
