//! A process of a container, from its start until its output is delivered.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    reaper::Exit,
    stdio::{Output, Streams},
};

/// Output that nobody reads is kept this long after the process's end was told.
pub(super) const UNREAD: Duration = Duration::from_secs(30);

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    /// Its end.
    pub(super) exit: Exit,
    /// Its streams.
    pub(super) streams: Streams,
    /// Its end was told, so that it takes no more signals.
    told: AtomicBool,
    read: Mutex<Instant>,
}

impl Process {
    /// A process that runs, or is about to.
    pub(super) fn new(exit: Exit, streams: Streams) -> Process {
        Process {
            exit,
            streams,
            told: AtomicBool::new(false),
            read: Mutex::new(Instant::now()),
        }
    }

    /// Waits for the end: exit code, or 128 + signal.
    pub(super) async fn wait(&self) -> i32 {
        let exited = self.exit.wait().await;
        self.told.store(true, Ordering::Relaxed);
        exited.status
    }

    /// Whether its end was told.
    pub(super) fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// Notes that somebody reads.
    pub(super) fn touch(&self) {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long nobody has read.
    pub(super) fn idle(&self) -> Duration {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Whether nobody can want anything of it.
    pub(super) fn is_over(&self) -> bool {
        let streams = &self.streams;
        self.is_told() && streams.stdout.has_ended() && streams.stderr.as_ref().is_none_or(Output::has_ended)
    }
}
