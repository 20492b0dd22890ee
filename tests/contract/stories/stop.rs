//! The order in which CRI-O takes a pod down.

use std::{fs, time::Duration};

use containerd_shim_protos::api::Status;
use tests::{
    failure::{Result, claim, same},
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{GRACE, Place, Pod, PodWanted},
    process::{self, Kind},
    task::{BOOT, ORDINARY, TERM},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "a_pod_stops_in_crios_order", order),
    (BOTH, "the_shim_stays_until_the_last_shutdown", last_shutdown),
    (BOTH, "a_container_that_ignores_term_is_killed", stubborn),
    (BOTH, "stopping_twice_is_no_error", twice),
    (OURS, "a_sandbox_ends_at_once_on_term", sandbox_term),
    (OURS, "a_stopped_sandbox_takes_its_containers_along", sandbox_first),
    (OURS, "a_create_that_crio_gave_up_can_be_deleted", given_up),
    (
        OURS,
        "a_container_deleted_while_it_is_created_leaves_nothing",
        overtaken,
    ),
];

fn order(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let mut containers = [pod.idle()?, pod.idle()?];
    let machine = process::of_the_vm(crio);
    pod.disconnect()?;
    // The network is gone and everything still runs and answers.
    for container in &containers {
        same("a container without network", container.shell("echo here")?, "here")?;
    }
    for container in &mut containers {
        let exit = container.stop(GRACE)?;
        same("the exit code on TERM", exit.exit_status, 0)?;
        // Right after the stop, long before Delete.
        container.rootfs.unmount()?;
        container.exited(ORDINARY)?;
    }
    pod.sandbox.is(Status::RUNNING)?;
    pod.stop(&mut [])?;
    pod.sandbox.is(Status::STOPPED)?;
    process::gone("the virtual machine", &machine, Duration::from_secs(5))?;
    for container in &containers {
        container.is(Status::STOPPED)?;
    }
    pod.end(containers)
}

fn last_shutdown(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let shim = process::only(Kind::Shim, crio)?;
    let [mut first, mut second] = [pod.idle()?, pod.idle()?];
    pod.stop(&mut [&mut first, &mut second])?;
    for container in [first, second] {
        container.remove()?;
        same(
            "the shim before the last Shutdown",
            process::only(Kind::Shim, crio)?,
            shim,
        )?;
        pod.sandbox.is(Status::STOPPED)?;
    }
    pod.remove()?;
    process::gone("the shim", &[shim], Duration::from_secs(5))
}

fn stubborn(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.start(&Wanted::shell("trap '' TERM; echo ready; while :; do sleep 1000; done"))?;
    container.stdout()?.line("ready", ORDINARY)?;
    let exit = container.stop(Duration::from_millis(300))?;
    same("the exit code", exit.exit_status, 137)?;
    container.exited(ORDINARY)?;
    pod.end([container])
}

fn twice(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.idle()?;
    for _ in 0..2 {
        container.stop(GRACE)?;
    }
    pod.end([container])
}

fn sandbox_term(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let machine = process::of_the_vm(crio);
    claim(!machine.is_empty(), "a running pod has no virtual machine")?;
    // No time for a pause process to install a handler, and none needed.
    pod.sandbox.kill("", TERM)?.granted(ORDINARY)?;
    pod.sandbox.exited(Duration::from_secs(3))?;
    process::gone("the virtual machine", &machine, Duration::from_secs(5))?;
    pod.end([])
}

/// What kubelet does to a pod whose sandbox died: containers must not be stuck.
fn sandbox_first(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let container = pod.idle()?;
    pod.sandbox.stop(GRACE)?;
    container.exited(Duration::from_secs(5))?;
    pod.stop(&mut [])?;
    pod.end([container])
}

/// CRI-O's `container_create_timeout`: Delete while Create is under way, and then CRI-O waits for the answer to Create.
fn given_up(crio: &Crio<'_>) -> Result {
    debug_assert_eq!(crio.runtime, Runtime::Sandpod);
    let before = crio.node.census();
    let place = Place::make(crio, &PodWanted::default())?;
    let sandbox = place.prepare(crio)?;
    let create = sandbox.begin_create()?;
    if let Err(refusal) = sandbox.begin_delete("")?.answer(BOOT)? {
        claim(refusal.means_gone(), format!("Delete was refused: {refusal}"))?;
    }
    // Granted or refused: only answered.
    if create.answer(BOOT)?.is_ok() {
        sandbox.begin_delete("")?.answer(BOOT)?.ok();
    }
    sandbox.shutdown()?;
    place.remove()?;
    sandbox.discard()?;
    crio.node.as_before(&before, Duration::from_secs(5))
}

/// The same of a container: were it in the guest, a second one of its id could not be made.
fn overtaken(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let shim = process::only(Kind::Shim, crio)?;
    let in_share = |id: &str| {
        let mounts = fs::read_to_string(format!("/proc/{shim}/mountinfo")).unwrap_or_default();
        mounts.contains(&format!("{id}/rootfs"))
    };
    for moment in ["at once", "with its files in the share"] {
        let mut container = pod.prepare(&Wanted::idle())?;
        let create = container.begin_create()?;
        if moment != "at once" {
            Bell::default().until("the container's files in the share", BOOT, || {
                in_share(&container.id).then_some(()).ok_or_else(|| "none".into())
            })?;
        }
        container.begin_delete("")?.granted(ORDINARY)?;
        // Refused, unless it was over before Delete came; then Delete was that of a created container.
        drop(create.answer(BOOT)?);
        container.create()?;
        container.start()?;
        container.stdout()?.line("ready", ORDINARY)?;
        container.stop(GRACE)?;
        container.rootfs.unmount()?;
        container.remove()?;
    }
    pod.end([])
}
