//! What the controller may do, and that it may do nothing else.

use serde_json::json;
use tests::failure::{Result, claim, contains, same};

use super::{
    Story,
    ground::NAMESPACE,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("the_controllers_rights_are_these", listed),
    ("what_is_not_listed_is_denied", denied),
];

/// What every service account may do: look at itself and at what the API server offers.
const EVERYBODYS: &[&str] = &[
    "selfsubjectreviews.authentication.k8s.io [] [] [create]",
    "selfsubjectaccessreviews.authorization.k8s.io [] [] [create]",
    "selfsubjectrulesreviews.authorization.k8s.io [] [] [create]",
];

const CLUSTER: &[&str] = &[
    "kataconfigs.kataconfiguration.openshift.io [] [] [list watch patch]",
    "kataconfigs.kataconfiguration.openshift.io/finalizers [] [] [update]",
    "kataconfigs.kataconfiguration.openshift.io/status [] [] [patch]",
    "nodes [] [] [list watch patch]",
    "pods [] [] [list watch]",
    "runtimeclasses.node.k8s.io [] [] [list watch create patch delete]",
];

const OWN: &[&str] = &[
    "configmaps [] [osc-feature-gates] [list watch]",
    "leases.coordination.k8s.io [] [] [create]",
    "leases.coordination.k8s.io [] [sandpod-operator] [get update]",
    "pods [] [] [list watch create delete]",
];

const DEFAULT: &[&str] = &["events.events.k8s.io [] [] [create]"];

/// What the API server says that the controller may do in a namespace, one kind of thing a line. What everybody may
/// read by address (`/healthz` and the like) is left out.
fn rights(rig: &Rig<'_>, namespace: &str) -> Result<Vec<String>> {
    let output = rig.as_controller(
        &["auth", "can-i", "--list", "--no-headers", "--namespace", namespace],
        None,
    )?;
    let text = output.text();
    let lines = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    Ok(in_order(lines.filter(|line| !line.starts_with('['))))
}

/// Sorted, and the verbs of each line, too: their order means nothing.
fn in_order(lines: impl Iterator<Item = String>) -> Vec<String> {
    let verbs_in_order = |line: String| match line.trim_end_matches(']').rsplit_once('[') {
        Some((what, verbs)) => {
            let mut verbs: Vec<&str> = verbs.split(' ').collect();
            verbs.sort_unstable();
            format!("{what}[{}]", verbs.join(" "))
        }
        None => line,
    };
    let mut lines: Vec<String> = lines.map(verbs_in_order).collect();
    lines.sort();
    lines
}

fn expected(parts: &[&[&str]]) -> Vec<String> {
    in_order(parts.iter().copied().flatten().map(|line| (*line).to_owned()))
}

fn listed(rig: &mut Rig<'_>) -> Result {
    same(
        "in an ordinary namespace",
        rights(rig, "kube-system")?,
        expected(&[EVERYBODYS, CLUSTER]),
    )?;
    same(
        "where events are kept",
        rights(rig, "default")?,
        expected(&[EVERYBODYS, CLUSTER, DEFAULT]),
    )?;
    let cluster: Vec<&str> = CLUSTER
        .iter()
        .copied()
        .filter(|line| !line.starts_with("pods "))
        .collect();
    same(
        "in its own namespace",
        rights(rig, NAMESPACE)?,
        expected(&[EVERYBODYS, &cluster, OWN]),
    )
}

/// Commands that would be of use to somebody who has the controller's token.
const FORBIDDEN: &[&str] = &[
    "get secrets --all-namespaces",
    "get secrets --namespace openshift-sandboxed-containers-operator",
    "get configmaps --namespace openshift-sandboxed-containers-operator",
    "get --raw /api/v1/namespaces/openshift-sandboxed-containers-operator/pods/p/log",
    "delete node worker-0",
    "patch node worker-0 --subresource status --type merge --patch {\"status\":{}}",
    "delete kataconfig cluster-kataconfig",
    "create namespace mine",
    "delete runtimeclass other",
    "patch runtimeclass other --type merge --patch {\"overhead\":null}",
    "create token sandpod-operator --namespace openshift-sandboxed-containers-operator",
    "get clusterroles",
    "get validatingadmissionpolicies",
    "get nodes --as admin",
];

fn denied(rig: &mut Rig<'_>) -> Result {
    rig.node("worker-0", &json!({}))?;
    rig.create(NAME, &json!({}))?;
    let other = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "other"}, "handler": "runc"});
    rig.must(&["create", "-f", "-"], Some(&other.to_string()))?;
    for line in FORBIDDEN {
        let words: Vec<&str> = line.split(' ').collect();
        refused(rig, &words, None)?;
    }
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "other", "namespace": "kube-system"}});
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e", "namespace": "kube-system"}});
    for object in [pod, lease, event] {
        refused(rig, &["create", "-f", "-"], Some(&object.to_string()))?;
    }
    let exec = format!("/api/v1/namespaces/{NAMESPACE}/pods/p/exec?command=true");
    refused(rig, &["create", "--raw", &exec, "-f", "-"], Some("{}"))
}

fn refused(rig: &Rig<'_>, words: &[&str], input: Option<&str>) -> Result {
    let output = rig.as_controller(words, input)?;
    claim(output.code != 0, format!("the controller may {}", words.join(" ")))?;
    contains(&words.join(" "), &output.errors(), "orbidden")
}
