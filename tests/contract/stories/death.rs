//! Something below CRI-O dies.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::Status;
use serde_json::json;
use tests::{
    config::Guest,
    failure::{Result, Trying, claim, same},
    places,
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{GRACE, Pod},
    process::{self, Kind},
    task::{ORDINARY, exit_file},
};

/// This module's stories.
pub const TOLD: Told = &[
    (
        OURS,
        "a_dead_shim_takes_everything_with_it_and_the_next_pod_sweeps",
        shim,
    ),
    (OURS, "a_machine_without_death_signals_ends_with_its_shim", deathless),
    (OURS, "leftovers_that_cannot_be_killed_hold_no_start_up", leftovers),
    (OURS, "a_pod_whose_shim_died_is_removed_by_a_restarted_crio", rescued),
    (OURS, "a_dead_virtual_machine_becomes_exits", machine),
    (OURS, "a_machine_that_talks_nonsense_becomes_exits", nonsense),
    (OURS, "a_dead_keeper_becomes_exits", keeper),
    (OURS, "a_dead_file_server_becomes_exits", file_server),
    (OURS, "a_dead_machine_ends_a_waiting_exec", waiting_exec),
    (OURS, "what_a_dying_machine_was_starting_has_ended", starting),
    (BOTH, "a_container_that_dies_leaves_the_others_alone", neighbour),
];

/// How soon the end of something below the shim must be told.
const SOON: Duration = Duration::from_secs(5);

/// How soon leftovers are gone that nothing holds any more: they are looked at one after the other, with pauses.
const SWEEP: Duration = Duration::from_secs(180);

/// What a sandbox's shim has written down on the node.
fn state_of(sandbox: &str) -> PathBuf {
    Path::new("/run/kata").join(sandbox)
}

/// Waits until nothing is left of a sandbox whose shim is dead. A process that `start` leaves behind sees to it.
pub fn swept(sandbox: &str) -> Result {
    let state = state_of(sandbox);
    Bell::default().until("the sweep", SWEEP, || match state.exists() {
        false => Ok(()),
        true => Err(format!("{} is there", state.display())),
    })
}

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
    dead.forget()?;
    // Nobody calls `delete` under CRI-O: the next `start` on the node has to sweep.
    claim(state_of(&dead.facts.id).exists(), "nothing is left to sweep")?;
    let next = Pod::run(crio)?;
    swept(&dead.facts.id)?;
    dead.discard()?;
    next.end([])?;
    crio.node.as_before(&before, SOON)
}

/// CRI-O keeps its broken connections until it is restarted. Then it asks at the addresses in the bundles, and what it
/// asks for must be there.
fn rescued(crio: &Crio<'_>) -> Result {
    let before = crio.node.census();
    let mut pod = Pod::run(crio)?;
    let mut ended = pod.start(&Wanted::shell("exit 7"))?;
    same("the exit code", ended.exited(ORDINARY)?.exit_status, 7)?;
    let mut running = pod.idle()?;
    let machine = process::of_the_vm(crio);
    let shim = process::only(Kind::Shim, crio)?;
    process::murder(shim)?;
    process::gone("the shim, QEMU and virtiofsd", &[&machine[..], &[shim]].concat(), SOON)?;
    let next = Pod::run(crio)?;
    for task in [&mut pod.sandbox, &mut ended, &mut running] {
        task.abandon()?;
        // Beside the new pod, a new shim takes the dead one's place.
        Bell::default().until("a shim that answers", SWEEP, || {
            task.recover().map_err(|error| error.to_string())
        })?;
        task.is(Status::STOPPED)?;
        task.exit = Some(task.begin_wait("")?);
    }
    same("what ended before", ended.exited(ORDINARY)?.exit_status, 7)?;
    same("what ended with the shim", running.exited(ORDINARY)?.exit_status, 137)?;
    // CRI-O stops what it takes for running, and removes it.
    pod.stop(&mut [&mut running])?;
    pod.end([ended, running])?;
    next.end([])?;
    crio.node.as_before(&before, SOON)
}

/// A program of the configuration that executes the real one without its death signal, as the kernel does to one that
/// it executes in an SELinux domain of its own.
fn without_death_signal(crio: &Crio<'_>, name: &str, program: &Path) -> Result<String> {
    let path = crio.node.folder().join(name);
    let script = format!(
        "#!/bin/sh\nexec /usr/bin/setpriv --pdeathsig clear -- {} \"$@\"\n",
        program.display()
    );
    fs::write(&path, script)
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .trying(format!("writing {}", path.display()))?;
    Ok(path.display().to_string())
}

fn deathless(crio: &Crio<'_>) -> Result {
    let qemu = without_death_signal(crio, "deathless-qemu", Path::new("/usr/bin/qemu-system-x86_64"))?;
    let virtiofsd = without_death_signal(crio, "deathless-virtiofsd", &places::virtiofsd()?)?;
    let changed = |line: &str| match line.split_once(" = ") {
        Some(("path", _)) => format!("path = {qemu:?}\n"),
        Some(("virtio_fs_daemon", _)) => format!("virtio_fs_daemon = {virtiofsd:?}\n"),
        _ => format!("{line}\n"),
    };
    let text: String = Guest::Own.configuration()?.lines().map(changed).collect();
    let crio = Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)?;
    for kind in [Kind::Vm, Kind::FileServer] {
        same(
            "processes before the pod",
            process::running(kind, &crio),
            Vec::<i32>::new(),
        )?;
    }
    shim(&crio)
}

/// SIGKILL does not reach the first process of a node from within it, so leftovers that name it are there until the
/// story lets go of them.
fn leftovers(crio: &Crio<'_>) -> Result {
    let started = fs::read_to_string("/proc/1/stat").trying("reading /proc/1/stat")?;
    let started = started
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .nth(19);
    let started: u64 = started.and_then(|ticks| ticks.parse().ok()).unwrap_or_default();
    let state = |name: &str, undo: serde_json::Value| -> std::io::Result<()> {
        let dead = json!({"pid": u32::from(u16::MAX) << 8, "started": 1});
        let state = json!({"version": 1, "sandbox": name, "shim": dead, "undo": undo});
        fs::write(Path::new("/run/kata").join(name).join("state.json"), state.to_string())
    };
    // Each is waited for some seconds: together they take longer than a `start` may.
    let names: Vec<String> = (0..6).map(|n| format!("leftover-{n}")).collect();
    for name in &names {
        fs::create_dir_all(Path::new("/run/kata").join(name)).trying("making a leftover")?;
        state(name, json!([{"process": {"pid": 1, "started": started}}])).trying("making a leftover")?;
    }
    let pod = Pod::run(crio)?;
    let left = || names.iter().filter(|name| Path::new("/run/kata").join(name).exists());
    same("leftovers beside the new pod", left().count(), names.len())?;
    // With nothing to wait for, whoever has failed to remove them tries again.
    Bell::default().until("the end of the leftovers", SWEEP, || {
        for name in left() {
            // One that goes in this moment needs no more.
            drop(state(name, json!([])));
        }
        match left().count() {
            0 => Ok(()),
            left => Err(format!("{left} leftovers")),
        }
    })?;
    pod.end([])
}

fn machine(crio: &Crio<'_>) -> Result {
    dies(crio, Kind::Vm)
}

/// It could be given no memory, disk or interface any more, and who has broken into it may be the one who talks.
fn nonsense(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let machine = process::of_the_vm(crio);
    let mut monitor = process::file_of(process::only(Kind::Vm, crio)?, "socket,id=qmp,fd=")?;
    monitor.write_all(b"7\n").trying("talking nonsense in QEMU's name")?;
    for task in [&container, &pod.sandbox] {
        same("the exit code", task.exited(ORDINARY)?.exit_status, 137)?;
    }
    process::gone("what is left of the machine", &machine, SOON)?;
    let told = || match crio.log() {
        log if log.contains("QEMU sent something that is not its protocol") => Ok(()),
        log => Err(log),
    };
    Bell::default().until("the reason in the shim's log", ORDINARY, told)?;
    pod.end([container])
}

fn keeper(crio: &Crio<'_>) -> Result {
    dies(crio, Kind::Keeper)
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

/// Nobody knows whether it ran: it is told as ended to whoever waits, and in CRI-O's folder to whoever comes later.
fn starting(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.create(&Wanted::idle())?;
    let machine = process::only(Kind::Vm, crio)?;
    process::stop(machine)?;
    let (start, wait) = (container.begin_start()?, container.begin_wait("")?);
    // The shim takes the requests of a connection in their order: by then it has asked the guest.
    container.is(Status::CREATED)?;
    process::murder(machine)?;
    start.refused(ORDINARY)?;
    same("the exit code", wait.granted(ORDINARY)?.exit_status, 137)?;
    let path = exit_file(&container.id);
    Bell::default().until(
        "the file in CRI-O's exits folder",
        ORDINARY,
        || match fs::read_to_string(&path) {
            Ok(code) if code == "137" => Ok(()),
            other => Err(format!("{}: {other:?}", path.display())),
        },
    )?;
    same("Delete.exit_status", container.delete()?.exit_status, 137)?;
    container.discard()?;
    pod.end([])
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
