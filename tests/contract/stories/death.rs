//! Something below CRI-O dies.

use std::time::Duration;

use containerd_shim_protos::api::Status;
use tests::failure::{Result, claim, same};

use super::{BOTH, OURS, Told};
use crate::{
    crio::Crio,
    pod::{GRACE, Pod},
    process::{self, Kind},
    task::ORDINARY,
};

/// This module's stories.
pub const TOLD: Told = &[
    (
        OURS,
        "a_dead_shim_takes_everything_with_it_and_the_next_start_sweeps",
        shim,
    ),
    (OURS, "a_dead_virtual_machine_becomes_exits", machine),
    (OURS, "a_dead_file_server_becomes_exits", file_server),
    (OURS, "a_dead_machine_ends_a_waiting_exec", waiting_exec),
    (BOTH, "a_container_that_dies_leaves_the_others_alone", neighbour),
];

/// How soon the end of something below the shim must be told.
const SOON: Duration = Duration::from_secs(5);

fn shim(crio: &Crio<'_>) -> Result {
    let before = crio.node.census();
    let pod = Pod::run(crio)?;
    let mut container = pod.idle()?;
    let machine = process::of_the_vm(crio);
    let shim = process::only(Kind::Shim, crio)?;
    process::murder(shim)?;
    process::gone("the shim, QEMU and virtiofsd", &[&machine[..], &[shim]].concat(), SOON)?;
    // CRI-O's part can be removed; its calls to the dead shim fail, whatever they are.
    claim(container.is(Status::RUNNING).is_err(), "a dead shim answers")?;
    container.rootfs.unmount()?;
    container.discard()?;
    let mut dead = pod;
    dead.disconnect()?;
    dead.sandbox.rootfs.unmount()?;
    // Nobody calls `delete` under CRI-O: the next `start` on the node has to sweep.
    let next = Pod::run(crio)?;
    dead.discard()?;
    next.end([])?;
    crio.node.as_before(&before, SOON)
}

fn machine(crio: &Crio<'_>) -> Result {
    dies(crio, Kind::Vm)
}

/// The guest would hang for ever on its root file systems.
fn file_server(crio: &Crio<'_>) -> Result {
    let servers = process::running(Kind::FileServer, crio);
    claim(servers.is_empty(), "a file server runs before the pod")?;
    dies(crio, Kind::FileServer)
}

fn dies(crio: &Crio<'_>, kind: Kind) -> Result {
    let pod = Pod::run(crio)?;
    let containers = [pod.idle()?, pod.idle()?];
    let machine = process::of_the_vm(crio);
    let shim = process::only(Kind::Shim, crio)?;
    // The file server may have a parent and a child of one name.
    for pid in process::running(kind, crio) {
        process::murder(pid)?;
    }
    for task in containers.iter().chain([&pod.sandbox]) {
        let exit = task.exited(SOON)?;
        claim(exit.exit_status != 0, "a container whose machine died ended well")?;
    }
    process::gone("what is left of the machine", &machine, SOON)?;
    same("the shim", process::only(Kind::Shim, crio)?, shim)?;
    for task in &containers {
        if let Err(refusal) = task.kill("", 9)?.answer(ORDINARY)? {
            claim(
                refusal.means_gone(),
                format!("Kill after the machine's death was refused: {refusal}"),
            )?;
        }
    }
    pod.end(containers)
}

fn waiting_exec(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(&["sh", "-c", "echo begun; sleep 1000"], false, false)?;
    exec.streams.stdout.line("begun", ORDINARY)?;
    process::murder(process::only(Kind::Vm, crio)?)?;
    let done = exec.finish(SOON)?;
    claim(done.code != 0, "an exec whose machine died ended well")?;
    let refused = container.begin_exec(&["true"], false, false);
    claim(refused.is_err(), "an exec was started in a dead machine")?;
    pod.end([container])
}

fn neighbour(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let [mut one, other] = [pod.idle()?, pod.idle()?];
    one.stop(Duration::ZERO)?;
    other.is(Status::RUNNING)?;
    pod.sandbox.is(Status::RUNNING)?;
    same("the other's word", other.shell("echo here")?, "here")?;
    one.stop(GRACE)?;
    pod.end([one, other])
}
