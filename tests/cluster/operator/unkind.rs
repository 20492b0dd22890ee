//! An API server that has no time for the operator.

use std::{
    process::{Child, Stdio},
    time::Instant,
};

use serde_json::{Value, json};
use tests::{
    failure::{Result, Trying, claim, same},
    wait::Bell,
};

use super::{
    Story,
    ground::SOON,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[(
    "an_api_server_with_too_many_requests_is_left_alone_between_two_tries",
    too_many_requests,
)];

/// What the API server counts as failed with this code.
const REFUSED: &str = "kata_operator_api_failures_total{code=\"429\"}";

/// The API server's own way to refuse: a level of priority for what service accounts write on nodes, at which one
/// request at a time is served and none waits.
fn narrow() -> Value {
    let metadata = json!({"name": "narrow"});
    let level = json!({
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "PriorityLevelConfiguration", "metadata": metadata,
        "spec": {"type": "Limited", "limited": {
            "nominalConcurrencyShares": 0, "lendablePercent": 0, "borrowingLimitPercent": 0,
            "limitResponse": {"type": "Reject"},
        }},
    });
    let schema = json!({
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema", "metadata": metadata,
        "spec": {
            "matchingPrecedence": 10,
            "priorityLevelConfiguration": metadata,
            "rules": [{
                "subjects": [{"kind": "Group", "group": {"name": "system:serviceaccounts"}}],
                "resourceRules": [{
                    "verbs": ["patch", "update"], "apiGroups": [""], "resources": ["nodes"], "clusterScope": true,
                }],
            }],
        },
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [level, schema]})
}

fn too_many_requests(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.controller()?.until_said("leading", SOON)?;
    let narrow = narrow().to_string();
    rig.must(&["create", "-f", "-"], Some(&narrow))?;
    let refused = slow_request(rig).and_then(|mut slow| {
        let refused = refused_for_a_while(rig);
        slow.kill().trying("ending kubectl")?;
        slow.wait().trying("waiting for kubectl")?;
        refused
    });
    rig.must(&["delete", "-f", "-"], Some(&narrow))?;
    refused?;
    rig.until_installed(NAME, 1)
}

/// A request that is being served until it is ended: its body does not come.
fn slow_request(rig: &Rig<'_>) -> Result<Child> {
    let mut command = rig.ground.server.kubectl_command([
        "--as",
        "system:serviceaccount:kube-system:node-controller",
        "replace",
        "--raw",
        "/api/v1/nodes/worker-0",
        "-f",
        "-",
    ])?;
    let command = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().trying("starting kubectl")
}

/// Each try ends a pass, and the server's own wish, a second or more, lies between two.
fn refused_for_a_while(rig: &mut Rig<'_>) -> Result {
    Bell::default().until("the slow request", SOON, || {
        let levels = rig.kubectl(
            &["get", "--raw", "/debug/api_priority_and_fairness/dump_priority_levels"],
            None,
        );
        let levels = levels.map_err(|failure| failure.to_string())?.text();
        let line = levels
            .lines()
            .find(|line| line.starts_with("narrow,"))
            .ok_or("no such level")?;
        // PriorityLevelName, ActiveQueues, IsIdle, IsQuiescing, WaitingRequests, ExecutingRequests
        match line.split(',').nth(5).map(str::trim) {
            Some("1") => Ok(()),
            _ => Err(line.to_owned()),
        }
    })?;
    let began = Instant::now();
    rig.create(NAME, &json!({}))?;
    let controller = rig.controller()?;
    let count = || controller.metric(REFUSED).map_err(|failure| failure.to_string());
    let refused = Bell::default().until("refusals", SOON, || match count()? {
        refused if refused >= 3.0 => Ok(refused),
        refused => Err(format!("{refused}")),
    })?;
    let took = began.elapsed().as_secs_f64();
    claim(refused <= took + 1.0, format!("{refused} refusals in {took} s"))?;
    let failed = controller.metric("kata_operator_reconcile_errors_total")?;
    // The pass with the last of them may be about to end.
    claim(
        failed >= refused - 1.0,
        format!("{failed} passes have failed, and {refused} requests"),
    )?;
    let node = rig.json(&["get", "node", "worker-0"])?;
    let label = &node["metadata"]["labels"]["katacontainers.io/kata-runtime"];
    same("the label that pods go by", label, &Value::Null)
}
