//! `make bench`: pods of Sandpod, in turns with runc's, and the same virtual machine without a pod. Prints tables for
//! `docs/performance.md`.
//!
//! `bench [rounds]`; ten rounds when it is not told.

mod bare;
mod samples;
mod table;

use std::{process::ExitCode, time::Instant};

use bare::Bare;
use samples::Samples;
use tests::{
    cold_read::{self, ColdRead},
    config::{Guest, Runtime},
    failure::{Failure, Result, claim},
    node::{Containerd, Node, NodeSpec},
    procs::Process,
    tasks::Attached,
};

/// How often everything is measured.
const ROUNDS: usize = 10;

/// Execs in each task, one after another.
const EXECS: usize = 5;

/// Pods that start at once.
const AT_ONCE: usize = 5;

/// Says that it runs, and stays.
const PROGRAM: &[&str] = &["sh", "-c", "echo running; exec sleep infinity"];

/// The runtimes, in the order of their turns.
const RUNTIMES: [Runtime; 3] = [Runtime::Kata(Guest::Own), Runtime::Kata(Guest::Debian), Runtime::Runc];

/// What was measured of one runtime: times in seconds, memory in MiB.
#[derive(Debug, Default)]
pub struct Series {
    bare_boot: Samples,
    first_output: Samples,
    exec: Samples,
    removal: Samples,
    at_once: Samples,
    shim: Samples,
    virtiofsd: Samples,
    qemu: Samples,
    guest_ram: Samples,
    available: Samples,
}

fn main() -> ExitCode {
    let rounds = std::env::args().nth(1).map_or(Ok(ROUNDS), |word| word.parse());
    let done = rounds
        .map_err(|_| Failure::Claim("usage: bench [rounds]".into()))
        .and_then(bench);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn bench(rounds: usize) -> Result {
    eprintln!("bench: {rounds} rounds, usually 30 seconds each");
    let node = Node::start(&NodeSpec::new(Containerd::Newest))?;
    let bare = Bare::new()?;
    let mut series = RUNTIMES.map(|_| Series::default());
    let start = Instant::now();
    for round in 1..=rounds {
        for (runtime, series) in RUNTIMES.into_iter().zip(&mut series) {
            measure(&node, &bare, runtime, series)?;
        }
        eprintln!("bench: round {round} of {rounds} done after {:.0?}", start.elapsed());
    }
    let read = ColdRead::perform(&node, RUNTIMES[0])?;
    node.close()?;
    println!("{}", table::starts(rounds, &series));
    println!("{}", table::cold_read(&read));
    Ok(())
}

fn measure(node: &Node, bare: &Bare, runtime: Runtime, series: &mut Series) -> Result {
    let boot = match runtime {
        Runtime::Kata(guest) => Some(bare.boot(guest)?),
        Runtime::Runc => None,
    };
    let task = node.task(runtime, "bench")?.launch(PROGRAM)?.up()?;
    series.first_output.add(task.first_output.as_secs_f64());
    if let Some(boot) = boot {
        series.bare_boot.add(boot.took.as_secs_f64());
        let processes = node.processes_of(task.task.id());
        bare::same_machine(&boot.line, qemu(&processes)?)?;
        memory(node, &task, series)?;
    }
    for _ in 0..EXECS {
        let start = Instant::now();
        let done = task.task.exec(&["true"])?;
        series.exec.add(start.elapsed().as_secs_f64());
        claim(done.code == 0, format!("an exec failed: {}", done.errors()))?;
    }
    series.removal.add(task.kill()?.as_secs_f64());
    at_once(node, runtime, series)
}

fn memory(node: &Node, task: &Attached<'_>, series: &mut Series) -> Result {
    let held = cold_read::at_rest(node, task.task.id())?;
    let mut add = |samples: fn(&mut Series) -> &mut Samples, kib: u64| {
        #[expect(clippy::cast_precision_loss, reason = "no node has 2^52 KiB")]
        samples(series).add(kib as f64 / 1024.0);
    };
    add(|series| &mut series.shim, held.shim_kib);
    add(|series| &mut series.virtiofsd, held.virtiofsd_kib);
    add(|series| &mut series.qemu, held.qemu_kib);
    add(|series| &mut series.guest_ram, held.guest_kib);
    let line = task.task.exec(&["grep", "MemAvailable", "/proc/meminfo"])?.text();
    let available = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok());
    add(
        |series| &mut series.available,
        available.ok_or_else(|| Failure::Claim(format!("{line:?} is no MemAvailable")))?,
    );
    Ok(())
}

/// From the first start to the last one's first output.
fn at_once(node: &Node, runtime: Runtime, series: &mut Series) -> Result {
    let start = Instant::now();
    let launches = (0..AT_ONCE).map(|_| node.task(runtime, "many")?.launch(PROGRAM));
    let launches: Vec<_> = launches.collect::<Result<_>>()?;
    let tasks = launches.into_iter().map(|launch| launch.up());
    let tasks: Vec<_> = tasks.collect::<Result<_>>()?;
    series.at_once.add(start.elapsed().as_secs_f64());
    for task in tasks {
        task.kill()?;
    }
    Ok(())
}

fn qemu(processes: &[Process]) -> Result<&[String]> {
    let qemu = processes
        .iter()
        .find(|process| process.program().starts_with("qemu-system-"));
    qemu.map(|process| process.arguments.as_slice())
        .ok_or_else(|| Failure::Claim(format!("no QEMU among {processes:?}")))
}
