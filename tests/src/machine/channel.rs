//! The harness' end of the port to an emulated node.

use std::{
    collections::BTreeMap,
    io::Write,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::wire::{self, Frame, Kind, LONGEST, Run};
use crate::{
    failure::{Failure, Result, Trying},
    run::{self, Output},
};

/// How long the node may take to accept bytes. One that does not is dead.
const ACCEPTING: Duration = Duration::from_secs(240);

/// The way to the runner of one boot of a node.
#[derive(Debug)]
pub(super) struct Channel {
    stream: Mutex<UnixStream>,
    heard: Arc<Heard>,
    next: AtomicU32,
}

/// What came from the node.
#[derive(Debug, Default)]
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    boot: Option<String>,
    commands: BTreeMap<u32, Progress>,
    /// Why nothing more comes.
    over: Option<String>,
}

/// What is known of a command.
#[derive(Debug, Clone, Default)]
struct Progress {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: Option<i32>,
}

impl Channel {
    /// Listens on a stream that has the port at its other end.
    pub(super) fn new(stream: UnixStream) -> Result<Channel> {
        stream
            .set_write_timeout(Some(ACCEPTING))
            .trying("setting a deadline for the node's port")?;
        let heard = Arc::<Heard>::default();
        let mut frames = stream.try_clone().trying("sharing the node's port")?;
        let listener = Arc::clone(&heard);
        thread::spawn(move || {
            let over = loop {
                match wire::read(&mut frames) {
                    Ok(Some(frame)) => listener.note(frame),
                    Ok(None) => break "the node's machine has ended".to_owned(),
                    Err(error) => break format!("the node's port: {error}"),
                }
            };
            listener.state().over = Some(over);
            listener.changed.notify_all();
        });
        Ok(Channel {
            stream: Mutex::new(stream),
            heard,
            next: AtomicU32::new(1),
        })
    }

    /// Waits for the runner's first word, the boot's identifier.
    pub(super) fn greeting(&self, deadline: Duration) -> Result<String> {
        self.heard
            .until("the node's first word", deadline, |state| state.boot.clone())
    }

    /// Waits until nothing can come any more.
    pub(super) fn end(&self, deadline: Duration) -> Result {
        let over = |state: &State| state.over.clone();
        match self.heard.until("the end of the node's machine", deadline, over) {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Starts a command.
    pub(super) fn start(&self, run: &Run) -> Result<Running<'_>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.heard.state().commands.insert(number, Progress::default());
        let running = Running {
            channel: self,
            number,
            line: run::last_of(&run.words.join(" "), 400),
            left: false,
        };
        self.send(number, Kind::Run, &run.to_bytes())?;
        Ok(running)
    }

    fn send(&self, number: u32, kind: Kind, bytes: &[u8]) -> Result {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut *stream, number, kind, bytes)
            .and_then(|()| stream.flush())
            .trying("writing to the node's port")
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        // The listener ends with the stream; one that has ended already is fine.
        drop(stream.shutdown(Shutdown::Both));
    }
}

impl Heard {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, frame: Frame) {
        let mut state = self.state();
        match (frame.kind, state.commands.get_mut(&frame.command)) {
            (Kind::Hello, _) => state.boot = Some(String::from_utf8_lossy(&frame.bytes).into_owned()),
            (Kind::Stdout, Some(progress)) => progress.stdout.extend(frame.bytes),
            (Kind::Stderr, Some(progress)) => progress.stderr.extend(frame.bytes),
            (Kind::Exit, Some(progress)) => progress.code = frame.bytes.try_into().ok().map(i32::from_be_bytes),
            // Of a command that nobody waits for any more.
            _ => {}
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for something to be known.
    fn until<T>(&self, what: &str, deadline: Duration, look: impl Fn(&State) -> Option<T>) -> Result<T> {
        let end = Instant::now() + deadline;
        let mut state = self.state();
        loop {
            if let Some(value) = look(&state) {
                return Ok(value);
            }
            if let Some(over) = &state.over {
                return Err(Failure::Claim(format!("{what} did not come: {over}")));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::Deadline {
                    what: what.into(),
                    deadline,
                    detail: String::new(),
                });
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A command that runs in the node; killed when it is dropped before its end.
#[derive(Debug)]
pub struct Running<'m> {
    channel: &'m Channel,
    number: u32,
    line: String,
    left: bool,
}

impl Running<'_> {
    /// Sends bytes to its standard input.
    ///
    /// # Errors
    /// When the node does not take them.
    pub fn input(&self, bytes: &[u8]) -> Result {
        let mut parts = bytes.chunks(LONGEST);
        parts.try_for_each(|part| self.channel.send(self.number, Kind::Input, part))
    }

    /// Ends its standard input.
    ///
    /// # Errors
    /// When the node does not take it.
    pub fn end_input(&self) -> Result {
        self.channel.send(self.number, Kind::Input, &[])
    }

    /// Waits until a line of its output or errors contains a text, and returns the line.
    ///
    /// # Errors
    /// [`Failure::Deadline`], and when the command ends before.
    pub fn wait_for_line(&self, text: &str, deadline: Duration) -> Result<String> {
        let what = format!("{text:?} from `{}`", self.line);
        let line = |bytes: &[u8]| {
            let said = String::from_utf8_lossy(bytes);
            // A line is whole when the next one has begun.
            let whole = said.rsplit_once('\n').map_or("", |(lines, _)| lines);
            whole.lines().find(|line| line.contains(text)).map(str::to_owned)
        };
        let found = self.channel.heard.until(&what, deadline, |state| {
            let progress = state.commands.get(&self.number)?;
            let line = line(&progress.stdout).or_else(|| line(&progress.stderr));
            match (line, progress.code) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(_)) => Some(Err(progress.clone())),
                (None, None) => None,
            }
        })?;
        found.map_err(|progress| progress.output().failure(&self.line))
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn said(&self) -> String {
        let state = self.channel.heard.state();
        let bytes = state.commands.get(&self.number).map(|progress| &progress.stdout);
        bytes.map_or_else(String::new, |bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// Kills it and what is in its process group.
    ///
    /// # Errors
    /// When the node does not take the word.
    pub fn kill(&self) -> Result {
        self.channel.send(self.number, Kind::Kill, &[])
    }

    /// Leaves it to itself: it goes on, or ends with the node.
    pub fn leave(mut self) {
        self.left = true;
    }

    /// Waits for its end, whatever its exit code.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with what it had said; it is killed then.
    pub fn wait(self, deadline: Duration) -> Result<Output> {
        let what = format!("the end of `{}`", self.line);
        let ended = self.channel.heard.until(&what, deadline, |state| {
            let progress = state.commands.get(&self.number)?;
            progress.code.map(|_| progress.clone().output())
        });
        ended.map_err(|failure| match failure {
            Failure::Deadline { what, deadline, .. } => Failure::Deadline {
                what,
                deadline,
                detail: format!("; it had said: {}", run::last_of(&self.said(), 2000)),
            },
            other => other,
        })
    }

    /// Waits for its end; it must succeed.
    ///
    /// # Errors
    /// As [`Running::wait`], and any exit code but 0.
    pub fn succeed(self, deadline: Duration) -> Result<Output> {
        let line = self.line.clone();
        let output = self.wait(deadline)?;
        match output.code {
            0 => Ok(output),
            _ => Err(output.failure(&line)),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let progress = self.channel.heard.state().commands.remove(&self.number);
        if !self.left && progress.is_some_and(|progress| progress.code.is_none()) {
            // With the node gone it is gone, too.
            drop(self.kill());
        }
    }
}

impl Progress {
    fn output(self) -> Output {
        Output {
            code: self.code.unwrap_or_default(),
            stdout: self.stdout,
            stderr: self.stderr,
        }
    }
}
