//! Exec and ExecSync.

use std::{fs, time::Duration};

use containerd_shim_protos::api::Status;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::failure::{Result, Trying, claim, contains, same};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::Pod,
    process::{self, Kind},
    task::{KILL, ORDINARY},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "the_output_of_an_exec_is_complete_before_wait_answers", complete),
    (
        BOTH,
        "an_exec_has_a_terminal_only_when_the_request_says_so",
        no_terminal,
    ),
    (BOTH, "an_exec_with_a_terminal_follows_its_size", terminal),
    (BOTH, "an_exec_reads_its_input_to_the_end_that_closeio_makes", input),
    (BOTH, "without_an_input_its_end_is_read", no_input),
    (BOTH, "an_exec_whose_time_is_up_is_killed_alone", timeout),
    (
        OURS,
        "an_exec_whose_time_is_up_takes_its_children_along",
        timeout_of_a_group,
    ),
    (OURS, "an_exec_that_is_slow_to_die_harms_nobody", slow),
    (BOTH, "an_exec_runs_in_a_container_that_is_not_started", not_started),
    (BOTH, "an_exec_of_nothing_fails_and_harms_nobody", nothing),
    (BOTH, "exit_codes_of_execs_are_theirs", codes),
    (BOTH, "many_execs_at_once_keep_their_output_apart", many),
    (BOTH, "an_exec_ends_while_its_child_keeps_the_output_open", orphan),
];

/// How soon an exec must end that a signal ends, whatever its children do.
const SOON: Duration = Duration::from_secs(10);

/// For what takes seconds on an idle machine.
const LONG: Duration = Duration::from_secs(120);

/// More than a pipe holds, and not a multiple of anything.
const MUCH: usize = 300_001;

fn complete(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let script = format!("head -c {MUCH} /dev/zero | tr '\\0' o; head -c {MUCH} /dev/zero | tr '\\0' e >&2");
    for round in 0..12 {
        let done = container
            .begin_exec(&["sh", "-c", &script], false, false)?
            .finish(ORDINARY)?;
        same("the exit code", done.code, 0)?;
        same(
            &format!("bytes of standard output in round {round}"),
            count(&done.stdout, b'o'),
            MUCH,
        )?;
        same(
            &format!("bytes of standard error in round {round}"),
            count(&done.stderr, b'e'),
            MUCH,
        )?;
        if crio.runtime == Runtime::Sandpod {
            // The reference is only lucky: CRI-O reads nothing after Wait.
            same(
                &format!("bytes still in the pipes when Wait was answered, in round {round}"),
                done.late,
                0,
            )?;
        }
    }
    pod.end([container])
}

fn count(bytes: &[u8], wanted: u8) -> usize {
    bytes.iter().filter(|byte| **byte == wanted).count()
}

fn no_terminal(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.start(&Wanted::idle().with_tty())?;
    container.stdout()?.line("ready", ORDINARY)?;
    let done = container.exec(&["sh", "-c", "test -t 1 || echo none; echo apart >&2"])?;
    same("standard output", done.text(), "none")?;
    same("standard error", done.errors(), "apart")?;
    pod.end([container])
}

fn terminal(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(&["sh"], true, true)?;
    exec.resize(77, 33)?;
    let mut input = exec.fifos.input()?;
    input.send(b"stty -echo; stty size; test -t 0 && echo on a terminal\n", ORDINARY)?;
    exec.streams.stdout.line("33 77", ORDINARY)?;
    exec.streams.stdout.line("on a terminal", ORDINARY)?;
    exec.resize(100, 40)?;
    input.send(b"stty size; echo to stderr >&2\n", ORDINARY)?;
    exec.streams.stdout.line("40 100", ORDINARY)?;
    exec.streams.stdout.line("to stderr", ORDINARY)?;
    input.send(b"exit 3\n", ORDINARY)?;
    drop(input);
    let done = exec.finish(ORDINARY)?;
    same("the exit code", done.code, 3)?;
    contains("the terminal's line ends", &done.text(), "\r\n")?;
    pod.end([container])
}

fn input(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(&["sh", "-c", "cat; echo at the end"], false, true)?;
    let mut input = exec.fifos.input()?;
    input.send(b"one\n", ORDINARY)?;
    exec.streams.stdout.line("one", ORDINARY)?;
    exec.still_runs()?;
    // More than any buffer on the way, and then the end at once.
    input.send(&b"x".repeat(MUCH), ORDINARY)?;
    input.send(b"\n", ORDINARY)?;
    drop(input);
    exec.close_input()?;
    let done = exec.finish(ORDINARY)?;
    same("bytes that went through", count(&done.stdout, b'x'), MUCH)?;
    contains("the last words", &done.text(), "at the end")?;
    pod.end([container])
}

fn no_input(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let reader = pod.start(&Wanted::shell("cat; echo the end"))?;
    same("a container's exit code", reader.exited(ORDINARY)?.exit_status, 0)?;
    same("its output", &*reader.stdout()?.end(ORDINARY)?, b"the end\n")?;
    let container = pod.idle()?;
    same("an exec", container.shell("cat; echo the end")?, "the end")?;
    pod.end([container, reader])
}

fn timeout(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(
        &["sh", "-c", "trap '' TERM INT; echo begun; exec sleep 1000"],
        false,
        false,
    )?;
    exec.streams.stdout.line("begun", ORDINARY)?;
    let done = exec.time_out()?;
    same("the exit code of a killed exec", done.code, 137)?;
    container.is(Status::RUNNING)?;
    same("the container's word", container.shell("echo here")?, "here")?;
    pod.end([container])
}

/// critest looks for the command in the list of processes after ExecSync's time was up.
fn timeout_of_a_group(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(&["sh", "-c", "sleep 4321 & echo begun; sleep 4321; true"], false, false)?;
    exec.streams.stdout.line("begun", ORDINARY)?;
    same("the exit code of a killed exec", exec.time_out()?.code, 137)?;
    let processes = container.shell("ps")?;
    claim(
        !processes.contains("sleep 4321"),
        format!("the children of a killed exec live on: {processes}"),
    )?;
    pod.end([container])
}

/// A process that waits for a file of the host dies when the file server answers. That is no reason to end a pod.
fn slow(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let volume = pod.volume("slow")?;
    fs::write(volume.join("file"), "text").trying("writing into the volume")?;
    let [container, other] = [
        pod.start(&Wanted::idle().with_volume(&volume, "/volume", false))?,
        pod.idle()?,
    ];
    container.stdout()?.line("ready", ORDINARY)?;
    // What both do from now on the shell does by itself: a program would come from the file server.
    let clock = other.begin_exec(&["sh", "-c", "echo begun; read -t 15 line; echo later"], false, true)?;
    clock.streams.stdout.line("begun", ORDINARY)?;
    let script = "echo begun; read line; echo reading; exec 3</volume/file; echo done";
    let stuck = container.begin_exec(&["sh", "-c", script], false, true)?;
    stuck.streams.stdout.line("begun", ORDINARY)?;
    let servers = process::running(Kind::FileServer, crio);
    let signal = |signal| {
        let mut pids = servers.iter().map(|pid| Pid::from_raw(*pid));
        pids.try_for_each(|pid| kill(pid, signal))
            .trying(format!("sending {signal} to the file server"))
    };
    signal(Signal::SIGSTOP)?;
    stuck.fifos.input()?.send(b"go\n", ORDINARY)?;
    stuck.streams.stdout.line("reading", ORDINARY)?;
    container.kill(&stuck.id, KILL)?.granted(ORDINARY)?;
    clock.streams.stdout.line("later", LONG)?;
    stuck.still_runs()?;
    pod.sandbox.is(Status::RUNNING)?;
    container.is(Status::RUNNING)?;
    signal(Signal::SIGCONT)?;
    same("the exit code of what was killed", stuck.finish(LONG)?.code, 137)?;
    clock.finish(LONG)?;
    same("a container's word", container.shell("echo here")?, "here")?;
    pod.end([container, other])
}

/// Its namespaces and files are there already.
fn not_started(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.create(&Wanted::idle())?;
    same("an exec before the start", container.shell("echo here")?, "here")?;
    container.start()?;
    container.stdout()?.line("ready", ORDINARY)?;
    same("an exec after the start", container.shell("echo here")?, "here")?;
    pod.end([container])
}

fn nothing(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    match container.begin_exec(&["/no/such/program"], false, false) {
        // Where the program is looked for only after Start was answered, the exit code says it as a shell does.
        Ok(exec) => same("the exit code", exec.finish(ORDINARY)?.code, 127)?,
        Err(refusal) => contains("the refusal", &refusal.to_string(), "/no/such/program")?,
    }
    container.is(Status::RUNNING)?;
    same("the container's word", container.shell("echo here")?, "here")?;
    pod.end([container])
}

fn codes(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill -15 $$", 143),
    ] {
        same(script, container.exec(&["sh", "-c", script])?.code, code)?;
    }
    pod.end([container])
}

fn many(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let begin = |number: usize| {
        let script = format!("for i in 1 2 3 4 5; do head -c 20000 /dev/zero | tr '\\0' {number}; done; exit {number}");
        container.begin_exec(&["sh", "-c", &script], false, false)
    };
    let execs = (0..8).map(begin).collect::<Result<Vec<_>>>()?;
    for (number, exec) in (0u8..).zip(execs) {
        let done = exec.finish(ORDINARY * 2)?;
        same("an exec's exit code", done.code, u32::from(number))?;
        same("an exec's own bytes", count(&done.stdout, b'0' + number), 100_000)?;
        same("all bytes of an exec", done.stdout.len(), 100_000)?;
    }
    pod.end([container])
}

/// kubectl exec of a script that leaves a daemon behind: the exit is the process's, whoever holds the output.
fn orphan(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let exec = container.begin_exec(&["sh", "-c", "sleep 1000 & echo parent done; exit 4"], false, false)?;
    exec.streams.stdout.line("parent done", ORDINARY)?;
    if crio.runtime == Runtime::Sandpod {
        let done = exec.finish(SOON)?;
        same("the exit code", done.code, 4)?;
        claim(
            container.shell("ps")?.contains("sleep 1000"),
            "the daemon that the exec left was killed",
        )?;
    } else {
        // runc's pipes are the process's own: Wait comes, the end of the output does not. CRI-O does not wait for it
        // either.
        container.kill(&exec.id, 0)?.answer(ORDINARY)?.ok();
        container.shell("kill $(pidof sleep) 2>/dev/null; true")?;
        same("the exit code", exec.finish(ORDINARY)?.code, 4)?;
    }
    pod.end([container])
}
