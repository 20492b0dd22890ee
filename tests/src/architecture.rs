//! Which crate may need which: what is built for one program is not paid for by another. Which licences crates may
//! have.

use std::{collections::BTreeSet, process::Command};

use spdx::{Expression, LicenseReq, ParseMode};

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

/// The licences of which a crate of others has to offer one, as SPDX names them.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Zlib",
];

/// A crate whose manifest names no licence, and the one whose text it brings.
const UNNAMED: (&str, &str) = ("rust-criu ", "MIT");

/// What `cargo tree` says of the crates that building the chosen members takes, a line each, in its words for
/// `--format`. What only their tests take is left out.
fn tree(choice: &[&str], format: &str) -> String {
    let told = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--edges", "normal,build"])
        .args(["--prefix", "none", "--format", format])
        .args(choice)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    String::from_utf8(told.stdout).expect("names of crates are UTF-8")
}

/// Every crate that building a member takes, without itself.
fn needs(member: &str) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = tree(&["--package", member], "{p}")
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

#[test]
fn every_crate_has_a_licence_that_may_be_shipped() {
    let may = |licence: &LicenseReq| licence.license.id().is_some_and(|id| LICENCES.contains(&id.name));
    // The harness is not shipped.
    let crates = tree(&["--workspace", "--exclude", "tests"], "{p}|{l}");
    // An empty line stands between two members.
    for line in crates.lines().filter(|line| !line.is_empty()) {
        let (name, licence) = line.split_once('|').expect("the format has the bar");
        // A line says so when it is not the first of its crate.
        let licence = match licence.trim_end_matches(" (*)") {
            "" if name.starts_with(UNNAMED.0) => UNNAMED.1,
            named => named,
        };
        let licence = Expression::parse_mode(licence, ParseMode::LAX)
            .unwrap_or_else(|error| panic!("the licence of {name}, {licence:?}: {error}"));
        assert!(
            licence.evaluate(may),
            "{name} has the licence {licence}: do without it, or add it to LICENCES"
        );
    }
}
