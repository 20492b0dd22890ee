//! What is applied and what is made: the manifests, the schema, the RuntimeClass.

use std::process::Command;

use serde_json::{Value, json};
use tests::{
    failure::{Result, claim, contains, same},
    places,
    run::{self, succeed},
};

use super::{
    Story,
    ground::{SOON, install},
    rig::{NAME, Rig, config},
};

pub const STORIES: &[Story] = &[
    ("one_file_and_the_kustomization_are_the_same", one_file),
    ("the_schema_takes_what_users_paste_and_names_what_it_refuses", schema),
    ("peer_pods_are_refused_by_name", peer_pods),
    ("an_administrators_overhead_stays", overhead),
    ("health_is_told", health),
];

fn one_file(rig: &mut Rig<'_>) -> Result {
    let folder = places::workspace().join("deploy/operator");
    let rendered = succeed(&mut Command::new(folder.join("render.sh")), run::ORDINARY)?;
    same(
        "what render.sh prints",
        rendered.text(),
        install()?.trim_end().to_owned(),
    )?;
    // Both as the API server would have them, which forgives the order of objects and of keys.
    let objects = |words: &[&str], input: Option<&str>| -> Result<Vec<Value>> {
        let words: Vec<&str> = ["create", "--dry-run=client", "-o", "json"]
            .iter()
            .chain(words)
            .copied()
            .collect();
        let text = rig.must(&words, input)?;
        let mut objects: Vec<Value> = serde_json::Deserializer::from_str(&text)
            .into_iter::<Value>()
            .map_while(std::result::Result::ok)
            .collect();
        if let Some(items) = objects.first().and_then(|list| list["items"].as_array().cloned()) {
            objects = items;
        }
        objects.sort_by_key(|object| {
            format!(
                "{} {} {}",
                object["kind"], object["metadata"]["namespace"], object["metadata"]["name"]
            )
        });
        Ok(objects)
    };
    let folder = folder.display().to_string();
    let kustomized = objects(&["-k", &folder], None)?;
    same("the objects", kustomized.len(), 25)?;
    same(
        "the objects of the one file",
        objects(&["-f", "-"], Some(&install()?))?,
        kustomized,
    )
}

fn schema(rig: &mut Rig<'_>) -> Result {
    let head =
        "apiVersion: kataconfiguration.openshift.io/v1\nkind: KataConfig\nmetadata:\n  name: example-kataconfig\n";
    let defaults = json!({"checkNodeEligibility": false, "enablePeerPods": false, "logLevel": "info"});
    for spec in ["", "spec:\n", "spec: {}\n"] {
        let words = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
        let made: Value = serde_json::from_str(&rig.must(&words, Some(&format!("{head}{spec}")))?).unwrap_or_default();
        same(
            &format!("the defaults of {spec:?}"),
            made["spec"].clone(),
            defaults.clone(),
        )?;
    }
    let null = json!({"kataConfigPoolSelector": null});
    rig.must(&["create", "--dry-run=server", "-f", "-"], Some(&config(NAME, &null)))?;
    let expression = |json: Value| json!({"kataConfigPoolSelector": {"matchExpressions": [json]}});
    let values = "values must be non-empty for In and NotIn, and empty for Exists and DoesNotExist";
    let refused = [
        (
            json!({"logLevel": "loud"}),
            "spec.logLevel: Unsupported value: \"loud\": supported values: \"fatal\", \"panic\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"",
        ),
        (
            expression(json!({"key": "a", "operator": "Gt", "values": ["1"]})),
            "Unsupported value: \"Gt\": supported values: \"In\", \"NotIn\", \"Exists\", \"DoesNotExist\"",
        ),
        (expression(json!({"key": "a", "operator": "In"})), values),
        (
            expression(json!({"key": "a", "operator": "NotIn", "values": []})),
            values,
        ),
        (
            expression(json!({"key": "a", "operator": "Exists", "values": ["1"]})),
            values,
        ),
        (
            expression(json!({"key": "a", "operator": "DoesNotExist", "values": ["1"]})),
            values,
        ),
        (
            expression(json!({"operator": "Exists"})),
            "matchExpressions[0].key: Required value",
        ),
        (
            json!({"checkNodeEligibility": "yes"}),
            "spec.checkNodeEligibility: Invalid value: \"string\"",
        ),
        (
            json!({"checkNodeEligibilty": true}),
            "unknown field \"spec.checkNodeEligibilty\"",
        ),
    ];
    for (spec, expected) in refused {
        let output = rig.kubectl(&["create", "--dry-run=server", "-f", "-"], Some(&config(NAME, &spec)))?;
        claim(output.code != 0, format!("{spec} was taken"))?;
        contains("the refusal", &output.errors(), expected)?;
    }
    Ok(())
}

fn peer_pods(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({"enablePeerPods": true}))?;
    let row = rig
        .history
        .until("the refusal", SOON, |row| row.condition[1] == "PeerPodsNotSupported")?;
    contains(
        "the message",
        &row.condition[2],
        "enablePeerPods: true asks for pods in virtual machines of a cloud",
    )?;
    rig.nothing_left(0, "worker-0")?;
    rig.respec(NAME, &json!({"enablePeerPods": false}))?;
    rig.until_installed(NAME, 1)
}

fn overhead(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let class = rig.json(&["get", "runtimeclass", "kata"])?;
    same(
        "the overhead",
        class["overhead"].clone(),
        json!({"podFixed": {"cpu": "500m", "memory": "500Mi"}}),
    )?;
    let selector = json!({"node-role.kubernetes.io/kata-oc": "", "katacontainers.io/kata-runtime": "true"});
    same(
        "the nodes",
        class["scheduling"]["nodeSelector"].clone(),
        selector.clone(),
    )?;
    let mine = json!({"overhead": {"podFixed": {"memory": "750Mi", "cpu": "250m"}}});
    rig.must(
        &[
            "patch",
            "runtimeclass",
            "kata",
            "--type",
            "merge",
            "--patch",
            &mine.to_string(),
        ],
        None,
    )?;
    // Whatever makes the controller look again: another node, another log level, a restart of itself.
    rig.node("worker-1", &json!({}))?;
    rig.until_installed(NAME, 2)?;
    rig.controller()?.kill()?;
    rig.start_controller(&super::controller::Settings::default())?;
    rig.respec(NAME, &json!({"logLevel": "debug"}))?;
    let at_debug = |node: &Value| node["metadata"]["annotations"]["sandpod.io/log-level"] == "debug";
    rig.until_json(&["get", "node", "worker-0"], "the log level on a node", at_debug)?;
    rig.until_installed(NAME, 2)?;
    let class = rig.json(&["get", "runtimeclass", "kata"])?;
    same(
        "the administrator's overhead",
        class["overhead"].clone(),
        mine["overhead"].clone(),
    )?;
    same("making a pod", rig.kata_pod("hello", "worker-0")?.code, 0)?;
    let pod = rig.json(&["get", "pod", "hello"])?;
    same(
        "the pod's overhead",
        pod["spec"]["overhead"].clone(),
        json!({"memory": "750Mi", "cpu": "250m"}),
    )?;
    same("the pod's nodes", pod["spec"]["nodeSelector"].clone(), selector)
}

fn health(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let address = rig.controller()?.address()?;
    let get = |path: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail", &format!("http://{address}{path}")]);
        succeed(&mut curl, run::ORDINARY).map(|output| output.text())
    };
    same("/healthz", get("/healthz")?.as_str(), "ok")?;
    same("/readyz", get("/readyz")?.as_str(), "ok")?;
    let metrics = get("/metrics")?;
    for line in [
        "kata_config_installation_success 1",
        "kata_operator_leader 1",
        "kata_operator_nodes{state=\"installed\"} 1",
        "kata_operator_node_install_seconds_count 1",
        "kata_operator_reconcile_errors_total 0",
        "kata_operator_build_info{version=\"0.1.0-1a2b3c4d\"} 1",
    ] {
        contains("the metrics", &metrics, line)?;
    }
    Ok(())
}
