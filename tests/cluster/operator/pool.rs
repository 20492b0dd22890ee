//! Which nodes get kata, and how that changes.

use serde_json::{Value, json};
use tests::failure::{Result, contains, same};

use super::{
    Story,
    controller::Settings,
    ground::SOON,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("each_operator_of_the_selector_selects_what_it_says", each_operator),
    ("the_labels_of_the_guides_sample_select", match_labels),
    ("eligibility_on_and_off", eligibility),
    ("a_selector_that_makes_no_sense_is_named", nonsense),
    ("nodes_come_and_go_and_the_status_says_updating", nodes_come_and_go),
    ("a_new_version_and_a_log_level_reach_every_node", upgrade),
    ("a_rebooted_node_is_verified_and_a_damaged_one_repaired", reboot),
];

fn each_operator(rig: &mut Rig<'_>) -> Result {
    rig.node("with-true", &json!({"kata": "true"}))?;
    rig.node("with-false", &json!({"kata": "false"}))?;
    rig.node("without", &json!({}))?;
    rig.start_controller(&Settings::default())?;
    let cases = [
        (
            json!({"key": "kata", "operator": "In", "values": ["true"]}),
            json!(["with-true"]),
        ),
        (
            json!({"key": "kata", "operator": "NotIn", "values": ["true"]}),
            json!(["with-false", "without"]),
        ),
        (
            json!({"key": "kata", "operator": "Exists"}),
            json!(["with-false", "with-true"]),
        ),
        (json!({"key": "kata", "operator": "DoesNotExist"}), json!(["without"])),
    ];
    let spec = |expression: &Value| json!({"kataConfigPoolSelector": {"matchExpressions": [expression]}});
    rig.create(NAME, &spec(&cases[0].0))?;
    for (expression, installed) in &cases {
        rig.respec(NAME, &spec(expression))?;
        let what = format!("kata on {installed} and nowhere else");
        let claim =
            |row: &super::history::Row| row.condition == ["False", "", ""] && row.nodes["installed"] == *installed;
        rig.history.until_last(NAME, &what, SOON, claim)?;
        let members = rig.json(&[
            "get",
            "nodes",
            "--selector",
            "node-role.kubernetes.io/kata-oc=,katacontainers.io/kata-runtime=true",
        ])?;
        let names: Vec<Value> = members["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|node| node["metadata"]["name"].clone())
            .collect();
        same("the nodes with both labels", json!(names), installed.clone())?;
    }
    rig.respec(NAME, &json!({"kataConfigPoolSelector": null}))?;
    rig.until_installed(NAME, 3)
}

fn match_labels(rig: &mut Rig<'_>) -> Result {
    rig.node("chosen", &json!({"zone": "a"}))?;
    rig.node("other", &json!({"zone": "b"}))?;
    rig.start_controller(&Settings::default())?;
    rig.create(NAME, &json!({"checkNodeEligibility": false, "logLevel": "info", "kataConfigPoolSelector": {"matchLabels": {"zone": "a"}}}))?;
    rig.until_installed(NAME, 1)?;
    rig.nothing_left(1, "other")
}

fn eligibility(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    rig.create(NAME, &json!({"checkNodeEligibility": true}))?;
    let row = rig
        .history
        .until("nobody eligible", SOON, |row| row.condition[1] == "NoEligibleNodes")?;
    same("whether it is in progress", row.condition[0].as_str(), "False")?;
    let message = "No node can have kata: 2 workers, 2 matched by kataConfigPoolSelector, 0 of them with the label feature.node.kubernetes.io/runtime.kata=true";
    same("the message", row.condition[2].as_str(), message)?;
    rig.must(
        &[
            "label",
            "node",
            "worker-1",
            "feature.node.kubernetes.io/runtime.kata=true",
        ],
        None,
    )?;
    rig.until_installed(NAME, 1)?;
    let described = rig.must(&["describe", "kataconfig", NAME], None)?;
    contains("the events", &described, "NoEligibleNodes")?;
    rig.respec(NAME, &json!({"checkNodeEligibility": false}))?;
    rig.until_installed(NAME, 2)?;
    // Node Feature Discovery takes its labels away for a while when it is upgraded: what is there stays.
    rig.respec(NAME, &json!({"checkNodeEligibility": true}))?;
    rig.must(
        &["label", "node", "worker-1", "feature.node.kubernetes.io/runtime.kata-"],
        None,
    )?;
    let seen = |config: &Value| {
        let generation = &config["metadata"]["generation"];
        let mut conditions = config["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|condition| condition["type"] == "Progressing" && condition["observedGeneration"] == *generation)
    };
    rig.until_json(&["get", "kataconfig", NAME], "a status about this spec", seen)?;
    rig.until_installed(NAME, 2)
}

/// What the schema lets through, the controller refuses.
fn nonsense(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    let expression = json!({"key": "not a key", "operator": "Exists"});
    rig.create(
        NAME,
        &json!({"kataConfigPoolSelector": {"matchExpressions": [expression]}}),
    )?;
    let refused = [
        "False",
        "InvalidSelector",
        "kataConfigPoolSelector: \"not a key\" is not a label's key",
    ]
    .map(String::from);
    rig.history
        .until("the refusal's word", SOON, |row| row.condition == refused)?;
    rig.nothing_left(0, "worker-0")?;
    rig.respec(NAME, &json!({"kataConfigPoolSelector": null}))?;
    rig.until_installed(NAME, 1)
}

fn nodes_come_and_go(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    rig.node("worker-1", &json!({}))?;
    let updating = ["True", "Updating", "Adding and/or removing kata-enabled nodes"].map(String::from);
    rig.history
        .until("the word of a change", SOON, |row| row.condition == updating)?;
    rig.until_installed(NAME, 2)?;
    rig.must(&["delete", "node", "worker-0"], None)?;
    rig.until_installed(NAME, 1)?;
    // One that is not Ready and one that is cordoned wait, and nobody waits for them.
    rig.node_that_is_not_ready("asleep")?;
    rig.must(&["cordon", "worker-1"], None)?;
    rig.node("worker-2", &json!({}))?;
    let waiting = json!({"installed": ["worker-1", "worker-2"], "waitingToInstall": ["asleep"], "nodeCount": 3, "readyNodeCount": 2});
    rig.history
        .until_last(NAME, "a node that waits alone", SOON, |row| row.nodes == waiting)?;
    rig.ready("asleep", true)?;
    rig.until_installed(NAME, 3)
}

fn upgrade(rig: &mut Rig<'_>) -> Result {
    let nodes = ["worker-0", "worker-1"];
    rig.start(&nodes)?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 2)?;
    rig.controller()?.stop()?;
    let next = "0.2.0-9f8e7d6c";
    for index in 0..nodes.len() {
        let version = rig.kubelet(index)?.folder().join("version");
        std::fs::write(version, next).map_err(|error| tests::failure::Failure::Claim(error.to_string()))?;
    }
    let settings = Settings {
        version: next.into(),
        ..Settings::default()
    };
    rig.start_controller(&settings)?;
    let turns = [
        (
            "Updating",
            json!({"nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": nodes}),
        ),
        (
            "Updating",
            json!({"installing": ["worker-1"], "nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0"]}),
        ),
        (
            "Updating",
            json!({"installed": ["worker-1"], "installing": ["worker-0"], "nodeCount": 2, "readyNodeCount": 1}),
        ),
        ("", json!({"installed": nodes, "nodeCount": 2, "readyNodeCount": 2})),
    ];
    rig.history.until_in_order(&turns, SOON)?;
    let node = rig.json(&["get", "node", "worker-0"])?;
    same(
        "the version on a node",
        node["metadata"]["annotations"]["sandpod.io/installed-version"].as_str(),
        Some(next),
    )?;
    rig.respec(NAME, &json!({"logLevel": "debug"}))?;
    let at = |level: &'static str| move |node: &Value| node["metadata"]["annotations"]["sandpod.io/log-level"] == level;
    for name in nodes {
        rig.until_json(&["get", "node", name], "the log level on a node", at("debug"))?;
    }
    rig.until_installed(NAME, 2)
}

fn reboot(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let before = rig.history.rows().len();
    rig.node_status("worker-0", &json!({"nodeInfo": {"bootID": "second"}}))?;
    let in_boot =
        |boot: &'static str| move |node: &Value| node["metadata"]["annotations"]["sandpod.io/boot-id"] == boot;
    rig.until_json(&["get", "node", "worker-0"], "a look after the boot", in_boot("second"))?;
    same("statuses since then", rig.history.rows().len(), before)?;
    let kata = rig.kubelet(0)?.folder().join("kata");
    std::fs::remove_file(kata).map_err(|error| tests::failure::Failure::Claim(error.to_string()))?;
    rig.node_status("worker-0", &json!({"nodeInfo": {"bootID": "third"}}))?;
    rig.history
        .until("the word of a repair", SOON, |row| row.condition[1] == "Updating")?;
    rig.until_installed(NAME, 1)?;
    let described = rig.must(&["describe", "node", "worker-0"], None)?;
    contains(
        "the node's events",
        &described,
        "Node worker-0 is installed anew: kata is gone",
    )
}
