//! One process in the guest as its caller sees it.
//!
//! ```text
//! Created ──start──▶ Starting ──agent took it──▶ Running ◀──pause/resume──▶ Paused
//!    │                  │ agent refused: back to Created     │                 │
//!    │                  │                                    └──── ended ──────┴──▶ Ending
//!    └──────────────────┴──────────────────── VM gone, or host done ──────────────────┴──▶ Stopped
//! ```
//!
//! `Stopped` is published last: output is delivered, fifos are closed and the host has let go of the container's root
//! file system before any `Wait` is answered. Until then, in `Ending`, the guest may know the process no more.

use std::{sync::atomic::AtomicBool, time::SystemTime};

use tokio::sync::watch;

use crate::{
    error::{Error, Result},
    io::Stdio,
};

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Known, not started.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub killed: AtomicBool,
    /// Turns true at `CloseIO`.
    pub close_stdin: watch::Sender<bool>,
    /// Rows and columns asked for before there was a terminal.
    pub size: watch::Sender<Option<(u32, u32)>>,
}

impl Process {
    /// A process that is not started yet.
    pub fn new(stdio: Stdio) -> Process {
        Process {
            stdio,
            status: watch::Sender::new(Status::Created),
            killed: AtomicBool::new(false),
            close_stdin: watch::Sender::new(false),
            size: watch::Sender::new(None),
        }
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

    /// The guest said that it has ended.
    pub fn begin_end(&self) {
        self.change(|now| matches!(now, Status::Running | Status::Paused).then_some(Status::Ending));
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

    /// Waits until it has ended in the guest, whoever knows of it.
    pub async fn ended(&self) {
        let mut status = self.status.subscribe();
        let ended = |status: &Status| matches!(status, Status::Ending | Status::Stopped(_));
        // The sender lives as long as `self`.
        status.wait_for(ended).await.map(drop).unwrap_or_default();
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
    fn the_first_exit_counts_and_nothing_revives_a_stopped_process() {
        let process = Process::new(Stdio::default());
        assert!(process.stop(Exit::now(7)));
        assert!(!process.stop(Exit::now(137)));
        process.set_paused(false);
        process.end_start(true);
        assert_eq!(process.exit().unwrap().status, 7);
    }
}
