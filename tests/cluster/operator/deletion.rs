//! The way out.

use serde_json::json;
use tests::{
    failure::{Result, claim, contains, same},
    wait::Bell,
};

use super::{
    Story,
    controller::Settings,
    ground::SOON,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("deletion_is_blocked_by_a_pod_and_released_at_once", blocked),
    ("pods_of_another_class_with_the_handler_count", another_class),
    ("deletion_in_the_middle_of_an_installation", in_the_middle),
    ("a_dead_node_is_skipped_by_name", skipped),
    ("no_pod_slips_in_while_kata_is_removed", slips_in),
];

const BLOCKED: &str = "Existing pods using \"kata\" RuntimeClass found. Please delete the pods manually for KataConfig deletion to proceed";

fn until_blocked(rig: &Rig<'_>) -> Result {
    let condition = ["False", "BlockedByExistingKataPods", BLOCKED].map(String::from);
    rig.history
        .until_last(NAME, "the pods' word", SOON, |row| row.condition == condition)
        .map(drop)
}

fn blocked(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 2)?;
    same("making a pod", rig.kata_pod("hello", "worker-0")?.code, 0)?;
    rig.delete(NAME)?;
    until_blocked(rig)?;
    let described = rig.must(&["describe", "kataconfig", NAME], None)?;
    contains("the events", &described, "BlockedByExistingKataPods")?;
    rig.must(&["get", "runtimeclass", "kata"], None)?;
    claim(
        rig.kubelet(0)?.folder().join("kata").exists(),
        "kata was taken from under a pod",
    )?;
    rig.must(&["delete", "pod", "hello", "--force", "--grace-period=0"], None)?;
    // By the watch: a look without an event comes later than this waits.
    rig.history.until_gone(NAME, SOON)?;
    rig.nothing_left(0, "worker-0")?;
    rig.nothing_left(1, "worker-1")
}

/// An administrator's own RuntimeClass for kata, say with another overhead.
fn another_class(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "kata-small"}, "handler": "kata"});
    rig.must(&["create", "-f", "-"], Some(&class.to_string()))?;
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "small", "namespace": "default"},
        "spec": {"runtimeClassName": "kata-small", "nodeName": "worker-0", "containers": [{"name": "hello", "image": "hello"}]}});
    // A class is known to the API server's admission a moment after it was made.
    Bell::default().until("a pod of the class", SOON, || {
        let output = rig.kubectl(&["create", "-f", "-"], Some(&pod.to_string()));
        let output = output.map_err(|failure| failure.to_string())?;
        if output.code == 0 { Ok(()) } else { Err(output.errors()) }
    })?;
    rig.delete(NAME)?;
    until_blocked(rig)?;
    let described = rig.must(&["describe", "kataconfig", NAME], None)?;
    contains("the events", &described, "to proceed: default/small")?;
    rig.must(&["delete", "pod", "small", "--force", "--grace-period=0"], None)?;
    rig.history.until_gone(NAME, SOON)?;
    rig.must(&["delete", "runtimeclass", "kata-small"], None)?;
    rig.nothing_left(0, "worker-0")
}

fn in_the_middle(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    let gate = rig.kubelet(1)?.folder().join("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU)
        .map_err(|error| tests::failure::Failure::Claim(error.to_string()))?;
    rig.create(NAME, &json!({}))?;
    rig.history.until("an installation", SOON, |row| {
        row.nodes["installing"] == json!(["worker-1"])
    })?;
    rig.delete(NAME)?;
    let nodes = json!({"installing": ["worker-1"], "nodeCount": 0, "readyNodeCount": 0});
    let waits = |row: &super::history::Row| row.condition[1] == "Uninstalling" && row.nodes == nodes;
    rig.history
        .until_last(NAME, "a deletion that lets the installer finish", SOON, waits)?;
    std::fs::write(&gate, "go\n").map_err(|error| tests::failure::Failure::Claim(error.to_string()))?;
    std::fs::remove_file(&gate).map_err(|error| tests::failure::Failure::Claim(error.to_string()))?;
    rig.history.until_gone(NAME, SOON)?;
    rig.nothing_left(0, "worker-0")?;
    rig.nothing_left(1, "worker-1")
}

fn skipped(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 2)?;
    rig.ready("worker-1", false)?;
    rig.delete(NAME)?;
    let waiting = json!({"waitingToUninstall": ["worker-1"], "nodeCount": 0, "readyNodeCount": 0});
    rig.history
        .until_last(NAME, "a wait for the dead node", SOON, |row| row.nodes == waiting)?;
    rig.must(
        &["annotate", "kataconfig", NAME, "sandpod.io/skip-nodes=worker-1"],
        None,
    )?;
    rig.history.until_gone(NAME, SOON)?;
    rig.nothing_left(0, "worker-0")?;
    claim(
        rig.kubelet(1)?.folder().join("kata").exists(),
        "the dead node was touched",
    )
}

/// The RuntimeClass goes first, and while it is there the policy refuses pods.
fn slips_in(rig: &mut Rig<'_>) -> Result {
    rig.node("worker-0", &json!({}))?;
    rig.start_controller(&Settings::default())?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    same("making a pod", rig.kata_pod("first", "worker-0")?.code, 0)?;
    rig.delete(NAME)?;
    until_blocked(rig)?;
    let refused = Bell::default().until("a refusal by the policy", SOON, || {
        let output = rig.kata_pod("second", "worker-0").map_err(|error| error.to_string())?;
        if output.code == 0 {
            rig.must(&["delete", "pod", "second", "--force", "--grace-period=0"], None)
                .map_err(|error| error.to_string())?;
            return Err("the pod was let in".into());
        }
        Ok(output.errors())
    })?;
    contains("the refusal", &refused, "kata is being removed from the cluster")?;
    rig.must(&["delete", "pod", "first", "--force", "--grace-period=0"], None)?;
    rig.history.until_gone(NAME, SOON)?;
    let refused = rig.kata_pod("third", "worker-0")?;
    contains(
        "the refusal afterwards",
        &refused.errors(),
        "RuntimeClass \"kata\" not found",
    )
}
