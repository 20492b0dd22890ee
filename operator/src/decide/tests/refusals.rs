//! What is asked for and cannot be had, and what is there already.

use super::*;

/// What the first pod of the installer is to be; it is not made.
fn first_run(cluster: &mut Cluster) -> (String, Order) {
    loop {
        let actions = cluster.decide().actions;
        let started = actions.into_iter().find_map(|action| match action {
            Action::StartRun { name, order } => Some((name, order)),
            _ => None,
        });
        if let Some(started) = started {
            return started;
        }
        cluster.pass(usize::MAX);
    }
}

#[test]
fn a_pod_that_is_not_let_in_is_told_of_and_tried_again() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.create(NAME, json!({}));
    let (_, order) = first_run(&mut cluster);
    let at = cluster.at();
    cluster.world.refused = Some(Refused {
        node: order.node,
        verb: order.verb,
        purpose: order.purpose,
        at,
        text: "exceeded quota".into(),
    });
    let decision = cluster.rest();
    let message = "Node worker-1 Degraded: the installer's pod is refused: exceeded quota";
    assert_eq!(cluster.condition(NAME).2, message);
    assert_eq!(decision.wake, Some(at + SignedDuration::from_mins(1)));
    cluster.tick(SignedDuration::from_mins(1));
    cluster.rest();
    assert_eq!(cluster.lists(NAME).installing, ["worker-1"]);
}

#[test]
fn nobody_eligible_is_said() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({"checkNodeEligibility": true}));
    cluster.pass(usize::MAX);
    let decision = cluster.pass(usize::MAX);
    assert_eq!(reasons(&decision), ["NoEligibleNodes"]);
    cluster.rest();
    let (in_progress, reason, message) = cluster.condition(NAME);
    assert_eq!((in_progress.as_str(), reason.as_str()), ("False", "NoEligibleNodes"));
    assert!(
        message.starts_with("No node can have kata: 1 workers, 1 matched"),
        "{message}"
    );
    cluster
        .node("worker-0")
        .labels
        .insert(crate::decide::ELIGIBLE.into(), "true".into());
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 1);
}

#[test]
fn a_selector_that_makes_no_sense_is_said_and_changes_nothing() {
    let mut cluster = installed(&["worker-0"]);
    let selector = json!({"matchExpressions": [{"key": "a", "operator": "In"}]});
    select(&mut cluster, selector);
    cluster.rest();
    let (in_progress, reason, message) = cluster.condition(NAME);
    assert_eq!((in_progress.as_str(), reason.as_str()), ("False", "InvalidSelector"));
    assert!(message.ends_with("needs values with In and NotIn"), "{message}");
    assert_eq!(cluster.lists(NAME).ready_node_count, 1);
}

#[test]
fn a_spec_that_cannot_be_understood_is_said_and_changes_nothing() {
    let mut cluster = Cluster::new(&["worker-0"]);
    let why = || (NAME.to_owned(), "unknown log level Info".to_owned());
    cluster.world.invalid_specs.extend([why()]);
    cluster.create(NAME, json!({}));
    cluster.rest();
    let expected = "spec cannot be understood: unknown log level Info";
    let refused = || {
        (
            String::from("False"),
            String::from("InvalidSpec"),
            String::from(expected),
        )
    };
    assert_eq!(cluster.condition(NAME), refused());
    assert!(cluster.config(NAME).unwrap().finalizers().is_empty());
    cluster.world.invalid_specs.clear();
    cluster.run_all();
    // Kata stays where it is, also when it goes wrong later.
    cluster.world.invalid_specs.extend([why()]);
    cluster.run_all();
    assert_eq!(cluster.condition(NAME), refused());
    assert_eq!(cluster.lists(NAME).ready_node_count, 1);
    cluster.delete(NAME);
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
}

#[test]
fn what_works_is_available_while_a_spec_makes_no_sense() {
    let mut cluster = Cluster::new(&["worker-0"]);
    let spec = json!({
        "configuration": "[runtime]\nenable_debug = true\n",
        "runtimeClasses": [{"name": "kata-large", "configuration": "[hypervisor.qemu]\ndefault_memory = 4096\n"}],
    });
    cluster.create(NAME, spec);
    cluster.run_all();
    let classes = |cluster: &mut Cluster| cluster.config(NAME).unwrap().status.clone().unwrap().runtime_classes;
    let before = (classes(&mut cluster), cluster.lists(NAME).ready_node_count);
    assert_eq!(before.1, 1);
    let spoil: [fn(&mut crate::api::KataConfig); 2] = [
        |config| config.spec.memory_overhead_mb = Some(1),
        |config| {
            config.spec.memory_overhead_mb = None;
            config.spec.configuration = Some("[nonsense]".to_owned());
        },
    ];
    for spoil in spoil {
        cluster.respec(NAME, |config| {
            config.spec.overhead.memory = Some("350Mi".to_owned());
            spoil(config);
        });
        cluster.run_all();
        assert_eq!(cluster.condition(NAME).1, "InvalidSpec");
        assert_eq!((classes(&mut cluster), cluster.lists(NAME).ready_node_count), before);
    }
}

#[test]
fn peer_pods_are_refused_by_name() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({"enablePeerPods": true}));
    cluster.rest();
    let (in_progress, reason, message) = cluster.condition(NAME);
    assert_eq!(
        (in_progress.as_str(), reason.as_str()),
        ("False", "PeerPodsNotSupported")
    );
    assert!(message.starts_with("enablePeerPods: true asks for"), "{message}");
    assert!(cluster.config(NAME).unwrap().finalizers().is_empty());
    cluster.respec(NAME, |config| config.spec.enable_peer_pods = false);
    cluster.run_all();
    assert_eq!(cluster.lists(NAME).ready_node_count, 1);
}

#[test]
fn the_first_of_two_is_in_force_and_the_other_follows_it() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create("b", json!({}));
    cluster.create("a", json!({}));
    let decision = cluster.rest();
    assert!(decision.notes.is_empty());
    assert_eq!(cluster.lists("a").installing, ["worker-0"]);
    let (in_progress, reason, message) = cluster.condition("b");
    assert_eq!((in_progress.as_str(), reason.as_str()), ("False", "Duplicate"));
    assert_eq!(
        message,
        "A KataConfig instance already exists: a is in force; delete this one, or that one first"
    );
    cluster.run_all();
    cluster.delete("a");
    cluster.run_all();
    assert_eq!(cluster.lists("b").ready_node_count, 1);
}

#[test]
fn an_earlier_name_does_not_take_over() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create("b", json!({}));
    cluster.rest();
    cluster.create("a", json!({}));
    cluster.run_all();
    assert_eq!(cluster.condition("a").1, "Duplicate");
    assert_eq!(cluster.lists("b").ready_node_count, 1);
}

#[test]
fn a_runtime_class_of_somebody_else_is_neither_changed_nor_deleted() {
    let mut cluster = Cluster::new(&["worker-0"]);
    let theirs = ["kata", "kata-qemu"].map(|name| {
        let class = RuntimeClass {
            handler: "kata-qemu".into(),
            ..RuntimeClass::default()
        };
        (name.to_owned(), class)
    });
    let theirs = BTreeMap::from(theirs);
    cluster.world.runtime_classes.clone_from(&theirs);
    cluster.create(NAME, json!({"overhead": {"memory": "1Gi"}}));
    cluster.run_all();
    let told = cluster.world.told.first().unwrap();
    assert!(told.contains("RuntimeClass kata, with the handler kata-qemu"), "{told}");
    assert_eq!(cluster.world.told.len(), 1, "one that nobody asks for concerns nobody");
    assert_eq!(cluster.condition(NAME).0, "False");
    assert!(cluster.history(NAME).iter().all(|(reason, _)| reason != "Updating"));
    cluster.delete(NAME);
    cluster.run_all();
    assert!(cluster.world.configs.is_empty());
    assert_eq!(cluster.world.runtime_classes, theirs);
}

#[test]
fn a_node_of_another_kind_is_told_of_once() {
    let mut cluster = Cluster::new(&["worker-0", "worker-1"]);
    cluster.node("worker-1").host = Host {
        architecture: "arm64".into(),
        ..Host::default()
    };
    cluster.create(NAME, json!({}));
    let mut told = Vec::new();
    for _ in 0..10 {
        told.extend(cluster.pass(usize::MAX).notes);
    }
    let told: Vec<_> = told
        .into_iter()
        .filter(|note| note.reason == "NodeNotSupported")
        .collect();
    assert_eq!(told.len(), 2);
    assert!(told[0].text.ends_with("its architecture is arm64, not amd64"));
    assert_eq!(cluster.lists(NAME).node_count, 1);
}

#[test]
fn two_controllers_cannot_make_two_pods_for_the_same_run() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    let (name, _) = first_run(&mut cluster);
    cluster.tick(SignedDuration::from_secs(1));
    assert_eq!(first_run(&mut cluster).0, name);
    assert!(
        name.starts_with("kata-install-worker-0-") && name.len() == "kata-install-worker-0-12345678".len(),
        "{name}"
    );
}

#[test]
fn confidential_machines_are_refused_and_other_feature_gates_are_told_of() {
    let mut cluster = installed(&["worker-0"]);
    let gates = [
        ("confidential", "true"),
        ("deploymentMode", "DaemonSet"),
        ("unknown", "x"),
    ];
    let gates = gates.map(|(gate, value)| (gate.to_owned(), value.to_owned()));
    cluster.world.feature_gates = gates.into();
    cluster.rest();
    assert_eq!(cluster.condition(NAME).1, "ConfidentialNotSupported");
    // What is there stays.
    assert_eq!(cluster.lists(NAME).installed, ["worker-0"]);
    let told: Vec<&String> = cluster.world.told.iter().collect();
    assert_eq!(told.len(), 2);
    assert!(told[0].starts_with("deploymentMode: \"DaemonSet\""), "{told:?}");
    assert!(told[1].contains("does not know it"), "{told:?}");
    cluster
        .world
        .feature_gates
        .insert("confidential".into(), "false".into());
    cluster.run_all();
    assert_eq!(cluster.condition(NAME).1, "");
}

#[test]
fn a_runtime_class_that_cannot_be_is_refused_by_its_name() {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME, json!({}));
    cluster.run_all();
    for (classes, why) in [
        (
            json!([{"name": "runc"}]),
            "runtimeClasses: \"runc\" is not the name of a RuntimeClass of Sandpod's",
        ),
        (
            json!([{"name": "kata-a"}, {"name": "kata-a"}]),
            "runtimeClasses: kata-a is there twice; leave one of them out",
        ),
        (
            json!([{"name": "kata-a", "configuration": "[hypervisor.qemu]\nacelerator = 1\n"}]),
            "configuration of the RuntimeClass kata-a: unknown configuration key `hypervisor.qemu.acelerator`",
        ),
    ] {
        cluster.respec(NAME, |config| {
            config.spec.runtime_classes = serde_json::from_value(classes).unwrap();
        });
        cluster.rest();
        let (_, reason, message) = cluster.condition(NAME);
        assert_eq!(reason, "InvalidSpec");
        assert!(message.contains(why), "{message}");
        assert!(cluster.world.runs.is_empty());
        assert_eq!(cluster.world.runtime_classes.len(), 1);
    }
}

#[test]
fn a_configuration_that_no_pod_could_start_with_reaches_no_node() {
    let mut cluster = installed(&["worker-0"]);
    cluster.respec(NAME, |config| {
        config.spec.configuration = Some("[hypervisor.qemu]\nacelerator = 1\n".into())
    });
    cluster.run_all();
    let (_, reason, message) = cluster.condition(NAME);
    assert_eq!(reason, "InvalidSpec");
    assert!(
        message.contains("configuration: ") && message.contains("acelerator"),
        "{message}"
    );
    assert_eq!(cluster.node("worker-0").record.ready, Some(true));
}
