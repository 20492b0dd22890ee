//! The KataConfig that is in force: what it asks for, what is there, and the next steps from one to the other.

use std::collections::{BTreeMap, BTreeSet};

use config::Config;
use jiff::SignedDuration;
use kube::ResourceExt;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    clock::Clock,
    has_finalizer,
    output::{About, Action, Decision, End, Note, Step},
    pool::Pool,
    results::{self, Outcome},
    selector::SelectorError,
    standing::{Measure, Place, Standing},
    status::{self, Facts, Reason},
    tell_status, turn,
    world::{FEATURE_GATES, KATA, KataPod, Node, ONCE, Progress, RETRY, Record, Run, RuntimeClass, SKIP_NODES, World},
};
use crate::{
    api::{KataConfig, KataNodes, PodOverhead},
    report::Verb,
};

/// The feature gate that asks for confidential machines.
const CONFIDENTIAL: &str = "confidential";

/// What stands in the way of any change.
#[derive(Debug, PartialEq, Eq)]
enum Hold {
    Spec(String),
    PeerPods,
    Confidential,
    Selector(SelectorError),
    /// It is being deleted, and pods use kata.
    Pods,
    /// No node is wanted any more, so all would lose kata: more probably a mistake than an intention.
    NobodyWanted,
}

pub(super) struct Scene<'a> {
    world: &'a World,
    config: &'a KataConfig,
    clock: &'a Clock,
    /// Nodes that are to be left alone.
    skipped: BTreeSet<&'a str>,
    purpose: String,
    /// The RuntimeClasses that are asked for, `kata` among them, with their overheads; none while `spec` is invalid.
    classes: BTreeMap<String, PodOverhead>,
    /// The configurations of those beside `kata`.
    class_settings: BTreeMap<String, String>,
    /// Stands for what is laid over the installed configuration.
    settings_hash: Option<String>,
    /// `spec` makes sense.
    understood: bool,
}

/// The nodes, each in its place, for a KataConfig that has its finalizer.
struct Cast<'a> {
    pool: Pool,
    hold: Option<Hold>,
    standings: Vec<Standing<'a>>,
    /// Pods that use kata are known, and there are none.
    free_of_pods: bool,
    /// How many nodes may be changed at a time.
    most: usize,
}

impl<'a> Scene<'a> {
    pub(super) fn new(world: &'a World, config: &'a KataConfig, clock: &'a Clock) -> Scene<'a> {
        let skipped = config.annotations().get(SKIP_NODES).map_or("", String::as_str);
        let beside = config.spec.classes().unwrap_or_default();
        let overheads = beside
            .iter()
            .map(|(name, class)| (name.clone(), class.overhead.clone()));
        let kata = config
            .spec
            .pod_overhead()
            .ok()
            .map(|overhead| (KATA.to_owned(), overhead));
        let classes = overheads.chain(kata).collect();
        let class_settings = beside
            .into_iter()
            .map(|(name, class)| (name, class.configuration))
            .collect();
        let mut scene = Scene {
            world,
            config,
            clock,
            understood: true,
            skipped: skipped
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .collect(),
            purpose: purpose(config, &world.settings.version),
            settings_hash: settings_hash(configuration(config).unwrap_or_default(), &class_settings),
            classes,
            class_settings,
        };
        scene.understood = scene.invalid().is_none();
        scene
    }

    pub(super) fn play(&self, decision: &mut Decision) {
        match (has_finalizer(self.config), self.deleting()) {
            (false, true) => {}
            (false, false) => self.begin(decision),
            (true, _)
                if self
                    .config
                    .status
                    .as_ref()
                    .is_none_or(|status| status.conditions.is_empty())
                    && !self.deleting() =>
            {
                self.tell(&Reason::Installing, KataNodes::default(), Vec::new(), decision);
            }
            (true, _) => self.go_on(decision),
        }
    }

    fn deleting(&self) -> bool {
        self.config.metadata.deletion_timestamp.is_some()
    }

    /// What is wrong with `spec`.
    fn invalid(&self) -> Option<String> {
        let unread = self.world.invalid_specs.get(&self.config.name_any()).cloned();
        // Checked here: the nodes would go out of service over it, one after another.
        let configuration = configuration(self.config).unwrap_or_default();
        let unread = unread.or_else(|| self.config.spec.classes().err());
        unread.or_else(|| match Config::parse("", &[configuration]) {
            Err(error) => Some(format!("configuration: {error}")),
            Ok(common) => self.class_settings.iter().find_map(|(name, settings)| {
                let error = common.with(settings).err()?;
                Some(format!("configuration of the RuntimeClass {name}: {error}"))
            }),
        })
    }

    fn measure(&self) -> Measure<'_> {
        Measure {
            settings: &self.world.settings,
            log_level: self.config.spec.log_level.name(),
            configuration: configuration(self.config).unwrap_or_default(),
            runtime_classes: &self.class_settings,
            settings_hash: self.settings_hash.as_deref(),
            understood: self.understood,
            purpose: &self.purpose,
            clock: self.clock,
            refused: self.world.refused.as_ref(),
            rollout: &self.config.spec.rollout,
            unread_runs: &self.world.unread_runs,
        }
    }

    /// No node is touched before the finalizer is there. What makes no sense does not get one.
    fn begin(&self, decision: &mut Decision) {
        if let Some(why) = self.invalid() {
            return self.tell(&Reason::InvalidSpec(why), KataNodes::default(), Vec::new(), decision);
        }
        if self.config.spec.enable_peer_pods {
            return self.tell(&Reason::PeerPods, KataNodes::default(), Vec::new(), decision);
        }
        if self.confidential() {
            return self.tell(&Reason::Confidential, KataNodes::default(), Vec::new(), decision);
        }
        self.tell(&Reason::Installing, KataNodes::default(), Vec::new(), decision);
        decision.actions.push(Action::AddFinalizer(self.config.name_any()));
    }

    fn tell(&self, reason: &Reason, lists: KataNodes, waiting: Vec<String>, decision: &mut Decision) {
        decision.nodes = lists.clone();
        let facts = Facts {
            runtime_classes: self.classes_there(),
            paused: self.config.spec.rollout.paused && !self.deleting(),
            waiting,
        };
        tell_status(self.config, reason, lists, &facts, self.clock, decision);
    }

    /// The nodes that nothing is done to now, each with its reason.
    fn waiting(&self, cast: &Cast<'_>) -> Vec<String> {
        let reason = |standing: &Standing<'_>| {
            let node = standing.node;
            let waits = matches!(standing.place, Place::WaitingToInstall | Place::WaitingToUninstall);
            let pods = || self.world.kata_pods.as_ref().and_then(|pods| pods.as_ref().ok());
            let here = |pod: &&KataPod| pod.node.as_deref() == Some(&node.name);
            match waits {
                false => None,
                true if !node.ready => Some("is not Ready".to_owned()),
                true if standing.wanted && node.unschedulable => Some("is cordoned".to_owned()),
                true if standing.wanted && !standing.chosen(self.measure()) => {
                    Some("has not the labels of rollout.canary".to_owned())
                }
                true if standing.wanted => None,
                true => {
                    let pod = pods()?.iter().find(here)?;
                    Some(format!("has pods with kata, such as {}", pod.name))
                }
            }
        };
        let waiting = cast
            .standings
            .iter()
            .filter_map(|standing| Some((standing, reason(standing)?)));
        let mut waiting: Vec<String> = waiting
            .map(|(standing, why)| format!("{} {why}", standing.node.name))
            .collect();
        waiting.sort();
        waiting
    }

    fn go_on(&self, decision: &mut Decision) {
        let cast = self.cast();
        let removal = self.deleting()
            || cast
                .standings
                .iter()
                .any(|standing| !standing.wanted && standing.node.record.claimed());
        decision.awaits_pods = removal;
        let lists = status::lists(&cast.standings);
        self.tell_of_left_out(&cast, decision);
        self.tell(&self.reason(&cast), lists, self.waiting(&cast), decision);
        let noted = self.take_note(&cast, decision) | self.uncordon(&cast, decision);
        if cast.hold.is_some() || noted {
            return;
        }
        if self.mark(&cast, decision) || self.runtime_classes(&cast, decision) {
            return;
        }
        if self.deleting() && !cast.standings.iter().any(|standing| standing.node.record.claimed()) {
            return self.finish(&cast, decision);
        }
        turn::take(
            &self.config.name_any(),
            &cast.standings,
            cast.most,
            self.measure(),
            &|node| self.removable(&cast, node),
            decision,
        );
    }

    /// Puts every node in its place.
    fn cast(&self) -> Cast<'a> {
        let world = self.world;
        let (mut pool, refusal) = match Pool::choose(&self.config.spec, &world.nodes) {
            Ok(pool) => (pool, None),
            Err(error) => (Pool::default(), Some(Hold::Selector(error))),
        };
        pool.wanted.retain(|name| !self.skipped.contains(name.as_str()));
        let peer_pods = self.config.spec.enable_peer_pods.then_some(Hold::PeerPods);
        let most = self.config.spec.rollout.most(pool.wanted.len());
        let wrong = self.invalid().or_else(|| most.as_ref().err().cloned());
        let confidential = self.confidential().then_some(Hold::Confidential);
        let refusal = wrong.map(Hold::Spec).or(peer_pods).or(confidential).or(refusal);
        let free_of_pods = matches!(&self.world.kata_pods, Some(Ok(pods)) if self.in_the_way(pods).next().is_none());
        let claimed = |node: &Node| node.record.claimed() && !self.skipped.contains(node.name.as_str());
        let begun = !self.has_our_class();
        let hold = match self.deleting() {
            true => (!free_of_pods && !begun).then_some(Hold::Pods),
            false => refusal.or_else(|| {
                let nobody = pool.wanted.is_empty() && world.nodes.iter().any(claimed);
                nobody.then_some(Hold::NobodyWanted)
            }),
        };
        let wanted = |node: &Node| match &hold {
            // As it is.
            Some(Hold::Spec(_) | Hold::PeerPods | Hold::Confidential | Hold::Selector(_) | Hold::NobodyWanted) => {
                node.record.claimed()
            }
            Some(Hold::Pods) => pool.wanted.contains(&node.name),
            None => !self.deleting() && pool.wanted.contains(&node.name),
        };
        let touched = world
            .nodes
            .iter()
            .filter(|node| !self.skipped.contains(node.name.as_str()));
        let standings = touched
            .map(|node| Standing::of(node, wanted(node), &world.runs, self.measure()))
            .collect();
        Cast {
            pool,
            hold,
            standings,
            free_of_pods,
            most: most.unwrap_or(1),
        }
    }

    /// The pods that use kata on nodes that are not left alone, as far as they have a node.
    fn in_the_way<'p>(&'p self, pods: &'p [KataPod]) -> impl Iterator<Item = &'p KataPod> {
        let skipped = |pod: &KataPod| pod.node.as_deref().is_some_and(|node| self.skipped.contains(node));
        pods.iter().filter(move |pod| !skipped(pod))
    }

    fn reason(&self, cast: &Cast<'_>) -> Reason {
        if self.deleting() {
            match &self.world.kata_pods {
                Some(Err(error)) => return Reason::Unlisted(error.clone()),
                Some(Ok(pods)) if !cast.free_of_pods => {
                    return Reason::Blocked(self.in_the_way(pods).map(|pod| pod.name.clone()).collect());
                }
                _ => {}
            }
        }
        match &cast.hold {
            Some(Hold::Spec(why)) => return Reason::InvalidSpec(why.clone()),
            Some(Hold::PeerPods) => return Reason::PeerPods,
            Some(Hold::Confidential) => return Reason::Confidential,
            Some(Hold::Selector(error)) => return Reason::InvalidSelector(error.to_string()),
            Some(Hold::NobodyWanted) => {
                let kept = cast.standings.iter().filter(|standing| standing.wanted).count();
                return Reason::NoEligibleNodes(format!(
                    "{}; kata stays on {kept} nodes that have it: delete the KataConfig to remove it from all",
                    cast.pool.why_empty()
                ));
            }
            Some(Hold::Pods) | None => {}
        }
        let failed = cast
            .standings
            .iter()
            .filter_map(|standing| Some((standing, standing.trouble.as_ref()?)));
        if let Some((standing, text)) = failed.min_by_key(|(standing, _)| &standing.node.name) {
            return Reason::Failed {
                node: standing.node.name.clone(),
                text: text.clone(),
            };
        }
        let all_there = self.classes_there().len() == self.classes.len();
        let at_work = |standing: &Standing<'_>| !matches!(standing.place, Place::Nowhere | Place::Installed);
        match (self.deleting(), cast.standings.iter().any(at_work)) {
            (true, _) => Reason::Uninstalling,
            (false, false) if cast.pool.wanted.is_empty() => Reason::NoEligibleNodes(cast.pool.why_empty()),
            (false, false) if all_there => Reason::Steady,
            _ if self.installed_before() => Reason::Updating,
            _ => Reason::Installing,
        }
    }

    /// The first installation is over once the RuntimeClass is there. One that somebody else made was there from the
    /// start.
    fn installed_before(&self) -> bool {
        let ours = self.has_our_class();
        let status = self.config.status.as_ref();
        let steady = status.and_then(|status| status.in_progress());
        ours || steady.is_some_and(|condition| condition.reason == "Updating" || condition.reason.is_empty())
    }

    /// What is not as one might think, and stays so.
    fn tell_of_left_out(&self, cast: &Cast<'_>, decision: &mut Decision) {
        if self.deleting() {
            return;
        }
        let [not_supported, not_ours, ignored] = ONCE;
        let config = About::Config(self.config.name_any());
        let mut once = |abouts: &[&About], reason, text: String| {
            if !self.world.told.contains(&text) {
                let notes = abouts
                    .iter()
                    .map(|about| warning((*about).clone(), reason, text.clone()));
                decision.notes.extend(notes);
            }
        };
        for (node, what) in &cast.pool.unsupported {
            let text = format!("Node {node} does not get kata: {what}");
            once(&[&About::Node(node.clone()), &config], not_supported, text);
        }
        for (name, class) in &self.world.runtime_classes {
            if class.ours || !self.classes.contains_key(name) {
                continue;
            }
            let text = format!(
                "The RuntimeClass {name}, with the handler {}, is not this operator's: it is neither changed nor \
                 deleted",
                class.handler
            );
            once(&[&config], not_ours, text);
        }
        for (gate, value) in self
            .world
            .feature_gates
            .iter()
            .filter(|(gate, _)| *gate != CONFIDENTIAL)
        {
            let text = match gate.as_str() {
                "deploymentMode" => "nodes are changed by an installer's pods, without a reboot, in any mode",
                "caaUpdateStrategy" => "it is about peer pods, which are not supported",
                _ => "this operator does not know it",
            };
            let text = format!("{gate}: {value:?} in the ConfigMap {FEATURE_GATES} changes nothing: {text}");
            once(&[&config], ignored, text);
        }
    }

    /// Confidential machines are asked for where OpenShift sandboxed containers is asked for them.
    fn confidential(&self) -> bool {
        let gate = self.world.feature_gates.get(CONFIDENTIAL);
        gate.is_some_and(|value| value.trim().eq_ignore_ascii_case("true"))
    }

    fn has_our_class(&self) -> bool {
        self.world.runtime_classes.get(KATA).is_some_and(|class| class.ours)
    }

    /// Of the RuntimeClasses that are asked for, those that are there; of ours, while nobody knows what is asked for.
    fn classes_there(&self) -> Vec<String> {
        let there = self.world.runtime_classes.iter();
        let counts = |name: &String, ours: bool| match self.understood {
            true => self.classes.contains_key(name),
            false => ours,
        };
        there
            .filter(|(name, class)| counts(name, class.ours))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Ends the cordon of nodes whose change is over. Tells whether there are any.
    fn uncordon(&self, cast: &Cast<'_>, decision: &mut Decision) -> bool {
        let before = decision.actions.len();
        let over = cast.standings.iter().filter(|standing| standing.idle(self.measure()));
        decision.actions.extend(over.filter_map(uncordoned));
        decision.actions.len() > before
    }

    /// Notes on the nodes how runs ended, and deletes their pods. Tells whether there was something new.
    fn take_note(&self, cast: &Cast<'_>, decision: &mut Decision) -> bool {
        let mut news = false;
        for run in &self.world.runs {
            let there = self.world.nodes.iter().any(|node| node.uid == run.order.node_uid);
            if !there && !run.deleted {
                decision.actions.push(delete(run));
            }
        }
        let unread = self.world.unread_runs.iter().filter(|run| run.ended && !run.deleted);
        decision.actions.extend(unread.map(|run| Action::DeleteRun {
            name: run.name.clone(),
            uid: run.uid.clone(),
        }));
        for standing in &cast.standings {
            let Some((run, Some(outcome))) = &standing.run else {
                continue;
            };
            if !standing.noted {
                news = true;
                self.note(standing, run, outcome, decision);
            }
            // Its pod stands for a node that may still be shaken by what was done to it.
            let shaken = outcome.failure.is_none()
                && run.order.verb != Verb::Verify
                && !standing.settled(outcome, self.measure());
            if !run.deleted && !shaken {
                decision.actions.push(delete(run));
            }
        }
        news
    }

    fn note(&self, standing: &Standing<'_>, run: &Run, outcome: &Outcome, decision: &mut Decision) {
        let node = &standing.node.name;
        decision.actions.push(Action::Mark {
            node: node.clone(),
            record: results::record(
                run,
                outcome,
                standing.node,
                standing.wanted,
                &self.world.settings,
                self.clock.now(),
            ),
        });
        decision.ends.push(End {
            verb: run.order.verb,
            took: outcome.ended.duration_since(run.created).max(SignedDuration::ZERO),
            failure: outcome.failure.as_ref().map(|failure| failure.code),
            after: decision.written(),
        });
        let (word, text) = match (&outcome.failure, run.order.verb) {
            (None, Verb::Verify) => return,
            (None, Verb::Install) => ("Installed", installed(run)),
            (None, Verb::Uninstall) => ("Uninstalled", format!("Node {node} has no kata any more")),
            (Some(failure), Verb::Install) => ("InstallFailed", format!("Node {node} Degraded: {}", failure.text)),
            (Some(failure), Verb::Uninstall) => ("UninstallFailed", format!("Node {node} Degraded: {}", failure.text)),
            (Some(failure), Verb::Verify) if failure.leaves_as_it_was(&run.order, &standing.node.record) => (
                "VerificationFailed",
                format!("Node {node} keeps kata and is looked at again later: {}", failure.text),
            ),
            (Some(failure), Verb::Verify) => (
                "VerificationFailed",
                format!("Node {node} is installed anew: {}", failure.text),
            ),
        };
        let mut tell = |about| {
            decision.notes.push(Note {
                about,
                warning: outcome.failure.is_some(),
                reason: word,
                text: text.clone(),
                after: decision.written(),
            });
        };
        tell(About::Node(node.clone()));
        tell(About::Config(self.config.name_any()));
    }

    /// Notes on nodes that they are wanted, or not any more. Tells whether something was to be noted.
    fn mark(&self, cast: &Cast<'_>, decision: &mut Decision) -> bool {
        let before = decision.actions.len();
        let ours = cast.standings.iter().filter(|standing| !standing.node.record.foreign());
        for Standing { node, wanted, .. } in ours {
            let record = &node.record;
            let marked = match (wanted, record.claimed()) {
                (true, _) => Record {
                    member: true,
                    ..record.clone()
                },
                (false, false) => Record::default(),
                // No new pods from here on.
                (false, true) => Record {
                    ready: Some(false),
                    ..record.clone()
                },
            };
            if marked != *record {
                decision.actions.push(Action::Mark {
                    node: node.name.clone(),
                    record: marked,
                });
            }
        }
        decision.actions.len() > before
    }

    /// RuntimeClasses come last and go first. Tells whether one has to.
    fn runtime_classes(&self, cast: &Cast<'_>, decision: &mut Decision) -> bool {
        let before = decision.actions.len();
        let there = &self.world.runtime_classes;
        let unwanted = |name: &String| self.deleting() || !self.classes.contains_key(name);
        let gone = there.iter().filter(|(name, class)| class.ours && unwanted(name));
        let gone = gone.map(|(name, _)| Action::DeleteRuntimeClass(name.clone()));
        decision.actions.extend(gone);
        for (name, overhead) in self.classes.iter().filter(|_| !self.deleting()) {
            let (name, overhead) = (name.clone(), overhead.clone());
            match there.get(&name) {
                Some(class) if class.ours && differs(class, &overhead) => {
                    decision.actions.push(Action::SetOverhead { name, overhead });
                }
                None if self.complete(cast, &name) => self.create_class(name, overhead, decision),
                _ => {}
            }
        }
        decision.actions.len() > before
    }

    /// Whether the nodes are such that pods can use this RuntimeClass.
    fn complete(&self, cast: &Cast<'_>, name: &str) -> bool {
        let wanted = || cast.standings.iter().filter(|standing| standing.wanted);
        let installed = |standing: &Standing<'_>| standing.place == Place::Installed;
        // A node with former settings runs pods of `kata`, and has no handler for a RuntimeClass that is new.
        let does_without = |standing: &Standing<'_>| match name == KATA {
            true => standing.unable(self.measure()),
            false => !standing.takes_pods(),
        };
        wanted().any(installed) && wanted().all(|standing| installed(standing) || does_without(standing))
    }

    fn create_class(&self, name: String, overhead: PodOverhead, decision: &mut Decision) {
        let owner = self.config.name_any();
        let text = format!("Pods can use runtimeClassName: {name}");
        let about = About::Config(owner.clone());
        decision
            .actions
            .push(Action::CreateRuntimeClass { name, owner, overhead });
        decision.notes.push(Note {
            about,
            warning: false,
            reason: "RuntimeClassCreated",
            text,
            after: decision.written(),
        });
    }

    /// Whether kata may be taken from this node.
    fn removable(&self, cast: &Cast<'_>, node: &Node) -> bool {
        match (&self.world.kata_pods, self.deleting()) {
            (_, true) => cast.free_of_pods,
            (Some(Ok(pods)), false) => !pods.iter().any(|pod| pod.node.as_deref() == Some(&node.name)),
            (Some(Err(_)) | None, false) => false,
        }
    }

    /// No node has anything of ours any more.
    fn finish(&self, cast: &Cast<'_>, decision: &mut Decision) {
        decision.actions.extend(cast.standings.iter().filter_map(uncordoned));
        let left = self.world.runs.iter().filter(|run| !run.deleted);
        decision.actions.extend(left.map(delete));
        decision.actions.push(Action::RemoveFinalizer(self.config.name_any()));
    }
}

/// Whether the RuntimeClass is to tell the scheduler something else than what we wrote last. One of before there was
/// an annotation for it may have been changed by hand.
fn differs(class: &RuntimeClass, overhead: &PodOverhead) -> bool {
    match &class.overhead {
        Some(written) => *written != overhead.to_string(),
        None => overhead.asked_for,
    }
}

/// The KataConfig's own configuration of pods.
fn configuration(config: &KataConfig) -> Option<&str> {
    config
        .spec
        .configuration
        .as_deref()
        .filter(|text| !text.trim().is_empty())
}

/// What is told of an installation: what the installer warned of, too.
fn installed(run: &Run) -> String {
    let warnings = match &run.progress {
        Progress::Done { report, .. } => report.warnings.as_slice(),
        _ => &[],
    };
    let text = format!("Node {} has kata {}", run.order.node, run.order.version);
    std::iter::once(&text)
        .chain(warnings)
        .cloned()
        .collect::<Vec<_>>()
        .join("; ")
}

fn uncordoned(standing: &Standing<'_>) -> Option<Action> {
    let node = standing.node;
    node.cordoned.then(|| Action::Cordon {
        node: node.name.clone(),
        on: false,
    })
}

fn delete(run: &Run) -> Action {
    Action::DeleteRun {
        name: run.name.clone(),
        uid: run.uid.clone(),
    }
}

/// What is so already.
fn warning(about: About, reason: &'static str, text: String) -> Note {
    Note {
        about,
        warning: true,
        reason,
        text,
        after: Step::Statuses(0),
    }
}

/// What a run is made for. When it changes, an earlier failure says nothing about the next run.
fn purpose(config: &KataConfig, version: &str) -> String {
    let retry = config.annotations().get(RETRY).map_or("", String::as_str);
    let uid = config.uid().unwrap_or_default();
    let generation = config.metadata.generation.unwrap_or_default();
    short_hash(&format!("{uid}\n{generation}\n{retry}\n{version}"))
}

/// Stands for what is laid over the installed configuration; none where that is nothing.
pub(super) fn settings_hash(configuration: &str, classes: &BTreeMap<String, String>) -> Option<String> {
    match (configuration.is_empty(), classes.is_empty()) {
        (true, true) => None,
        // As versions without RuntimeClasses beside `kata` have noted it.
        (false, true) => Some(short_hash(configuration)),
        (_, false) => Some(short_hash(&json!([configuration, classes]).to_string())),
    }
}

/// Eight digits that stand for a text.
pub(super) fn short_hash(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
