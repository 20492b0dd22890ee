//! libcontainer tells the cause of a failure to its log only: the process that fails sends one generic phrase.
//! So its errors are logged to a pipe that all processes of a request share, and the first one is the cause.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use nix::{fcntl::OFlag, unistd::pipe2};
use tracing::{Level, subscriber::with_default};
use tracing_subscriber::fmt;

pub(super) struct Trace {
    read: OwnedFd,
    write: Arc<File>,
}

impl Trace {
    pub(super) fn new() -> io::Result<Trace> {
        // Never blocks: when the pipe is full, the first error is in it.
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Trace {
            read,
            write: Arc::new(File::from(write)),
        })
    }

    /// Runs `work` with its errors, and those of the processes it forks, recorded.
    pub(super) fn record<T>(&self, work: impl FnOnce() -> T) -> T {
        let write = Arc::clone(&self.write);
        let log = fmt()
            .with_max_level(Level::ERROR)
            .without_time()
            .with_target(false)
            .with_level(false);
        let log = log
            .with_ansi(false)
            .with_writer(move || Line(Arc::clone(&write)))
            .finish();
        with_default(log, work)
    }

    /// The first error that was recorded.
    pub(super) fn first(&self) -> Option<String> {
        let mut bytes = [0; 4096];
        let n = File::from(self.read.try_clone().ok()?).read(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes[..n]);
        text.lines()
            .next()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
    }
}

struct Line(Arc<File>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
