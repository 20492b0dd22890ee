//! Carries a process's bytes between the agent and the caller's fifos.
//!
//! One request per stream is outstanding at a time, which keeps the order; none has a deadline. Output fifos are held
//! open for reading and writing: a CRI daemon that restarts goes away and comes back on the same paths, and in between
//! the bytes wait in the pipe instead of killing the writer, and after the process's end for as long as its caller has
//! not forgotten it. End of input is what `CloseIO` says, not what the fifo says, for the same reason.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    time::Duration,
};

use agent_protocol::{
    client::{Client, ClientError, LONGEST_READ},
    protocol::agent::{CloseStdinRequest, ReadStreamRequest, TtyWinResizeRequest, WriteStreamRequest},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt,
    net::unix::pipe::{OpenOptions, Receiver, Sender},
    sync::watch,
    task::JoinHandle,
    time::Instant,
};

use crate::error::{Context, Error, Result};

/// How long a process's output may take to end after the process: for its reader to make room, and for the guest to
/// come to an end.
const STALLED_OUTPUT: Duration = Duration::from_secs(10);

/// How long the output of a process that was killed may go on before its end is asked for all the same: less than the
/// shim waits for the end of what it has killed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where a process's streams go, as the caller said it. `State` must echo it to the letter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Path of a fifo, or empty.
    pub stdin: String,
    /// Path of a fifo, a `file://` URL, or empty.
    pub stdout: String,
    /// Same; not used with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// The caller's ends, opened.
pub struct Streams {
    stdin: Input,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

enum Input {
    Fifo(Receiver),
    /// The caller gives none: the process reads the end at once.
    Empty,
    /// A terminal that nobody types at.
    Idle,
}

enum Output {
    Fifo(Sender),
    File(tokio::fs::File),
    /// Nobody wants it; a process whose output is not read would stand still.
    Nowhere,
}

impl Stdio {
    /// Whether the process reads something.
    pub fn has_input(&self) -> bool {
        self.terminal || !self.stdin.is_empty()
    }

    /// Opens what the caller named. Must be called in the runtime.
    pub fn open(&self) -> Result<Streams> {
        let stdin = match self.stdin.as_str() {
            "" if self.terminal => Input::Idle,
            "" => Input::Empty,
            path => Input::Fifo(
                OpenOptions::new()
                    .read_write(true)
                    .open_receiver(path)
                    .at("open stdin", path)?,
            ),
        };
        Ok(Streams {
            stdin,
            stdout: Some(Output::open(&self.stdout)?),
            // A terminal has none of its own.
            stderr: (!self.terminal).then(|| Output::open(&self.stderr)).transpose()?,
        })
    }
}

impl Output {
    fn open(path: &str) -> Result<Output> {
        if path.is_empty() {
            return Ok(Output::Nowhere);
        }
        if let Some((scheme, rest)) = path.split_once("://") {
            if scheme != "file" {
                return Err(Error::Invalid(format!(
                    "output '{path}' is of scheme {scheme}; this runtime takes fifos and file://"
                )));
            }
            let file = fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(rest)
                .at("open", rest)?;
            return Ok(Output::File(file.into()));
        }
        if !Path::new(path).exists() {
            return Err(Error::Invalid(format!("output fifo '{path}' does not exist")));
        }
        let fifo = OpenOptions::new().read_write(true).open_sender(path).at("open", path)?;
        Ok(Output::Fifo(fifo))
    }

    /// A further descriptor, of a fifo only.
    fn fifo(&self) -> Option<OwnedFd> {
        match self {
            // Without one, output that nobody reads before the end is lost, and nothing else.
            Output::Fifo(fifo) => fifo.as_fd().try_clone_to_owned().ok(),
            Output::File(_) | Output::Nowhere => None,
        }
    }

    async fn write(&mut self, data: &[u8]) -> std::io::Result<()> {
        match self {
            Output::Fifo(fifo) => fifo.write_all(data).await,
            Output::File(file) => {
                file.write_all(data).await?;
                file.flush().await
            }
            Output::Nowhere => Ok(()),
        }
    }

    /// CRI-O closes its end of an exec's output as soon as the exec's Wait is answered, whatever is still in the pipe
    /// (a race in `internal/oci/runtime_vm.go` of CRI-O): give the reader a moment to empty it. No event tells when a
    /// pipe is empty.
    async fn emptied(&self) {
        let Output::Fifo(fifo) = self else { return };
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        for _ in 0..300 {
            match crate::sys::unread(fifo.as_fd()) {
                Ok(0) | Err(_) => return,
                Ok(_) => tick.tick().await,
            };
        }
    }
}

/// Names a process in the agent's terms.
#[derive(Debug, Clone)]
pub struct ProcessName {
    /// The container's id.
    pub container: String,
    /// The exec's id, or the container's id for its init.
    pub exec: String,
}

impl ProcessName {
    /// Asks for another size of its terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> TtyWinResizeRequest {
        let mut request = TtyWinResizeRequest::new();
        request.container_id = self.container.clone();
        request.exec_id = self.exec.clone();
        request.row = rows;
        request.column = columns;
        request
    }
}

/// The running copies of one process's streams.
pub struct Copies {
    output: Vec<OutputCopy>,
    /// Further descriptors of the output's fifos.
    fifos: Vec<OwnedFd>,
    input: Option<JoinHandle<()>>,
}

impl Streams {
    /// Starts copying. `close_stdin` turns true when the caller has closed the process's input.
    pub fn copy(self, client: &Client, name: &ProcessName, close_stdin: watch::Receiver<bool>) -> Copies {
        let outputs = [&self.stdout, &self.stderr];
        let fifos = outputs.into_iter().flatten().filter_map(Output::fifo).collect();
        let output = [(self.stdout, true), (self.stderr, false)]
            .into_iter()
            .filter_map(|(output, stdout)| {
                let copy = copy_output(client.clone(), name.clone(), output?, stdout);
                Some(OutputCopy::Running(tokio::spawn(copy)))
            })
            .collect();
        let (client, name) = (client.clone(), name.clone());
        let input = match self.stdin {
            Input::Fifo(stdin) => Some(tokio::spawn(copy_input(client, name, stdin, close_stdin))),
            Input::Empty => Some(tokio::spawn(async move { end_input(&client, &name).await })),
            Input::Idle => None,
        };
        Copies { output, fifos, input }
    }
}

/// An output that is being copied, or was.
enum OutputCopy {
    Running(JoinHandle<Option<Output>>),
    Ended(Option<Output>),
}

impl OutputCopy {
    /// Waits for its end.
    async fn end(&mut self) {
        if let OutputCopy::Running(copy) = self {
            *self = OutputCopy::Ended(copy.await.unwrap_or_default());
        }
    }
}

impl Copies {
    /// Waits until all output has come to its end. Of a process that was killed, only as long as its output may take: a
    /// guest may be one that has no end.
    pub async fn ended(&mut self, mut killed: watch::Receiver<bool>) {
        let all = async {
            for copy in &mut self.output {
                copy.end().await;
            }
        };
        let given_up = async {
            // A process that nobody knows any more is not killed any more.
            if killed.wait_for(|killed| *killed).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = all => {}
            () = given_up => {}
        }
    }

    /// Called when the process has ended: waits until its output is delivered and closes the fifos.
    ///
    /// The agent ends the streams of a dead process within its own grace; only a caller that reads nothing can delay
    /// this, or a guest that has no end, and it is given up after 10 s.
    ///
    /// Returns reading ends of what is not read: as long as they are open the bytes are there for a reader that comes
    /// back, and it sees their end.
    pub async fn finish(self, wait_for_reader: bool) -> Vec<File> {
        if let Some(input) = self.input {
            input.abort();
        }
        let end = Instant::now() + STALLED_OUTPUT;
        for mut copy in self.output {
            let in_time = tokio::time::timeout_at(end, copy.end()).await.is_ok();
            match copy {
                OutputCopy::Ended(Some(output)) if in_time && wait_for_reader => output.emptied().await,
                OutputCopy::Ended(_) => {}
                OutputCopy::Running(copy) => {
                    tracing::warn!(
                        "output is lost: it did not end, or nobody read it, within 10 s of the process's end"
                    );
                    copy.abort();
                }
            }
        }
        self.fifos.iter().filter_map(reading_end).collect()
    }
}

/// A fifo's reading end, if there is something in it.
fn reading_end(fifo: &OwnedFd) -> Option<File> {
    crate::sys::unread(fifo.as_fd()).ok().filter(|bytes| *bytes > 0)?;
    // Its caller may have removed its name.
    let path = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    let mut options = fs::OpenOptions::new();
    let end = options.read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    end.inspect_err(|error| tracing::warn!(%error, "output is lost: nobody has read it"))
        .ok()
}

async fn copy_output(client: Client, name: ProcessName, mut output: Output, stdout: bool) -> Option<Output> {
    loop {
        let mut request = ReadStreamRequest::new();
        request.container_id = name.container.clone();
        request.exec_id = name.exec.clone();
        request.len = LONGEST_READ;
        let reply = if stdout {
            client.read_stdout(request).await
        } else {
            client.read_stderr(request).await
        };
        // Both an empty reply and an error are the end of the stream (upstream's shims take both so).
        let data = match reply {
            Ok(reply) if !reply.data.is_empty() => reply.data,
            _ => return Some(output),
        };
        if let Err(error) = output.write(&data).await {
            tracing::warn!(%error, ?name, "cannot write output");
            return None;
        }
    }
}

async fn copy_input(client: Client, name: ProcessName, stdin: Receiver, mut close: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let closed = tokio::select! {
            biased;
            ready = stdin.readable() => { if ready.is_err() { return; } false }
            closed = close.wait_for(|closed| *closed) => { if closed.is_err() { return; } true }
        };
        match stdin.try_read(&mut buffer) {
            Ok(count) if count > 0 => {
                if let Err(error) = write_all(&client, &name, &buffer[..count]).await {
                    tracing::debug!(%error, ?name, "the process takes no more input");
                    return;
                }
            }
            // Whatever the caller wrote before it closed has been read: now the process may see the end.
            Ok(_) | Err(_) if closed => break,
            Ok(_) | Err(_) => {}
        }
    }
    end_input(&client, &name).await;
}

/// Lets a process see the end of its input.
pub(crate) async fn end_input(client: &Client, name: &ProcessName) {
    let mut request = CloseStdinRequest::new();
    request.container_id = name.container.clone();
    request.exec_id = name.exec.clone();
    if let Err(error) = client.close_stdin(request).await {
        tracing::debug!(%error, ?name, "stdin was closed already");
    }
}

/// Writes all of it into a process's input.
///
/// # Errors
/// The process takes no more.
pub(crate) async fn write_all(
    client: &Client,
    name: &ProcessName,
    mut data: &[u8],
) -> std::result::Result<(), ClientError> {
    while !data.is_empty() {
        let mut request = WriteStreamRequest::new();
        request.container_id = name.container.clone();
        request.exec_id = name.exec.clone();
        request.data = data.to_vec();
        let taken = client.write_stdin(request).await?.len as usize;
        // The answer is the guest's word: more than was sent, or nothing, must not make a loop or a panic.
        if taken == 0 || taken > data.len() {
            return Err(ClientError::Gone);
        }
        data = &data[taken..];
    }
    Ok(())
}
