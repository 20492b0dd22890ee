//! CRI-O's ends of named pipes.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::{mkfifo, pipe2},
};
use tests::{
    failure::{Failure, Result, Trying},
    run::last_of,
    wait::patient,
};

/// Makes a fifo that others may open too.
///
/// # Errors
/// The kernel's.
pub fn make(path: &Path) -> Result {
    mkfifo(path, Mode::from_bits_truncate(0o700)).trying(format!("making the fifo {}", path.display()))
}

/// Reads a fifo from now on, in a thread.
#[derive(Debug)]
pub struct Reader {
    name: String,
    seen: Arc<Seen>,
    /// Closing it ends the thread, which gives the fifo back.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<File>>,
}

#[derive(Debug, Default)]
struct Seen {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// What a reader had when it was told to stop.
#[derive(Debug)]
pub struct Taken {
    /// Everything, with what was still in the pipe at the end.
    pub bytes: Vec<u8>,
    /// How much was still in the pipe: CRI-O would have lost it.
    pub late: usize,
    /// Whether the writer had closed its end.
    pub ended: bool,
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader {
    /// Opens the fifo as CRI-O does, without waiting for a writer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> Result<Reader> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let opening = || format!("opening the fifo {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .trying(opening())?;
        // Not for children: a shim that inherits the other end would keep the thread for ever.
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC).trying(opening())?;
        let seen = Arc::<Seen>::default();
        let shared = Arc::clone(&seen);
        let thread = thread::spawn(move || follow(file, &stopped, &shared));
        Ok(Reader {
            name,
            seen,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Waits until what has come satisfies `enough`, and returns it.
    ///
    /// # Errors
    /// When it does not in time, or the writer ends before.
    pub fn until(&self, what: &str, deadline: Duration, enough: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let wanted = |state: &State| enough(&state.bytes);
        self.wait(what, deadline, wanted)
    }

    /// Waits until a line with this text has come.
    ///
    /// # Errors
    /// When it does not in time, or the writer ends before.
    pub fn line(&self, text: &str, deadline: Duration) -> Result {
        let has = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().any(|line| line.contains(text));
        self.until(&format!("a line with {text:?}"), deadline, has).map(drop)
    }

    /// Waits for the writer's end and returns everything that came.
    ///
    /// # Errors
    /// When the writer does not end in time.
    pub fn end(&self, deadline: Duration) -> Result<Vec<u8>> {
        self.wait("the end of it", deadline, |state| state.ended)
    }

    /// What has come so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().bytes).into_owned()
    }

    /// Stops reading at once and closes this end, as CRI-O does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn close(mut self) -> Result<Taken> {
        let mut taken = Taken {
            bytes: Vec::new(),
            late: 0,
            ended: false,
        };
        if let Some(mut file) = self.stop_thread() {
            let mut late = Vec::new();
            taken.ended = match file.read_to_end(&mut late) {
                Ok(_) => true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => false,
                Err(error) => return Err(error).trying(format!("reading {}", self.name)),
            };
            taken.late = late.len();
            let mut state = self.seen.lock();
            state.bytes.append(&mut late);
            taken.bytes = std::mem::take(&mut state.bytes);
        }
        Ok(taken)
    }

    fn stop_thread(&mut self) -> Option<File> {
        drop(self.stop.take());
        self.thread.take().and_then(|thread| thread.join().ok())
    }

    fn wait(&self, what: &str, deadline: Duration, wanted: impl Fn(&State) -> bool) -> Result<Vec<u8>> {
        let until = Instant::now() + patient(deadline);
        let mut state = self.seen.lock();
        loop {
            if wanted(&state) {
                return Ok(state.bytes.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended {
                let text = last_of(&String::from_utf8_lossy(&state.bytes), 300);
                let why = if state.ended { "; the writer closed it" } else { "" };
                let detail = format!("{why}; {} bytes came, at last {text:?}", state.bytes.len());
                return Err(Failure::Deadline {
                    what: format!("{what} on {}", self.name),
                    deadline,
                    detail,
                });
            }
            state = self
                .seen
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.stop_thread());
    }
}

/// Collects bytes until the writer closes or `stopped` does.
fn follow(mut file: File, stopped: &OwnedFd, seen: &Seen) -> File {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut watched = [
            PollFd::new(file.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut watched, PollTimeout::NONE).is_err_and(|error| error != nix::Error::EINTR) {
            return file;
        }
        if watched[1].any().unwrap_or(true) {
            return file;
        }
        if !watched[0].any().unwrap_or(true) {
            continue;
        }
        let count = match file.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(_) => return file,
        };
        let mut state = seen.lock();
        state.bytes.extend_from_slice(&buffer[..count]);
        state.ended = count == 0;
        seen.changed.notify_all();
        if count == 0 {
            return file;
        }
    }
}

/// Writes a fifo.
#[derive(Debug)]
pub struct Writer(File);

impl Writer {
    /// Opens the fifo; the process's side must have it open for reading.
    ///
    /// # Errors
    /// When nobody reads it.
    pub fn open(path: &Path) -> Result<Writer> {
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path);
        Ok(Writer(file.trying(format!(
            "opening {}, which the shim should read",
            path.display()
        ))?))
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// When the reader does not take it in time.
    pub fn send(&mut self, mut bytes: &[u8], deadline: Duration) -> Result {
        let until = Instant::now() + patient(deadline);
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let ready = poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)], timeout)
                        .trying("waiting for the reader")?;
                    if ready == 0 {
                        let what = "the reading of standard input".into();
                        return Err(Failure::Deadline {
                            what,
                            deadline,
                            detail: format!("; {} bytes are left", bytes.len()),
                        });
                    }
                }
                Err(error) => return Err(error).trying("writing standard input"),
            }
        }
        Ok(())
    }
}
