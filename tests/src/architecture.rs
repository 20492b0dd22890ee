//! Which crate may need which: what is built for one program is not paid for by another.

use std::{collections::BTreeSet, process::Command};

/// A member of the workspace, the other members that it may need, and crates of others that it never builds.
const RULES: &[(&str, &[&str], &[&str])] = &[
    ("agent", &["agent-protocol"], &["kube", "tonic"]),
    ("agent-protocol", &[], &["kube", "libcontainer", "libcgroups", "tonic"]),
    ("config", &[], &["kube", "libcontainer", "tokio"]),
    (
        "installer",
        &["config", "installer-report", "node-check", "vmm-host"],
        &["kube", "libcontainer", "ttrpc"],
    ),
    ("installer-report", &[], &["kube", "tokio"]),
    (
        "node-check",
        &["config", "vmm-host"],
        &["kube", "libcontainer", "tokio"],
    ),
    (
        "operator",
        &["config", "installer-report"],
        &["libcontainer", "tonic", "ttrpc"],
    ),
    (
        "shim",
        &["agent-protocol", "config", "node-check", "vmm", "vmm-host"],
        &["kube", "libcontainer", "tonic"],
    ),
    ("vmm", &["vmm-host"], &["kube", "libcontainer", "ttrpc"]),
    ("vmm-host", &[], &["kube", "libcontainer", "tokio"]),
];

/// Every crate that building a member takes, without itself and what only its tests take.
fn needs(member: &str) -> BTreeSet<String> {
    let told = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--edges", "normal,build"])
        .args(["--prefix", "none", "--format", "{p}", "--package", member])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let mut names: BTreeSet<String> = String::from_utf8(told.stdout)
        .expect("names of crates are UTF-8")
        .lines()
        .filter_map(|line| Some(line.split_whitespace().next()?.to_owned()))
        .collect();
    assert!(names.remove(member), "cargo tree names {member} itself");
    names
}

#[test]
fn no_crate_needs_more_than_it_may() {
    let members: BTreeSet<&str> = RULES.iter().map(|(member, ..)| *member).collect();
    for (member, may, never) in RULES {
        let needs = needs(member);
        for other in members.iter().filter(|other| needs.contains(**other)) {
            assert!(
                may.contains(other),
                "{member} needs {other}: let it not, or say so in RULES"
            );
        }
        for other in *never {
            assert!(!needs.contains(*other), "{member} builds {other}");
        }
        for other in *may {
            assert!(
                needs.contains(*other),
                "{member} does not need {other} any more: take it out of RULES"
            );
        }
    }
}

#[test]
fn every_crate_has_its_rule() {
    let manifest = include_str!("../../Cargo.toml");
    let members = manifest
        .lines()
        .find_map(|line| line.strip_prefix("members = "))
        .expect("the workspace names its members");
    // The harness needs what it likes.
    assert_eq!(members.matches('"').count() / 2, RULES.len() + 1, "{members}");
}
