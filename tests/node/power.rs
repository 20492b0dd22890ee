//! The node is shut down with pods on it, or its power is cut in the middle of an install.

use tests::{
    failure::{Failure, Result, claim, contains},
    machine::{Machine, ORDINARY},
};

use crate::{
    PowerStory,
    install::{HANDLER, INSTALL, ensure, installer, payload, pods_are_gone, uninstall},
};

pub const STORIES: &[PowerStory] = &[
    (
        "pods_of_before_a_reboot_can_be_removed",
        pods_of_before_a_reboot_can_be_removed,
    ),
    ("an_upgrade_without_power_is_run_again", an_upgrade_without_power),
    (
        "a_first_install_without_power_is_run_again",
        a_first_install_without_power,
    ),
];

/// Every step.
pub const AT_LENGTH: &[PowerStory] = &[
    (
        "an_upgrade_without_power_at_each_step",
        an_upgrade_without_power_at_each_step,
    ),
    (
        "a_first_install_without_power_at_each_step",
        a_first_install_without_power_at_each_step,
    ),
];

/// What the installer says at the steps of an upgrade.
const STEPS_OF_AN_UPGRADE: &[&str] = &[
    "checking", "staging", "placing", "trying", "making", "asking", "sweeping",
];

/// What it says at the steps of a first install.
const STEPS_OF_AN_INSTALL: &[&str] = &[
    "checking",
    "staging",
    "placing",
    "trying",
    "making",
    "writing",
    "restarting",
    "asking",
    "sweeping",
];

fn pods_of_before_a_reboot_can_be_removed(node: &mut Machine) -> Result {
    ensure(node)?;
    let old = node.pod(HANDLER, "old").run()?;
    old.container("sleeper", &["sleep", "infinity"])?;
    let id = old.id().to_owned();
    let boot = node.boot_id().to_owned();
    node.reboot()?;
    claim(node.boot_id() != boot, "the node did not reboot")?;
    let scope = node.run(&format!(
        "journalctl --boot -1 --unit cri-containerd-{id}.scope --output cat"
    ))?;
    contains(
        "what systemd said of the pod's scope",
        &scope,
        "Deactivated successfully",
    )?;
    after_a_boot(node, &id)
}

/// The CRI knows that the pod has ended and can remove it; a new one runs.
fn after_a_boot(node: &Machine, old: &str) -> Result {
    contains(
        "the old pod",
        &node.inspect("inspectp", old, "{{.status.state}}")?,
        "SANDBOX_NOTREADY",
    )?;
    node.crictl(&["rmp", "--force", old])?;
    a_pod_runs(node, HANDLER)?;
    pods_are_gone(node)
}

fn a_pod_runs(node: &Machine, handler: &str) -> Result {
    let pod = node.pod(handler, "probe").run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    contains("an exec", &container.shell("echo here")?, "here")?;
    pod.remove()
}

/// Just when the new version becomes the current one, and a pod of the old one runs.
fn an_upgrade_without_power(node: &mut Machine) -> Result {
    ensure(node)?;
    cut_and_go_on(node, "3.0.0", "making")
}

/// Just when containerd is to read what was written for it.
fn a_first_install_without_power(node: &mut Machine) -> Result {
    ensure(node)?;
    uninstall(node)?;
    cut_and_go_on(node, "4.0.0", "restarting")
}

fn an_upgrade_without_power_at_each_step(node: &mut Machine) -> Result {
    ensure(node)?;
    for (number, step) in (10..).zip(STEPS_OF_AN_UPGRADE) {
        cut_and_go_on(node, &format!("{number}.0.0"), step)?;
    }
    Ok(())
}

fn a_first_install_without_power_at_each_step(node: &mut Machine) -> Result {
    ensure(node)?;
    for (number, step) in (30..).zip(STEPS_OF_AN_INSTALL) {
        uninstall(node)?;
        cut_and_go_on(node, &format!("{number}.0.0"), step)?;
    }
    Ok(())
}

/// Installs a version and cuts the power when the installer says that it begins a step. After the boot the node runs
/// the pods that its CRI offers to run, and the same command completes; what it installs is what other stories run.
fn cut_and_go_on(node: &mut Machine, version: &str, step: &str) -> Result {
    let at_step = |failure| Failure::Claim(format!("power cut at {step:?}: {failure}"));
    let command = installer(&payload(node, version)?)?;
    let installing = node.start(&["sh", "-c", &command], false)?;
    installing.wait_for_line(&format!("installer: {step}"), INSTALL)?;
    installing.leave();
    node.power_cut()?;
    node.power_on().map_err(at_step)?;
    go_on(node, version).map_err(at_step)
}

fn go_on(node: &Machine, version: &str) -> Result {
    node.until("an answer of the CRI", "crictl version", ORDINARY)?;
    let offered = node
        .crictl(&["info", "--output", "json"])?
        .contains(&format!("\"{HANDLER}\""));
    a_pod_runs(node, if offered { HANDLER } else { "runc" })?;
    node.run_within(&installer(&payload(node, version)?)?, INSTALL)?;
    contains(
        "the current version",
        &node.run("readlink /opt/sandpod/current")?,
        &format!("{version}-"),
    )?;
    pods_are_gone(node)
}
