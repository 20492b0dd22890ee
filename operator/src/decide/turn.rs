//! Whose turn it is. There is one installer pod at a time in the cluster.

use super::{
    output::{About, Action, Decision, Note},
    scene::short_hash,
    standing::{Measure, Place, Standing},
    world::{Node, Order, Record},
};
use crate::report::Verb;

/// Starts the installer on the node whose turn it is, if any.
///
/// The last by name comes first, as in the guide's tables. A failed node stops all others until it is due again, and
/// then comes before them; one that is not Ready stops nobody.
pub(super) fn take(
    config: &str,
    standings: &[Standing<'_>],
    measure: Measure<'_>,
    removable: &dyn Fn(&Node) -> bool,
    decision: &mut Decision,
) {
    if standings.iter().any(|standing| standing.run.is_some()) {
        return;
    }
    let mut failed = standings
        .iter()
        .filter(|standing| standing.node.ready && is_failed(standing))
        .peekable();
    let next = if failed.peek().is_some() {
        let due: Vec<&Standing<'_>> = failed.filter(|standing| standing.due(measure)).collect();
        due.into_iter()
            .filter_map(|standing| ready_for(standing, measure, removable))
            .max_by_key(|(standing, _)| &standing.node.name)
    } else {
        standings
            .iter()
            .filter_map(|standing| ready_for(standing, measure, removable))
            .max_by_key(|(standing, verb)| (urgency(*verb), &standing.node.name))
    };
    if let Some((standing, verb)) = next {
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
    if !node.ready {
        return None;
    }
    match standing.place {
        Place::WaitingToInstall | Place::FailedToInstall => (!node.unschedulable).then_some((standing, Verb::Install)),
        Place::WaitingToUninstall | Place::FailedToUninstall => removable(node).then_some((standing, Verb::Uninstall)),
        Place::Installed => standing
            .to_be_verified(measure.clock)
            .then_some((standing, Verb::Verify)),
        Place::Nowhere | Place::Installing | Place::Uninstalling => None,
    }
}

fn start(config: &str, standing: &Standing<'_>, verb: Verb, measure: Measure<'_>, decision: &mut Decision) {
    let node = standing.node;
    if verb == Verb::Install {
        let claimed = Record {
            member: true,
            ready: Some(false),
            ..node.record.clone()
        };
        if claimed != node.record {
            decision.actions.push(Action::Mark {
                node: node.name.clone(),
                record: claimed,
            });
        }
    }
    let order = Order {
        verb,
        node: node.name.clone(),
        node_uid: node.uid.clone(),
        version: measure.settings.version.clone(),
        log_level: measure.log_level.to_owned(),
        purpose: measure.purpose.to_owned(),
        failures: if verb == standing.needs() {
            standing.failures(measure)
        } else {
            0
        },
        boot_id: node.host.boot_id.clone(),
        software: node.host.software(),
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
