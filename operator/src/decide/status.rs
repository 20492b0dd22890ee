//! The status that users read, word for word as the user guide of OpenShift sandboxed containers has it, section 2.4.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    standing::{Place, Standing},
    world::KATA,
};
use crate::api::{AVAILABLE, Condition, DEGRADED, IN_PROGRESS, KataConfig, KataConfigStatus, KataNodes, PROGRESSING};

/// Why the condition `InProgress` is as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reason {
    /// Kata is on all wanted nodes.
    Steady,
    /// The first installation.
    Installing,
    /// Nodes come, go or get another version.
    Updating,
    /// The KataConfig is being deleted.
    Uninstalling,
    /// A node did not do what it should.
    Failed { node: String, text: String },
    /// Pods use kata: their names.
    Blocked(Vec<String>),
    /// Nobody knows whether pods use kata.
    Unlisted(String),
    /// No node is wanted.
    NoEligibleNodes(String),
    /// `spec` cannot be understood.
    InvalidSpec(String),
    /// The selector makes no sense.
    InvalidSelector(String),
    /// Peer pods are asked for.
    PeerPods,
    /// Confidential machines are asked for.
    Confidential,
    /// Another KataConfig is in force.
    Duplicate(String),
}

impl Reason {
    /// Status, reason and message.
    fn words(&self) -> (bool, &'static str, String) {
        match self {
            Reason::Steady => (false, "", String::new()),
            Reason::Installing => (
                true,
                "Installing",
                "Performing initial installation of kata on cluster".into(),
            ),
            Reason::Updating => (true, "Updating", "Adding and/or removing kata-enabled nodes".into()),
            Reason::Uninstalling => (true, "Uninstalling", "Removing kata from cluster".into()),
            Reason::Failed { node, text } => (true, "Failed", format!("Node {node} Degraded: {text}")),
            Reason::Blocked(_) => {
                let text = "Existing pods using \"kata\" RuntimeClass found. Please delete the pods manually for KataConfig deletion to proceed";
                (false, "BlockedByExistingKataPods", text.into())
            }
            Reason::Unlisted(error) => (
                false,
                "BlockedByExistingKataPods",
                format!("Failed to list kata pods: {error}"),
            ),
            Reason::NoEligibleNodes(why) => (false, "NoEligibleNodes", why.clone()),
            Reason::InvalidSpec(why) => (false, "InvalidSpec", format!("spec cannot be understood: {why}")),
            Reason::InvalidSelector(why) => (false, "InvalidSelector", why.clone()),
            Reason::PeerPods => {
                let text = "enablePeerPods: true asks for pods in virtual machines of a cloud, which are not supported; set it to false";
                (false, "PeerPodsNotSupported", text.into())
            }
            Reason::Confidential => {
                let text = "the ConfigMap osc-feature-gates has confidential: \"true\", which asks for confidential machines; they are not supported: set it to \"false\"";
                (false, "ConfidentialNotSupported", text.into())
            }
            Reason::Duplicate(name) => {
                let text = format!(
                    "A KataConfig instance already exists: {name} is in force; delete this one, or that one first"
                );
                (false, "Duplicate", text)
            }
        }
    }

    /// The word, for an event about what an administrator has to see to.
    pub(super) fn calls_for_help(&self) -> Option<(&'static str, String)> {
        let (_, reason, message) = self.words();
        match self {
            Reason::Steady | Reason::Installing | Reason::Updating | Reason::Uninstalling | Reason::Failed { .. } => {
                None
            }
            Reason::Blocked(pods) => Some((reason, blocked(pods))),
            _ => Some((reason, message)),
        }
    }
}

/// What a status tells besides its reason and its lists.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The RuntimeClasses that are there, of those that are asked for.
    pub(super) runtime_classes: Vec<String>,
    /// No node is begun.
    pub(super) paused: bool,
    /// The nodes that are waited for, each with what it waits for.
    pub(super) waiting: Vec<String>,
}

/// At most so many nodes are named in a message.
const NAMED: usize = 5;

/// The status with this reason; the time of the last transition is kept while a condition's status stays.
pub(super) fn status(
    reason: &Reason,
    kata_nodes: KataNodes,
    facts: &Facts,
    config: &KataConfig,
    now: Timestamp,
) -> KataConfigStatus {
    let before = config.status.as_ref();
    let generation = config.metadata.generation;
    let condition = |kind: &str, (is, word, message): (bool, &str, String), observed_generation| {
        let status = if is { "True" } else { "False" };
        let last = before.and_then(|before| before.condition(kind));
        let last = last.filter(|condition| condition.status == status);
        let since = last.map(|condition| condition.last_transition_time.clone());
        Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            last_transition_time: since.unwrap_or_else(|| Time(to_the_second(now))),
            reason: word.to_owned(),
            message,
            observed_generation,
        }
    };
    KataConfigStatus {
        runtime_classes: facts.runtime_classes.clone(),
        conditions: vec![
            condition(IN_PROGRESS, reason.words(), None),
            condition(AVAILABLE, available(&kata_nodes, facts), generation),
            condition(PROGRESSING, progressing(reason, facts), generation),
            condition(DEGRADED, degraded(reason), generation),
        ],
        kata_nodes,
        waiting_for_mco_to_start: false,
    }
}

fn available(nodes: &KataNodes, facts: &Facts) -> (bool, &'static str, String) {
    let message = format!("{} of {} nodes have kata", nodes.ready_node_count, nodes.node_count);
    let class = facts.runtime_classes.iter().any(|class| class == KATA);
    match (class, nodes.ready_node_count) {
        (false, _) => (false, "NoRuntimeClass", message),
        (true, 0) => (false, "NoNodes", message),
        (true, _) => (true, "Installed", message),
    }
}

fn progressing(reason: &Reason, facts: &Facts) -> (bool, &'static str, String) {
    let (in_progress, word, message) = reason.words();
    let waiting = || {
        let named: Vec<&str> = facts.waiting.iter().take(NAMED).map(String::as_str).collect();
        let more = match facts.waiting.len() - named.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("{}{more}", named.join("; "))
    };
    match reason {
        Reason::Failed { .. } => (false, "Failed", message),
        _ if in_progress && facts.paused => (false, "Paused", "spec.rollout.paused is true: no node is begun".into()),
        _ if in_progress && facts.waiting.is_empty() => (true, word, message),
        // Whatever else is to be done goes on.
        _ if in_progress => (true, "WaitingForNodes", waiting()),
        Reason::Steady => (false, "Complete", message),
        Reason::Blocked(pods) => (false, word, blocked(pods)),
        _ => (false, word, message),
    }
}

fn degraded(reason: &Reason) -> (bool, &'static str, String) {
    let (_, word, message) = reason.words();
    match reason {
        Reason::Steady | Reason::Installing | Reason::Updating | Reason::Uninstalling | Reason::Blocked(_) => {
            (false, "AsExpected", String::new())
        }
        _ => (true, word, message),
    }
}

/// The guide's sentence, and the pods that it is about.
fn blocked(pods: &[String]) -> String {
    let (_, _, message) = Reason::Blocked(Vec::new()).words();
    let first: Vec<&str> = pods.iter().take(3).map(String::as_str).collect();
    let more = if pods.len() > first.len() { " and others" } else { "" };
    format!("{message}: {}{more}", first.join(", "))
}

/// As the API shows times.
fn to_the_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// The lists, each sorted by name.
pub(super) fn lists(standings: &[Standing<'_>]) -> KataNodes {
    let names = |place: Place| -> Vec<String> {
        let mut names: Vec<String> = standings
            .iter()
            .filter(|standing| standing.place == place)
            .map(|standing| standing.node.name.clone())
            .collect();
        names.sort();
        names
    };
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let installed = names(Place::Installed);
    KataNodes {
        node_count: count(standings.iter().filter(|standing| standing.wanted).count()),
        ready_node_count: count(installed.len()),
        installed,
        installing: names(Place::Installing),
        waiting_to_install: names(Place::WaitingToInstall),
        failed_to_install: names(Place::FailedToInstall),
        uninstalling: names(Place::Uninstalling),
        waiting_to_uninstall: names(Place::WaitingToUninstall),
        failed_to_uninstall: names(Place::FailedToUninstall),
    }
}
