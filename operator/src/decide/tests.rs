//! The guide's tables, and each thing that can stand in the way.

mod nodes;
mod refusals;

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use kube::ResourceExt;
use serde_json::json;

use super::{
    About, Action, Decision, Order, Progress, RETRY, Refused, RuntimeClass, SKIP_NODES,
    cluster::Cluster,
    decide, fixtures,
    world::{Host, KATA, KataPod},
};
use crate::{
    api::KataNodes,
    report::{Code, Verb},
};

const NAME: &str = "cluster-kataconfig";

/// The guide's way to write lists.
fn lists(json: serde_json::Value) -> KataNodes {
    serde_json::from_value(json).unwrap()
}

/// A cluster with kata on all of its nodes.
fn installed(nodes: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(nodes);
    cluster.create(NAME, json!({}));
    cluster.run_all();
    assert_eq!(
        cluster.condition(NAME),
        (String::from("False"), String::new(), String::new())
    );
    cluster
}

fn select(cluster: &mut Cluster, selector: serde_json::Value) {
    let selector = serde_json::from_value(selector).unwrap();
    cluster.respec(NAME, |config| config.spec.kata_config_pool_selector = selector);
}

fn reasons(decision: &Decision) -> Vec<&'static str> {
    decision.notes.iter().map(|note| note.reason).collect()
}

fn pod(node: &str) -> KataPod {
    KataPod {
        name: "default/hello".into(),
        node: Some(node.into()),
    }
}

#[test]
fn table_2_1() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.run_all();
    let history = cluster.history(NAME);
    let installing = |json| ("Installing".to_owned(), lists(json));
    let expected = [
        installing(json!({"nodeCount": 0, "readyNodeCount": 0})),
        installing(json!({"nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0", "worker-1"]})),
        installing(
            json!({"installing": ["worker-1"], "nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0"]}),
        ),
        installing(
            json!({"installed": ["worker-1"], "nodeCount": 2, "readyNodeCount": 1, "waitingToInstall": ["worker-0"]}),
        ),
        installing(json!({"installed": ["worker-1"], "installing": ["worker-0"], "nodeCount": 2, "readyNodeCount": 1})),
        installing(json!({"installed": ["worker-0", "worker-1"], "nodeCount": 2, "readyNodeCount": 2})),
        (
            String::new(),
            lists(json!({"installed": ["worker-0", "worker-1"], "nodeCount": 2, "readyNodeCount": 2})),
        ),
    ];
    assert_eq!(history, expected);
    let (_, first) = &cluster.written[0];
    let condition = first.in_progress().unwrap();
    assert_eq!(condition.message, "Performing initial installation of kata on cluster");
    assert_eq!(condition.status, "True");
}

#[test]
fn table_2_2() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.written.clear();
    cluster.delete(NAME);
    cluster.run_all();
    let uninstalling = |json| ("Uninstalling".to_owned(), lists(json));
    let expected = [
        uninstalling(json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": ["worker-0", "worker-1"]})),
        // The RuntimeClass has gone in between.
        uninstalling(json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": ["worker-0", "worker-1"]})),
        uninstalling(
            json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-1"], "waitingToUninstall": ["worker-0"]}),
        ),
        uninstalling(json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": ["worker-0"]})),
        uninstalling(json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-0"]})),
    ];
    let history = cluster.history(NAME);
    assert_eq!(history[..5], expected);
    let message = cluster.written[0].1.in_progress().unwrap().message.clone();
    assert_eq!(message, "Removing kata from cluster");
    assert!(cluster.world.configs.is_empty());
    assert!(cluster.world.runs.is_empty());
    assert!(cluster.world.runtime_classes.is_empty());
    assert!(
        cluster
            .world
            .nodes
            .iter()
            .all(|node| node.record == super::Record::default())
    );
}

#[test]
fn a_node_is_claimed_before_it_is_touched_and_ready_after_it_was_verified() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    let record = cluster.node("worker-0").record.clone();
    assert_eq!((record.member, record.ready, record.version), (true, Some(false), None));
    cluster.run_starts();
    cluster.run_succeeds();
    cluster.rest();
    let record = cluster.node("worker-0").record.clone();
    assert_eq!(
        (record.ready, record.version.as_deref()),
        (Some(true), Some(fixtures::VERSION))
    );
    assert_eq!(record.boot_id.as_deref(), Some("first boot of worker-0"));
}

#[test]
fn the_next_node_waits_until_the_last_one_has_been_ready_for_a_while() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.run_starts();
    cluster.run_succeeds();
    let ended = cluster.at();
    let (ready, since) = (false, Some(ended));
    (cluster.node("worker-1").ready, cluster.node("worker-1").since) = (ready, since);
    cluster.tick(SignedDuration::from_secs(60));
    cluster.rest();
    assert_eq!(cluster.lists(NAME).waiting_to_install, ["worker-0"]);
    let back = cluster.at();
    (cluster.node("worker-1").ready, cluster.node("worker-1").since) = (true, Some(back));
    cluster.tick(SignedDuration::from_secs(4));
    let decision = cluster.rest();
    assert_eq!(decision.wake, Some(back + SignedDuration::from_secs(5)));
    cluster.tick(SignedDuration::from_secs(1));
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
}

#[test]
fn a_node_that_does_not_come_back_is_told_of_and_stops_the_others() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.run_succeeds();
    let now = cluster.at();
    (cluster.node("worker-1").ready, cluster.node("worker-1").since) = (false, Some(now));
    cluster.rest();
    cluster.tick(SignedDuration::from_mins(5));
    cluster.rest();
    let message = "Node worker-1 Degraded: it is not Ready since the installer ended";
    assert_eq!(cluster.condition(NAME).2, message);
    assert_eq!(cluster.lists(NAME).failed_to_install, ["worker-1"]);
    let now = cluster.at();
    (cluster.node("worker-1").ready, cluster.node("worker-1").since) = (true, Some(now));
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
}

#[test]
fn a_failure_is_told_stops_the_others_and_is_tried_again_later_and_later() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    for minutes in [1, 2, 4, 8, 15, 15] {
        assert_eq!(cluster.lists(NAME).installing, ["worker-1"]);
        cluster.run_fails(
            Some(Code::NoKvm),
            "/dev/kvm is absent; enable virtualization in the firmware",
        );
        let decision = cluster.pass(usize::MAX);
        assert_eq!(reasons(&decision), ["InstallFailed", "InstallFailed"]);
        assert_eq!(decision.notes[0].about, About::Node("worker-1".into()));
        assert_eq!(decision.ends[0].failure, Some(Code::NoKvm));
        let failed = cluster.at();
        let decision = cluster.rest();
        let message = "Node worker-1 Degraded: /dev/kvm is absent; enable virtualization in the firmware";
        assert_eq!(
            cluster.condition(NAME),
            ("True".into(), "Failed".into(), message.into())
        );
        let nodes = cluster.lists(NAME);
        assert_eq!(
            (nodes.failed_to_install, nodes.waiting_to_install),
            (vec!["worker-1".into()], vec!["worker-0".into()])
        );
        assert_eq!(decision.wake, Some(failed + SignedDuration::from_mins(minutes)));
        cluster.world.now = decision.wake.unwrap();
        cluster.rest();
    }
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
}

#[test]
fn a_retry_annotation_and_a_change_of_the_spec_try_at_once() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.run_fails(None, "no");
    cluster.rest();
    assert_eq!(cluster.lists(NAME).failed_to_install, ["worker-0"]);
    let config = cluster.config(NAME).unwrap();
    config.annotations_mut().insert(RETRY.into(), "now".into());
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
    assert_eq!(cluster.world.runs[0].order.failures, 0);
    cluster.run_fails(None, "no");
    cluster.rest();
    cluster.respec(NAME, |config| config.spec.check_node_eligibility = false);
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
}

#[test]
fn a_pod_that_cannot_start_is_a_failure() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.world.runs[0].progress = Progress::Pending(Some("ErrImagePull: not found".into()));
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
    cluster.tick(SignedDuration::from_mins(2));
    cluster.rest();
    let message = "Node worker-0 Degraded: the installer's pod does not start: ErrImagePull: not found";
    assert_eq!(cluster.condition(NAME).2, message);
    assert!(cluster.world.runs.is_empty());
}

#[test]
fn an_image_of_another_version_is_named() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    let now = cluster.at();
    cluster.world.runs[0].progress = Progress::Done {
        ended: now,
        report: fixtures::success(Verb::Install, "0.2.0-ffffffff"),
    };
    cluster.rest();
    let message = "Node worker-0 Degraded: the installer's image carries version 0.2.0-ffffffff, and the controller was told 0.1.0-1a2b3c4d; give both the same";
    assert_eq!(cluster.condition(NAME).2, message);
}

#[test]
fn nodes_that_are_not_ready_or_cordoned_wait_and_stop_nobody() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1", "worker-2"]);
    cluster.node("worker-2").ready = false;
    cluster.node("worker-1").unschedulable = true;
    cluster.create(NAME, json!({}));
    cluster.run_all();
    let expected = json!({"installed": ["worker-0"], "nodeCount": 3, "readyNodeCount": 1, "waitingToInstall": ["worker-1", "worker-2"]});
    assert_eq!(cluster.lists(NAME), lists(expected));
    // All that can have kata have it.
    assert!(cluster.world.runtime_classes.get(KATA).is_some_and(|class| class.ours));
    cluster.node("worker-2").ready = true;
    cluster.node("worker-1").unschedulable = false;
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 3);
}

#[test]
fn the_pool_may_change_later() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.written.clear();
    cluster.world.nodes.push(fixtures::node("worker-2"));
    cluster.pods.push(pod("worker-0"));
    let expression =
        json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["worker-0"]}]});
    select(&mut cluster, expression);
    cluster.run_all();
    let (in_progress, reason, message) = cluster.condition(NAME);
    assert_eq!((in_progress.as_str(), reason.as_str()), ("True", "Updating"));
    assert_eq!(message, "Adding and/or removing kata-enabled nodes");
    // The pod keeps its node's kata, and no other pod comes to it.
    let expected = json!({"installed": ["worker-1", "worker-2"], "nodeCount": 2, "readyNodeCount": 2, "waitingToUninstall": ["worker-0"]});
    assert_eq!(cluster.lists(NAME), lists(expected));
    assert_eq!(cluster.ready_nodes()["worker-0"], Some(false));
    assert!(cluster.rest().awaits_pods);
    cluster.pods.clear();
    cluster.run_all();
    assert_eq!(cluster.condition(NAME).0, "False");
    assert_eq!(cluster.node("worker-0").record, super::Record::default());
}

#[test]
fn a_new_version_and_another_log_level_go_from_node_to_node() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.written.clear();
    cluster.world.settings.version = "0.2.0-9f8e7d6c".into();
    cluster.run_all();
    let words: Vec<String> = cluster.history(NAME).into_iter().map(|(reason, _)| reason).collect();
    assert!(
        words.iter().rev().skip(1).all(|reason| reason == "Updating"),
        "{words:?}"
    );
    assert_eq!(
        cluster.node("worker-0").record.version.as_deref(),
        Some("0.2.0-9f8e7d6c")
    );
    cluster.respec(NAME, |config| config.spec.log_level = crate::log_level::LogLevel::Debug);
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.log_level, "debug");
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
}

#[test]
fn a_runtime_class_comes_after_its_handler_and_goes_before_it() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.run_all();
    let classes = |cluster: &Cluster| cluster.world.runtime_classes.keys().cloned().collect::<Vec<_>>();
    let ask = |cluster: &mut Cluster, classes: serde_json::Value| {
        cluster.respec(NAME, |config| {
            config.spec.runtime_classes = serde_json::from_value(classes).unwrap();
        });
    };
    let settings = "[hypervisor.qemu]\ndefault_memory = 4096\n";
    ask(
        &mut cluster,
        json!([{"name": "kata-large", "configuration": settings, "overhead": {"memory": "1Gi"}}]),
    );
    cluster.pass(usize::MAX);
    assert_eq!(cluster.world.runs[0].order.runtime_classes["kata-large"], settings);
    cluster.run_starts();
    cluster.run_succeeds();
    cluster.pass(usize::MAX);
    // The other node runs pods of `kata` all the while, and has no handler of this name.
    assert_eq!(classes(&cluster), ["kata"]);
    assert_eq!(cluster.condition(NAME).1, "Updating");
    cluster.run_all();
    assert_eq!(classes(&cluster), ["kata", "kata-large"]);
    assert_eq!(
        cluster.config(NAME).unwrap().status.clone().unwrap().runtime_classes,
        ["kata", "kata-large"]
    );
    let overhead = |cluster: &Cluster| cluster.world.runtime_classes["kata-large"].overhead.clone().unwrap();
    assert_eq!(overhead(&cluster), "cpu 500m, memory 1Gi");

    // Its overhead concerns no node.
    ask(
        &mut cluster,
        json!([{"name": "kata-large", "configuration": settings, "overhead": {"cpu": "1"}}]),
    );
    cluster.rest();
    assert_eq!(overhead(&cluster), "cpu 1, memory 500Mi");
    assert!(cluster.world.runs.is_empty());

    ask(&mut cluster, json!([]));
    cluster.pass(usize::MAX);
    assert_eq!(classes(&cluster), ["kata"]);
    assert!(cluster.world.runs.is_empty());
    cluster.run_all();
    assert!(cluster.handlers.values().all(BTreeSet::is_empty));
}

#[test]
fn a_runtime_class_waits_for_nodes_that_keep_former_settings() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1", "worker-2"]);
    cluster.create(NAME, json!({}));
    cluster.run_all();
    cluster.node("worker-0").labels.insert("canary".into(), "true".into());
    cluster.node("worker-1").unschedulable = true;
    cluster.respec(NAME, |config| {
        config.spec.runtime_classes = serde_json::from_value(json!([{"name": "kata-debug"}])).unwrap();
        config.spec.rollout.canary = Some([("canary".to_owned(), "true".to_owned())].into());
    });
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).installed, ["worker-0"]);
    assert!(!cluster.world.runtime_classes.contains_key("kata-debug"));
    // No pod comes to the cordoned one.
    cluster.respec(NAME, |config| config.spec.rollout.canary = None);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).installed, ["worker-0", "worker-2"]);
    assert!(cluster.world.runtime_classes.contains_key("kata-debug"));
}

#[test]
fn a_configuration_goes_from_node_to_node_and_away_again() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    let text = "[hypervisor.qemu]\naccelerator = \"tcg\"\n";
    cluster.respec(NAME, |config| config.spec.configuration = Some(text.into()));
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.configuration, text);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
    assert!(cluster.node("worker-0").record.configuration.is_some());
    cluster.respec(NAME, |config| config.spec.configuration = None);
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.configuration, "");
    cluster.run_all();
    assert_eq!(cluster.node("worker-0").record.configuration, None);
}

#[test]
fn a_node_is_cordoned_while_it_is_changed_and_not_if_it_was_before() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({"rollout": {"cordon": true}}));
    cluster.rest();
    assert!(cluster.node("worker-1").cordoned && !cluster.node("worker-0").cordoned);
    cluster.run_all();
    assert!(cluster.world.nodes.iter().all(|node| !node.cordoned));
    cluster.node("worker-1").unschedulable = true;
    cluster.delete(NAME);
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.node, "worker-1");
    assert!(!cluster.node("worker-1").cordoned);
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
    assert!(cluster.world.nodes.iter().all(|node| !node.cordoned));
}

#[test]
fn the_overhead_is_the_kataconfigs_or_whoevers_changed_it_since() {
    let mut cluster = installed(&["worker-0"]);
    let overhead = |cluster: &Cluster| cluster.world.runtime_classes[KATA].overhead.clone();
    assert_eq!(overhead(&cluster).as_deref(), Some("cpu 500m, memory 500Mi"));
    cluster.respec(NAME, |config| config.spec.memory_overhead_mb = Some(350));
    cluster.run_all();
    assert_eq!(overhead(&cluster).as_deref(), Some("cpu 500m, memory 350Mi"));
    cluster.respec(NAME, |config| config.spec.memory_overhead_mb = None);
    cluster.run_all();
    assert_eq!(overhead(&cluster).as_deref(), Some("cpu 500m, memory 500Mi"));
    // One that an earlier version has made may have been changed by hand.
    cluster.world.runtime_classes.get_mut(KATA).unwrap().overhead = None;
    assert!(cluster.rest().actions.is_empty());
    assert_eq!(overhead(&cluster), None);
}

#[test]
fn a_boot_another_kubelet_a_lost_handler_and_a_day_are_looked_at() {
    let mut cluster = installed(&["worker-0"]);
    let changes: [fn(&mut Cluster); 4] = [
        |cluster| cluster.node("worker-0").host.boot_id = "second".into(),
        |cluster| cluster.node("worker-0").host.kubelet = "v1.37.0".into(),
        |cluster| {
            cluster.node("worker-0").handlers.insert("runc".into());
            cluster.tick(SignedDuration::from_mins(10));
        },
        |cluster| cluster.tick(SignedDuration::from_hours(24)),
    ];
    for change in changes {
        change(&mut cluster);
        cluster.rest();
        assert_eq!(cluster.world.runs[0].order.verb, Verb::Verify);
        // Nobody sees it, and pods go on.
        assert_eq!(cluster.condition(NAME).0, "False");
        assert_eq!(cluster.ready_nodes()["worker-0"], Some(true));
        cluster.run_starts();
        cluster.run_succeeds();
        cluster.rest();
        assert!(cluster.world.runs.is_empty());
        cluster.node("worker-0").handlers.clear();
    }
}

#[test]
fn what_does_not_stand_a_look_is_installed_anew() {
    let mut cluster = installed(&["worker-0"]);
    cluster.node("worker-0").host.boot_id = "second".into();
    cluster.rest();
    cluster.run_fails(Some(Code::HandlerAbsent), "the handler is gone");
    let decision = cluster.pass(usize::MAX);
    assert_eq!(reasons(&decision), ["VerificationFailed", "VerificationFailed"]);
    assert_eq!(cluster.ready_nodes()["worker-0"], Some(false));
    cluster.rest();
    assert_eq!(cluster.condition(NAME).1, "Updating");
    assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
    cluster.run_all();
    assert_eq!(cluster.condition(NAME).0, "False");
}

#[test]
fn deletion_waits_for_pods_and_says_so() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.pods.push(pod("worker-1"));
    cluster.delete(NAME);
    let decision = cluster.pass(usize::MAX);
    assert_eq!(reasons(&decision), ["BlockedByExistingKataPods"]);
    let message = "Existing pods using \"kata\" RuntimeClass found. Please delete the pods manually for KataConfig deletion to proceed";
    let blocked = (
        "False".to_owned(),
        "BlockedByExistingKataPods".to_owned(),
        message.to_owned(),
    );
    assert_eq!(cluster.condition(NAME), blocked);
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
    assert!(cluster.rest().awaits_pods);
    assert!(cluster.world.runtime_classes.get(KATA).is_some_and(|class| class.ours));
    cluster.pods.clear();
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
}

#[test]
fn pods_that_cannot_be_listed_may_exist() {
    let mut cluster = installed(&["worker-0"]);
    cluster.delete(NAME);
    cluster.world.kata_pods = Some(Err("etcd is gone".into()));
    let decision = decide(&cluster.world);
    assert!(decision.actions.is_empty());
    let condition = decision.statuses[0].1.in_progress().unwrap();
    assert_eq!(condition.reason, "BlockedByExistingKataPods");
    assert_eq!(condition.message, "Failed to list kata pods: etcd is gone");
}

#[test]
fn deletion_lets_a_running_installer_finish() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.run_starts();
    cluster.delete(NAME);
    cluster.rest();
    assert_eq!(
        cluster.lists(NAME),
        lists(json!({"installing": ["worker-1"], "nodeCount": 0, "readyNodeCount": 0}))
    );
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
    assert!(cluster.ready_nodes().values().all(Option::is_none));
}

#[test]
fn a_dead_node_keeps_a_deletion_until_it_is_named_or_gone() {
    for way in ["named", "gone"] {
        let mut cluster = installed(&["worker-0", "worker-1"]);
        let now = cluster.at();
        (cluster.node("worker-0").ready, cluster.node("worker-0").since) = (false, Some(now));
        cluster.delete(NAME);
        cluster.run_all();
        assert_eq!(cluster.condition(NAME).1, "Failed");
        assert_eq!(
            cluster.lists(NAME),
            lists(json!({"nodeCount": 0, "readyNodeCount": 0, "failedToUninstall": ["worker-0"]}))
        );
        if way == "gone" {
            cluster.world.nodes.retain(|node| node.name != "worker-0");
        } else {
            let config = cluster.config(NAME).unwrap();
            config
                .annotations_mut()
                .insert(SKIP_NODES.into(), "other, worker-0".into());
        }
        cluster.run_all();
        assert!(cluster.world.configs.is_empty(), "{way}");
    }
}

#[test]
fn sandboxes_that_are_still_ending_are_waited_for_briefly() {
    let mut cluster = installed(&["worker-0"]);
    cluster.delete(NAME);
    cluster.rest();
    cluster.run_fails(
        Some(Code::SandboxesExist),
        "the container runtime still has 1 sandbox of kata",
    );
    let decision = cluster.rest();
    assert_eq!(cluster.condition(NAME).1, "Failed");
    assert_eq!(decision.wake, Some(cluster.at() + SignedDuration::from_secs(10)));
}
