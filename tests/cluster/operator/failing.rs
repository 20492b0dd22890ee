//! Nodes on which the installer fails.

use std::fs;

use serde_json::{Value, json};
use tests::{
    failure::{Result, Trying, contains, same},
    wait::Bell,
};

use super::{
    Story,
    controller::Settings,
    ground::{NAMESPACE, SOON},
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("a_node_that_is_not_fit_says_why_stops_nobody_and_recovers", recovers),
    (
        "a_failing_node_stops_the_others_and_a_retry_annotation_tries_at_once",
        retry,
    ),
    ("an_installer_pod_that_is_not_let_in_is_told_of", not_let_in),
    (
        "a_look_that_is_not_let_in_takes_nothing_from_the_node",
        not_let_in_later,
    ),
    ("connections_that_fall_silent_are_given_up", silence),
    ("a_label_that_is_not_let_in_is_told_of", denied),
    ("a_quota_of_critical_pods_is_in_nobodys_way", quota),
    (
        "a_kataconfig_that_another_operator_has_stored_is_told_what_is_wrong",
        stored_before,
    ),
];

const TEXT: &str = "/dev/kvm is absent; enable virtualization in the firmware";

/// What a node's installer is to find.
#[derive(Clone, Copy)]
enum Problem {
    /// Before it changes anything.
    Refuse,
    /// Afterwards.
    Fail,
}

impl Problem {
    fn file(self, rig: &Rig<'_>, index: usize) -> Result<std::path::PathBuf> {
        let name = match self {
            Problem::Refuse => "refuse",
            Problem::Fail => "fail",
        };
        Ok(rig.kubelet(index)?.folder().join(name))
    }

    fn begins(self, rig: &Rig<'_>, index: usize) -> Result {
        fs::write(self.file(rig, index)?, TEXT).trying("telling a node what to find")
    }

    fn ends(self, rig: &Rig<'_>, index: usize) -> Result {
        fs::remove_file(self.file(rig, index)?).trying("telling a node that all is well")
    }
}

/// A node that is not fit stops nobody; one on which an installation went wrong stops the others.
fn failed(rig: &Rig<'_>, problem: Problem) -> Result {
    let condition = ["True", "Failed", &format!("Node worker-1 Degraded: {TEXT}")].map(String::from);
    let nodes = match problem {
        Problem::Refuse => {
            json!({"failedToInstall": ["worker-1"], "installed": ["worker-0"], "nodeCount": 2, "readyNodeCount": 1})
        }
        Problem::Fail => {
            json!({"failedToInstall": ["worker-1"], "waitingToInstall": ["worker-0"], "nodeCount": 2, "readyNodeCount": 0})
        }
    };
    let claim = |row: &super::history::Row| row.condition == condition && row.nodes == nodes;
    rig.history
        .until_last(NAME, "the failure's word", SOON, claim)
        .map(drop)
}

fn recovers(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    Problem::Refuse.begins(rig, 1)?;
    rig.create(NAME, &json!({}))?;
    failed(rig, Problem::Refuse)?;
    // Pods can have kata where it is.
    rig.must(&["get", "runtimeclass", "kata"], None)?;
    rig.must(
        &[
            "wait",
            "kataconfig",
            NAME,
            "--for",
            "condition=Available",
            "--timeout",
            "1m",
        ],
        None,
    )?;
    for about in [["kataconfig", NAME], ["node", "worker-1"]] {
        let described = rig.must(&["describe", about[0], about[1]], None)?;
        contains("the events", &described, "InstallFailed")?;
        contains("the events", &described, TEXT)?;
    }
    let metrics = rig.controller()?.metrics()?;
    for line in [
        "kata_operator_install_failures_total{reason=\"NoKvm\"}",
        "kata_config_installation_success 0",
        "kata_operator_nodes{state=\"installed\"} 1",
    ] {
        contains("the metrics", &metrics, line)?;
    }
    Problem::Refuse.ends(rig, 1)?;
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
    Problem::Fail.begins(rig, 1)?;
    rig.create(NAME, &json!({}))?;
    failed(rig, Problem::Fail)?;
    Problem::Fail.ends(rig, 1)?;
    rig.must(&["annotate", "kataconfig", NAME, "sandpod.io/retry=now"], None)?;
    rig.until_installed(NAME, 2)
}

/// The level of pod security in the operator's namespace.
fn admits(rig: &Rig<'_>, level: &str) -> Result {
    let label = format!("pod-security.kubernetes.io/enforce={level}");
    rig.must(&["label", "namespace", NAMESPACE, "--overwrite", &label], None)
        .map(drop)
}

/// How many events the node has of refused pods.
fn refusals(rig: &Rig<'_>) -> Result<usize> {
    let described = rig.must(&["describe", "node", "worker-0"], None)?;
    Ok(described.matches("InstallerPodRefused").count())
}

/// A look at a node that is not let in takes nothing from the node, and is told of once.
fn not_let_in_later(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let before = rig.history.rows().len();
    admits(rig, "restricted")?;
    rig.node_status("worker-0", &json!({"nodeInfo": {"bootID": "second"}}))?;
    Bell::default().until("the refusal's event", SOON, || match refusals(rig) {
        Ok(0) => Err("there is none".to_owned()),
        Ok(_) => Ok(()),
        Err(failure) => Err(failure.to_string()),
    })?;
    // It was tried again at least once since.
    rig.controller()?.until_said_times("is refused", 3, SOON)?;
    same("the events of the refusal", refusals(rig)?, 1)?;
    same("statuses since then", rig.history.rows().len(), before)?;
    let node = rig.json(&["get", "node", "worker-0"])?;
    same(
        "the label that pods go by",
        node["metadata"]["labels"]["katacontainers.io/kata-runtime"].as_str(),
        Some("true"),
    )?;
    admits(rig, "privileged")?;
    let looked = |node: &Value| node["metadata"]["annotations"]["sandpod.io/boot-id"] == "second";
    rig.until_json(&["get", "node", "worker-0"], "a look after the boot", looked)
        .map(drop)
}

/// Somebody has taken the labels from the namespace by which privileged pods are let in.
fn not_let_in(rig: &mut Rig<'_>) -> Result {
    admits(rig, "restricted")?;
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
    admits(rig, "privileged")?;
    rig.until_installed(NAME, 1)
}

/// No end of a connection is ever told, and nothing comes by it any more.
fn silence(rig: &mut Rig<'_>) -> Result {
    rig.node("worker-0", &json!({}))?;
    let door = rig.ground.server.another_door()?;
    let path = rig.ground.kubeconfig_by(&door)?;
    let impatient = Settings {
        api_timeout: "2s",
        ..Settings::default()
    };
    rig.start_controller_by(&path, &impatient)?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    door.fall_silent();
    rig.node("worker-1", &json!({}))?;
    rig.until_installed(NAME, 2)
}

/// Somebody's policy that keeps our label from nodes.
fn policy() -> String {
    let metadata = json!({"name": "no-kata-label"});
    let rule = json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["nodes"]});
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": metadata,
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{
                "expression": "!('katacontainers.io/kata-runtime' in object.metadata.labels)",
                "message": "no kata in this company",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": metadata, "spec": {"policyName": "no-kata-label", "validationActions": ["Deny"]},
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]}).to_string()
}

fn denied(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.must(&["apply", "-f", "-"], Some(&policy()))?;
    let label = [
        "label",
        "node",
        "worker-0",
        "--dry-run=server",
        "katacontainers.io/kata-runtime=true",
    ];
    Bell::default().until("the policy's force", SOON, || match rig.kubectl(&label, None) {
        Ok(output) if output.errors().contains("no kata in this company") => Ok(()),
        Ok(output) => Err(output.errors()),
        Err(failure) => Err(failure.to_string()),
    })?;
    rig.create(NAME, &json!({}))?;
    let told = Bell::default().until("the refusal's event", SOON, || {
        let described = rig
            .must(&["describe", "kataconfig", NAME], None)
            .map_err(|failure| failure.to_string())?;
        described
            .contains("ActionRefused")
            .then(|| described.clone())
            .ok_or(described)
    })?;
    contains("the event", &told, "marking worker-0")?;
    contains("the event", &told, "no kata in this company")?;
    rig.must(&["delete", "-f", "-"], Some(&policy()))?;
    rig.until_installed(NAME, 1)?;
    let described = rig.must(&["describe", "kataconfig", NAME], None)?;
    same(
        "the events of the refusal",
        described.matches("ActionRefused").count(),
        1,
    )
}

/// As clouds have one in every namespace but kube-system.
fn quota(rig: &mut Rig<'_>) -> Result {
    let classes = json!({"scopeName": "PriorityClass", "operator": "In", "values": ["system-node-critical", "system-cluster-critical"]});
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "critical-pods", "namespace": NAMESPACE},
        "spec": {"hard": {"pods": "0"}, "scopeSelector": {"matchExpressions": [classes]}},
    });
    rig.must(&["apply", "-f", "-"], Some(&quota.to_string()))?;
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    let installed = rig.until_installed(NAME, 1);
    rig.must(&["delete", "-f", "-"], Some(&quota.to_string()))?;
    installed
}

/// Another operator's definition takes any word for a log level, and what is stored outlives the definition.
fn stored_before(rig: &mut Rig<'_>) -> Result {
    const DEFINITION: &str = "crd/kataconfigs.kataconfiguration.openshift.io";
    let level = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/logLevel/enum";
    let theirs = json!([{"op": "remove", "path": level}]).to_string();
    rig.must(&["patch", DEFINITION, "--type", "json", "--patch", &theirs], None)?;
    let config = super::rig::config(NAME, &json!({"logLevel": "Info"}));
    Bell::default().until("a stored KataConfig", SOON, || {
        match rig.kubectl(&["create", "-f", "-"], Some(&config)) {
            Ok(output) if output.code == 0 => Ok(()),
            Ok(output) => Err(output.errors()),
            Err(failure) => Err(failure.to_string()),
        }
    })?;
    rig.must(&["apply", "-f", "-"], Some(&super::ground::install()?))?;
    rig.start(&["worker-0"])?;
    let wrong = |config: &Value| config["status"]["conditions"][0]["reason"] == "InvalidSpec";
    let told = rig.until_json(&["get", "kataconfig", NAME], "what is wrong", wrong)?;
    let message = &told["status"]["conditions"][0]["message"];
    contains("the message", message.as_str().unwrap_or_default(), "Info")?;
    rig.respec(NAME, &json!({"logLevel": "info"}))?;
    rig.until_installed(NAME, 1)
}
