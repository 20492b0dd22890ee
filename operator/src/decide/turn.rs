//! Whose turn it is. So many nodes are changed at a time as the KataConfig says; looking at nodes disturbs nobody.

use super::{
    output::{About, Action, Decision, Note},
    scene::short_hash,
    standing::{Measure, Place, Standing},
    world::{Node, Order, Record},
};
use crate::report::Verb;

/// How many nodes are looked at, at a time: each is a pod that is there for a few seconds.
pub(super) const LOOKS: usize = 10;

/// Starts the installer on the nodes whose turn it is, if any. `most` is how many may be changed at a time.
///
/// The last by name comes first, as in the guide's tables. A failed node stops all others until it is due again, and
/// then comes before them. One that is not fit stops nobody, nor does one that is not Ready, unless it became so when
/// kata was put on it. A pod that the API server did not take stops all: it would not take the next one either.
pub(super) fn take(
    config: &str,
    standings: &[Standing<'_>],
    most: usize,
    measure: Measure<'_>,
    removable: &dyn Fn(&Node) -> bool,
    decision: &mut Decision,
) {
    let refused = measure.refused.filter(|refused| refused.purpose == measure.purpose);
    let refused = refused.is_some_and(|refused| !measure.clock.passed(refused.at, measure.settings.retry_first));
    if refused {
        return;
    }
    let stops = |standing: &Standing<'_>| standing.node.ready && is_failed(standing) && !standing.unfit(measure);
    let stopped = standings.iter().any(stops);
    let ready = standings
        .iter()
        .filter(|standing| standing.idle(measure) && (!stopped || stops(standing)));
    let mut next: Vec<_> = ready
        .filter_map(|standing| ready_for(standing, measure, removable))
        .collect();
    next.sort_by_key(|(standing, verb)| (!standing.unfit(measure), urgency(*verb), &standing.node.name));
    let changing = standings.iter().filter(|standing| standing.changing(measure)).count();
    let looking = standings.iter().filter(|standing| standing.run.is_some()).count();
    let (looks, changes): (Vec<_>, Vec<_>) = next.into_iter().rev().partition(|(_, verb)| *verb == Verb::Verify);
    let changes = changes.into_iter().take(most.saturating_sub(changing));
    let looks = looks.into_iter().take(LOOKS.saturating_sub(looking));
    for (standing, verb) in changes.chain(looks) {
        start(config, standing, verb, measure, decision);
    }
}

fn is_failed(standing: &Standing<'_>) -> bool {
    matches!(standing.place, Place::FailedToInstall | Place::FailedToUninstall)
}

fn urgency(verb: Verb) -> u8 {
    match verb {
        Verb::Uninstall => 2,
        Verb::Install => 1,
        Verb::Verify => 0,
    }
}

/// What could be done to a node now.
fn ready_for<'s, 'n>(
    standing: &'s Standing<'n>,
    measure: Measure<'_>,
    removable: &dyn Fn(&Node) -> bool,
) -> Option<(&'s Standing<'n>, Verb)> {
    let node = standing.node;
    if !node.ready || standing.barred(measure).is_some() || (is_failed(standing) && !standing.due(measure.clock)) {
        return None;
    }
    match standing.place {
        Place::WaitingToInstall | Place::FailedToInstall => {
            let wanted = !node.unschedulable && !measure.rollout.paused && standing.chosen(measure);
            wanted.then_some((standing, Verb::Install))
        }
        Place::WaitingToUninstall | Place::FailedToUninstall => removable(node).then_some((standing, Verb::Uninstall)),
        Place::Installed => standing.to_be_verified(measure).then_some((standing, Verb::Verify)),
        Place::Nowhere | Place::Installing | Place::Uninstalling => None,
    }
}

fn start(config: &str, standing: &Standing<'_>, verb: Verb, measure: Measure<'_>, decision: &mut Decision) {
    let node = standing.node;
    if verb == Verb::Install {
        let claimed = Record {
            member: true,
            claim: true,
            ready: Some(false),
            prefix: Some(measure.settings.prefix.clone()),
            ..node.record.clone()
        };
        if claimed != node.record {
            decision.actions.push(Action::Mark {
                node: node.name.clone(),
                record: claimed,
            });
        }
    }
    if measure.rollout.cordon && verb != Verb::Verify && !node.unschedulable && !node.cordoned {
        decision.actions.push(Action::Cordon {
            node: node.name.clone(),
            on: true,
        });
    }
    let order = Order {
        verb,
        node: node.name.clone(),
        node_uid: node.uid.clone(),
        version: measure.settings.version.clone(),
        log_level: measure.log_level.to_owned(),
        configuration: measure.configuration.to_owned(),
        runtime_classes: measure.runtime_classes.clone(),
        purpose: measure.purpose.to_owned(),
        failures: standing.failures_at(verb, measure),
        boot_id: node.host.boot_id.clone(),
        software: node.host.software(),
        in_service: node.record.ready == Some(true),
        runtime: node.host.runtime().to_owned(),
        prefix: match verb {
            Verb::Install => measure.settings.prefix.clone(),
            // Where it is, whatever the operator was told since.
            Verb::Verify | Verb::Uninstall => {
                let noted = node.record.prefix.clone();
                noted.unwrap_or_else(|| measure.settings.prefix.clone())
            }
        },
    };
    decision.actions.push(Action::StartRun {
        name: name(&order, &node.record),
        order,
    });
    let (word, text) = match verb {
        Verb::Install => (
            "InstallStarted",
            format!("Installing kata {} on node {}", measure.settings.version, node.name),
        ),
        Verb::Uninstall => ("UninstallStarted", format!("Removing kata from node {}", node.name)),
        Verb::Verify => return,
    };
    for about in [About::Node(node.name.clone()), About::Config(config.to_owned())] {
        decision.notes.push(Note {
            about,
            warning: false,
            reason: word,
            text: text.clone(),
            after: decision.written(),
        });
    }
}

/// The same for the same run, so that two controllers that both believe to lead cannot make two of them.
fn name(order: &Order, record: &Record) -> String {
    let last = record
        .last_run
        .as_ref()
        .map(|last| last.ended.0.to_string())
        .unwrap_or_default();
    let Order {
        verb,
        node,
        node_uid,
        version,
        purpose,
        failures,
        ..
    } = order;
    let hash = short_hash(&format!(
        "{verb:?}\n{node_uid}\n{version}\n{purpose}\n{failures}\n{last}"
    ));
    // A pod's name may have 253 characters, as a node's.
    let node: String = node.chars().take(200).collect();
    format!("kata-{}-{}-{hash}", verb.as_str(), node.trim_end_matches(['.', '-']))
}
