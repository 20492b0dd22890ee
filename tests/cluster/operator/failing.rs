//! Nodes on which the installer fails.

use std::fs;

use serde_json::json;
use tests::{
    failure::{Result, Trying, contains, same},
    run,
};

use super::{
    Story,
    controller::Settings,
    ground::{NAMESPACE, SOON},
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("a_failing_node_says_why_stops_the_others_and_recovers", recovers),
    ("a_retry_annotation_tries_at_once", retry),
    ("an_installer_pod_that_is_not_let_in_is_told_of", not_let_in),
];

const TEXT: &str = "/dev/kvm is absent; enable virtualization in the firmware";

fn refuse(rig: &Rig<'_>, index: usize) -> Result {
    fs::write(rig.kubelet(index)?.folder().join("refuse"), TEXT).trying("telling a node to refuse")
}

fn relent(rig: &Rig<'_>, index: usize) -> Result {
    fs::remove_file(rig.kubelet(index)?.folder().join("refuse")).trying("telling a node not to refuse")
}

fn failed(rig: &Rig<'_>) -> Result {
    let condition = ["True", "Failed", &format!("Node worker-1 Degraded: {TEXT}")].map(String::from);
    let nodes =
        json!({"failedToInstall": ["worker-1"], "waitingToInstall": ["worker-0"], "nodeCount": 2, "readyNodeCount": 0});
    let claim = |row: &super::history::Row| row.condition == condition && row.nodes == nodes;
    rig.history
        .until_last(NAME, "the failure's word", SOON, claim)
        .map(drop)
}

fn recovers(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    refuse(rig, 1)?;
    rig.create(NAME, &json!({}))?;
    failed(rig)?;
    for about in [["kataconfig", NAME], ["node", "worker-1"]] {
        let described = rig.must(&["describe", about[0], about[1]], None)?;
        contains("the events", &described, "InstallFailed")?;
        contains("the events", &described, TEXT)?;
    }
    let address = rig.controller()?.address()?;
    let metrics = run::succeed(
        std::process::Command::new("curl").args(["-sS", &format!("http://{address}/metrics")]),
        run::ORDINARY,
    )?
    .text();
    for line in [
        "kata_operator_install_failures_total{reason=\"NoKvm\"}",
        "kata_config_installation_success 0",
        "kata_operator_nodes{state=\"waitingToInstall\"} 1",
    ] {
        contains("the metrics", &metrics, line)?;
    }
    relent(rig, 1)?;
    rig.until_installed(NAME, 2)?;
    let node = rig.json(&["get", "node", "worker-1"])?;
    same(
        "the last error",
        node["metadata"]["annotations"]["sandpod.io/last-error"].as_str(),
        None,
    )
}

fn retry(rig: &mut Rig<'_>) -> Result {
    rig.node("worker-0", &json!({}))?;
    rig.node("worker-1", &json!({}))?;
    let patient = Settings {
        retry_first: "1h",
        ..Settings::default()
    };
    rig.start_controller(&patient)?;
    refuse(rig, 1)?;
    rig.create(NAME, &json!({}))?;
    failed(rig)?;
    relent(rig, 1)?;
    rig.must(&["annotate", "kataconfig", NAME, "sandpod.io/retry=now"], None)?;
    rig.until_installed(NAME, 2)
}

/// Somebody has taken the labels from the namespace by which privileged pods are let in.
fn not_let_in(rig: &mut Rig<'_>) -> Result {
    let level = "pod-security.kubernetes.io/enforce";
    rig.must(
        &[
            "label",
            "namespace",
            NAMESPACE,
            "--overwrite",
            &format!("{level}=restricted"),
        ],
        None,
    )?;
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    let row = rig
        .history
        .until("the refusal's word", SOON, |row| row.condition[1] == "Failed")?;
    contains(
        "the message",
        &row.condition[2],
        "Node worker-0 Degraded: the installer's pod is refused: ",
    )?;
    contains(
        "the message",
        &row.condition[2],
        "violates PodSecurity \"restricted:latest\"",
    )?;
    rig.must(
        &[
            "label",
            "namespace",
            NAMESPACE,
            "--overwrite",
            &format!("{level}=privileged"),
        ],
        None,
    )?;
    rig.until_installed(NAME, 1)
}
