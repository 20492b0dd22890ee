//! A guest that is an attacker's: `tests/src/bin/hostile-agent` is its agent.
//!
//! Whatever it says, the shim lives, answers CRI-O in time, stays small, and touches nothing but what is the sandbox's;
//! and everything is gone afterwards, which the node looks after.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use containerd_shim_protos::api::Status;
use tests::{
    config::{accelerator, configuration},
    failure::{Failure, Result, Trying, claim, contains, same},
    places,
    run::{ORDINARY as PROGRAM, succeed},
};

use super::{OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{Place, Pod, PodWanted},
    process::{self, Kind},
    task::{BOOT, KILL, ORDINARY, Task},
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "a_hostile_guest_that_answers_anything_harms_nobody", rude),
    (OURS, "a_hostile_guest_that_stops_answering_is_ended", mute),
    (OURS, "a_hostile_guest_that_denies_its_processes_is_ended", deny),
    (OURS, "a_hostile_guest_that_breaks_the_protocol_is_ended", broken),
    (OURS, "a_hostile_guest_that_is_never_born_is_given_up", unborn),
    (OURS, "a_hostile_guest_that_never_gets_ready_is_given_up", unready),
    (OURS, "a_hostile_guest_does_not_link_out_of_its_share", links),
    (OURS, "a_hostile_guests_metrics_are_its_own_or_none", scraped),
    (
        OURS,
        "an_agent_that_closes_the_output_when_it_is_asked_for_the_end_loses_none",
        upstream,
    ),
];

/// What the shim of a hostile guest may have had in memory at any time, shared pages of its program included.
const MOST_KIB: u64 = 32 << 10;
/// How soon a guest must be gone that cannot be spoken to.
const SOON: Duration = Duration::from_secs(10);
/// How long CRI-O waits for the end of what it has killed (`killContainerTimeout`).
const CRIOS_PATIENCE: Duration = Duration::from_secs(120);
/// How soon an answer must come that no guest has a part in.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How long an exit may be held up: by output without end, statistics without answer, and a container that is not
/// removed.
const HELD_UP: Duration = Duration::from_secs(30);

/// Plays against a hostile guest of this manner; `more` goes to the end of the configuration.
pub(super) fn against(crio: &Crio<'_>, manner: &str, more: &str, play: impl FnOnce(&Crio<'_>) -> Result) -> Result {
    let guest = crio.node.folder().join("hostile-guest");
    if !guest.exists() {
        let recipe = places::workspace().join("deploy/guest/build-image.sh");
        let agent = places::binaries()?.join("hostile-agent");
        succeed(Command::new(recipe).arg("own").arg(agent).arg(&guest), PROGRAM)?;
    }
    let text = configuration(&guest, &places::virtiofsd()?, accelerator(), true);
    let text = format!("{text}kernel_params = \"hostile={manner}\"\n{more}");
    let crio = Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)?;
    play(&crio).map_err(|failure| Failure::Claim(format!("{failure}{}", crio.log())))
}

/// The shim must live and be small, at its largest. Returns the KiB.
fn shim_is_small(crio: &Crio<'_>) -> Result<u64> {
    let shim = process::only(Kind::Shim, crio)?;
    let status = fs::read_to_string(format!("/proc/{shim}/status")).trying("looking at the shim")?;
    let most = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(u64::MAX);
    println!("the shim had at most {most} KiB in memory");
    claim(
        most <= MOST_KIB,
        format!("the shim had {most} KiB in memory, more than {MOST_KIB}"),
    )?;
    Ok(most)
}

/// A container of the hostile agent's, whose manner is its command.
fn wanted(manner: &str) -> Wanted {
    Wanted {
        args: vec![manner.into()],
        stdin: true,
        ..Wanted::default()
    }
}

fn rude(crio: &Crio<'_>) -> Result {
    const MANNERS: &[&str] = &[
        "endless",
        "input-more",
        "input-most",
        "input-none",
        "odd-exit",
        "high-exit",
        "numbers",
        "crowded",
        "garbage",
        "late",
    ];
    against(crio, "rude", "", |crio| {
        let mut pod = Pod::run(crio)?;
        let mut containers = Vec::new();
        for manner in MANNERS {
            let container = pod.start(&wanted(manner))?;
            // What this guest says of the exit comes at once, and ends the container and its input.
            let ends = manner.ends_with("exit") || *manner == "garbage";
            match container.fifos.input() {
                // Whatever comes of the input, it is taken.
                Ok(mut input) => input.send(b"some words\n", ORDINARY)?,
                Err(failure) => claim(ends, failure.to_string())?,
            }
            container.begin_state()?.granted(AT_ONCE)?;
            if !ends {
                container.is(Status::RUNNING)?;
            }
            if *manner != "late" {
                // Statistics or a refusal, but in time.
                drop(container.stats());
            }
            containers.push(container);
        }
        refused_in_a_sentence(&pod)?;
        forwarded(&pod)?;
        shim_is_small(crio)?;
        for container in &containers {
            // The answer does not matter, as to CRI-O; that it comes does.
            drop(container.kill("", KILL)?.answer(ORDINARY)?);
        }
        for (container, manner) in containers.iter().zip(MANNERS) {
            let exit = container.exited(HELD_UP)?;
            let expected = if manner.ends_with("exit") { 255 } else { 137 };
            same(manner, exit.exit_status, expected)?;
        }
        pod.sandbox.is(Status::RUNNING)?;
        shim_is_small(crio)?;
        let mut all: Vec<_> = containers.iter_mut().collect();
        pod.stop(&mut all)?;
        containers.into_iter().try_for_each(Task::remove)?;
        pod.remove()
    })
}

/// What a guest says reaches events and logs as one line of bounded length.
fn refused_in_a_sentence(pod: &Pod<'_, '_>) -> Result {
    let container = pod.create(&wanted("wordy"))?;
    let refusal = container.begin_start()?.refused(ORDINARY)?;
    let words = &refusal.message;
    claim(
        words.len() < 5000 && !words.contains(char::is_control),
        format!("a guest's refusal has {} bytes: {words:?}", words.len()),
    )?;
    container.remove()
}

/// A forwarded connection gets what comes, and ends when its client has had enough.
fn forwarded(pod: &Pod<'_, '_>) -> Result {
    let namespaces = &pod.facts.namespaces;
    let network = namespaces
        .iter()
        .find(|(kind, _)| *kind == "network")
        .map(|(_, path)| path);
    let mut command = Command::new("nsenter");
    command.arg(format!(
        "--net={}",
        network.map_or(String::new(), |path| path.display().to_string())
    ));
    command.args([
        "bash",
        "-c",
        "exec 3<>/dev/tcp/127.0.0.1/8080; head -c 8000000 <&3 | wc -c",
    ]);
    same(
        "forwarded bytes",
        succeed(&mut command, PROGRAM)?.text().trim(),
        "8000000",
    )
}

/// A container runs; then the guest is silent.
fn mute(crio: &Crio<'_>) -> Result {
    against(crio, "mute", "", |crio| {
        let pod = Pod::run(crio)?;
        let container = pod.start(&wanted("sleeper"))?;
        ended_by_kill(crio, pod, container)
    })
}

/// The guest does not know the process that it runs.
fn deny(crio: &Crio<'_>) -> Result {
    against(crio, "deny", "", |crio| {
        let pod = Pod::run(crio)?;
        let container = pod.start(&wanted("sleeper"))?;
        ended_by_kill(crio, pod, container)
    })
}

fn ended_by_kill<'c, 'n>(crio: &'c Crio<'n>, pod: Pod<'c, 'n>, container: Task<'c, 'n>) -> Result {
    let machine = process::of_the_vm(crio);
    container.kill("", KILL)?.granted(SOON)?;
    container.begin_state()?.granted(AT_ONCE)?;
    same("the exit", container.exited(CRIOS_PATIENCE)?.exit_status, 137)?;
    process::gone("the machine", &machine, SOON)?;
    shim_is_small(crio)?;
    pod.end([container])
}

/// Frames that are no answers end the connection, and the machine with it.
fn broken(crio: &Crio<'_>) -> Result {
    for manner in ["oversized", "streaming", "gone"] {
        against(crio, manner, "", |crio| {
            let pod = Pod::run(crio)?;
            let container = pod.create(&wanted("sleeper"))?;
            let machine = process::of_the_vm(crio);
            container.begin_start()?.refused(SOON)?;
            process::gone("the machine", &machine, SOON)?;
            same("the exit", container.begin_wait("")?.granted(SOON)?.exit_status, 137)?;
            shim_is_small(crio)?;
            pod.end([container])
        })?;
    }
    Ok(())
}

/// Create fails when the agent's time is up.
fn unborn(crio: &Crio<'_>) -> Result {
    let before = crio.node.census();
    against(crio, "unborn", "[agent.kata]\ndial_timeout = 2\n", |crio| {
        let mut place = Place::make(crio, &PodWanted::default())?;
        let sandbox = place.prepare(crio)?;
        sandbox.begin_create()?.refused(ORDINARY)?;
        place.release()?;
        place.remove()?;
        sandbox.discard()?;
        crio.node.as_before(&before, SOON)
    })
}

/// Nobody has to wait for a Create that the guest holds up.
fn unready(crio: &Crio<'_>) -> Result {
    let before = crio.node.census();
    against(crio, "unready", "", |crio| {
        let mut place = Place::make(crio, &PodWanted::default())?;
        let sandbox = place.prepare(crio)?;
        let pending = sandbox.begin_create()?;
        process::appears(Kind::Vm, crio, BOOT)?;
        same(
            "the state",
            sandbox.begin_state()?.granted(AT_ONCE)?.status.enum_value_or_default(),
            Status::CREATED,
        )?;
        sandbox.kill("", KILL)?.granted(AT_ONCE)?;
        shim_is_small(crio)?;
        sandbox.begin_delete("")?.granted(AT_ONCE)?;
        let machine = [&process::of_the_vm(crio)[..], &process::running(Kind::Shim, crio)].concat();
        sandbox.shutdown()?;
        drop(pending);
        process::gone("the shim and the machine", &machine, SOON)?;
        place.release()?;
        place.remove()?;
        sandbox.discard()?;
        crio.node.as_before(&before, SOON)
    })
}

/// The guest puts a link to a folder of the host where the shim is about to put the copy of a ConfigMap.
fn links(crio: &Crio<'_>) -> Result {
    let storage = crio.node.folder().join("storage");
    let canary = storage.join("canary");
    fs::create_dir_all(&canary).trying("making the canary")?;
    against(crio, &format!("links canary={}", canary.display()), "", |crio| {
        let pod = Pod::run(crio)?;
        let container = pod.start(&wanted("sleeper").with_volume(&config_map(&storage)?, "/etc/settings", true))?;
        let found: Vec<_> = fs::read_dir(&canary)
            .trying("looking at the canary")?
            .flatten()
            .collect();
        claim(found.is_empty(), format!("the shim wrote out of the share: {found:?}"))?;
        shim_is_small(crio)?;
        pod.end([container])
    })
}

/// What is asked of the shim's metrics is answered, whatever the guest says; a frame that is too long is the guest's
/// last word.
fn scraped(crio: &Crio<'_>) -> Result {
    against(crio, "scraped", "", |crio| {
        let pod = Pod::run(crio)?;
        let container = pod.start(&wanted("sleeper"))?;
        let machine = process::of_the_vm(crio);
        for (what, of_guest) in [
            ("other metrics", true),
            ("too many", false),
            ("a frame without end", false),
        ] {
            let text = scrape(&pod.facts.id)?;
            contains(what, &text, "kata_shim_fds ")?;
            same(what, text.contains("kata_guest_own 1\n"), of_guest)?;
            let lines: Vec<_> = text.lines().filter(|line| line.contains("6.66e66")).collect();
            same(
                &format!("what the guest said of others with {what}"),
                lines,
                Vec::<&str>::new(),
            )?;
            if what != "a frame without end" {
                container.is(Status::RUNNING)?;
            }
        }
        process::gone("the machine", &machine, HELD_UP)?;
        same("the exit", container.exited(HELD_UP)?.exit_status, 137)?;
        shim_is_small(crio)?;
        pod.end([container])
    })
}

/// The metrics of a sandbox, as `kata-ctl monitor` asks its shim for them.
fn scrape(sandbox: &str) -> Result<String> {
    let socket = format!("/run/kata/{sandbox}/shim-monitor.sock");
    let mut stream = UnixStream::connect(&socket).trying(format!("connecting to {socket}"))?;
    stream.set_read_timeout(Some(ORDINARY)).trying("setting a deadline")?;
    let asked = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: shim\r\n\r\n");
    asked.trying("asking for metrics")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).trying("reading metrics")?;
    contains("the answer to a scrape", &text, "HTTP/1.1 200 ")?;
    Ok(text)
}

/// An agent that is not ours: its containers' output is there until somebody asks how they ended. And it has fewer
/// processors than it should, which is no reason to refuse a container.
fn upstream(crio: &Crio<'_>) -> Result {
    const BYTES: usize = 100 * 3000;
    against(crio, "upstream", "", |crio| {
        let mut pod = Pod::run(crio)?;
        let mut container = pod.start(&wanted("writer").with_cpu_limit(2))?;
        same("the exit", container.exited(HELD_UP)?.exit_status, 0)?;
        same("bytes of output", container.stdout()?.end(ORDINARY)?.len(), BYTES)?;
        // Output without end holds up nobody's end.
        let mut endless = pod.start(&wanted("endless"))?;
        endless.kill("", KILL)?.granted(SOON)?;
        endless.exited(HELD_UP)?;
        pod.stop(&mut [&mut container, &mut endless])?;
        container.remove()?;
        endless.remove()?;
        pod.remove()
    })
}

/// A ConfigMap's volume as the kubelet's `AtomicWriter` leaves it.
fn config_map(storage: &std::path::Path) -> Result<PathBuf> {
    let volume = storage.join("pods/uid/volumes/kubernetes.io~configmap/settings");
    let made = || {
        fs::create_dir_all(volume.join("..1"))?;
        fs::write(volume.join("..1/key"), "value")?;
        symlink("..1", volume.join("..data"))?;
        symlink("..data/key", volume.join("key"))
    };
    made().trying("making a ConfigMap")?;
    Ok(volume)
}
