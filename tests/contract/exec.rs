//! An additional process in a container, as CRI-O's Exec and ExecSync run it.

use std::time::Duration;

use containerd_shim_protos::{
    api::{CloseIORequest, Empty, ExecProcessRequest, ResizePtyRequest, StartRequest, StartResponse, WaitResponse},
    protobuf::{MessageField, well_known_types::any::Any},
};
use serde_json::json;
use tests::failure::{Failure, Result, claim};

use crate::{
    bundle::PROCESS_TYPE,
    connection::Pending,
    crio::Runtime,
    fifo::Taken,
    task::{Fifos, KILL, ORDINARY, Streams, Task, new_id},
};

/// A running exec.
pub struct Exec<'t, 'c, 'n> {
    task: &'t Task<'c, 'n>,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its fifos.
    pub fifos: Fifos,
    /// Its output.
    pub streams: Streams,
    exit: Pending<WaitResponse>,
}

/// A finished exec.
#[derive(Debug)]
pub struct Done {
    /// Its exit code.
    pub code: u32,
    /// What it wrote to standard output, or to its terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How much of the output was still in the pipes when Wait was answered; CRI-O does not read that any more.
    pub late: usize,
}

impl Done {
    /// Standard output as text, without the last line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the last line end.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }
}

impl<'c, 'n> Task<'c, 'n> {
    /// Exec as ExecSync does it: no terminal, no input, to its end.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn exec(&self, args: &[&str]) -> Result<Done> {
        self.begin_exec(args, false, false)?.finish(ORDINARY)
    }

    /// Runs a shell script in the container, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn shell(&self, script: &str) -> Result<String> {
        let done = self.exec(&["sh", "-c", script])?;
        claim(
            done.code == 0,
            format!(
                "`{script}` ended with code {}: {} {}",
                done.code,
                done.text(),
                done.errors()
            ),
        )?;
        Ok(done.text())
    }

    /// Exec, Start and a Wait in the background.
    ///
    /// # Errors
    /// When Exec or Start is refused; what was made is removed then, as CRI-O does.
    pub fn begin_exec<'t>(&'t self, args: &[&str], tty: bool, stdin: bool) -> Result<Exec<'t, 'c, 'n>> {
        let id = new_id()?;
        let fifos = Fifos::make(&self.id, stdin)?;
        let streams = Streams::open(&fifos, tty)?;
        let started = self.send_exec(&id, &fifos, args, tty).and_then(|()| {
            let start = StartRequest {
                id: self.id.clone(),
                exec_id: id.clone(),
                ..StartRequest::default()
            };
            let started: Pending<StartResponse> = self.connection()?.ask("Start", &start)?;
            // CRI-O removes an exec that does not start.
            started
                .granted(ORDINARY)
                .or_else(|failure| self.begin_delete(&id)?.granted(ORDINARY).and(Err(failure)))
        });
        match started {
            Ok(_) => Ok(Exec {
                exit: self.begin_wait(&id)?,
                task: self,
                id,
                fifos,
                streams,
            }),
            Err(failure) => {
                drop(streams);
                fifos.remove().and(Err(failure))
            }
        }
    }

    fn send_exec(&self, id: &str, fifos: &Fifos, args: &[&str], tty: bool) -> Result {
        // CRI-O replaces the arguments in the container's own process: `terminal` in there is the container's.
        let mut process = self.spec["process"].clone();
        process["args"] = json!(args);
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: id.into(),
            terminal: tty,
            stdin: fifos.stdin.clone(),
            stdout: fifos.stdout.clone(),
            stderr: fifos.stderr.clone(),
            spec: MessageField::some(Any {
                type_url: PROCESS_TYPE.into(),
                value: process.to_string().into_bytes(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        let answer: Pending<Empty> = self.connection()?.ask("Exec", &request)?;
        answer.granted(ORDINARY).map(drop)
    }
}

impl Exec<'_, '_, '_> {
    /// Waits for its end, closes the fifos at once, and deletes it.
    ///
    /// # Errors
    /// When it does not end in time; or its output's writers are still open when Wait is answered.
    pub fn finish(self, deadline: Duration) -> Result<Done> {
        let exit = self.exit.granted(deadline)?;
        if self.task.crio.runtime == Runtime::Reference {
            // It goes on copying after its answer, and CRI-O may miss the last bytes.
            for stream in [Some(&self.streams.stdout), self.streams.stderr.as_ref()] {
                stream.map(|stream| stream.end(ORDINARY)).transpose()?;
            }
        }
        let stdout = self.streams.stdout.close()?;
        let stderr = self.streams.stderr.map(super::fifo::Reader::close).transpose()?;
        let closed = stdout.ended && stderr.as_ref().is_none_or(|taken| taken.ended);
        claim(
            closed,
            "Wait of an exec was answered while the write end of its output was still open",
        )?;
        claim(
            exit.exited_at.is_some(),
            "Wait of an exec was answered without exited_at",
        )?;
        self.fifos.remove()?;
        self.task.begin_delete(&self.id)?.granted(ORDINARY)?;
        let stderr = stderr.unwrap_or(Taken {
            bytes: Vec::new(),
            late: 0,
            ended: true,
        });
        Ok(Done {
            code: exit.exit_status,
            late: stdout.late + stderr.late,
            stdout: stdout.bytes,
            stderr: stderr.bytes,
        })
    }

    /// What CRI-O does when an exec's time is up: SIGKILL, then a wait without limit (limited here).
    ///
    /// # Errors
    /// When it does not end.
    pub fn time_out(self) -> Result<Done> {
        self.task.kill(&self.id, KILL)?.granted(ORDINARY)?;
        self.finish(ORDINARY)
    }

    /// Ends its standard input.
    ///
    /// # Errors
    /// When it is refused.
    pub fn close_input(&self) -> Result {
        let request = CloseIORequest {
            id: self.task.id.clone(),
            exec_id: self.id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        let answer: Pending<Empty> = self.task.connection()?.ask("CloseIO", &request)?;
        answer.granted(ORDINARY).map(drop)
    }

    /// Gives its terminal a size.
    ///
    /// # Errors
    /// When it is refused.
    pub fn resize(&self, width: u32, height: u32) -> Result {
        let request = ResizePtyRequest {
            id: self.task.id.clone(),
            exec_id: self.id.clone(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        let answer: Pending<Empty> = self.task.connection()?.ask("ResizePty", &request)?;
        answer.granted(ORDINARY).map(drop)
    }

    /// Fails when it has ended already.
    ///
    /// # Errors
    /// [`Failure::Claim`] with its exit.
    pub fn still_runs(&self) -> Result {
        match self.exit.answer(Duration::ZERO) {
            Err(Failure::Deadline { .. }) => Ok(()),
            other => Err(Failure::Claim(format!("the exec has ended: {other:?}"))),
        }
    }
}
