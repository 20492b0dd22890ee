//! Controllers and installers that die at every step.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::failure::{Failure, Result, Trying, claim, contains, same};

use super::{
    Story,
    controller::{Controller, Settings},
    ground::{NAMESPACE, SOON},
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    (
        "a_controller_that_is_killed_at_every_step_is_followed_by_one_that_goes_on",
        killed_controllers,
    ),
    (
        "an_installer_that_is_killed_at_every_step_is_followed_by_one_that_goes_on",
        killed_installers,
    ),
    ("a_standby_takes_over_when_the_leader_ends", standby),
    (
        "a_standby_takes_over_half_a_minute_after_the_leader_was_killed",
        killed_leader,
    ),
    ("a_leader_that_has_lost_its_lease_ends", lost_lease),
];

/// Starts controllers, and kills each when it is about to take its second step, until the story is at its end. Every
/// step of the way is so the last of one of them.
fn kill_on_the_way(rig: &mut Rig<'_>, arrived: impl Fn(&Rig<'_>) -> bool) -> Result<usize> {
    for generation in 0..100 {
        rig.start_controller(&Settings::default())?;
        let said = std::sync::Arc::clone(&rig.controller()?.said);
        let there = said.bell.until("a controller's second step, or the end", SOON, || {
            let lines = said.lines();
            let steps = lines
                .iter()
                .filter(|line| line.contains("acting") || line.contains("writing the status"))
                .count();
            match (steps >= 2, arrived(rig)) {
                (true, _) => Ok(false),
                (false, true) => Ok(true),
                (false, false) => Err(lines.last().cloned().unwrap_or_default()),
            }
        })?;
        if there {
            return Ok(generation);
        }
        rig.controller()?.kill()?;
    }
    Err(Failure::Claim("a hundred controllers came to no end".into()))
}

fn killed_controllers(rig: &mut Rig<'_>) -> Result {
    rig.node("worker-0", &json!({}))?;
    rig.node("worker-1", &json!({}))?;
    rig.create(NAME, &json!({}))?;
    let installed = |rig: &Rig<'_>| {
        rig.history
            .rows()
            .last()
            .is_some_and(|row| row.condition[0] == "False" && row.nodes["readyNodeCount"] == 2)
    };
    let generations = kill_on_the_way(rig, installed)?;
    claim(generations >= 5, format!("only {generations} controllers were killed"))?;
    rig.until_installed(NAME, 2)?;
    let rows = rig.history.rows();
    let several = rows
        .iter()
        .any(|row| row.nodes["installing"].as_array().is_some_and(|names| names.len() > 1));
    same("several nodes at once", several, false)?;
    rig.controller()?.kill()?;
    rig.delete(NAME)?;
    let gone = |rig: &Rig<'_>| rig.history.until_gone(NAME, Duration::ZERO).is_ok();
    kill_on_the_way(rig, gone)?;
    rig.nothing_left(0, "worker-0")?;
    rig.nothing_left(1, "worker-1")?;
    let pods = rig.json(&["get", "pods", "--namespace", NAMESPACE])?;
    same("the installer's pods", pods["items"].clone(), json!([]))
}

fn killed_installers(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    let deaths = rig.kubelet(0)?.folder().join("deaths");
    let steps =
        ["install", "uninstall"].map(|verb| format!("{verb} begins\n{verb} changes the host\n{verb} is done\n"));
    fs::write(&deaths, steps.concat()).trying("telling installers to die")?;
    rig.create(NAME, &json!({}))?;
    let killed = rig
        .history
        .until("the word of a death", SOON, |row| row.condition[1] == "Failed")?;
    contains(
        "the message",
        &killed.condition[2],
        "Node worker-0 Degraded: the installer ended with exit code 137 (Error)",
    )?;
    // Backed off by 1, 2 and 4 s.
    rig.until_installed(NAME, 1)?;
    rig.delete(NAME)?;
    rig.history.until_gone(NAME, SOON)?;
    let left = fs::read_to_string(&deaths).trying("reading which deaths are left")?;
    same("deaths that did not happen", left.as_str(), "")?;
    rig.nothing_left(0, "worker-0")
}

/// A second controller, beside the rig's own that leads.
fn beside_a_leader(rig: &mut Rig<'_>) -> Result<Controller> {
    rig.start(&["worker-0"])?;
    rig.controller()?.until_said("leading", SOON)?;
    let second = Settings {
        identity: "controller-1".into(),
        ..Settings::default()
    };
    Controller::start(&rig.ground.kubeconfig(), &second)
}

fn standby(rig: &mut Rig<'_>) -> Result {
    let second = beside_a_leader(rig)?;
    let ready = |controller: &Controller| {
        let address = controller.address()?;
        let mut curl = std::process::Command::new("curl");
        curl.args([
            "-sS",
            "--retry",
            "5",
            "--retry-all-errors",
            "--fail",
            &format!("http://{address}/readyz"),
        ]);
        tests::run::succeed(&mut curl, SOON)
    };
    same("the standby's health", ready(&second)?.text().as_str(), "ok")?;
    same("the exit code of the first", rig.controller()?.stop()?, 0)?;
    second.until_said("leading", SOON)?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)
}

fn killed_leader(rig: &mut Rig<'_>) -> Result {
    let second = beside_a_leader(rig)?;
    second.address()?;
    rig.controller()?.kill()?;
    let since = Instant::now();
    second.until_said("leading", SOON)?;
    // The last renewal may be ten seconds older than the death.
    claim(
        since.elapsed() > Duration::from_secs(18),
        format!("it led after {:?}", since.elapsed()),
    )?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)
}

fn lost_lease(rig: &mut Rig<'_>) -> Result {
    rig.start(&["worker-0"])?;
    rig.controller()?.until_said("leading", SOON)?;
    let patch = json!({"spec": {"holderIdentity": "somebody-else"}}).to_string();
    rig.must(
        &[
            "patch",
            "lease",
            "sandpod-operator",
            "--namespace",
            NAMESPACE,
            "--type",
            "merge",
            "--patch",
            &patch,
        ],
        None,
    )?;
    same("the exit code", rig.controller()?.until_ended(SOON)?, 1)?;
    claim(
        rig.what_was_said().contains("the lease was lost"),
        "nothing was said about the lease",
    )
}
