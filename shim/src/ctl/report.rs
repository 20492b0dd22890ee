//! What a node's sandboxes are doing now, for `kata-ctl monitor`: one report for everybody who asks at the same time.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use jiff::{Timestamp, Unit};
use serde::Serialize;
use tokio::sync::Mutex;

use super::top::{self, Memory, Usage};
use crate::{
    error::Result,
    trace::{Step, Trace},
};

/// How old a report may be that is handed out once more: less than a page waits before it asks again.
const FRESH: Duration = Duration::from_secs(1);

/// `/sandboxes.json`. Fields may be added; those that are there keep their meaning.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The node.
    pub node: String,
    /// The version of `kata-ctl`.
    pub version: &'static str,
    /// When it was measured (RFC 3339, UTC, seconds).
    pub measured: String,
    /// Every sandbox in the order of their ids, those too whose shim is dead.
    pub sandboxes: Vec<Sandbox>,
}

/// A sandbox: what `kata-ctl top --json` says of it, and its start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sandbox {
    /// What it holds and has used.
    #[serde(flatten)]
    pub usage: Usage,
    /// When its shim was executed (RFC 3339, UTC, seconds); `None` when that is not known.
    pub started: Option<String>,
    /// Its start-up waterfall so far, in the order of time.
    pub start: Vec<Step>,
}

impl Report {
    /// Measures.
    ///
    /// # Errors
    /// Those of [`top::measure`].
    pub async fn take(node: &str) -> Result<Report> {
        let sandboxes = top::measure().await?.into_iter().map(Sandbox::of).collect();
        Ok(Report {
            node: node.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            measured: time(SystemTime::now()).unwrap_or_default(),
            sandboxes,
        })
    }

    /// What all sandboxes hold together.
    pub fn memory(&self) -> Memory {
        let all = || self.sandboxes.iter().map(|sandbox| sandbox.usage.memory);
        Memory {
            guest: Some(all().filter_map(|memory| memory.guest).sum()),
            qemu: Some(all().filter_map(|memory| memory.qemu).sum()),
            virtiofsd: Some(all().filter_map(|memory| memory.virtiofsd).sum()),
            shim: all().map(|memory| memory.shim).sum(),
            total: all().map(|memory| memory.total).sum(),
        }
    }
}

impl Sandbox {
    fn of(usage: Usage) -> Sandbox {
        // There is none before its shim has written it, and none any more after the sandbox.
        let trace = Trace::load(&usage.sandbox).unwrap_or_default();
        Sandbox {
            usage,
            started: trace.began().and_then(time),
            start: trace.steps(),
        }
    }
}

/// To the second; a time beyond the year 9999 is none.
fn time(at: SystemTime) -> Option<String> {
    let at = Timestamp::try_from(at).and_then(|at| at.round(Unit::Second));
    at.ok().map(|at| at.to_string())
}

/// The last report, for those who ask soon after each other.
#[derive(Debug, Default)]
pub struct Desk(Mutex<Option<(Instant, Arc<Report>)>>);

impl Desk {
    /// A report that is as good as new.
    ///
    /// # Errors
    /// Those of [`Report::take`].
    pub async fn report(&self, node: &str) -> Result<Arc<Report>> {
        let mut last = self.0.lock().await;
        if let Some((taken, report)) = &*last
            && taken.elapsed() < FRESH
        {
            return Ok(Arc::clone(report));
        }
        let report = Arc::new(Report::take(node).await?);
        *last = Some((Instant::now(), Arc::clone(&report)));
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_at_once_gets_the_same_report() {
        let desk = Desk::default();
        let (first, second) = futures::join!(desk.report("a"), desk.report("a"));
        assert!(Arc::ptr_eq(&first.unwrap(), &second.unwrap()));
    }

    #[test]
    fn times_are_told_to_the_second() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_795_000_000_400_000);
        assert_eq!(time(at).unwrap(), "2026-11-18T11:06:40Z");
    }
}
