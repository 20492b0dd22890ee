//! The guide's tables 2.1 and 2.2.

use serde_json::{Value, json};
use tests::{
    failure::{Result, contains, same},
    run,
};

use super::{
    Story,
    ground::SOON,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("both_tables_with_two_workers_word_for_word", two_workers),
    ("both_tables_with_five_workers", five_workers),
];

fn two_workers(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    rig.create(NAME, &json!({"checkNodeEligibility": false, "logLevel": "info"}))?;
    let table_2_1 = [
        ("Installing", json!({"nodeCount": 0, "readyNodeCount": 0})),
        (
            "Installing",
            json!({"nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0", "worker-1"]}),
        ),
        (
            "Installing",
            json!({"installing": ["worker-1"], "nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0"]}),
        ),
        (
            "Installing",
            json!({"installed": ["worker-1"], "installing": ["worker-0"], "nodeCount": 2, "readyNodeCount": 1}),
        ),
        (
            "",
            json!({"installed": ["worker-0", "worker-1"], "nodeCount": 2, "readyNodeCount": 2}),
        ),
    ];
    rig.history.until_in_order(&table_2_1, SOON)?;
    let rows = rig.history.rows();
    let first = [
        "True",
        "Installing",
        "Performing initial installation of kata on cluster",
    ];
    same(
        "the condition of the first row",
        rows[0].condition.clone(),
        first.map(String::from),
    )?;
    let last = rows[rows.len() - 1].clone();
    same(
        "the condition of the last row",
        last.condition,
        ["False", "", ""].map(String::from),
    )?;
    same(
        "the RuntimeClasses in the end",
        last.runtime_classes,
        vec!["kata".to_owned()],
    )?;
    let early = rows
        .iter()
        .filter(|row| row.condition[0] == "True" && !row.runtime_classes.is_empty());
    same("RuntimeClasses before the end", early.count(), 0)?;
    the_guides_command(rig)?;

    rig.delete(NAME)?;
    let table_2_2 = [
        (
            "Uninstalling",
            json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": ["worker-0", "worker-1"]}),
        ),
        (
            "Uninstalling",
            json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-1"], "waitingToUninstall": ["worker-0"]}),
        ),
        (
            "Uninstalling",
            json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-0"]}),
        ),
    ];
    rig.history.until_in_order(&table_2_2, SOON)?;
    rig.history.until_gone(NAME, SOON)?;
    let removing = ["True", "Uninstalling", "Removing kata from cluster"].map(String::from);
    let told = rig.history.rows().iter().any(|row| row.condition == removing);
    same("the condition of the removal was told", told, true)?;
    for (index, node) in ["worker-0", "worker-1"].iter().enumerate() {
        rig.nothing_left(index, node)?;
    }
    same(
        "RuntimeClasses",
        rig.json(&["get", "runtimeclasses"])?["items"].clone(),
        json!([]),
    )
}

/// `oc describe kataconfig | sed -n /^Status:/,/^Events/p`, as the guide has it.
fn the_guides_command(rig: &Rig<'_>) -> Result {
    let mut describe = rig.ground.server.kubectl_command(["describe", "kataconfig"])?;
    let described = run::succeed(&mut describe, run::ORDINARY)?;
    let mut sed = std::process::Command::new("sed");
    sed.args(["-n", "/^Status:/,/^Events/p"]);
    let shown = run::finish(&mut sed, Some(described.stdout), run::ORDINARY)?.text();
    for part in [
        "Status:\n  Conditions:\n",
        "    Status:                False\n",
        "    Type:                  InProgress\n",
    ] {
        contains("the guide's command", &shown, part)?;
    }
    let nodes = "  Kata Nodes:\n    Installed:\n      worker-0\n      worker-1\n    Node Count:        2\n    Ready Node Count:  2\n";
    contains("the guide's command", &shown, nodes)?;
    contains("the guide's command", &shown, "\nEvents:")?;
    let columns = rig.must(&["get", "kataconfig"], None)?;
    let words: Vec<&str> = columns.lines().flat_map(str::split_whitespace).take(9).collect();
    same(
        "the columns",
        words,
        vec![
            "NAME",
            "INPROGRESS",
            "COMPLETED",
            "TOTAL",
            "AGE",
            NAME,
            "False",
            "2",
            "2",
        ],
    )
}

fn five_workers(rig: &mut Rig<'_>) -> Result {
    let names = ["worker-0", "worker-1", "worker-2", "worker-3", "worker-4"];
    rig.start(&names)?;
    rig.create(NAME, &json!({}))?;
    let mut expected = vec![
        ("Installing", json!({"nodeCount": 0, "readyNodeCount": 0})),
        (
            "Installing",
            json!({"nodeCount": 5, "readyNodeCount": 0, "waitingToInstall": names}),
        ),
    ];
    for turn in (0..5).rev() {
        let lists = json!({"installed": names[turn + 1..], "installing": [names[turn]], "waitingToInstall": names[..turn],
            "nodeCount": 5, "readyNodeCount": 4 - turn});
        expected.push(("Installing", without_empty(lists)));
    }
    expected.push(("", json!({"installed": names, "nodeCount": 5, "readyNodeCount": 5})));
    rig.history.until_in_order(&expected, SOON)?;
    one_at_a_time(rig)?;

    rig.delete(NAME)?;
    let mut expected = vec![(
        "Uninstalling",
        json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": names}),
    )];
    for turn in (0..5).rev() {
        let lists = json!({"uninstalling": [names[turn]], "waitingToUninstall": names[..turn], "nodeCount": 0, "readyNodeCount": 0});
        expected.push(("Uninstalling", without_empty(lists)));
    }
    rig.history.until_in_order(&expected, SOON)?;
    rig.history.until_gone(NAME, SOON)?;
    one_at_a_time(rig)
}

fn without_empty(mut lists: Value) -> Value {
    if let Some(lists) = lists.as_object_mut() {
        lists.retain(|_, list| list.as_array().is_none_or(|names| !names.is_empty()));
    }
    lists
}

fn one_at_a_time(rig: &Rig<'_>) -> Result {
    for row in rig.history.rows() {
        let busy = ["installing", "uninstalling"]
            .iter()
            .filter_map(|list| row.nodes[list].as_array());
        let busy: usize = busy.map(Vec::len).sum();
        tests::failure::claim(busy <= 1, format!("several at once: {row:?}"))?;
    }
    Ok(())
}
