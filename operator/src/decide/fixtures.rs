//! What tests of decisions are made from.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use super::world::{Host, Node, Record, RuntimeClass, Settings, World};
use crate::{
    api::{KataConfig, KataConfigSpec},
    report::{Code, Phase, Problem, Report, Verb},
};

/// The version that the installer's image carries.
pub const VERSION: &str = "0.1.0-1a2b3c4d";

/// When stories begin.
pub fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

/// A Ready worker that nobody has touched.
pub fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        uid: format!("uid-of-{name}"),
        labels: BTreeMap::from([
            ("node-role.kubernetes.io/worker".to_owned(), String::new()),
            ("kubernetes.io/hostname".to_owned(), name.to_owned()),
        ]),
        record: Record::default(),
        ready: true,
        since: Some(start() - SignedDuration::from_hours(1)),
        unschedulable: false,
        cordoned: false,
        host: Host {
            operating_system: "linux".into(),
            architecture: "amd64".into(),
            container_runtime: "containerd://2.4.2".into(),
            boot_id: format!("first boot of {name}"),
            kubelet: "v1.36.3".into(),
            os_image: "Debian GNU/Linux 12".into(),
        },
        handlers: BTreeSet::new(),
    }
}

/// A KataConfig as it is right after `kubectl create`.
pub fn config(name: &str, spec: serde_json::Value) -> KataConfig {
    KataConfig {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            uid: Some(format!("uid-of-{name}")),
            generation: Some(1),
            creation_timestamp: Some(Time(start())),
            ..ObjectMeta::default()
        },
        spec: serde_json::from_value::<KataConfigSpec>(spec).unwrap(),
        ..serde_json::from_value(serde_json::json!({"metadata": {}})).unwrap()
    }
}

/// These nodes and no KataConfig.
pub fn world(nodes: &[&str]) -> World {
    World {
        configs: Vec::new(),
        invalid_specs: BTreeMap::new(),
        nodes: nodes.iter().map(|name| node(name)).collect(),
        runs: Vec::new(),
        unread_runs: Vec::new(),
        kata_pods: None,
        runtime_classes: BTreeMap::new(),
        feature_gates: BTreeMap::new(),
        told: BTreeSet::new(),
        refused: None,
        settings: Settings {
            version: VERSION.into(),
            retry_first: SignedDuration::from_mins(1),
            settle: SignedDuration::from_secs(5),
            prefix: "/opt/sandpod".into(),
        },
        now: start(),
    }
}

/// What a run reports that did not do what it was asked for.
pub fn failure(verb: Verb, phase: Phase, version: &str, code: Code, text: &str) -> Report {
    Report {
        phase,
        version: version.to_owned(),
        changed: phase == Phase::Failed && verb != Verb::Verify,
        error: Some(Problem {
            code,
            text: text.to_owned(),
        }),
        ..Report::new(verb)
    }
}

/// What a run that does as it is told reports.
pub fn success(verb: Verb, version: &str) -> Report {
    Report {
        phase: match verb {
            Verb::Install => Phase::Installed,
            Verb::Verify => Phase::Verified,
            Verb::Uninstall => Phase::Uninstalled,
        },
        version: version.to_owned(),
        restarted: verb != Verb::Verify,
        handler_seen: Some(verb != Verb::Uninstall),
        ..Report::new(verb)
    }
}

/// A RuntimeClass as we make it.
pub fn our_class(name: &str, overhead: &str) -> RuntimeClass {
    RuntimeClass {
        ours: true,
        handler: name.into(),
        overhead: Some(overhead.into()),
    }
}
