//! A cluster that does what decisions say, for tests: the API server's part, the installer's and the scheduler's, in as
//! few lines as will do. It watches over what must never happen.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{
    Action, Decision, FINALIZER, KATA, KataPod, Node, ONCE, Order, Progress, Refused, Run, Step, World, decide,
    fixtures::{self, success},
    turn::LOOKS,
};
use crate::{
    api::{KataConfig, KataConfigStatus, KataNodes},
    report::{Code, Phase, Verb},
};

pub struct Cluster {
    pub world: World,
    pub pods: Vec<KataPod>,
    /// Hosts, by their nodes' uids, on which kata was seen to work after the last change.
    pub verified: BTreeSet<String>,
    /// Nodes that were told to be left alone once: what runs there does not count.
    pub skipped: BTreeSet<String>,
    /// How many nodes may be changed at a time.
    pub most: usize,
    /// The API server takes no pods of the installer.
    pub refusing: bool,
    /// Hosts, by their nodes' uids, of which a run has said that kata does not work there.
    pub blamed: BTreeSet<String>,
    /// The handlers beside `kata` that the installer has put on hosts, by their nodes' uids.
    pub handlers: BTreeMap<String, BTreeSet<String>>,
    /// Every status that was written.
    pub written: Vec<(String, KataConfigStatus)>,
    /// Runs whose end a node's record has begun to tell of, and those that were counted.
    noted: usize,
    counted: usize,
    /// What was written since something happened last.
    writes: usize,
    serial: u32,
}

impl Cluster {
    pub fn new(nodes: &[&str]) -> Cluster {
        Cluster {
            world: fixtures::world(nodes),
            pods: Vec::new(),
            verified: BTreeSet::new(),
            skipped: BTreeSet::new(),
            most: 1,
            refusing: false,
            blamed: BTreeSet::new(),
            handlers: BTreeMap::new(),
            written: Vec::new(),
            noted: 0,
            counted: 0,
            writes: 0,
            serial: 0,
        }
    }

    pub fn create(&mut self, name: &str, spec: serde_json::Value) {
        if self.world.configs.iter().all(|config| config.name_any() != name) {
            let mut config = fixtures::config(name, spec);
            config.metadata.creation_timestamp = Some(Time(self.world.now));
            self.world.configs.push(config);
        }
    }

    pub fn config(&mut self, name: &str) -> Option<&mut KataConfig> {
        self.world.configs.iter_mut().find(|config| config.name_any() == name)
    }

    pub fn respec(&mut self, name: &str, change: impl FnOnce(&mut KataConfig)) {
        if let Some(config) = self.config(name) {
            change(config);
            config.metadata.generation = config.metadata.generation.map(|generation| generation + 1);
        }
    }

    pub fn delete(&mut self, name: &str) {
        let now = Time(self.world.now);
        self.respec(name, |config| {
            config.metadata.deletion_timestamp.get_or_insert(now);
        });
        self.collect();
    }

    /// What has a deletion timestamp and no finalizer is gone.
    fn collect(&mut self) {
        self.world
            .configs
            .retain(|config| config.metadata.deletion_timestamp.is_none() || !config.finalizers().is_empty());
    }

    pub fn node(&mut self, name: &str) -> &mut Node {
        self.world.nodes.iter_mut().find(|node| node.name == name).unwrap()
    }

    pub fn lists(&mut self, name: &str) -> KataNodes {
        let config = self.config(name).unwrap();
        config.status.clone().unwrap_or_default().kata_nodes
    }

    /// The condition's status, reason and message.
    pub fn condition(&mut self, name: &str) -> (String, String, String) {
        let status = self.config(name).unwrap().status.clone().unwrap_or_default();
        let condition = status.in_progress().unwrap().clone();
        (condition.status, condition.reason, condition.message)
    }

    pub fn decide(&mut self) -> Decision {
        let mut decision = decide(&self.world);
        if decision.awaits_pods {
            self.world.kata_pods = Some(Ok(self.pods.clone()));
            decision = decide(&self.world);
            self.world.kata_pods = None;
        }
        assert_eq!(
            decision.statuses.len(),
            decision
                .statuses
                .iter()
                .map(|(name, _)| name)
                .collect::<BTreeSet<_>>()
                .len()
        );
        decision
    }

    /// Reads, decides and acts, and is killed after so many steps, or the API server refuses the next one. Returns the
    /// decision.
    pub fn pass(&mut self, steps: usize) -> Decision {
        let decision = self.decide();
        let written = decision.statuses.iter().take(steps);
        let taken = decision
            .actions
            .iter()
            .take(steps.saturating_sub(decision.statuses.len()));
        let mut done = Step::Statuses(0);
        for (number, (name, status)) in written.enumerate() {
            self.write(name, status);
            done = Step::Statuses(number + 1);
        }
        for (number, action) in taken.enumerate() {
            if let (true, Action::StartRun { order, .. }) = (self.refusing, action) {
                self.refuse(order);
                break;
            }
            self.excuse(action, &decision);
            self.act(action);
            self.watch_over();
            done = Step::Actions(number + 1);
            self.counted += decision.ends_with(done).count();
        }
        let once = decision.told(done).filter(|note| ONCE.contains(&note.reason));
        self.world.told.extend(once.map(|note| note.text.clone()));
        assert_eq!(
            self.counted, self.noted,
            "the ends of runs are counted when they are noted"
        );
        decision
    }

    /// The same, but the API server does the step after those, and its answer is lost: the controller takes it for
    /// refused.
    pub fn pass_with_a_lost_answer(&mut self, steps: usize) {
        let counted = self.counted;
        self.pass(steps.saturating_add(1));
        self.noted -= self.counted - counted;
        self.counted = counted;
    }

    /// What is to be done at a moment at which nothing happens is little: of every object a few writes.
    fn few_writes(&self) {
        let objects = self.world.nodes.len() + self.world.configs.len() + self.world.runs.len();
        assert!(
            self.writes <= 10 * (objects + 1),
            "{} writes: {:?}",
            self.writes,
            self.world
        );
    }

    /// Passes until there is nothing to do.
    pub fn rest(&mut self) -> Decision {
        self.writes = 0;
        for _ in 0..50 {
            let decision = self.pass(usize::MAX);
            if decision.statuses.is_empty() && decision.actions.is_empty() {
                self.few_writes();
                return decision;
            }
        }
        panic!("no rest: {:?}", self.decide());
    }

    fn write(&mut self, name: &str, status: &KataConfigStatus) {
        self.writes += 1;
        if let Some(config) = self.config(name) {
            let before = config.status.replace(status.clone());
            let now = status.in_progress().unwrap().clone();
            let then = before.as_ref().and_then(|status| status.in_progress());
            if let Some(then) = then.filter(|then| then.status == now.status) {
                assert_eq!(then.last_transition_time, now.last_transition_time, "no transition");
            }
            assert_ne!(before.as_ref(), Some(status), "written without need");
            orderly(&status.kata_nodes);
            self.written.push((name.to_owned(), status.clone()));
        }
    }

    fn act(&mut self, action: &Action) {
        self.writes += 1;
        match action {
            Action::AddFinalizer(name) => {
                let config = self.config(name).unwrap();
                assert!(config.metadata.deletion_timestamp.is_none());
                config.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
            }
            Action::RemoveFinalizer(name) => {
                self.config(name).unwrap().metadata.finalizers = None;
                self.collect();
            }
            Action::Mark { node, record } => self.mark(node, record),
            Action::Cordon { node, on } => {
                let node = self.node(node);
                assert!(node.cordoned != *on && !node.unschedulable, "cordoned without need");
                node.cordoned = *on;
            }
            Action::StartRun { name, order } => {
                assert!(
                    self.world.runs.iter().all(|run| run.name != *name),
                    "{name} is there already"
                );
                if order.verb == Verb::Uninstall {
                    assert!(
                        self.pods.iter().all(|pod| pod.node.as_ref() != Some(&order.node)),
                        "sandboxes on {}",
                        order.node
                    );
                }
                self.world.refused = None;
                self.serial += 1;
                self.world.runs.push(Run {
                    name: name.clone(),
                    uid: format!("run-{}", self.serial),
                    order: order.clone(),
                    created: self.world.now,
                    deleted: false,
                    progress: Progress::Pending(None),
                });
            }
            Action::DeleteRun { name, uid } => {
                self.world.runs.retain(|run| (&run.name, &run.uid) != (name, uid));
                self.world
                    .unread_runs
                    .retain(|run| (&run.name, &run.uid) != (name, uid));
            }
            Action::CreateRuntimeClass { name, overhead, .. } => {
                assert!(!self.world.runtime_classes.contains_key(name), "{name} is there");
                if name != KATA {
                    self.every_node_has(name);
                }
                let class = fixtures::our_class(name, &overhead.to_string());
                self.world.runtime_classes.insert(name.clone(), class);
            }
            Action::SetOverhead { name, overhead } => {
                let class = self.world.runtime_classes.get_mut(name).unwrap();
                assert!(class.ours);
                class.overhead = Some(overhead.to_string());
            }
            Action::DeleteRuntimeClass(name) => {
                let skipped = |pod: &KataPod| pod.node.as_ref().is_some_and(|node| self.skipped.contains(node));
                let unused = name != KATA || self.pods.iter().all(skipped);
                assert!(unused, "pods use the RuntimeClass");
                assert!(self.world.runtime_classes.remove(name).is_some_and(|class| class.ours));
            }
        }
    }

    /// No pod of a new RuntimeClass comes to a node without its handler.
    fn every_node_has(&self, class: &str) {
        for node in &self.world.nodes {
            let ours = node.record.ready == Some(true) && !node.record.foreign();
            let takes_pods = node.ready && !node.unschedulable && ours;
            let has = self.handlers.get(&node.uid).is_some_and(|has| has.contains(class));
            assert!(
                has || !takes_pods || self.skipped.contains(&node.name),
                "{} has no handler {class}",
                node.name
            );
        }
    }

    /// As the controller does when the API server does not take a pod.
    fn refuse(&mut self, order: &Order) {
        self.world.refused = Some(Refused {
            node: order.node.clone(),
            verb: order.verb,
            purpose: order.purpose.clone(),
            at: self.world.now,
            text: "no".into(),
        });
    }

    /// A node stops being ready for pods when kata is taken from it or put on it anew, or when a run has said that it
    /// does not work there; for no other reason.
    fn excuse(&mut self, action: &Action, decision: &Decision) {
        let Action::Mark { node: name, record } = action else {
            return;
        };
        let node = self.node(name);
        if node.record.ready != Some(true) || record.ready == Some(true) {
            return;
        }
        let uid = node.uid.clone();
        let lists = &decision.nodes;
        let leaves = [
            &lists.waiting_to_uninstall,
            &lists.uninstalling,
            &lists.failed_to_uninstall,
        ];
        let installed = |action: &Action| matches!(action, Action::StartRun { order, .. } if order.node == *name && order.verb == Verb::Install);
        let excused = leaves.into_iter().any(|list| list.contains(name))
            || decision.actions.iter().any(installed)
            || self.blamed.contains(&uid);
        assert!(
            excused,
            "{name} is not ready any more, and nobody said anything about it: {lists:?}"
        );
    }

    fn mark(&mut self, name: &str, record: &super::Record) {
        let verified = self.verified.clone();
        let node = self.node(name);
        if record.ready == Some(true) && node.record.ready != Some(true) {
            assert!(
                verified.contains(&node.uid),
                "{name} is called ready, and nobody has looked"
            );
        }
        assert_ne!(node.record, *record, "marked without need");
        let run = |record: &super::Record| record.last_run.as_ref().map(|last| last.run.clone());
        let noted = match run(record) {
            // Nothing stays on a node that kata was taken from.
            None => node.record.claimed() && !record.claimed(),
            told => told != run(&node.record),
        };
        node.record = record.clone();
        self.noted += usize::from(noted);
    }

    /// Never more nodes in flight than the KataConfigs have ever allowed, and never two runs on one.
    fn watch_over(&self) {
        let counts = |run: &&Run| {
            let under_way = matches!(run.progress, Progress::Pending(_) | Progress::Running);
            let there = self.world.nodes.iter().any(|node| node.uid == run.order.node_uid);
            under_way && there && !self.skipped.contains(&run.order.node)
        };
        let under_way: Vec<&Run> = self.world.runs.iter().filter(counts).collect();
        let (looks, changes): (Vec<&Run>, Vec<&Run>) =
            under_way.into_iter().partition(|run| run.order.verb == Verb::Verify);
        assert!(changes.len() <= self.most, "too many at once: {changes:?}");
        assert!(looks.len() <= LOOKS, "too many at once: {looks:?}");
        let nodes: BTreeSet<&str> = looks
            .iter()
            .chain(&changes)
            .map(|run| run.order.node_uid.as_str())
            .collect();
        assert_eq!(nodes.len(), looks.len() + changes.len(), "two runs on a node");
    }

    pub fn tick(&mut self, by: SignedDuration) {
        self.world.now += by;
    }

    /// The next pod of the installer is not let in, if one is due now.
    pub fn pod_is_refused(&mut self) {
        for action in self.decide().actions {
            if let Action::StartRun { order, .. } = action {
                self.refuse(&order);
            }
        }
    }

    /// The first run that is under way.
    fn under_way(&mut self) -> Option<&mut Run> {
        let mut runs = self.world.runs.iter_mut();
        runs.find(|run| matches!(run.progress, Progress::Pending(_) | Progress::Running))
    }

    /// A kubelet starts the installer.
    pub fn run_starts(&mut self) {
        let Some(run) = self.under_way() else { return };
        run.progress = Progress::Running;
        if run.order.verb != Verb::Verify {
            let uid = run.order.node_uid.clone();
            self.verified.remove(&uid);
        }
    }

    /// The installer does as it was told, unless sandboxes are in its way.
    pub fn run_succeeds(&mut self) {
        let now = self.world.now;
        let pods = self.pods.clone();
        let Some(run) = self.under_way() else { return };
        let order = run.order.clone();
        if order.verb == Verb::Uninstall && pods.iter().any(|pod| pod.node.as_ref() == Some(&order.node)) {
            return self.run_fails(Some(Code::SandboxesExist), "sandboxes exist");
        }
        run.progress = Progress::Done {
            ended: now,
            report: success(order.verb, &order.version),
        };
        self.blamed.remove(&order.node_uid);
        if order.verb != Verb::Verify {
            let handlers = order.runtime_classes.keys().cloned().collect();
            self.handlers.insert(order.node_uid.clone(), handlers);
        }
        match order.verb {
            Verb::Install | Verb::Verify => drop(self.verified.insert(order.node_uid)),
            Verb::Uninstall => drop(self.verified.remove(&order.node_uid)),
        }
    }

    /// The installer fails on its way; without a code it leaves no word. Nobody knows what is on the node then, unless
    /// it only looked.
    pub fn run_fails(&mut self, code: Option<Code>, text: &str) {
        let now = self.world.now;
        let Some(run) = self.under_way() else { return };
        let verb = run.order.verb;
        run.progress = Progress::Failed {
            ended: now,
            report: code.map(|code| fixtures::failure(verb, Phase::Failed, "", code, text)),
            text: text.to_owned(),
        };
        let uid = run.order.node_uid.clone();
        if verb != Verb::Verify || code.is_some_and(Code::is_about_the_node) {
            self.verified.remove(&uid);
            self.blamed.insert(uid);
        }
    }

    /// The installer finds that the node is not fit, or in use, and changes nothing.
    pub fn run_is_refused(&mut self, code: Code, text: &str) {
        let now = self.world.now;
        let Some(run) = self.under_way() else { return };
        run.progress = Progress::Failed {
            ended: now,
            report: Some(fixtures::failure(run.order.verb, Phase::Refused, "", code, text)),
            text: text.to_owned(),
        };
        let (uid, in_service) = (run.order.node_uid.clone(), run.order.in_service);
        if code.is_about_the_node() {
            self.verified.remove(&uid);
            self.blamed.insert(uid);
        } else if in_service {
            // What was there before is there still.
            self.verified.insert(uid);
        }
    }

    /// Everything that has to happen happens, in the shortest time.
    pub fn run_all(&mut self) {
        for _ in 0..400 {
            let decision = self.rest();
            if self.under_way().is_some() {
                self.tick(SignedDuration::from_secs(1));
                self.run_starts();
                self.run_succeeds();
                continue;
            }
            // What is to come within minutes; the daily look is not waited for.
            let soon = self.world.now + SignedDuration::from_mins(20);
            match decision.wake.filter(|wake| *wake <= soon) {
                Some(wake) => self.world.now = wake.max(self.world.now),
                None => return,
            }
        }
        panic!("no end: {:?}", self.decide());
    }

    /// The statuses of a KataConfig since it was created: the condition's reason and the lists, without repetitions.
    pub fn history(&self, name: &str) -> Vec<(String, KataNodes)> {
        let told = self.written.iter().filter(|(config, _)| config == name);
        told.map(|(_, status)| (status.in_progress().unwrap().reason.clone(), status.kata_nodes.clone()))
            .collect()
    }

    pub fn at(&self) -> Timestamp {
        self.world.now
    }

    pub fn ready_nodes(&self) -> BTreeMap<String, Option<bool>> {
        let nodes = self.world.nodes.iter();
        nodes.map(|node| (node.name.clone(), node.record.ready)).collect()
    }
}

fn orderly(nodes: &KataNodes) {
    let lists = [
        &nodes.installed,
        &nodes.installing,
        &nodes.waiting_to_install,
        &nodes.failed_to_install,
        &nodes.uninstalling,
        &nodes.waiting_to_uninstall,
        &nodes.failed_to_uninstall,
    ];
    let mut seen = BTreeSet::new();
    for list in lists {
        assert!(list.is_sorted(), "{list:?}");
        for name in list {
            assert!(seen.insert(name), "{name} is in two lists");
        }
    }
    assert_eq!(nodes.ready_node_count, i64::try_from(nodes.installed.len()).unwrap());
    assert!(nodes.ready_node_count <= nodes.node_count);
}
