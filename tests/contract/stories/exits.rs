//! How the end of a container is told.

use std::fs;

use containerd_shim_protos::{api::Status, ttrpc::Code};
use tests::{
    census,
    failure::{Failure, Result, Trying, claim, contains, same},
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::Crio,
    pod::Pod,
    task::{KILL, ORDINARY, TERM, Task, exit_file},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "exit_codes_and_signals_are_told_by_wait_and_state", codes),
    (BOTH, "output_written_just_before_the_end_is_there", last_words),
    (BOTH, "signal_0_tells_the_living_from_the_dead", probe),
    (BOTH, "a_kill_that_comes_too_late_is_no_error", late_kill),
    (BOTH, "a_wait_sent_before_start_is_answered", early_wait),
    (BOTH, "a_container_without_a_program_fails_and_is_removed", no_program),
    (BOTH, "a_created_container_that_never_starts_is_removed", never_started),
    (OURS, "a_created_container_dies_of_signals", created),
    (OURS, "an_out_of_memory_kill_is_told_by_a_file", out_of_memory),
    (
        OURS,
        "a_machine_that_its_pods_cgroup_has_no_memory_for_is_told_as_out_of_memory",
        host_out_of_memory,
    ),
    (OURS, "an_exit_is_told_by_a_file_too", exits_folder),
];

fn codes(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255)] {
        let container = pod.start(&Wanted::shell(script))?;
        same(script, container.exited(ORDINARY)?.exit_status, code)?;
        let deleted = container.delete()?;
        same("Delete.exit_status", deleted.exit_status, code)?;
        claim(deleted.exited_at.is_some(), "Delete answers without exited_at")?;
        container.discard()?;
    }
    for (signal, code) in [(KILL, 137), (TERM, 143)] {
        // The first process of a pid namespace dies of no signal that it has no handler for, but for KILL.
        let container = pod.start(&Wanted::shell(
            "trap 'exit 143' TERM; echo ready; while :; do sleep 1000 & wait $!; done",
        ))?;
        container.stdout()?.line("ready", ORDINARY)?;
        container.kill("", signal)?.granted(ORDINARY)?;
        same(
            "the exit code after a signal",
            container.exited(ORDINARY)?.exit_status,
            code,
        )?;
        container.remove()?;
    }
    pod.end([])
}

fn last_words(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    for _ in 0..5 {
        let container = pod.start(&Wanted::shell("seq 1 20000; echo error >&2; exit 1"))?;
        container.exited(ORDINARY)?;
        let output = container.stdout()?.end(ORDINARY)?;
        claim(
            output.ends_with(b"\n19999\n20000\n"),
            format!("{} bytes of output do not end as written", output.len()),
        )?;
        let stderr = container.streams.as_ref().and_then(|streams| streams.stderr.as_ref());
        same(
            "standard error",
            stderr.map(|stderr| stderr.end(ORDINARY)).transpose()?,
            Some(b"error\n".to_vec()),
        )?;
        container.remove()?;
    }
    pod.end([])
}

fn probe(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.idle()?;
    pod.sandbox.kill("", 0)?.granted(ORDINARY)?;
    container.kill("", 0)?.granted(ORDINARY)?;
    container.is(Status::RUNNING)?;
    container.stop(crate::pod::GRACE)?;
    let refusal = container.kill("", 0)?.refused(ORDINARY)?;
    same("the status of a probe of the dead", refusal.code, Some(Code::NOT_FOUND))?;
    pod.end([container])
}

fn late_kill(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.start(&Wanted::shell("exit 5"))?;
    container.exited(ORDINARY)?;
    for signal in [TERM, KILL] {
        if let Err(refusal) = container.kill("", signal)?.answer(ORDINARY)? {
            same("the status of a late Kill", refusal.code, Some(Code::NOT_FOUND))?;
        }
    }
    same(
        "the exit code afterwards",
        container.is(Status::STOPPED)?.exit_status,
        5,
    )?;
    same(
        "a second Wait",
        container.begin_wait("")?.granted(ORDINARY)?.exit_status,
        5,
    )?;
    pod.end([container])
}

fn early_wait(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.create(&Wanted::shell("exit 6"))?;
    let early = container.begin_wait("")?;
    container.start()?;
    same("the early Wait", early.granted(ORDINARY)?.exit_status, 6)?;
    same("the usual Wait", container.exited(ORDINARY)?.exit_status, 6)?;
    pod.end([container])
}

fn no_program(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.prepare(&Wanted {
        args: vec!["/no/such/program".into()],
        ..Wanted::default()
    })?;
    match container.create().and_then(|_| container.start()) {
        // Where the program is looked for only after Start was answered, the exit code says it as a shell does.
        Ok(()) => same("the exit code", container.exited(ORDINARY)?.exit_status, 127)?,
        Err(failure) => contains("the refusal", &failure.to_string(), "/no/such/program")?,
    }
    removed(container)?;
    let healthy = pod.idle()?;
    pod.end([healthy])
}

/// Deletes what may never have come to exist.
fn removed(container: Task<'_, '_>) -> Result {
    if let Err(refusal) = container.begin_delete("")?.answer(ORDINARY)? {
        claim(refusal.means_gone(), format!("Delete was refused: {refusal}"))?;
    }
    container.shutdown()?;
    container.discard()
}

fn never_started(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.create(&Wanted::idle())?;
    container.is(Status::CREATED)?;
    container.kill("", KILL)?.granted(ORDINARY)?;
    let exit = container.begin_wait("")?.granted(ORDINARY)?;
    same("the exit code", exit.exit_status, 137)?;
    pod.end([container])
}

/// What has not been started has no handler: whatever would end a program ends it.
fn created(crio: &Crio<'_>) -> Result {
    const HANGUP: u32 = 1;
    const FIRST_REAL_TIME: u32 = 34;
    const CHILD: u32 = 17;
    let pod = Pod::run(crio)?;
    for signal in [TERM, HANGUP, FIRST_REAL_TIME] {
        let mut container = pod.create(&Wanted::idle())?;
        container.kill("", CHILD)?.granted(ORDINARY)?;
        container.is(Status::CREATED)?;
        container.kill("", signal)?.granted(ORDINARY)?;
        let exit = container.begin_wait("")?.granted(ORDINARY)?;
        same("the exit code", exit.exit_status, 128 + signal)?;
        container.rootfs.unmount()?;
        container.begin_start()?.refused(ORDINARY)?;
        container.remove()?;
    }
    pod.end([])
}

fn out_of_memory(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let file = |task: &Task<'_, '_>| task.bundle.join("oom").exists();
    let hog = pod.start(&Wanted::shell("x=abcdefgh; while :; do x=$x$x; done").with_memory(32))?;
    let wait = hog
        .exit
        .as_ref()
        .ok_or_else(|| Failure::Claim("nobody waits for this container".into()))?;
    let exit = wait.granted(ORDINARY)?;
    claim(
        file(&hog),
        "Wait of a container that ran out of memory was answered before the file `oom` was in its bundle",
    )?;
    same("the exit code", exit.exit_status, 137)?;
    let other = pod.start(&Wanted::shell("kill -9 $$; exit 137"))?;
    same("the exit code of another", other.exited(ORDINARY)?.exit_status, 137)?;
    claim(!file(&other), "a container that had memory enough has a file `oom`")?;
    // A first process that would live on without its children.
    let parent = "(x=abcdefgh; while :; do x=$x$x; done); exec sleep 1000";
    let whole = pod.start(&Wanted::shell(parent).with_memory(32).killed_whole())?;
    same("the exit code of all", whole.exited(ORDINARY)?.exit_status, 137)?;
    claim(file(&whole), "a container that was killed as a whole has no file `oom`")?;
    pod.end([hog, other, whole])
}

fn host_out_of_memory(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let (hog, other) = (pod.start(&Wanted::idle())?, pod.idle()?);
    // The kubelet limits the pod to what its containers may use and an overhead; here that is as good as used up.
    let folder = census::hierarchies()
        .into_iter()
        .map(|hierarchy| hierarchy.join(pod.facts.cgroup.trim_start_matches('/')));
    let file = |names: [&str; 2]| {
        folder
            .clone()
            .flat_map(|folder| names.map(|name| folder.join(name)))
            .find(|file| file.exists())
    };
    let missing = || Failure::Claim("the host has no memory controller".into());
    let used = file(["memory.current", "memory.usage_in_bytes"]).ok_or_else(missing)?;
    let limit = file(["memory.max", "memory.limit_in_bytes"]).ok_or_else(missing)?;
    let used = fs::read_to_string(&used).trying(format!("reading {}", used.display()))?;
    let bytes = used
        .trim()
        .parse::<u64>()
        .map_err(|error| Failure::Claim(format!("{used}: {error}")))?
        + (32 << 20);
    fs::write(&limit, bytes.to_string()).trying(format!("writing {}", limit.display()))?;

    let exec = hog.begin_exec(&["sh", "-c", "head -c 800000000 /dev/zero | tail"], false, false)?;
    for task in [&hog, &other] {
        let exit = task.exited(ORDINARY)?;
        claim(
            task.bundle.join("oom").exists(),
            "Wait of a container whose machine was killed for want of memory was answered before the file `oom` was in its bundle",
        )?;
        same("the exit code", exit.exit_status, 137)?;
    }
    exec.finish(ORDINARY)?;
    pod.end([hog, other])
}

fn exits_folder(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.start(&Wanted::shell("exit 9"))?;
    container.exited(ORDINARY)?;
    let path = exit_file(&container.id);
    Bell::default().until("the file in CRI-O's exits folder", ORDINARY, || {
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    })?;
    pod.end([container])
}
