//! Logging to the bundle's `log` fifo, which containerd and CRI-O copy into their own log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    panic,
    sync::OnceLock,
};

use tracing_subscriber::{
    Registry,
    filter::LevelFilter,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
};

static LEVEL: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

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
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let (filter, handle) = reload::Layer::new(level);
    let lines = fmt::layer().with_ansi(false).with_writer(Fifo(fifo));
    // Set once, in a process that has just begun: there is no other subscriber to refuse it.
    tracing::subscriber::set_global_default(Registry::default().with(filter).with(lines)).unwrap_or_default();
    LEVEL.set(handle).unwrap_or_default();
    panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}

/// From now on debug lines too: the configuration asks for them.
pub fn verbose() {
    if let Some(level) = LEVEL.get() {
        level.modify(|level| *level = LevelFilter::DEBUG).unwrap_or_default();
    }
}
