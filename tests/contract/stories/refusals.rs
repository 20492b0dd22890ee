//! What must fail, with a sentence and without a trace.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use tests::{
    config::Guest,
    failure::{Result, Trying, claim, contains, same},
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{Place, Pod, PodWanted},
    process::{self, Kind},
    task::BOOT,
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "a_pod_on_the_hosts_network_is_refused", host_network),
    (OURS, "an_unknown_key_of_the_configuration_is_named", unknown_key),
    (OURS, "a_kernel_that_is_not_there_is_named", no_kernel),
    (OURS, "a_module_that_the_kernel_has_needs_no_loading", modules),
    (OURS, "a_file_server_that_fails_is_told_in_its_own_words", no_server),
    (OURS, "a_shim_that_is_asked_for_nothing_ends", unused),
    (OURS, "a_container_of_an_unknown_sandbox_is_refused", unknown_sandbox),
    (BOTH, "a_second_create_of_the_same_container_is_refused", second_create),
];

/// How soon a shim whose sandbox was refused must be gone: nobody will ask it for anything again.
const SOON: Duration = Duration::from_secs(5);

/// How soon a shim whose caller died before its first request is gone.
const UNUSED: Duration = Duration::from_secs(45);

/// Creates a sandbox that must be refused, lets go of it as CRI-O does, and returns the sentence.
fn refused(crio: &Crio<'_>, wanted: &PodWanted) -> Result<String> {
    refused_and_logged(crio, wanted, "")
}

/// The same for a refusal of which the shim's log has these words.
fn refused_and_logged(crio: &Crio<'_>, wanted: &PodWanted, words: &str) -> Result<String> {
    let before = crio.node.census();
    let mut place = Place::make(crio, wanted)?;
    let sandbox = place.prepare(crio)?;
    let refusal = sandbox.begin_create()?.refused(BOOT)?;
    same(
        "virtual machines of a refused sandbox",
        process::of_the_vm(crio),
        Vec::<i32>::new(),
    )?;
    Bell::default().until("the words in the shim's log", SOON, || match crio.log() {
        log if log.contains(words) => Ok(()),
        log => Err(log),
    })?;
    place.release()?;
    place.remove()?;
    sandbox.discard()?;
    // CRI-O sends neither Delete nor Shutdown for a sandbox whose Create failed.
    crio.node.as_before(&before, SOON)?;
    let sentence = refusal.message;
    claim(
        sentence.contains(' ') && !sentence.contains('\n'),
        format!("{sentence:?} is no sentence"),
    )?;
    Ok(sentence)
}

fn host_network(crio: &Crio<'_>) -> Result {
    let sentence = refused(
        crio,
        &PodWanted {
            host_network: true,
            ..PodWanted::default()
        },
    )?;
    contains("the refusal", &sentence.to_lowercase(), "network")?;
    contains("the refusal", &sentence.to_lowercase(), "host")
}

fn unknown_key(crio: &Crio<'_>) -> Result {
    let text = format!("{}enable_teleportation = true\n", Guest::Own.configuration()?);
    let crio = Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)?;
    contains(
        "the refusal",
        &refused(&crio, &PodWanted::default())?,
        "enable_teleportation",
    )
}

fn no_kernel(crio: &Crio<'_>) -> Result {
    let text = Guest::Own.configuration()?;
    let moved: String = text
        .lines()
        .map(|line| {
            if line.starts_with("kernel = ") {
                "kernel = \"/no/such/vmlinux\"\n".into()
            } else {
                format!("{line}\n")
            }
        })
        .collect();
    let crio = Crio::new(crio.node, Runtime::Sandpod)?.configured(&moved)?;
    contains(
        "the refusal",
        &refused(&crio, &PodWanted::default())?,
        "/no/such/vmlinux",
    )
}

/// `kernel_modules` may name what is built in, but such a module takes its parameters from `kernel_params`.
fn modules(crio: &Crio<'_>) -> Result {
    let with = |modules: &str| -> Result<Crio<'_>> {
        let text = Guest::Own.configuration()?;
        let text = format!("{text}[agent.kata]\nkernel_modules = [{modules}]\n");
        Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)
    };
    let crio = with("\"tun\", \"xt_CT\"")?;
    let pod = Pod::run(&crio)?;
    let container = pod.idle()?;
    pod.end([container])?;
    for (modules, word) in [
        ("\"loop max_loop=4\"", "write loop.max_loop=4 into `kernel_params`"),
        ("\"nobodys\"", "has no module \"nobodys\""),
    ] {
        contains("the refusal", &refused(&with(modules)?, &PodWanted::default())?, word)?;
    }
    Ok(())
}

/// QEMU, which it leaves alone, only says that it could not read from a socket.
fn no_server(crio: &Crio<'_>) -> Result {
    let server = crio.node.folder().join("broken-virtiofsd");
    fs::write(&server, "#!/bin/sh\necho 'the disk has a headache' >&2; exit 3\n")
        .and_then(|()| fs::set_permissions(&server, fs::Permissions::from_mode(0o755)))
        .trying(format!("writing {}", server.display()))?;
    let changed = |line: &str| match line.split_once(" = ") {
        Some(("virtio_fs_daemon", _)) => format!("virtio_fs_daemon = {server:?}\n"),
        _ => format!("{line}\n"),
    };
    let text: String = Guest::Own.configuration()?.lines().map(changed).collect();
    let crio = Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)?;
    let sentence = refused_and_logged(&crio, &PodWanted::default(), "the last words of virtiofsd")?;
    contains("the refusal", &sentence, "virtiofsd exited with code 3")?;
    contains("the refusal", &sentence, "the disk has a headache")
}

/// CRI-O dies between `start` and Create, and its next life knows nothing of the pod.
fn unused(crio: &Crio<'_>) -> Result {
    let before = crio.node.census();
    let mut place = Place::make(crio, &PodWanted::default())?;
    let sandbox = place.prepare(crio)?;
    let shim = process::only(Kind::Shim, crio)?;
    process::gone("the shim", &[shim], UNUSED)?;
    place.release()?;
    place.remove()?;
    sandbox.discard()?;
    crio.node.as_before(&before, SOON)
}

/// CRI-O's memory of a pod whose shim is gone: the container's `start` has nowhere to go, and must not make a machine
/// of its own.
fn unknown_sandbox(crio: &Crio<'_>) -> Result {
    let place = Place::make(crio, &PodWanted::default())?;
    let failure = place
        .prepare_container(crio, &Wanted::idle())
        .err()
        .map(|failure| failure.to_string());
    contains("the failure of `start`", &failure.unwrap_or_default(), &place.facts.id)?;
    same("virtual machines", process::of_the_vm(crio), Vec::<i32>::new())?;
    place.remove()
}

fn second_create(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    container.begin_create()?.refused(BOOT)?;
    same("the container's word", container.shell("echo here")?, "here")?;
    pod.end([container])
}
