//! Anything may happen in any order, the controller may die after any step, and still: what [`Cluster`] watches over
//! never happens, and there is always progress or a reason that is told.

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use proptest::prelude::*;

use super::{
    RETRY, SKIP_NODES,
    cluster::Cluster,
    fixtures,
    world::{KATA, KataPod, Node, Progress, Record},
};
use crate::{api::ClassSpec, log_level::LogLevel, report::Code};

#[derive(Debug, Clone)]
enum Happening {
    /// The controller reads, decides, acts, and dies after so many steps.
    Pass(usize),
    /// The API server refuses the write after so many steps: somebody was faster (409), there are too many requests
    /// (429), or it is not well (500), and then it may have done it all the same. The controller waits a little.
    WriteIsRefused(usize, bool),
    RunStarts,
    RunSucceeds,
    RunFails(bool),
    RunIsRefused(bool),
    ClockIsOff(i64),
    RunCannotStart,
    RunIsLost,
    PodIsRefused,
    PodsAreRefused(bool),
    ForeignLabel(usize),
    Time(i64),
    Ready(usize, bool),
    Cordon(usize, bool),
    Reboot(usize),
    NodeGoes(usize),
    NodeComes(usize),
    NodeLosesLabel(usize),
    PodComes(usize),
    PodGoes,
    Create(usize),
    Delete(usize),
    Select(Option<usize>),
    Level(bool),
    PeerPods(bool),
    MaxUnavailable(i32),
    Pause(bool),
    CordonChanging(bool),
    Canary(Option<usize>),
    Retry(u8),
    Skip(usize),
    Upgrade(u8),
    ClassGoes,
    /// The KataConfig asks for these RuntimeClasses beside `kata`.
    Classes(Vec<usize>),
}

const NODES: [&str; 4] = ["worker-0", "worker-1", "worker-2", "worker-3"];
const CLASSES: [(&str, &str); 3] = [
    ("kata-large", "[hypervisor.qemu]\ndefault_memory = 4096\n"),
    ("kata-large", ""),
    ("kata-debug", "[runtime]\nenable_debug = true\n"),
];
const CONFIGS: [&str; 2] = ["cluster-kataconfig", "example-kataconfig"];

fn happening() -> impl Strategy<Value = Happening> {
    let node = 0..NODES.len();
    prop_oneof![
        12 => prop_oneof![3 => Just(usize::MAX), 1 => 0..6_usize].prop_map(Happening::Pass),
        6 => (0..6_usize, any::<bool>()).prop_map(|(steps, done)| Happening::WriteIsRefused(steps, done)),
        5 => Just(Happening::RunStarts),
        6 => Just(Happening::RunSucceeds),
        2 => any::<bool>().prop_map(Happening::RunFails),
        1 => Just(Happening::RunCannotStart),
        1 => Just(Happening::RunIsLost),
        1 => Just(Happening::PodIsRefused),
        1 => any::<bool>().prop_map(Happening::PodsAreRefused),
        1 => any::<bool>().prop_map(Happening::RunIsRefused),
        1 => (-5000..5000_i64).prop_map(Happening::ClockIsOff),
        1 => node.clone().prop_map(Happening::ForeignLabel),
        4 => prop_oneof![1..10_i64, 60..1200_i64, Just(90_000)].prop_map(Happening::Time),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, ready)| Happening::Ready(node, ready)),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, cordoned)| Happening::Cordon(node, cordoned)),
        1 => node.clone().prop_map(Happening::Reboot),
        1 => node.clone().prop_map(Happening::NodeGoes),
        1 => node.clone().prop_map(Happening::NodeComes),
        1 => node.clone().prop_map(Happening::NodeLosesLabel),
        2 => node.clone().prop_map(Happening::PodComes),
        2 => Just(Happening::PodGoes),
        2 => (0..CONFIGS.len()).prop_map(Happening::Create),
        2 => (0..CONFIGS.len()).prop_map(Happening::Delete),
        1 => proptest::option::of(node.clone()).prop_map(Happening::Select),
        1 => any::<bool>().prop_map(Happening::Level),
        1 => any::<bool>().prop_map(Happening::PeerPods),
        1 => (1..4_i32).prop_map(Happening::MaxUnavailable),
        1 => any::<bool>().prop_map(Happening::Pause),
        1 => any::<bool>().prop_map(Happening::CordonChanging),
        1 => proptest::option::of(node.clone()).prop_map(Happening::Canary),
        1 => any::<u8>().prop_map(Happening::Retry),
        1 => node.prop_map(Happening::Skip),
        1 => (0..3_u8).prop_map(Happening::Upgrade),
        1 => Just(Happening::ClassGoes),
        2 => proptest::collection::vec(0..CLASSES.len(), 0..3).prop_map(Happening::Classes),
    ]
}

fn happens(cluster: &mut Cluster, happening: &Happening) {
    match happening {
        Happening::Pass(steps) => drop(cluster.pass(*steps)),
        Happening::WriteIsRefused(steps, done) => {
            match done {
                true => cluster.pass_with_a_lost_answer(*steps),
                false => drop(cluster.pass(*steps)),
            }
            cluster.tick(SignedDuration::from_millis(500));
        }
        Happening::RunStarts => cluster.run_starts(),
        Happening::RunSucceeds => cluster.run_succeeds(),
        Happening::RunFails(sandboxes) => cluster.run_fails(sandboxes.then_some(Code::SandboxesExist), "no"),
        Happening::RunIsRefused(unfit) => {
            cluster.run_is_refused(if *unfit { Code::NoKvm } else { Code::DiskFull }, "no");
        }
        Happening::ClockIsOff(seconds) => {
            for run in &mut cluster.world.runs {
                if let Progress::Done { ended, .. } | Progress::Failed { ended, .. } = &mut run.progress {
                    *ended += SignedDuration::from_secs(*seconds);
                }
            }
        }
        Happening::PodsAreRefused(refused) => cluster.refusing = *refused,
        Happening::RunCannotStart => {
            for run in &mut cluster.world.runs {
                if run.progress == Progress::Pending(None) {
                    run.progress = Progress::Pending(Some("the image cannot be pulled".into()));
                }
            }
        }
        Happening::RunIsLost => drop(cluster.world.runs.pop()),
        Happening::PodIsRefused => cluster.pod_is_refused(),
        Happening::Time(seconds) => cluster.tick(SignedDuration::from_secs(*seconds)),
        Happening::Create(index) => cluster.create(CONFIGS[*index], serde_json::json!({})),
        Happening::Delete(index) => cluster.delete(CONFIGS[*index]),
        Happening::Upgrade(version) => cluster.world.settings.version = format!("0.{version}.0-1a2b3c4d"),
        // Somebody deletes it by hand; pods that run do not mind.
        Happening::ClassGoes => cluster.world.runtime_classes.clear(),
        Happening::PodGoes => drop(cluster.pods.pop()),
        other => happens_to_node(cluster, other),
    }
}

fn happens_to_node(cluster: &mut Cluster, happening: &Happening) {
    let now = cluster.at();
    let there = |cluster: &Cluster, index: usize| cluster.world.nodes.iter().any(|node| node.name == NODES[index]);
    match *happening {
        Happening::NodeComes(index) if !there(cluster, index) => {
            let mut node = fixtures::node(NODES[index]);
            node.uid = format!("{}-{now}", node.name);
            node.since = Some(now);
            cluster.world.nodes.push(node);
        }
        Happening::NodeGoes(index) => {
            cluster.world.nodes.retain(|node| node.name != NODES[index]);
            cluster.pods.retain(|pod| pod.node.as_deref() != Some(NODES[index]));
        }
        Happening::PodComes(index) if there(cluster, index) => {
            let class = cluster.world.runtime_classes.contains_key(KATA);
            let record = &cluster.node(NODES[index]).record;
            if class && record.member && record.ready == Some(true) {
                cluster.pods.push(KataPod {
                    name: "default/hello".into(),
                    node: Some(NODES[index].to_owned()),
                });
            }
        }
        Happening::Ready(index, ready) if there(cluster, index) => {
            let node = cluster.node(NODES[index]);
            if node.ready != ready {
                (node.ready, node.since) = (ready, Some(now));
            }
        }
        Happening::Cordon(index, cordoned) if there(cluster, index) => {
            let node = cluster.node(NODES[index]);
            node.unschedulable = cordoned && !node.cordoned;
        }
        Happening::Reboot(index) if there(cluster, index) => {
            cluster.node(NODES[index]).host.boot_id = format!("boot at {now}");
        }
        Happening::ForeignLabel(index) if there(cluster, index) => {
            let record = &mut cluster.node(NODES[index]).record;
            if !record.claimed() {
                record.ready = Some(true);
            }
        }
        Happening::NodeLosesLabel(index) if there(cluster, index) => cluster.node(NODES[index]).record.member = false,
        ref other => happens_to_configs(cluster, other),
    }
}

fn happens_to_configs(cluster: &mut Cluster, happening: &Happening) {
    for name in CONFIGS {
        match *happening {
            Happening::Select(index) => cluster.respec(name, |config| {
                let expression = index.map(|index| {
                    serde_json::json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [NODES[index]]}]})
                });
                config.spec.kata_config_pool_selector = expression.map(|json| serde_json::from_value(json).unwrap());
            }),
            Happening::Classes(ref classes) => cluster.respec(name, |config| {
                let (names, settings): (Vec<_>, Vec<_>) = classes.iter().map(|index| CLASSES[*index]).unzip();
                // The same one twice is refused by the definition.
                let first = |at: &usize| !names[..*at].contains(&names[*at]);
                let classes = (0..names.len()).filter(first).map(|at| ClassSpec {
                    name: names[at].into(),
                    configuration: Some(settings[at].into()),
                    ..ClassSpec::default()
                });
                config.spec.runtime_classes = classes.collect();
            }),
            Happening::Level(debug) => cluster.respec(name, |config| {
                config.spec.log_level = if debug { LogLevel::Debug } else { LogLevel::Info };
            }),
            Happening::MaxUnavailable(most) => {
                cluster.most = cluster.most.max(usize::try_from(most).unwrap());
                cluster.respec(name, |config| config.spec.rollout.max_unavailable = Some(IntOrString::Int(most)));
            }
            Happening::CordonChanging(cordon) => cluster.respec(name, |config| config.spec.rollout.cordon = cordon),
            Happening::Pause(paused) => cluster.respec(name, |config| config.spec.rollout.paused = paused),
            Happening::Canary(index) => {
                let label = |index: usize| ("kubernetes.io/hostname".to_owned(), NODES[index].to_owned());
                let canary = index.map(|index| [label(index)].into());
                cluster.respec(name, |config| config.spec.rollout.canary = canary);
            }
            Happening::PeerPods(on) => cluster.respec(name, |config| config.spec.enable_peer_pods = on),
            Happening::Retry(word) => {
                if let Some(config) = cluster.config(name) {
                    config.annotations_mut().insert(RETRY.into(), word.to_string());
                }
            }
            Happening::Skip(index) => {
                cluster.skipped.insert(NODES[index].to_owned());
                if let Some(config) = cluster.config(name) {
                    config.annotations_mut().insert(SKIP_NODES.into(), NODES[index].to_owned());
                }
            }
            _ => {}
        }
    }
}

/// Nothing to do now: then something is under way, or a time is known, or the status says why not.
fn progress_or_a_reason(cluster: &mut Cluster) {
    let decision = cluster.rest();
    let Some(config) = cluster
        .world
        .configs
        .iter()
        .find(|config| !config.finalizers().is_empty())
    else {
        return;
    };
    let name = config.name_any();
    let rollout = &config.spec.rollout;
    let held = rollout.paused || rollout.canary.is_some();
    let (in_progress, reason, message) = cluster.condition(&name);
    let lists = cluster.lists(&name);
    if in_progress == "False" || reason == "Failed" {
        assert!(
            !message.is_empty() || lists.node_count == lists.ready_node_count,
            "{lists:?}"
        );
        return;
    }
    let waiting = [&lists.waiting_to_install, &lists.waiting_to_uninstall];
    let mut nodes = waiting.into_iter().flatten();
    let unfit = nodes.any(|name| {
        let node = cluster.world.nodes.iter().find(|node| node.name == *name).unwrap();
        held || !node.ready || node.unschedulable || cluster.pods.iter().any(|pod| pod.node.as_ref() == Some(name))
    });
    let under_way = !cluster.world.runs.is_empty();
    assert!(
        unfit || under_way || decision.wake.is_some(),
        "stuck: {reason} {lists:?}"
    );
}

/// All is well with the nodes, and nobody asks for what cannot be.
fn calm_down(cluster: &mut Cluster) {
    let now = cluster.at();
    for node in &mut cluster.world.nodes {
        (node.ready, node.unschedulable) = (true, false);
        node.since = Some(now);
    }
    cluster.pods.clear();
    cluster.refusing = false;
    for node in &mut cluster.world.nodes {
        if node.record.foreign() {
            node.record = Record::default();
        }
    }
    for name in CONFIGS {
        cluster.respec(name, |config| {
            config.spec.enable_peer_pods = false;
            (config.spec.rollout.paused, config.spec.rollout.canary) = (false, None);
            config.annotations_mut().remove(SKIP_NODES);
        });
    }
}

fn all_is_well(cluster: &mut Cluster) {
    let decision = cluster.rest();
    assert!(decision.actions.is_empty());
    assert!(
        cluster
            .world
            .configs
            .iter()
            .all(|config| config.metadata.deletion_timestamp.is_none()),
        "a KataConfig is still being deleted"
    );
    let active = cluster
        .world
        .configs
        .iter()
        .find(|config| !config.finalizers().is_empty());
    let Some(name) = active.map(|config| config.name_any()) else {
        return;
    };
    let (in_progress, reason, _) = cluster.condition(&name);
    let lists = cluster.lists(&name);
    assert_eq!(in_progress, "False", "{reason} {lists:?}");
    if reason == "NoEligibleNodes" {
        // Kata is not taken from all nodes because none is wanted.
        let claimed = |node: &&Node| node.record.claimed();
        let kept = cluster.world.nodes.iter().filter(claimed).count();
        return assert_eq!(lists.node_count, i64::try_from(kept).unwrap());
    }
    assert_eq!(reason, "");
    assert_eq!(lists.node_count, lists.ready_node_count);
    let cordoned = |node: &Node| node.cordoned && !cluster.skipped.contains(&node.name);
    assert!(!cluster.world.nodes.iter().any(cordoned), "a node stays cordoned");
    assert!(cluster.world.runtime_classes.contains_key(KATA));
    let status = cluster.config(&name).unwrap().status.clone().unwrap();
    let classes = cluster.config(&name).unwrap().spec.classes().unwrap();
    let wanted: Vec<String> = [KATA.to_owned()].into_iter().chain(classes.into_keys()).collect();
    assert_eq!(status.runtime_classes, wanted);
    let there: Vec<String> = cluster.world.runtime_classes.keys().cloned().collect();
    assert_eq!(there, wanted);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_forbidden_does_and_all_ends_well(
        installed: bool,
        happenings in proptest::collection::vec(happening(), 1..80),
    ) {
        let mut cluster = Cluster::new(&NODES[..3]);
        cluster.create(CONFIGS[0], serde_json::json!({}));
        if installed {
            cluster.run_all();
        }
        for happening in &happenings {
            happens(&mut cluster, happening);
        }
        progress_or_a_reason(&mut cluster);
        calm_down(&mut cluster);
        cluster.run_all();
        all_is_well(&mut cluster);
    }
}
