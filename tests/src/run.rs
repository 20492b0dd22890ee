//! Programs of others, run to their end or to a deadline.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{
    failure::{Failure, Result, Trying},
    wait::patient,
};

/// How long an ordinary command of a peer may take: longer than the slowest seen on a loaded two-core machine.
pub const ORDINARY: Duration = Duration::from_secs(60);

/// What a finished program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128+signal when a signal ended it.
    pub code: i32,
    /// Everything it wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the last line end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the last line end.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }

    /// The failure of the command line that has left this and should have succeeded.
    #[must_use]
    pub fn failure(&self, line: &str) -> Failure {
        let said = format!("{} {}", self.text(), self.errors());
        Failure::Command {
            command: line.to_owned(),
            status: format!("code {}", self.code),
            output: last_of(said.trim(), 2000),
        }
    }
}

/// A command of which the program, to be added, will be the first process of new mount, network, IPC and pid
/// namespaces, and ends with it. Needs root.
#[must_use]
pub fn in_new_namespaces() -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "--net",
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    command
}

/// Runs a command to its end, whatever its exit code.
///
/// # Errors
/// When it cannot be started, or is not done by the deadline; its whole process group is killed then.
pub fn finish(command: &mut Command, input: Option<Vec<u8>>, deadline: Duration) -> Result<Output> {
    let line = describe(command);
    command.process_group(0);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .trying(format!("starting `{line}`"))?;
    let writer = input.zip(child.stdin.take()).map(|(bytes, mut pipe)| {
        // An early exit of the reader is seen in its exit code, not here.
        thread::spawn(move || drop(pipe.write_all(&bytes)))
    });
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait(child, deadline, &line)?;
    let output = Output {
        code: code_of(status),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    };
    if let Some(writer) = writer {
        drop(writer.join());
    }
    Ok(output)
}

/// Runs a command that must succeed.
///
/// # Errors
/// As [`finish`], and when its exit code is not 0.
pub fn succeed(command: &mut Command, deadline: Duration) -> Result<Output> {
    let output = finish(command, None, deadline)?;
    if output.code == 0 {
        return Ok(output);
    }
    Err(refusal(command, &output))
}

/// The failure of a command that should have succeeded.
#[must_use]
pub fn refusal(command: &Command, output: &Output) -> Failure {
    output.failure(&describe(command))
}

/// Waits for a child with a deadline; past it, its process group is killed.
///
/// # Errors
/// [`Failure::Deadline`] when it had to be killed.
pub fn wait(mut child: Child, deadline: Duration, line: &str) -> Result<ExitStatus> {
    let group = Pid::from_raw(child.id().cast_signed());
    let (told, done) = mpsc::channel();
    let waiter = thread::spawn(move || drop(told.send(child.wait())));
    let status = match done.recv_timeout(patient(deadline)) {
        Ok(status) => status.trying(format!("waiting for `{line}`"))?,
        Err(_) => {
            // Already gone is as good as killed.
            let _ = killpg(group, Signal::SIGKILL);
            drop(waiter.join());
            return Err(Failure::Deadline {
                what: format!("the end of `{line}`"),
                deadline,
                detail: String::new(),
            });
        }
    };
    drop(waiter.join());
    Ok(status)
}

/// Waits for a line that a program writes; none when it ends before. What it writes after that is read and forgotten,
/// so that it is not held up.
///
/// # Errors
/// [`Failure::Deadline`] when there is none by then.
pub fn await_line(
    output: impl Read + Send + 'static,
    deadline: Duration,
    mut wanted: impl FnMut(&str) -> bool + Send + 'static,
) -> Result<Option<String>> {
    let (told, seen) = mpsc::channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(output).lines().map_while(std::result::Result::ok);
        // Nobody listens any more after the deadline.
        drop(told.send(lines.find(|line| wanted(line))));
        lines.for_each(drop);
    });
    seen.recv_timeout(patient(deadline)).map_err(|_| Failure::Deadline {
        what: "a line".into(),
        deadline,
        detail: String::new(),
    })
}

/// The exit code as a shell shows it.
#[must_use]
pub fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The command line as one would type it, without the entering of namespaces before it.
#[must_use]
pub fn describe(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let start = words.iter().position(|word| word == "--").map_or(0, |at| at + 1);
    last_of(&words[start..].join(" "), 400)
}

/// The last `limit` bytes of a text, cut at a character.
#[must_use]
pub fn last_of(text: &str, limit: usize) -> String {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A read error ends the text early; what was read so far is still worth showing.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}
