//! critest, the CRI's own validation suite (cri-tools, docs/validation.md), and what it reports.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use serde_json::Value;
use tests::{
    census,
    config::Runtime,
    failure::{Failure, Result, Trying},
    node::{Containerd, INSTALLED, Node, NodeSpec},
    places,
    run::{self, finish, succeed},
    stage,
};

use crate::registry;

/// How long all specs may take with one runtime: three times what they take on two loaded cores.
const PATIENCE: Duration = Duration::from_secs(45 * 60);

/// How a spec ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// It did not apply; critest's reason.
    Skipped(String),
    /// Not as it should; what was seen instead.
    Failed(String),
}

/// What a run of critest gave.
#[derive(Debug)]
pub struct Report {
    /// How each spec ended.
    pub outcomes: BTreeMap<String, Outcome>,
    /// Whether the node held nothing of critest's pods afterwards.
    pub left: std::result::Result<(), String>,
}

/// The names of the specs that critest runs; its benchmarks are none of them.
///
/// # Errors
/// When critest has not been built.
pub fn specs() -> Result<Vec<String>> {
    let folder = tempfile::tempdir().trying("making a folder for critest's list")?;
    let list = folder.path().join("specs.json");
    let mut command = Command::new(places::peers()?.join("critest"));
    command
        .arg("-ginkgo.dry-run")
        .arg(format!("-ginkgo.json-report={}", list.display()));
    succeed(&mut command, run::ORDINARY)?;
    let outcomes = outcomes(&list)?.into_iter();
    Ok(outcomes
        .filter(|(_, outcome)| *outcome == Outcome::Passed)
        .map(|(name, _)| name)
        .collect())
}

/// Runs specs (empty: all) with a runtime on a node of its own. critest's report and output, and containerd's log, are
/// kept in `logs`.
///
/// # Errors
/// When there is no report of critest's.
pub fn run(runtime: Runtime, specs: &[&str], logs: &Path) -> Result<Report> {
    runtime.require()?;
    fs::create_dir_all(logs).trying(format!("making {}", logs.display()))?;
    let node = Node::start(&NodeSpec::new(Containerd::Newest))?;
    let report = on(&node, runtime, specs, logs);
    let containers = node.events().containers();
    let closed = node.close();
    remove_default_cgroups(&containers);
    let report = report?;
    closed.map(|()| report)
}

fn on(node: &Node, runtime: Runtime, specs: &[&str], logs: &Path) -> Result<Report> {
    let registry = registry::start(node)?;
    let before = node.census();
    let report = node.path("report.json");
    let temporary = node.path("critest");
    fs::create_dir_all(&temporary).trying(format!("making {}", temporary.display()))?;
    let mut command = command(node, runtime, specs, &report)?;
    // Its volumes, logs and profiles go with the node.
    command.env("TMPDIR", &temporary);
    let finished = finish(&mut command, None, PATIENCE);
    // Nobody misses a log that could not be kept.
    drop(fs::copy(node.path("containerd.log"), logs.join("containerd.log")));
    let output = finished?;
    let said = [output.stdout.as_slice(), &output.stderr].concat();
    fs::write(logs.join("critest.log"), said).trying("keeping critest's output")?;
    if !report.exists() {
        return Err(run::refusal(&command, &output));
    }
    drop(fs::copy(&report, logs.join("report.json")));
    for container in node.events().containers() {
        node.remember(&container);
    }
    // A spec that failed may have kept its pod and its volumes' mounts; what is asked here is whether removed pods are
    // gone.
    let removed = node
        .crictl(["rmp", "--all", "--force"])
        .and_then(|_| unmount(node, &temporary));
    let left = removed.and_then(|()| node.nothing_left_since(&before, stage::SETTLE));
    drop(registry);
    Ok(Report {
        outcomes: outcomes(&report)?,
        left: left.map_err(|failure| failure.to_string()),
    })
}

fn command(node: &Node, runtime: Runtime, specs: &[&str], report: &Path) -> Result<Command> {
    // Only with this handler, containerd runs pods with user namespaces.
    let handler = match runtime {
        Runtime::Kata(_) => INSTALLED.to_owned(),
        Runtime::Runc => runtime.handler(),
    };
    let mut command = node.command(&places::peers()?.join("critest").display().to_string());
    command
        .args(["-config", "/dev/null"])
        .args(["-runtime-endpoint", "unix:///run/containerd/containerd.sock"])
        .args(["-runtime-handler", &handler])
        // The same order each time.
        .args(["-ginkgo.seed", "1", "-ginkgo.no-color"])
        .arg(format!("-ginkgo.timeout={}s", PATIENCE.as_secs() - 60))
        .arg(format!("-ginkgo.json-report={}", report.display()));
    for spec in specs {
        command.arg(format!("-ginkgo.focus={}$", literally(spec)));
    }
    Ok(command)
}

/// Unmounts what the node has below a folder.
fn unmount(node: &Node, below: &Path) -> Result {
    let script = "cut -d ' ' -f 5 /proc/self/mountinfo | grep \"^$0/\" | sort -r | xargs -r umount --lazy";
    let mut command = node.command("sh");
    command.args(["-c", script]).arg(below);
    succeed(&mut command, run::ORDINARY).map(drop)
}

/// A regular expression that matches a text.
fn literally(text: &str) -> String {
    let escape = |letter: char| {
        let special = !letter.is_alphanumeric() && !letter.is_whitespace();
        special.then_some('\\').into_iter().chain([letter])
    };
    text.chars().flat_map(escape).collect()
}

/// critest names no parent cgroup, so its pods' cgroups are below one that containerd makes in the machine's root and
/// never removes, and where they stay when the node ends under them. What is not empty belongs to somebody who is still
/// at work.
fn remove_default_cgroups(containers: &[String]) {
    for hierarchy in census::hierarchies() {
        let parent = hierarchy.join("k8s.io");
        let left = containers
            .iter()
            .flat_map(|container| census::folders(&parent.join(container)));
        for folder in left.chain([parent.clone()]) {
            drop(fs::remove_dir(folder));
        }
    }
}

fn outcomes(report: &Path) -> Result<BTreeMap<String, Outcome>> {
    let text = fs::read_to_string(report).trying(format!("reading {}", report.display()))?;
    let unexpected = |source| Failure::Json {
        what: "critest's report".into(),
        source,
    };
    let report: Value = serde_json::from_str(&text).map_err(unexpected)?;
    let nodes = report[0]["SpecReports"].as_array();
    let specs = nodes.into_iter().flatten().filter(|node| node["LeafNodeType"] == "It");
    Ok(specs.map(|spec| (name(spec), outcome(spec))).collect())
}

/// A spec's name, without the mark that every one of them carries.
fn name(spec: &Value) -> String {
    let containers = spec["ContainerHierarchyTexts"].as_array();
    let words: Vec<_> = containers
        .into_iter()
        .flatten()
        .chain([&spec["LeafNodeText"]])
        .filter_map(Value::as_str)
        .collect();
    words.join(" ").trim_start_matches("[k8s.io] ").to_owned()
}

fn outcome(spec: &Value) -> Outcome {
    let failure = &spec["Failure"];
    let message = failure["Message"].as_str().unwrap_or_default().trim().to_owned();
    match spec["State"].as_str() {
        Some("passed") => Outcome::Passed,
        Some("skipped" | "pending") => Outcome::Skipped(message),
        state => {
            let place = &failure["Location"];
            let file = place["FileName"].as_str().unwrap_or_default();
            Outcome::Failed(format!(
                "{}: {} ({}:{})",
                state.unwrap_or("without a state"),
                run::last_of(&message, 1500),
                file.rsplit('/').next().unwrap_or(file),
                place["LineNumber"]
            ))
        }
    }
}
