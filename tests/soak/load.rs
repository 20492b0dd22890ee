//! Many containers, pods, execs and cycles.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use tests::{
    config::Runtime,
    cri::{Container, Pod},
    failure::{Failure, Result, claim, same},
    footprint::Footprint,
    node::Node,
    run,
};

use crate::{Counts, Story};

pub const STORIES: &[Story] = &[
    ("many_containers_in_a_pod", many_containers_in_a_pod),
    ("many_pods_at_once", many_pods_at_once),
    ("many_execs", many_execs),
    ("many_pods_in_a_row", many_pods_in_a_row),
];

/// Execs at a time.
pub const STREAMS: usize = 10;

/// How much the shim's memory may differ after many execs: its allocator's slack.
const SLACK_KIB: u64 = 1024;

/// Each of many containers has its own log, exec and exit code, while all others run.
fn many_containers_in_a_pod(node: &Node, runtime: Runtime, counts: Counts) -> Result {
    let pod = node.pod(runtime, "crowd")?.run()?;
    let script =
        |number| format!("trap 'exit {number}' TERM; echo I am {number}; while :; do sleep 1000 & wait $!; done");
    let start = Instant::now();
    let containers: Vec<_> = (1..=counts.containers)
        .map(|number| pod.shell(&format!("number-{number}"), &script(number)).run())
        .collect::<Result<_>>()?;
    println!(
        "soak: {} containers of a pod run after {:?}",
        containers.len(),
        start.elapsed()
    );
    for (number, container) in (1..).zip(&containers) {
        container.wait_for_log(&format!("I am {number}"))?;
        same("exec", container.shell(&format!("echo {number}"))?, number.to_string())?;
    }
    for (number, container) in (1..).zip(&containers) {
        container.kill("SIGTERM")?;
        same("exit code", container.wait_exit()?.code, number)?;
    }
    pod.remove()
}

/// Many pods start at the same moment, live side by side, and go.
fn many_pods_at_once(node: &Node, runtime: Runtime, counts: Counts) -> Result {
    let start = Instant::now();
    let pods: Vec<Pod<'_>> = at_once(counts.pods, |_| node.pod(runtime, "many")?.run())?;
    println!(
        "soak: {} pods started at once run after {:?}",
        pods.len(),
        start.elapsed()
    );
    at_once(pods.len(), |number| {
        let container = pods[number].container("one", &["sleep", "infinity"]).run()?;
        same("exec", container.shell(&format!("echo {number}"))?, number.to_string())
    })?;
    for pod in pods {
        pod.remove()?;
    }
    Ok(())
}

/// Ten streams of execs: every byte and every exit code is right, and the shim holds no more memory than before.
fn many_execs(node: &Node, runtime: Runtime, counts: Counts) -> Result {
    let pod = node.pod(runtime, "busy")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    // A tenth first: what a shim allocates at its first use is no growth.
    execs(&container, counts.execs / 10)?;
    let own = || Footprint::of(&pod.processes()).shim_unshared_kib;
    let before = own();
    claim(before > 0, "the pod has a shim")?;
    let start = Instant::now();
    execs(&container, counts.execs - counts.execs / 10)?;
    let after = own();
    println!(
        "soak: {} execs took {:?}; the shim's own memory was {before} KiB, is {after} KiB",
        counts.execs,
        start.elapsed()
    );
    claim(
        after <= before + SLACK_KIB,
        format!("the shim grew from {before} to {after} KiB"),
    )?;
    pod.remove()
}

fn execs(container: &Container<'_>, count: usize) -> Result {
    let next = AtomicUsize::new(0);
    at_once(STREAMS, |_| {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            an_exec(container, number)?;
        }
    })
    .map(drop)
}

/// An exec whose output and exit code are those of its number.
pub fn an_exec(container: &Container<'_>, number: usize) -> Result {
    let (length, code) = (number * 37 % 5000, i32::try_from(number % 120).unwrap_or(0));
    let script = format!("head -c {length} /dev/zero | tr '\\0' x; exit {code}");
    let output = container.exec(&["sh", "-c", &script], None, run::ORDINARY)?;
    let right = output.code == code && output.stdout.len() == length && output.stdout.iter().all(|byte| *byte == b'x');
    claim(
        right,
        format!(
            "exec {number} ends with {code} after {length} bytes, not with {} after {}: {}",
            output.code,
            output.stdout.len(),
            output.errors()
        ),
    )
}

/// Pods are made, used and removed, two at a time.
fn many_pods_in_a_row(node: &Node, runtime: Runtime, counts: Counts) -> Result {
    // containerd opens some files at their first use.
    a_pod(node, runtime)?;
    let before = node.containerd_descriptors();
    let start = Instant::now();
    at_once(2, |_| (0..counts.cycles / 2).try_for_each(|_| a_pod(node, runtime)))?;
    println!("soak: {} pods in a row took {:?}", counts.cycles, start.elapsed());
    node.events().bell.until("containerd's files", run::ORDINARY, || {
        match node.containerd_descriptors() {
            now if now <= before => Ok(()),
            now => Err(format!("{before} before, {now} now")),
        }
    })
}

/// A pod of a container that says something and ends.
pub fn a_pod(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "cycle")?.run()?;
    let container = pod.shell("short", "echo hello; exit 3").run()?;
    same("exit code", container.wait_exit()?.code, 3)?;
    container.wait_for_log("hello")?;
    pod.remove()
}

/// Does the work in threads of its own, each with its number; the first failure is the answer, when all have ended.
pub fn at_once<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || work(number))).collect();
        let answers = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(Failure::Claim("a thread panicked".into())))
        });
        // All of them first: what a failure leaves running would be somebody's leftover.
        let answers: Vec<_> = answers.collect();
        answers.into_iter().collect()
    })
}
