//! One process in the guest as its caller sees it.
//!
//! ```text
//! Creating ──the agent has it──▶ Created, then
//!
//! Created ──start──▶ Starting ──agent took it──▶ Running ◀──pause/resume──▶ Paused
//!    │                  │ agent refused: back to Created     │                 │
//!    │                  │                                    └──── ended ──────┴──▶ Ending
//!    └──────────────────┴──────────────────── VM gone, or host done ──────────────────┴──▶ Stopped
//! ```
//!
//! What ends in `Creating` goes to `Stopped` at once, and whoever creates it finds it so and takes it back. What is
//! killed in `Created` goes to `Ending`.
//!
//! `Stopped` is published last: output is delivered, fifos are closed and the host has let go of the container's root
//! file system before any `Wait` is answered. Until then, in `Ending`, the guest may know the process no more.

use std::{
    fs::File,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};

use crate::{
    error::{Error, Result},
    io::Stdio,
};

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Known, and not in the guest yet.
    Creating,
    /// Not started.
    Created,
    /// The agent is being asked to start it.
    Starting,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Ended in the guest; callers hear of it when the host has cleaned up.
    Ending,
    /// Ended.
    Stopped(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    /// An exit with this status, now.
    pub fn now(status: u32) -> Exit {
        Exit {
            status,
            at: SystemTime::now(),
        }
    }
}

/// A process's public half: what its caller named, and its status for any number of waiters.
#[derive(Debug)]
pub struct Process {
    /// The caller's streams.
    pub stdio: Stdio,
    status: watch::Sender<Status>,
    /// Whether a caller has killed it: its end by SIGKILL is then no riddle.
    pub killed: watch::Sender<bool>,
    /// Turns true at `CloseIO`.
    pub close_stdin: watch::Sender<bool>,
    /// Rows and columns asked for before there was a terminal.
    pub size: watch::Sender<Option<(u32, u32)>>,
    /// The reading ends of its output that nobody has read to the end.
    unread: Mutex<Vec<File>>,
}

impl Process {
    /// A process that is not started yet.
    pub fn new(stdio: Stdio) -> Process {
        Process::at(Status::Created, stdio)
    }

    /// The first process of a container that is not in the guest yet.
    pub fn of_new_container(stdio: Stdio) -> Process {
        Process::at(Status::Creating, stdio)
    }

    /// A process of an earlier shim, which ended with it at the latest.
    pub fn ended_before(stdio: Stdio, exit: Exit) -> Process {
        Process::at(Status::Stopped(exit), stdio)
    }

    fn at(status: Status, stdio: Stdio) -> Process {
        Process {
            stdio,
            status: watch::Sender::new(status),
            killed: watch::Sender::new(false),
            close_stdin: watch::Sender::new(false),
            size: watch::Sender::new(None),
            unread: Mutex::default(),
        }
    }

    /// The guest has its container; false if it has ended meanwhile.
    pub fn created(&self) -> bool {
        self.change(|now| (now == Status::Creating).then_some(Status::Created))
    }

    /// Keeps output for a reader that comes back, until this process is forgotten.
    pub fn keep_unread(&self, ends: Vec<File>) {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).extend(ends);
    }

    /// Its status now.
    pub fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Takes `Created` to `Starting`, for one caller only.
    pub fn begin_start(&self, name: &str) -> Result<()> {
        if self.change(|now| (now == Status::Created).then_some(Status::Starting)) {
            return Ok(());
        }
        Err(Error::Precondition(format!(
            "{name} cannot be started: it is {}",
            self.status().word()
        )))
    }

    /// The agent answered: it runs, or it is as it was before.
    pub fn end_start(&self, started: bool) {
        let next = if started { Status::Running } else { Status::Created };
        self.change(|now| (now == Status::Starting).then_some(next));
    }

    /// Records a pause or its end; a stopped process stays stopped.
    pub fn set_paused(&self, paused: bool) {
        let next = if paused { Status::Paused } else { Status::Running };
        self.change(|now| matches!(now, Status::Running | Status::Paused).then_some(next));
    }

    /// The guest said that it has ended, or it is not to start any more.
    pub fn begin_end(&self) -> bool {
        let may = |now| matches!(now, Status::Created | Status::Running | Status::Paused);
        self.change(|now| may(now).then_some(Status::Ending))
    }

    /// Whether it has ended in the guest, whoever knows of it.
    pub fn has_ended(&self) -> bool {
        matches!(self.status(), Status::Ending | Status::Stopped(_))
    }

    /// Ends it. The first exit counts; answers whether this was the first.
    pub fn stop(&self, exit: Exit) -> bool {
        self.change(|now| (!matches!(now, Status::Stopped(_))).then_some(Status::Stopped(exit)))
    }

    /// Its exit, when it has ended.
    pub fn exit(&self) -> Option<Exit> {
        match self.status() {
            Status::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Whether it goes on running for so long. What is being started is looked at when it runs.
    pub async fn outlives(&self, patience: Duration) -> bool {
        let mut status = self.status.subscribe();
        let runs = |status: &Status| matches!(status, Status::Running | Status::Paused);
        // The sender lives as long as `self`.
        let begun = status.wait_for(|status| *status != Status::Starting).await;
        if !begun.is_ok_and(|status| runs(&status)) {
            return false;
        }
        timeout(patience, status.wait_for(|status| !runs(status)))
            .await
            .is_err()
    }

    /// Waits for its end, from any status.
    pub async fn wait(&self) -> Exit {
        let mut status = self.status.subscribe();
        loop {
            if let Status::Stopped(exit) = *status.borrow_and_update() {
                return exit;
            }
            if status.changed().await.is_err() {
                // The sender lives as long as `self`: there is always a next change to wait for.
                std::future::pending::<()>().await;
            }
        }
    }

    fn change(&self, next: impl FnOnce(Status) -> Option<Status>) -> bool {
        self.status.send_if_modified(|status| match next(*status) {
            Some(next) => {
                *status = next;
                true
            }
            None => false,
        })
    }
}

impl Status {
    /// The word for messages.
    pub fn word(self) -> &'static str {
        match self {
            Status::Creating => "being created",
            Status::Created => "created",
            Status::Starting => "starting",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ending => "ending",
            Status::Stopped(_) => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_starts_once_and_may_be_started_again_when_the_agent_refused() {
        let process = Process::new(Stdio::default());
        process.begin_start("c").unwrap();
        assert!(process.begin_start("c").unwrap_err().to_string().contains("starting"));
        process.end_start(false);
        process.begin_start("c").unwrap();
        process.end_start(true);
        assert_eq!(process.status(), Status::Running);
    }

    #[test]
    fn what_ended_while_it_was_created_is_not_created() {
        let process = Process::of_new_container(Stdio::default());
        assert!(
            process
                .begin_start("c")
                .unwrap_err()
                .to_string()
                .contains("being created")
        );
        process.stop(Exit::now(137));
        assert!(!process.created());
        let process = Process::of_new_container(Stdio::default());
        assert!(process.created());
        process.begin_start("c").unwrap();
    }

    #[tokio::test]
    async fn only_what_runs_is_slow_to_die() {
        const LONG: Duration = Duration::from_secs(3600);
        let running = || {
            let process = Process::new(Stdio::default());
            process.begin_start("c").unwrap();
            process.end_start(true);
            process
        };
        assert!(running().outlives(Duration::ZERO).await);
        let ending = running();
        ending.begin_end();
        assert!(!ending.outlives(LONG).await);
        assert!(!Process::new(Stdio::default()).outlives(LONG).await);

        // A start that fails leaves nothing that could be slow.
        let failing = Process::new(Stdio::default());
        failing.begin_start("c").unwrap();
        assert!(!tokio::join!(failing.outlives(LONG), async { failing.end_start(false) }).0);
    }

    #[test]
    fn the_first_exit_counts_and_nothing_revives_a_stopped_process() {
        let process = Process::new(Stdio::default());
        assert!(process.stop(Exit::now(7)));
        assert!(!process.stop(Exit::now(137)));
        process.set_paused(false);
        process.end_start(true);
        assert_eq!(process.exit().unwrap().status, 7);
    }
}
