//! The agent's ends of a process's standard streams.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{pipe2, write},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex as AsyncMutex,
};

use super::{
    error::{Doing, Error, Result},
    reaper::Exit,
    sys,
};
use crate::engine;

/// Bytes of an answer to a read. Far below what ttrpc carries (4 MiB).
const MAX_READ: usize = 1 << 20;
/// Bytes that a process can write ahead of its reader: a read takes all of it at once.
const PIPE: i32 = 256 << 10;
/// A terminal goes both ways.
const BOTH: Interest = Interest::READABLE.add(Interest::WRITABLE);
/// How long output may take to end after its process, when another process holds the pipe.
const GRACE: Duration = Duration::from_millis(500);

/// The streams of one process.
#[derive(Debug)]
pub(super) struct Streams {
    /// What the process reads.
    pub(super) stdin: Input,
    /// What it writes.
    pub(super) stdout: Output,
    /// What it complains; `None` with a terminal.
    pub(super) stderr: Option<Output>,
    /// The terminal's master.
    pub(super) terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// Both sides of streams of which the process does not exist yet.
pub(super) enum Prepared {
    /// A terminal is made in the container.
    Terminal,
    /// Our ends.
    Pipes {
        /// Write end; `None` if the process has no input.
        stdin: Option<OwnedFd>,
        /// Read end.
        stdout: OwnedFd,
        /// Read end.
        stderr: OwnedFd,
    },
}

impl Prepared {
    /// Makes the streams of a process to come; the engine gets its side. Without `input` and a terminal the process
    /// reads `/dev/null`: a pipe at its end looks to some programs like a client that has left.
    pub(super) fn new(terminal: bool, input: bool) -> Result<(Prepared, engine::Stdio)> {
        if terminal {
            return Ok((Prepared::Terminal, engine::Stdio::Terminal));
        }
        let pipes = || -> nix::Result<_> {
            let ((stdout, out), (stderr, err)) = (pipe()?, pipe()?);
            let (inner_in, stdin) = if input { Some(pipe()?) } else { None }.unzip();
            for ours in stdin.iter().chain([&stdout, &stderr]) {
                do_not_wait(ours)?;
            }
            for output in [&stdout, &stderr] {
                sys::set_pipe_size(output, PIPE)?;
            }
            let theirs = engine::Stdio::Pipes {
                stdin: inner_in,
                stdout: out,
                stderr: err,
            };
            Ok((Prepared::Pipes { stdin, stdout, stderr }, theirs))
        };
        pipes().doing(|| "make the pipes of a process".into())
    }

    /// The streams of the process that exists now, with the terminal that the engine made.
    pub(super) fn complete(self, terminal: Option<OwnedFd>) -> Result<Streams> {
        let made = || -> io::Result<_> {
            match (self, terminal) {
                (Prepared::Pipes { stdin, stdout, stderr }, _) => Ok(Some(Streams {
                    stdin: Input::new(
                        stdin
                            .map(|stdin| sys::asynchronous(stdin, Interest::WRITABLE))
                            .transpose()?
                            .map(Arc::new),
                        false,
                    ),
                    stdout: Output::new(sys::asynchronous(stdout, Interest::READABLE)?.into()),
                    stderr: Some(Output::new(sys::asynchronous(stderr, Interest::READABLE)?.into())),
                    terminal: None,
                })),
                (Prepared::Terminal, Some(master)) => {
                    do_not_wait(&master)?;
                    let master = Arc::new(sys::asynchronous(master, BOTH)?);
                    Ok(Some(Streams {
                        stdin: Input::new(Some(Arc::clone(&master)), true),
                        stdout: Output::new(Arc::clone(&master)),
                        stderr: None,
                        terminal: Some(master),
                    }))
                }
                (Prepared::Terminal, None) => Ok(None),
            }
        };
        let streams = made().doing(|| "use the streams of a process".into())?;
        streams.ok_or_else(|| Error::Invalid("the container engine made no terminal".into()))
    }
}

fn pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC)
}

fn do_not_wait(fd: &OwnedFd) -> nix::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}

/// A stream that the process reads.
#[derive(Debug)]
pub(super) struct Input {
    /// `None` when it was closed, or there is none.
    end: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    terminal: bool,
}

impl Input {
    fn new(end: Option<Arc<AsyncFd<OwnedFd>>>, terminal: bool) -> Input {
        Input {
            end: Mutex::new(end),
            terminal,
        }
    }

    /// Writes as much as the process takes now, at least a byte; `None` if it takes no more, being closed or ended.
    pub(super) async fn write(&self, data: &[u8], exit: &Exit) -> Result<Option<usize>> {
        let Some(end) = self.lock().clone() else {
            return Ok(None);
        };
        let written = end.async_io(Interest::WRITABLE, |end| Ok(write(end, data)?));
        let written = tokio::select! {
            biased;
            written = written => written,
            _ = exit.wait() => return Ok(None),
        };
        match written {
            Ok(count) => Ok(Some(count)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EIO)) => Ok(None),
            Err(error) => Err(error).doing(|| "write to a process".into()),
        }
    }

    /// Lets the process see the end. A terminal has none: its user types it.
    pub(super) fn close(&self) {
        if !self.terminal {
            self.lock().take();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<AsyncFd<OwnedFd>>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that the process writes.
///
/// ```text
/// open ──(pipe's end, or the process has ended, and nothing came for GRACE)──▶ ended
///   └──(the process has ended, and others still write after GRACE)──▶ last bytes ──▶ ended
/// ```
#[derive(Debug)]
pub(super) struct Output {
    end: Arc<AsyncFd<OwnedFd>>,
    /// Locked over a read, which keeps the order. Bytes that are still delivered; `None` for any number.
    left: AsyncMutex<Option<usize>>,
}

impl Output {
    fn new(end: Arc<AsyncFd<OwnedFd>>) -> Output {
        Output {
            end,
            left: AsyncMutex::new(None),
        }
    }

    /// Waits for output and takes at most `most` bytes of it; no bytes are its end.
    pub(super) async fn read(&self, most: usize, exit: &Exit) -> Result<Vec<u8>> {
        let most = match most {
            0 => MAX_READ, // unset
            most => most.min(MAX_READ),
        };
        let mut left = self.left.lock().await;
        if left.is_none() {
            let read = self.end.async_io(Interest::READABLE, |end| take(end, most));
            tokio::select! {
                biased;
                () = overdue(exit) => {}
                read = read => {
                    let data = read.doing(|| "read from a process".into())?;
                    if data.is_empty() {
                        *left = Some(0);
                    }
                    return Ok(data);
                }
            }
        }
        // The process's own bytes are before those that others write from now on.
        let unread = sys::unread(self.end.get_ref()).unwrap_or(0);
        let allowed = left.unwrap_or(unread).min(unread);
        let data = match allowed {
            0 => Vec::new(),
            _ => take(self.end.get_ref(), most.min(allowed)).doing(|| "read from a process".into())?,
        };
        *left = Some(allowed - data.len());
        Ok(data)
    }

    /// Whether its end was delivered.
    pub(super) fn has_ended(&self) -> bool {
        self.left.try_lock().is_ok_and(|left| *left == Some(0))
    }
}

/// Returns when output has no more time to come.
async fn overdue(exit: &Exit) {
    let exited = exit.wait().await;
    let late = (exited.at + GRACE).saturating_duration_since(Instant::now());
    tokio::time::sleep(late).await;
}

fn take(end: impl AsFd, most: usize) -> io::Result<Vec<u8>> {
    let waiting = sys::unread(end.as_fd())?;
    match sys::read(end, waiting.clamp(1, most)) {
        // The last user of a terminal has closed it.
        Err(Errno::EIO) => Ok(Vec::new()),
        data => Ok(data?),
    }
}
