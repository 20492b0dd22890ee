//! Logging to the bundle's `log` fifo, which containerd and CRI-O copy into their own log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    panic,
    path::Path,
    sync::OnceLock,
};

use nix::fcntl::{FcntlArg, fcntl};
use tracing_subscriber::{
    Registry,
    filter::LevelFilter,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
};

static LEVEL: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// What fits into the fifo while nobody reads: more than the last words of a guest, of QEMU and of virtiofsd together,
/// with the prefixes.
const ROOM: i32 = 512 << 10;
/// Letters of the sandbox's id before each line, as `crictl` shows them: the CRI's log has the lines of all pods.
pub(crate) const SHORT_ID: usize = 13;

/// The fifo; a record that does not fit while nobody reads is cut off: the log must never hold up a pod.
struct Fifo {
    file: File,
    prefix: String,
}

impl Fifo {
    fn open(path: &Path, sandbox: &str) -> io::Result<Fifo> {
        // Open for reading too: a daemon that restarts leaves the fifo without a reader for a while.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(path)?;
        // With less room a long record may be cut off, and nothing else.
        let _room = fcntl(&file, FcntlArg::F_SETPIPE_SZ(ROOM));
        let short: String = sandbox.chars().take(SHORT_ID).collect();
        Ok(Fifo {
            file,
            prefix: format!("kata[{short}] "),
        })
    }
}

impl Write for &Fifo {
    /// Takes one record, which may have several lines.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let marked = marked(&self.prefix, record);
        match (&self.file).write_all(&marked) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(record.len()),
            other => other.map(|()| record.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines of a record, each with the prefix.
fn marked(prefix: &str, record: &[u8]) -> Vec<u8> {
    let lines = record.split_inclusive(|byte| *byte == b'\n');
    lines.flat_map(|line| [prefix.as_bytes(), line].concat()).collect()
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = &'a Fifo;

    fn make_writer(&'a self) -> &'a Fifo {
        self
    }
}

/// Logs to `log` in the working directory, the bundle of the sandbox. Without it (a caller other than a CRI) nothing
/// is logged.
pub fn init(sandbox: &str, debug: bool) {
    let Ok(fifo) = Fifo::open("log".as_ref(), sandbox) else {
        return;
    };
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let (filter, handle) = reload::Layer::new(level);
    let lines = fmt::layer().with_ansi(false).with_writer(fifo);
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn the_last_words_of_three_fit_while_nobody_reads_and_what_does_not_fit_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let fifo = Fifo::open(&path, "0123456789abcdef").unwrap();
        let line = "x".repeat(1023) + "\n";
        let record = line.repeat(3 * 64);
        (&fifo).write_all(record.as_bytes()).unwrap();
        let mut read = vec![0; record.len() + 3 * 64 * "kata[0123456789abc] ".len()];
        (&fifo.file).read_exact(&mut read).unwrap();
        assert!(read.starts_with(b"kata[0123456789abc] xxx") && read.ends_with(b"xxx\n"));
        (&fifo).write_all(line.repeat(1024).as_bytes()).unwrap();
    }

    #[test]
    fn every_line_tells_its_sandbox() {
        let record = b"ERROR the last words of QEMU:\nno such device\n";
        let lines = "kata[0123] ERROR the last words of QEMU:\nkata[0123] no such device\n";
        assert_eq!(marked("kata[0123] ", record), lines.as_bytes());
    }
}
