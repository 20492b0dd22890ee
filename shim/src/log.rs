//! Logging to the bundle's `log` fifo, which containerd and CRI-O copy into their own log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
};

use tracing_subscriber::fmt::MakeWriter;

/// The fifo; a line that does not fit while nobody reads is dropped: the log must never hold up a pod.
struct Fifo(File);

impl Write for &Fifo {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match (&self.0).write(line) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(line.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = &'a Fifo;

    fn make_writer(&'a self) -> &'a Fifo {
        self
    }
}

/// Logs to `log` in the working directory, the bundle of the sandbox. Without it (a caller other than a CRI) nothing
/// is logged.
pub fn init(debug: bool) {
    // Open for reading too: a daemon that restarts leaves the fifo without a reader for a while.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("log");
    let Ok(fifo) = fifo else { return };
    let level = if debug {
        tracing::Level::DEBUG
    } else {
        tracing::Level::INFO
    };
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(level)
        .with_writer(Fifo(fifo))
        .finish();
    // Set once, in a process that has just begun: there is no other subscriber to refuse it.
    tracing::subscriber::set_global_default(subscriber).unwrap_or_default();
}
