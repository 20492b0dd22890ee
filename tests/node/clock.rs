//! The guest's wall clock and the node's.

use std::time::{Duration, Instant};

use serde_json::json;
use tests::{
    failure::{Failure, Result, claim},
    machine::{Machine, ORDINARY, Pod},
    places,
    wait::Bell,
};

use crate::{
    Story,
    install::{HANDLER, ensure, pods_are_gone},
};

pub const STORIES: &[Story] = &[("the_clock_is_the_nodes_whoever_was_stopped", whoever_was_stopped)];

pub const AT_LENGTH: &[Story] = &[("the_clock_is_the_nodes_for_ten_minutes", for_ten_minutes)];

/// The most that the guest's clock may be off, in nanoseconds.
const MOST: i64 = 50_000_000;

/// How long whoever is stopped stays so.
const STOP: Duration = Duration::from_secs(20);

/// How long a clock may take to be right again: it is looked at once a minute at least, and then made faster or slower.
const AGAIN: Duration = Duration::from_secs(600);

/// How long the long story looks.
const LONG: Duration = Duration::from_secs(600);

/// Where the node has the program for both sides. /run takes no programs.
const FOLDER: &str = "/root/clock";

/// Where a pod answers.
const PORT: u16 = 4000;

/// How often a clock is asked for one offset.
const TRIPS: u32 = 200;

/// A pod that tells its time to whoever asks.
struct Clock<'m> {
    node: &'m Machine,
    pod: Pod<'m>,
    address: String,
}

/// How far a pod's clock is from the node's, and by how much that may be wrong, in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Offset {
    nanoseconds: i64,
    error: i64,
}

/// The pod's QEMU is stopped; then the whole node is, and its clock is set as its NTP would do.
fn whoever_was_stopped(node: &Machine) -> Result {
    ensure(node)?;
    let clock = Clock::start(node)?;
    clock.becomes_right("after the start")?;
    let seconds = STOP.as_secs();
    node.run(&format!(
        "qemu=$(pidof qemu-system-x86_64) && kill -STOP $qemu && sleep {seconds} && kill -CONT $qemu"
    ))?;
    clock.becomes_right("after a stop of QEMU")?;
    node.freeze(STOP)?;
    clock.becomes_right("after a stop of the node")?;
    node.run("date --set '10 seconds'")?;
    clock.becomes_right("after the node's clock was set")?;
    node.run("date --set '10 seconds ago'")?;
    clock.remove()
}

/// Once it is right it stays so.
fn for_ten_minutes(node: &Machine) -> Result {
    ensure(node)?;
    let clock = Clock::start(node)?;
    clock.becomes_right("after the start")?;
    let end = Instant::now() + LONG;
    let mut worst = 0;
    while Instant::now() < end {
        let offset = clock.offset()?;
        claim(
            !offset.is_wrong(),
            format!("{offset:?} of a clock that was right before"),
        )?;
        worst = worst.max(offset.nanoseconds.abs());
    }
    println!("in ten minutes the guest's clock was at most {} us off", worst / 1000);
    clock.becomes_right("after ten minutes")?;
    clock.remove()
}

impl<'m> Clock<'m> {
    fn start(node: &'m Machine) -> Result<Clock<'m>> {
        let program = places::binaries()?.join("clock-offset");
        node.run(&format!("mkdir -p {FOLDER} && cp {} {FOLDER}", program.display()))?;
        let pod = node.pod(HANDLER, "clock").run()?;
        let program = ["/clock/clock-offset", "answer", &format!("0.0.0.0:{PORT}")];
        pod.container_with("clock", &program, |container| {
            container["mounts"] = json!([{ "container_path": "/clock", "host_path": FOLDER, "readonly": true }]);
        })?;
        let address = node.inspect("inspectp", pod.id(), "{{.status.network.ip}}")?;
        let address = format!("{address}:{PORT}");
        Ok(Clock { node, pod, address })
    }

    fn offset(&self) -> Result<Offset> {
        let asked = format!("{FOLDER}/clock-offset ask {} {TRIPS}", self.address);
        let said = self.node.until("the pod's time", &asked, ORDINARY)?;
        let numbers: Vec<_> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [nanoseconds, error] => Ok(Offset { nanoseconds, error }),
            _ => Err(Failure::Claim(format!("{said:?} is no offset"))),
        }
    }

    /// Waits until the clock is shown to be right.
    fn becomes_right(&self, when: &str) -> Result {
        let what = format!("the guest's clock {when}");
        let offset = Bell::default().until(&what, AGAIN, || match self.offset() {
            Ok(offset) if offset.is_right() => Ok(offset),
            Ok(offset) => Err(format!("{offset:?}")),
            Err(failure) => Err(failure.to_string()),
        })?;
        let (us, error) = (offset.nanoseconds / 1000, offset.error / 1000);
        println!("{when} the guest's clock is {us} us off, +-{error} us");
        Ok(())
    }

    fn remove(self) -> Result {
        self.pod.remove()?;
        pods_are_gone(self.node)?;
        self.node.run(&format!("rm -r {FOLDER}")).map(drop)
    }
}

impl Offset {
    fn is_right(self) -> bool {
        self.nanoseconds.abs() + self.error <= MOST
    }

    fn is_wrong(self) -> bool {
        self.nanoseconds.abs() - self.error > MOST
    }
}
