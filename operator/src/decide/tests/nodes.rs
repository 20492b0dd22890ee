//! What says something about a node and what does not, and which nodes stop others.

use jiff::Timestamp;

use super::*;
use crate::{decide::Node, report::Phase};

/// The node's next verification is under way.
fn verifying(cluster: &mut Cluster, node: &str) {
    let now = cluster.at();
    cluster.node(node).host.boot_id = format!("boot at {now}");
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.verb, Verb::Verify);
}

/// Kata of another version is to come, and its installer is under way on the node.
fn upgrading(node: &str) -> Cluster {
    let mut cluster = installed(&[node]);
    cluster.world.settings.version = "0.2.0-9f8e7d6c".into();
    cluster.rest();
    cluster.run_starts();
    assert_eq!(cluster.ready_nodes()[node], Some(false));
    cluster
}

fn goes_down(cluster: &mut Cluster, node: &str, ready: bool) {
    let now = cluster.at();
    let node: &mut Node = cluster.node(node);
    (node.ready, node.since) = (ready, Some(now));
}

#[test]
fn a_verification_that_is_not_let_in_is_tried_once_in_a_while() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.refusing = true;
    for node in ["worker-0", "worker-1"] {
        cluster.node(node).host.boot_id = "second".into();
    }
    for _ in 0..3 {
        // It comes to rest: nobody asks again before the time.
        let decision = cluster.rest();
        let refused = cluster.world.refused.clone().unwrap();
        assert_eq!((refused.verb, refused.at), (Verb::Verify, cluster.at()));
        assert_eq!(decision.wake, Some(cluster.at() + SignedDuration::from_mins(1)));
        assert_eq!(cluster.condition(NAME).0, "False");
        cluster.tick(SignedDuration::from_mins(1));
    }
    cluster.refusing = false;
    cluster.run_all();
    assert!(cluster.ready_nodes().values().all(|ready| *ready == Some(true)));
    assert_eq!(cluster.node("worker-0").record.boot_id.as_deref(), Some("second"));
}

#[test]
fn a_verification_that_cannot_start_says_nothing_about_the_node() {
    let mut cluster = installed(&["worker-0"]);
    verifying(&mut cluster, "worker-0");
    for (attempt, minutes) in [1, 2, 4].into_iter().enumerate() {
        let failures = u32::try_from(attempt).unwrap();
        assert_eq!(
            (cluster.world.runs[0].order.verb, cluster.world.runs[0].order.failures),
            (Verb::Verify, failures)
        );
        cluster.world.runs[0].progress = Progress::Pending(Some("ErrImagePull: no registry".into()));
        cluster.tick(SignedDuration::from_mins(2));
        let decision = cluster.pass(usize::MAX);
        assert_eq!(reasons(&decision), ["VerificationFailed", "VerificationFailed"]);
        assert!(
            decision.notes[0].text.starts_with("Node worker-0 keeps kata"),
            "{decision:?}"
        );
        let decision = cluster.rest();
        assert_eq!(cluster.condition(NAME).0, "False");
        assert_eq!(cluster.ready_nodes()["worker-0"], Some(true));
        assert_eq!(decision.wake, Some(cluster.at() + SignedDuration::from_mins(minutes)));
        cluster.world.now = decision.wake.unwrap();
        cluster.rest();
    }
    cluster.run_all();
    assert_eq!(cluster.node("worker-0").record.last_error, None);
}

#[test]
fn a_verification_counts_when_it_is_about_the_node() {
    let kinds = [
        (Code::Busy, true),
        (Code::NoCri, true),
        (Code::Io, true),
        (Code::OtherBoot, true),
        (Code::Damaged, false),
        (Code::HandlerAbsent, false),
        (Code::NoKvm, false),
        (Code::NotInstalled, false),
    ];
    for (code, stays) in kinds {
        let mut cluster = installed(&["worker-0"]);
        verifying(&mut cluster, "worker-0");
        cluster.run_fails(Some(code), "why");
        cluster.pass(usize::MAX);
        let record = &cluster.node("worker-0").record;
        assert_eq!(
            (record.ready, record.version.is_some()),
            (Some(stays), stays),
            "{code:?}"
        );
        cluster.run_all();
        assert_eq!(cluster.ready_nodes()["worker-0"], Some(true), "{code:?}");
    }
}

#[test]
fn an_upgrade_that_changed_nothing_leaves_the_node_in_service() {
    for (code, stays) in [(Code::DiskFull, true), (Code::Busy, true), (Code::NoKvm, false)] {
        let mut cluster = upgrading("worker-0");
        cluster.run_is_refused(code, "why");
        cluster.rest();
        assert_eq!(cluster.condition(NAME).2, "Node worker-0 Degraded: why");
        assert_eq!(cluster.ready_nodes()["worker-0"], Some(stays), "{code:?}");
        let version = cluster.node("worker-0").record.version.clone();
        assert_eq!(version.as_deref(), stays.then_some(fixtures::VERSION), "{code:?}");
        cluster.run_all();
        let version = cluster.node("worker-0").record.version.clone();
        assert_eq!(version.as_deref(), Some("0.2.0-9f8e7d6c"));
    }
}

#[test]
fn an_upgrade_that_was_put_back_leaves_the_node_in_service() {
    for (version, stays) in [(fixtures::VERSION, true), ("", false)] {
        let mut cluster = upgrading("worker-0");
        let mut report = fixtures::failure(Verb::Install, Phase::Failed, version, Code::Io, "cannot write");
        (report.changed, report.handler_seen) = (false, Some(true));
        let uid = cluster.node("worker-0").uid.clone();
        // It was put back, and so is as it was verified.
        cluster.verified.insert(uid);
        cluster.world.runs[0].progress = Progress::Failed {
            ended: cluster.at(),
            report: Some(report),
            text: "cannot write".into(),
        };
        cluster.rest();
        assert_eq!(cluster.ready_nodes()["worker-0"], Some(stays));
        assert_eq!(cluster.condition(NAME).1, "Failed");
    }
}

#[test]
fn a_run_that_was_lost_may_have_done_anything() {
    let mut cluster = upgrading("worker-0");
    cluster.run_fails(None, "nobody hears it");
    // Somebody deletes its pod before the controller has seen its end.
    cluster.world.runs.clear();
    cluster.rest();
    cluster.world.runs[0].progress = Progress::Pending(Some("ErrImagePull: no registry".into()));
    cluster.tick(SignedDuration::from_mins(2));
    cluster.rest();
    let record = cluster.node("worker-0").record.clone();
    assert_eq!((record.ready, record.version), (Some(false), None));
}

#[test]
fn another_installation_of_kata_is_left_alone_and_named() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1", "worker-2"]);
    for node in ["worker-1", "worker-2"] {
        cluster.node(node).record.ready = Some(true);
    }
    cluster.create(NAME, json!({}));
    let without =
        json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["worker-1"]}]});
    select(&mut cluster, without);
    cluster.run_all();
    for node in ["worker-1", "worker-2"] {
        let record = cluster.node(node).record.clone();
        assert_eq!(
            (record.ready, record.member, record.claimed()),
            (Some(true), false, false),
            "{node}"
        );
    }
    let (_, reason, message) = cluster.condition(NAME);
    assert_eq!(reason, "Failed");
    assert!(
        message.contains("worker-2 Degraded: another installation of kata"),
        "{message}"
    );
    // It stops nobody.
    assert_eq!(cluster.lists(NAME).installed, ["worker-0"]);
    assert!(cluster.world.runtime_classes.get(KATA).is_some_and(|class| class.ours));
    cluster.delete(NAME);
    cluster.run_all();
    assert_eq!(cluster.ready_nodes()["worker-2"], Some(true));
    assert!(cluster.world.configs.is_empty());
}

#[test]
fn a_node_that_goes_down_after_its_install_stops_the_rollout() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1", "worker-2"]);
    cluster.create(NAME, json!({}));
    for _ in 0..2 {
        cluster.rest();
        cluster.run_starts();
        cluster.run_succeeds();
        cluster.rest();
        cluster.tick(SignedDuration::from_secs(5));
    }
    // The next one's turn has come already when its kubelet notices that the container runtime has no network.
    goes_down(&mut cluster, "worker-2", false);
    cluster.rest();
    assert_eq!(cluster.lists(NAME).waiting_to_install, ["worker-0"]);
    assert!(cluster.world.runs.is_empty());
    cluster.tick(SignedDuration::from_mins(5));
    cluster.rest();
    assert_eq!(
        cluster.condition(NAME).2,
        "Node worker-2 Degraded: it is not Ready since the installer ended"
    );
    assert!(cluster.world.runs.is_empty());
    goes_down(&mut cluster, "worker-2", true);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 3);
}

#[test]
fn a_node_that_goes_down_much_later_stops_nobody() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.tick(SignedDuration::from_hours(1));
    goes_down(&mut cluster, "worker-1", false);
    cluster.tick(SignedDuration::from_hours(1));
    cluster.rest();
    assert_eq!(cluster.condition(NAME).0, "False");
    cluster.world.nodes.push(fixtures::node("worker-2"));
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 3);
}

#[test]
fn a_node_that_is_not_fit_stops_nobody() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1", "worker-2"]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    cluster.run_starts();
    cluster.run_is_refused(Code::NoKvm, "/dev/kvm is absent");
    cluster.rest();
    for _ in 0..2 {
        cluster.run_starts();
        cluster.run_succeeds();
        cluster.rest();
        cluster.tick(SignedDuration::from_secs(5));
        cluster.rest();
    }
    let expected = json!({"installed": ["worker-0", "worker-1"], "failedToInstall": ["worker-2"], "nodeCount": 3, "readyNodeCount": 2});
    assert_eq!(cluster.lists(NAME), lists(expected));
    assert_eq!(cluster.condition(NAME).2, "Node worker-2 Degraded: /dev/kvm is absent");
    assert!(cluster.world.runtime_classes.get(KATA).is_some_and(|class| class.ours));
    // It is tried again when its time has come.
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 3);
}

#[test]
fn another_prefix_leaves_kata_where_it_is() {
    let mut cluster = installed(&["worker-0"]);
    cluster.world.settings.prefix = "/var/lib/sandpod".into();
    cluster.rest();
    let (_, reason, message) = cluster.condition(NAME);
    assert_eq!(reason, "Failed");
    let expected = "kata is installed in /opt/sandpod, and the operator was told /var/lib/sandpod";
    assert!(message.contains(expected), "{message}");
    assert_eq!(cluster.ready_nodes()["worker-0"], Some(true));
    assert!(cluster.world.runs.is_empty());
    // It is removed from where it is.
    cluster.delete(NAME);
    cluster.rest();
    assert_eq!(
        (
            cluster.world.runs[0].order.verb,
            cluster.world.runs[0].order.prefix.as_str()
        ),
        (Verb::Uninstall, "/opt/sandpod")
    );
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
}

#[test]
fn pods_on_a_node_that_is_left_alone_keep_no_deletion() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    cluster.pods.push(pod("worker-0"));
    cluster.delete(NAME);
    let decision = cluster.rest();
    assert!(decision.awaits_pods);
    assert_eq!(cluster.condition(NAME).1, "BlockedByExistingKataPods");
    cluster.skipped.insert("worker-0".into());
    let config = cluster.config(NAME).unwrap();
    config.annotations_mut().insert(SKIP_NODES.into(), "worker-0".into());
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
    assert_eq!(cluster.ready_nodes()["worker-1"], None);
}

#[test]
fn pods_in_the_way_of_a_deletion_are_named() {
    let mut cluster = installed(&["worker-0"]);
    for name in ["a/1", "a/2", "b/3", "b/4"] {
        cluster.pods.push(KataPod {
            name: name.into(),
            node: Some("worker-0".into()),
        });
    }
    cluster.delete(NAME);
    let decision = cluster.pass(usize::MAX);
    assert!(
        decision.notes[0].text.ends_with("to proceed: a/1, a/2, b/3 and others"),
        "{decision:?}"
    );
}

#[test]
fn the_clock_of_a_node_is_not_believed() {
    for ahead in [SignedDuration::from_hours(1), SignedDuration::from_hours(-1)] {
        let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
        cluster.create(NAME, json!({}));
        cluster.rest();
        cluster.run_starts();
        cluster.run_succeeds();
        let Progress::Done { ended, .. } = &mut cluster.world.runs[0].progress else {
            panic!("not done");
        };
        *ended += ahead;
        let noted: Timestamp = cluster.at();
        let decision = cluster.rest();
        // It is waited for by the controller's own clock.
        assert_eq!(decision.wake, Some(noted + SignedDuration::from_secs(5)));
        assert_eq!(cluster.lists(NAME).waiting_to_install, ["worker-0"]);
        cluster.world.now = decision.wake.unwrap();
        cluster.rest();
        assert_eq!(cluster.lists(NAME).installing, ["worker-0"]);
    }
}

#[test]
fn a_selector_that_matches_nobody_removes_kata_from_nobody() {
    let mut cluster = installed(&["worker-0", "worker-1"]);
    select(
        &mut cluster,
        json!({"matchLabels": {"kubernetes.io/hostname": "wroker-0"}}),
    );
    cluster.run_all();
    let (in_progress, reason, message) = cluster.condition(NAME);
    assert_eq!((in_progress.as_str(), reason.as_str()), ("False", "NoEligibleNodes"));
    assert!(message.contains("kata stays on 2 nodes that have it"), "{message}");
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
    cluster.delete(NAME);
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
    assert!(cluster.ready_nodes().values().all(Option::is_none));
}

#[test]
fn a_container_runtime_that_does_not_tell_its_handlers_is_no_failure() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.node("worker-0").host.container_runtime = "cri-o://1.28.4".into();
    cluster.create(NAME, json!({}));
    cluster.rest();
    assert_eq!(cluster.world.runs[0].order.runtime, "cri-o");
    cluster.run_starts();
    cluster.run_succeeds();
    let Progress::Done { report, .. } = &mut cluster.world.runs[0].progress else {
        panic!("not done");
    };
    report.handler_seen = None;
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 1);
}

/// Status and reason of a condition, and its message.
fn condition(cluster: &mut Cluster, kind: &str) -> (String, String) {
    let config = cluster.config(NAME).unwrap();
    let found = config.status.as_ref().unwrap().condition(kind).unwrap();
    assert_eq!(found.observed_generation, config.metadata.generation);
    (format!("{} {}", found.status, found.reason), found.message.clone())
}

#[test]
fn machines_read_whether_kata_is_available_progressing_and_degraded() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.node("worker-0").unschedulable = true;
    cluster.create(NAME, json!({}));
    cluster.rest();
    assert_eq!(condition(&mut cluster, "Available").0, "False NoRuntimeClass");
    let waits = ("True WaitingForNodes".to_owned(), "worker-0 is cordoned".to_owned());
    assert_eq!(condition(&mut cluster, "Progressing"), waits);
    assert_eq!(condition(&mut cluster, "Degraded").0, "False AsExpected");
    cluster.run_all();
    // What can be done is done, and the node that is waited for is named.
    let some = ("True Installed".to_owned(), "1 of 2 nodes have kata".to_owned());
    assert_eq!(condition(&mut cluster, "Available"), some);
    assert_eq!(condition(&mut cluster, "Progressing"), waits);
    cluster.node("worker-0").unschedulable = false;
    cluster.rest();
    cluster.run_starts();
    cluster.run_is_refused(Code::NoKvm, "/dev/kvm is absent");
    cluster.rest();
    assert_eq!(condition(&mut cluster, "Available").0, "True Installed");
    assert_eq!(condition(&mut cluster, "Progressing").0, "False Failed");
    let degraded = "Node worker-0 Degraded: /dev/kvm is absent";
    assert_eq!(
        condition(&mut cluster, "Degraded"),
        ("True Failed".to_owned(), degraded.to_owned())
    );
    cluster.run_all();
    assert_eq!(condition(&mut cluster, "Progressing").0, "False Complete");
    cluster.respec(NAME, |config| config.spec.enable_peer_pods = true);
    cluster.rest();
    assert_eq!(condition(&mut cluster, "Degraded").0, "True PeerPodsNotSupported");
}

fn rolling_out(rollout: &serde_json::Value, nodes: usize) -> Cluster {
    let names: Vec<String> = (0..nodes).map(|number| format!("worker-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut cluster = Cluster::new(&names);
    cluster.most = nodes;
    cluster.create(NAME, json!({"rollout": rollout}));
    cluster.rest();
    cluster
}

#[test]
fn so_many_nodes_are_changed_at_once_as_the_rollout_says() {
    for (most, nodes, at_once) in [
        (json!(3), 7, 3),
        (json!("50%"), 7, 3),
        (json!("1%"), 7, 1),
        (json!(9), 4, 4),
    ] {
        let mut cluster = rolling_out(&json!({"maxUnavailable": most}), nodes);
        assert_eq!(cluster.lists(NAME).installing.len(), at_once, "{most}");
        // One that is down after its installation counts.
        cluster.run_starts();
        cluster.run_succeeds();
        let done = cluster.world.runs[0].order.node.clone();
        cluster.rest();
        cluster.tick(SignedDuration::from_secs(1));
        goes_down(&mut cluster, &done, false);
        cluster.tick(SignedDuration::from_secs(30));
        cluster.rest();
        assert_eq!(cluster.lists(NAME).installing.len(), at_once - 1, "{most}");
        goes_down(&mut cluster, &done, true);
        cluster.run_all();
        assert_eq!(cluster.lists(NAME).installed.len(), nodes);
    }
    let mut cluster = rolling_out(&json!({"maxUnavailable": "half"}), 2);
    assert_eq!(cluster.condition(NAME).1, "InvalidSpec");
    assert!(cluster.condition(NAME).2.contains("rollout.maxUnavailable: \"half\""));
}

#[test]
fn a_paused_rollout_begins_no_node() {
    let mut cluster = rolling_out(&json!({}), 2);
    cluster.respec(NAME, |config| config.spec.rollout.paused = true);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).installed, ["worker-1"]);
    assert_eq!(cluster.lists(NAME).waiting_to_install, ["worker-0"]);
    assert_eq!(condition(&mut cluster, "Progressing").0, "False Paused");
    cluster.respec(NAME, |config| config.spec.rollout.paused = false);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
    // A deletion goes on.
    cluster.respec(NAME, |config| config.spec.rollout.paused = true);
    cluster.delete(NAME);
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
}

#[test]
fn canaries_go_first_and_alone() {
    let mut cluster = rolling_out(&json!({"canary": {"kubernetes.io/hostname": "worker-0"}}), 3);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).installed, ["worker-0"]);
    // Pods can be tried there.
    assert_eq!(condition(&mut cluster, "Available").0, "True Installed");
    let (_, message) = condition(&mut cluster, "Progressing");
    assert!(
        message.starts_with("worker-1 has not the labels of rollout.canary; worker-2"),
        "{message}"
    );
    cluster.respec(NAME, |config| config.spec.rollout.canary = None);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 3);
    cluster.world.settings.version = "0.2.0-9f8e7d6c".into();
    cluster.respec(NAME, |config| {
        config.spec.rollout.canary = Some([("kubernetes.io/hostname".into(), "worker-1".into())].into());
    });
    cluster.run_all();
    let versions: Vec<_> = cluster
        .world
        .nodes
        .iter()
        .map(|node| node.record.version.clone().unwrap())
        .collect();
    assert_eq!(versions, [fixtures::VERSION, "0.2.0-9f8e7d6c", fixtures::VERSION]);
    assert!(cluster.ready_nodes().values().all(|ready| *ready == Some(true)));
}

#[test]
fn a_verification_that_hangs_holds_up_no_installation() {
    let mut cluster = installed(&["worker-0"]);
    verifying(&mut cluster, "worker-0");
    cluster.world.nodes.push(fixtures::node("worker-1"));
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-1"]);
    // Looking is for many at a time.
    let names: Vec<String> = (10..40).map(|number| format!("worker-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut cluster = installed(&names);
    cluster.tick(SignedDuration::from_hours(24));
    cluster.rest();
    assert_eq!(cluster.world.runs.len(), 10);
}

#[test]
fn a_pod_of_another_version_of_the_operator_is_waited_for() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.world.unread_runs.push(crate::decide::UnreadRun {
        name: "kata-install-worker-1-1234".into(),
        uid: "u".into(),
        node: "worker-1".into(),
        ended: false,
        deleted: false,
    });
    cluster.create(NAME, json!({}));
    cluster.rest();
    assert!(cluster.world.runs.is_empty());
    cluster.world.unread_runs[0].ended = true;
    cluster.run_all();
    assert!(cluster.world.unread_runs.is_empty());
    assert_eq!(cluster.lists(NAME).ready_node_count, 2);
}
