//! The guide's tables 2.1 and 2.2.

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, contains, same},
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

/// The guide's table 2.1: the reason of the condition, and the lists.
fn table_2_1() -> [(&'static str, Value); 5] {
    let [first, second, third, fourth, last] = [
        json!({"nodeCount": 0, "readyNodeCount": 0}),
        json!({"nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0", "worker-1"]}),
        json!({"installing": ["worker-1"], "nodeCount": 2, "readyNodeCount": 0, "waitingToInstall": ["worker-0"]}),
        json!({"installed": ["worker-1"], "installing": ["worker-0"], "nodeCount": 2, "readyNodeCount": 1}),
        json!({"installed": ["worker-0", "worker-1"], "nodeCount": 2, "readyNodeCount": 2}),
    ];
    let under_way = |lists| ("Installing", lists);
    [
        under_way(first),
        under_way(second),
        under_way(third),
        under_way(fourth),
        ("", last),
    ]
}

/// The guide's table 2.2.
fn table_2_2() -> [(&'static str, Value); 3] {
    let rows = [
        json!({"nodeCount": 0, "readyNodeCount": 0, "waitingToUninstall": ["worker-0", "worker-1"]}),
        json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-1"], "waitingToUninstall": ["worker-0"]}),
        json!({"nodeCount": 0, "readyNodeCount": 0, "uninstalling": ["worker-0"]}),
    ];
    rows.map(|lists| ("Uninstalling", lists))
}

fn two_workers(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0", "worker-1"])?;
    rig.create(NAME, &json!({"checkNodeEligibility": false, "logLevel": "info"}))?;
    rig.history.until_in_order(&table_2_1(), SOON)?;
    let rows = rig.history.rows();
    let told = |condition: [&str; 3]| rows.iter().filter(|row| row.condition == condition).count() > 0;
    let first = [
        "True",
        "Installing",
        "Performing initial installation of kata on cluster",
    ];
    same("the words of the first row", told(first), true)?;
    let (last, before) = rows.split_last().ok_or_else(|| Failure::Claim("no rows".into()))?;
    same(
        "the words of the last row",
        last.condition.clone(),
        ["False", "", ""].map(String::from),
    )?;
    same(
        "the RuntimeClasses in the end",
        last.runtime_classes.clone(),
        vec!["kata".to_owned()],
    )?;
    let early = before
        .iter()
        .filter(|row| row.condition[0] == "True" && !row.runtime_classes.is_empty());
    same("RuntimeClasses before the end", early.count(), 0)?;
    the_guides_command(rig)?;

    rig.delete(NAME)?;
    rig.history.until_in_order(&table_2_2(), SOON)?;
    rig.history.until_gone(NAME, SOON)?;
    let removing = ["True", "Uninstalling", "Removing kata from cluster"].map(String::from);
    let told = rig.history.rows().iter().any(|row| row.condition == removing);
    same("the words of the removal", told, true)?;
    rig.nothing_left(0, "worker-0")?;
    rig.nothing_left(1, "worker-1")?;
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
