//! The start-up waterfall: eight timestamps per pod, kept in `/run/kata/<sandbox>/trace.json`. Each is there as soon as
//! it is known: a start that hangs is looked at while it hangs.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, decode},
    undo::{dir_of, write_renamed},
};

/// A point on the way from `start` to the first container, in the order in which they are expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// The shim's `start` action was executed.
    ShimExec,
    /// The shim serves; its address is printed.
    AddressPrinted,
    /// QEMU was spawned.
    QemuSpawned,
    /// QEMU answered the QMP handshake.
    QmpReady,
    /// The guest kernel's clock began (computed from the guest's own clock).
    KernelEntered,
    /// The agent began to run as PID 1 (computed from the guest's own clock).
    Pid1,
    /// The agent answered its first request.
    AgentConnected,
    /// The first container's process was started.
    ContainerExec,
}

impl Mark {
    /// What the waterfall calls it.
    pub fn label(self) -> &'static str {
        match self {
            Mark::ShimExec => "shim exec",
            Mark::AddressPrinted => "address printed",
            Mark::QemuSpawned => "QEMU spawned",
            Mark::QmpReady => "QMP ready",
            Mark::KernelEntered => "kernel entered",
            Mark::Pid1 => "PID 1",
            Mark::AgentConnected => "agent connected",
            Mark::ContainerExec => "container exec'd",
        }
    }
}

/// A mark of a waterfall with its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Step {
    /// What was reached.
    pub mark: Mark,
    /// Milliseconds since the first mark.
    pub at: f64,
    /// Milliseconds since the mark before.
    pub step: f64,
}

/// Timestamps of one start, in microseconds since the epoch.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace(BTreeMap<Mark, u64>);

impl Trace {
    /// Reads the trace of a sandbox that lives.
    pub fn load(sandbox: &str) -> Result<Trace> {
        let path = dir_of(sandbox).join("trace.json");
        let text = std::fs::read(&path).map_err(|source| crate::error::Error::Path {
            action: "read",
            path,
            source,
        })?;
        serde_json::from_slice(&text).map_err(decode("a sandbox's trace.json"))
    }

    /// Sets a mark; the first time counts.
    pub fn set(&mut self, mark: Mark, at: SystemTime) {
        let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.0.entry(mark).or_insert(since_epoch.as_micros() as u64);
    }

    /// Sets the two guest marks from the guest's own clock: `pid1` and `now` are microseconds of its boot clock, and
    /// `answered` is when the host held the answer. A clock that began before its VM is none.
    pub fn set_guest(&mut self, pid1: u64, now: u64, answered: SystemTime) {
        let before = |micros| answered.checked_sub(Duration::from_micros(micros));
        let (Some(kernel), Some(agent)) = (before(now), before(now.saturating_sub(pid1))) else {
            return;
        };
        let spawned = self.0.get(&Mark::QemuSpawned).copied().unwrap_or(0);
        if kernel >= UNIX_EPOCH + Duration::from_micros(spawned) {
            self.set(Mark::KernelEntered, kernel);
            self.set(Mark::Pid1, agent);
        }
    }

    /// Whether a mark is set.
    pub fn has(&self, mark: Mark) -> bool {
        self.0.contains_key(&mark)
    }

    /// Writes it for `kata-ctl trace`. Whoever starts something goes on without it.
    pub fn keep(&self, sandbox: &str) {
        if let Err(error) = self.save(sandbox) {
            tracing::warn!(%error, "the start-up waterfall is lost");
        }
    }

    fn save(&self, sandbox: &str) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(decode("the trace to write"))?;
        write_renamed(Path::new(&dir_of(sandbox).join("trace.json")), &text)
    }

    /// When the first mark was reached.
    pub fn began(&self) -> Option<SystemTime> {
        let first = self.0.values().min()?;
        UNIX_EPOCH.checked_add(Duration::from_micros(*first))
    }

    /// The marks in the order of time.
    pub fn steps(&self) -> Vec<Step> {
        let mut marks: Vec<_> = self.0.iter().map(|(mark, at)| (*at, *mark)).collect();
        marks.sort_unstable();
        let first = marks.first().map_or(0, |(at, _)| *at);
        let before = std::iter::once(first).chain(marks.iter().map(|(at, _)| *at));
        let step = |(&(at, mark), before): (&(u64, Mark), u64)| Step {
            mark,
            at: (at - first) as f64 / 1000.0,
            step: (at - before) as f64 / 1000.0,
        };
        marks.iter().zip(before).map(step).collect()
    }

    /// The waterfall: each mark with its time since the first and the step from the one before, in milliseconds.
    pub fn render(&self) -> String {
        let line = |Step { mark, at, step }: Step| {
            format!("{:<18} {at:>9.1} ms  {:>9}\n", mark.label(), format!("+{step:.1}"))
        };
        self.steps().into_iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waterfall_is_in_order_of_time_and_places_the_guest_by_its_own_clock() {
        let at = |ms: u64| UNIX_EPOCH + Duration::from_millis(1_000_000 + ms);
        let mut trace = Trace::default();
        trace.set(Mark::ShimExec, at(0));
        trace.set(Mark::QemuSpawned, at(10));
        trace.set(Mark::AgentConnected, at(800));
        trace.set(Mark::AgentConnected, at(900));
        trace.set_guest(650_000, 700_000, at(801));
        let rows: Vec<_> = trace
            .render()
            .lines()
            .map(|row| row.split("  ").next().unwrap().trim().to_owned())
            .collect();
        assert_eq!(
            rows,
            [
                "shim exec",
                "QEMU spawned",
                "kernel entered",
                "PID 1",
                "agent connected"
            ]
        );
        assert!(trace.render().contains("751.0 ms"), "{}", trace.render());
    }

    #[test]
    fn a_guests_clock_that_began_before_its_machine_is_not_believed() {
        let mut trace = Trace::default();
        trace.set(Mark::QemuSpawned, UNIX_EPOCH + Duration::from_secs(1_000));
        let answered = UNIX_EPOCH + Duration::from_secs(1_002);
        for (pid1, now) in [
            (0, 2_000_001),
            (u64::MAX, u64::MAX),
            (0, u64::MAX),
            (u64::MAX, 3_000_000),
        ] {
            trace.set_guest(pid1, now, answered);
            assert!(
                !trace.has(Mark::KernelEntered) && !trace.has(Mark::Pid1),
                "{pid1} {now}"
            );
        }
        trace.set_guest(u64::MAX, 2_000_000, answered);
        assert!(trace.has(Mark::KernelEntered));
    }
}
