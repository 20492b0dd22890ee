//! One KataConfig at a time.

use std::thread;

use serde_json::json;
use tests::{
    failure::{Failure, Result, contains, same},
    places,
    wait::Bell,
};

use super::{
    Story,
    ground::SOON,
    rig::{NAME, Rig, config},
};

pub const STORIES: &[Story] = &[
    ("the_policy_refuses_a_second_kataconfig", by_policy),
    ("without_the_policy_the_controller_refuses_one_of_two", by_controller),
];

/// The second one that the story tries to make.
const OTHER: &str = "example-kataconfig";

fn by_policy(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.create(NAME, &json!({}))?;
    let refused = Bell::default().until("a refusal by the policy", SOON, || {
        let words = ["create", "--dry-run=server", "-f", "-"];
        let output = rig
            .kubectl(&words, Some(&config(OTHER, &json!({}))))
            .map_err(|error| error.to_string())?;
        if output.code == 0 {
            Err("it was let in".into())
        } else {
            Ok(output.errors())
        }
    })?;
    contains(
        "the refusal",
        &refused,
        "A KataConfig instance already exists, refusing to create a duplicate",
    )?;
    rig.until_installed(NAME, 1)?;
    // What is there may be changed, and once it is gone, there is room.
    rig.respec(NAME, &json!({"logLevel": "debug"}))?;
    rig.delete(NAME)?;
    rig.history.until_gone(NAME, SOON)?;
    Bell::default().until("room for another one", SOON, || {
        let words = ["create", "--dry-run=server", "-f", "-"];
        let output = rig
            .kubectl(&words, Some(&config(OTHER, &json!({}))))
            .map_err(|error| error.to_string())?;
        if output.code == 0 { Ok(()) } else { Err(output.errors()) }
    })?;
    one_of_two_at_once(rig)
}

/// The policy looks at what it knows of, which may be a moment old: where it lets both in, the controller refuses one.
fn one_of_two_at_once(rig: &Rig<'_>) -> Result {
    let names = ["first-of-two", "second-of-two"];
    let outcomes = thread::scope(|scope| {
        let create = |name| rig.kubectl(&["create", "-f", "-"], Some(&config(name, &json!({}))));
        let tries = names.map(|name| scope.spawn(move || create(name)));
        tries.map(|tried| {
            tried
                .join()
                .unwrap_or_else(|_| Err(Failure::Claim("a thread panicked".into())))
        })
    });
    let mut let_in = Vec::new();
    for (name, outcome) in names.into_iter().zip(outcomes) {
        if outcome?.code == 0 {
            let_in.push(name);
        }
    }
    if let_in.len() == names.len() {
        let refused = rig
            .history
            .until("the refusal of one", SOON, |row| row.condition[1] == "Duplicate")?;
        let_in.retain(|name| *name != refused.name);
    }
    same("how many are left", let_in.len(), 1)?;
    rig.until_installed(let_in[0], 1)
}

fn by_controller(rig: &mut Rig<'_>) -> Result {
    let binding = ["validatingadmissionpolicybinding", "kataconfig-singleton"];
    rig.must(&["delete", binding[0], binding[1]], None)?;
    rig.node("worker-0", &json!({}))?;
    // The API server takes note of the policy's end a little later.
    rig.create("before", &json!({}))?;
    Bell::default().until("the policy's end", SOON, || {
        let output = rig
            .kubectl(&["create", "-f", "-"], Some(&config("after", &json!({}))))
            .map_err(|error| error.to_string())?;
        if output.code == 0 { Ok(()) } else { Err(output.errors()) }
    })?;
    for name in ["before", "after"] {
        rig.must(&["delete", "kataconfig", name], None)?;
    }
    rig.start_controller(&super::controller::Settings::default())?;
    let both = format!("{}\n---\n{}", config(NAME, &json!({})), config(OTHER, &json!({})));
    rig.must(&["create", "-f", "-"], Some(&both))?;
    let refused = rig
        .history
        .until("the refusal of one", SOON, |row| row.condition[1] == "Duplicate")?;
    let other = if refused.name == NAME { OTHER } else { NAME };
    let message =
        format!("A KataConfig instance already exists: {other} is in force; delete this one, or that one first");
    same("the message", refused.condition[2].clone(), message)?;
    rig.until_installed(other, 1)?;
    let described = rig.must(&["describe", "kataconfig", &refused.name], None)?;
    contains("the events", &described, "Duplicate")?;
    let loser = rig.json(&["get", "kataconfig", &refused.name])?;
    same(
        "the loser's finalizers",
        loser["metadata"]["finalizers"].clone(),
        json!(null),
    )?;
    rig.delete(&refused.name)?;
    rig.history.until_gone(&refused.name, SOON)?;
    rig.until_installed(other, 1)?;
    let policies = places::workspace().join("deploy/operator/admission.yaml");
    rig.must(&["apply", "-f", &policies.display().to_string()], None)
        .map(drop)
}
