//! Load while containerd goes and comes.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use tests::{
    config::Runtime,
    cri::{Container, Pod},
    failure::{Failure, Result, claim, same},
    node::Node,
};

use crate::{
    Counts, Story,
    load::{STREAMS, a_pod, an_exec, at_once},
};

pub const STORIES: &[Story] = &[("containerd_restarts_under_load", containerd_restarts_under_load)];

/// From one restart to the next.
const PERIOD: Duration = Duration::from_secs(10);

/// How long an exec may take when containerd goes in its middle.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Counts for ever, a line at a time.
const COUNTER: &str = "i=0; while :; do echo $((i+=1)); sleep 0.01; done";

/// Ten streams of execs, pods that come and go, and a log that grows, while containerd is restarted again and again.
/// What is interrupted fails at once; the rest is whole, and what ran before runs on.
fn containerd_restarts_under_load(node: &Node, runtime: Runtime, counts: Counts) -> Result {
    let pod = node.pod(runtime, "steady")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    let counter = pod.shell("counter", COUNTER).run()?;
    let over = AtomicBool::new(false);
    let (whole, cut) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let tally = |result: Result| match result {
        Ok(()) => whole.fetch_add(1, Ordering::Relaxed),
        Err(_) => cut.fetch_add(1, Ordering::Relaxed),
    };
    let restarting = thread::scope(|scope| {
        let loads = scope.spawn(|| {
            at_once(STREAMS + 1, |stream| {
                while !over.load(Ordering::Relaxed) {
                    match stream {
                        STREAMS => drop(tally(a_pod(node, runtime))),
                        _ => drop(tally(an_exec_that_may_be_cut(&container, stream)?)),
                    }
                }
                Ok(())
            })
        });
        let restarting = restarts(node, &pod, counts.restarts);
        over.store(true, Ordering::Relaxed);
        let loads = loads
            .join()
            .unwrap_or_else(|_| Err(Failure::Claim("the load panicked".into())));
        restarting.and(loads)
    });
    restarting?;
    let (whole, cut) = (whole.into_inner(), cut.into_inner());
    println!(
        "soak: beside {} restarts {whole} execs and pods were whole, {cut} cut off",
        counts.restarts
    );
    // While containerd is away its clients fail at once, as often as they try.
    claim(
        whole >= STREAMS * counts.restarts,
        format!("each stream got on between restarts: {whole} were whole, {cut} cut off"),
    )?;
    same("an exec afterwards", container.shell("echo alive")?.as_str(), "alive")?;
    counted(&counter, counts.restarts)?;
    pod.leave();
    for left in node.crictl(["pods", "--quiet"])?.text().lines() {
        node.crictl(["rmp", "--force", left])?;
    }
    Ok(())
}

/// A client of a containerd that has gone ends at once, whatever it says then; one that succeeds has everything.
fn an_exec_that_may_be_cut(container: &Container<'_>, stream: usize) -> Result<Result> {
    let start = Instant::now();
    let result = an_exec(container, stream);
    let took = start.elapsed();
    claim(
        took <= AT_ONCE,
        format!("an exec took {took:?} and then said {result:?}"),
    )?;
    Ok(result)
}

/// Restarts containerd, gently and by SIGKILL in turn. A container that ends meanwhile has its exit code afterwards.
fn restarts(node: &Node, pod: &Pod<'_>, count: usize) -> Result {
    for number in 0..count {
        // Not a wait for something: the load goes on for this long.
        thread::sleep(PERIOD);
        let ends = pod.shell(&format!("ends-{number}"), "sleep 1; exit 9").run()?;
        if number % 2 == 1 {
            node.kill_containerd()?;
        }
        node.restart_containerd()?;
        same("the pod", pod.state()?.as_str(), "SANDBOX_READY")?;
        same("the exit meanwhile", ends.wait_exit()?.code, 9)?;
    }
    Ok(())
}

/// The log counts without a hole, but for what a containerd had read and not yet written when it went.
fn counted(counter: &Container<'_>, restarts: usize) -> Result {
    let logs = counter.logs()?;
    let numbers: Vec<u64> = logs.lines().filter_map(|line| line.parse().ok()).collect();
    let steps = numbers.windows(2).map(|pair| pair[1].wrapping_sub(pair[0]));
    let holes: Vec<u64> = steps.filter(|step| *step != 1).collect();
    println!("soak: the log has {} lines and these holes: {holes:?}", numbers.len());
    claim(
        holes.len() <= restarts,
        format!("a hole for a restart at most, not {holes:?} for {restarts}"),
    )
}
