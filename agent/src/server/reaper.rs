//! PID 1's duty: the exits of all its children.
//!
//! A container's process becomes a child after the engine has sent its answer and perhaps before the answer is
//! read. So while an answer is awaited, the exits of unknown processes are kept.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use nix::errno::Errno;
use rustix::process::{WaitOptions, wait};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exited {
    /// Exit code, or 128 + signal.
    pub(super) status: i32,
    /// When it was noticed.
    pub(super) at: Instant,
}

/// The one that waits for children.
#[derive(Debug, Default)]
pub(super) struct Reaper(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    known: HashMap<i32, watch::Sender<Option<Exited>>>,
    early: HashMap<i32, Exited>,
    /// Answers that are awaited.
    expected: usize,
}

/// The end of a process, now or later.
#[derive(Debug, Clone)]
pub(super) struct Exit {
    pid: i32,
    exited: watch::Receiver<Option<Exited>>,
}

/// Held while the engine is asked for a process.
#[derive(Debug)]
pub(super) struct Expectation(Arc<Reaper>);

impl Reaper {
    /// Keeps the exits of unknown processes until the expectation is dropped or claimed.
    pub(super) fn expect(self: &Arc<Self>) -> Expectation {
        self.table().expected += 1;
        Expectation(Arc::clone(self))
    }

    /// Reaps for as long as the runtime lives. Must be called in it.
    pub(super) async fn run(self: Arc<Self>) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        // Locked around waitpid: a pid that is reaped may be another process's from then on (see `signal`).
        let mut table = self.table();
        loop {
            // The signal may be a real-time one, which nix has no name for.
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid.as_raw_nonzero().get(), status),
                Err(rustix::io::Errno::INTR) => continue,
                Ok(None) | Err(_) => return,
            };
            let killed = status.terminating_signal().map(|signal| 128 + signal);
            let Some(status) = status.exit_status().or(killed) else {
                continue;
            };
            let exited = Exited {
                status,
                at: Instant::now(),
            };
            match table.known.remove(&pid) {
                Some(sender) => drop(sender.send_replace(Some(exited))),
                None if table.expected > 0 => drop(table.early.insert(pid, exited)),
                None => {}
            }
        }
    }

    /// Signals a process unless it has ended; whether it was there.
    pub(super) fn signal(&self, exit: &Exit, signal: i32) -> nix::Result<bool> {
        let _no_reaping = self.table();
        if exit.now().is_some() {
            return Ok(false);
        }
        match sys::kill(exit.pid, signal) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expectation {
    /// Follows the process that the engine has answered.
    pub(super) fn claim(self, pid: i32) -> Exit {
        let mut table = self.0.table();
        let early = table.early.remove(&pid);
        let (sender, exited) = watch::channel(early);
        if early.is_none() {
            table.known.insert(pid, sender);
        }
        Exit { pid, exited }
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.expected -= 1;
        if table.expected == 0 {
            table.early.clear();
        }
    }
}

impl Exit {
    /// The process's pid; it may be another's once the process has ended.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended, if it has.
    pub(super) fn now(&self) -> Option<Exited> {
        *self.exited.borrow()
    }

    /// Waits for the end.
    pub(super) async fn wait(&self) -> Exited {
        let mut exited = self.exited.clone();
        match exited.wait_for(Option::is_some).await {
            Ok(found) => found.unwrap_or_else(unknown),
            // The reaper never drops a sender without a value.
            Err(_) => unknown(),
        }
    }
}

fn unknown() -> Exited {
    Exited {
        status: 255,
        at: Instant::now(),
    }
}
