//! CRI-O goes away and comes back; the pod does not notice.

use std::{fs, time::Duration};

use containerd_shim_protos::api::Status;
use tests::{
    failure::{Failure, Result, Trying, claim, same},
    run::last_of,
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::Crio,
    pod::{GRACE, Pod},
    task::{ORDINARY, Task, exit_file},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "no_output_is_lost_while_crio_is_away", output),
    (BOTH, "a_pod_is_served_after_crio_is_back", served),
    (OURS, "an_exit_while_crio_is_away_is_told", exit),
    (OURS, "last_words_wait_until_crio_is_back", last_words),
    (BOTH, "restarts_in_a_row_change_nothing", in_a_row),
];

/// More than all pipes and buffers on the way hold, so that the container has to wait for CRI-O.
const LINES: usize = 200_000;

fn output(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let mut talker = pod.start(&Wanted::shell(&format!("seq 1 {LINES}; echo done >&2")))?;
    talker
        .stdout()?
        .until("the first lines", ORDINARY, |bytes| bytes.len() > 1000)?;
    let mut text = talker.abandon()?;
    pod.sandbox.abandon()?;
    pod.sandbox.recover()?;
    talker.recover()?;
    text.append(&mut talker.stdout()?.end(ORDINARY * 3)?);
    let wanted: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    let agree = text
        .iter()
        .zip(wanted.as_bytes())
        .take_while(|(got, want)| got == want)
        .count();
    let around = last_of(&String::from_utf8_lossy(&text[..agree.min(text.len())]), 30);
    claim(
        text == wanted.as_bytes(),
        format!(
            "{} bytes of {} came, the same up to {agree}, {around:?}",
            text.len(),
            wanted.len()
        ),
    )?;
    pod.end([talker])
}

fn served(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let mut container = pod.start(&Wanted::idle().with_stdin())?;
    container.stdout()?.line("ready", ORDINARY)?;
    container.abandon()?;
    pod.sandbox.abandon()?;
    same(
        "the sandbox's status",
        pod.sandbox.recover()?.status.enum_value_or_default(),
        Status::RUNNING,
    )?;
    let state = container.recover()?;
    same(
        "the container's status",
        state.status.enum_value_or_default(),
        Status::RUNNING,
    )?;
    container.is(Status::RUNNING)?;
    container.kill("", 0)?.granted(ORDINARY)?;
    same("an exec", container.shell("echo here")?, "here")?;
    let another = pod.idle()?;
    same("the exit code on TERM", container.stop(GRACE)?.exit_status, 0)?;
    pod.end([container, another])
}

/// Waits until the file is there by which CRI-O learns of a container's exit.
fn exit_is_written(container: &Task) -> Result {
    let file = exit_file(&container.id);
    Bell::default().until("the file in CRI-O's exits folder", ORDINARY, || match file.exists() {
        true => Ok(()),
        false => Err(format!("no {}", file.display())),
    })
}

/// After its restart CRI-O sends no Wait: only a new file in its exits folder makes it look.
fn exit(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let mut container = pod.start(&Wanted::shell(
        "trap 'exit 11' USR1; echo ready; while :; do sleep 1000 & wait $!; done",
    ))?;
    container.stdout()?.line("ready", ORDINARY)?;
    container.abandon()?;
    pod.sandbox.abandon()?;
    pod.sandbox.recover()?;
    container.recover()?;
    container.kill("", 10)?.granted(ORDINARY)?;
    exit_is_written(&container)?;
    same("State.exit_status", container.is(Status::STOPPED)?.exit_status, 11)?;
    pod.end([container])
}

/// CRI-O opens the fifos of a container again, also when it has ended meanwhile.
fn last_words(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let volume = pod.volume("sign")?;
    let script = "echo ready; until [ -e /volume/go ]; do sleep 0.1; done; echo last; echo words >&2; exit 3";
    let mut container = pod.start(&Wanted::shell(script).with_volume(&volume, "/volume", false))?;
    container.stdout()?.line("ready", ORDINARY)?;
    container.abandon()?;
    pod.sandbox.abandon()?;
    fs::write(volume.join("go"), "").trying("giving the container its sign")?;
    exit_is_written(&container)?;
    pod.sandbox.recover()?;
    container.recover()?;
    same("the exit code", container.is(Status::STOPPED)?.exit_status, 3)?;
    let streams = container.streams.take();
    let streams = streams.ok_or_else(|| Failure::Claim("nobody reads this container".into()))?;
    for (reader, text) in [(Some(streams.stdout), "last"), (streams.stderr, "words")] {
        let reader = reader.ok_or_else(|| Failure::Claim("nobody reads this stream".into()))?;
        reader.line(text, ORDINARY)?;
        let taken = reader.close()?;
        same("what came", taken.bytes, format!("{text}\n").into_bytes())?;
        claim(taken.ended, "more might come from a container that has ended")?;
    }
    pod.end([container])
}

fn in_a_row(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.start(&Wanted::shell(
        "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done",
    ))?;
    let mut text = Vec::new();
    for _ in 0..10 {
        let seen = text.len();
        container
            .stdout()?
            .until("a line", ORDINARY, |bytes| bytes.contains(&b'\n'))?;
        text.append(&mut container.abandon()?);
        claim(text.len() > seen, "nothing came between two restarts")?;
        container.recover()?;
    }
    let exit = container.stop(GRACE)?;
    same("the exit code", exit.exit_status, 0)?;
    text.append(&mut container.stdout()?.end(Duration::from_secs(10))?);
    let text = String::from_utf8_lossy(&text).into_owned();
    let out_of_order = text
        .lines()
        .zip(1..)
        .find(|(line, number)| *line != format!("line {number}"));
    claim(
        out_of_order.is_none(),
        format!("lines were lost or repeated at {out_of_order:?}"),
    )?;
    pod.end([container])
}
