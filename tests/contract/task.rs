//! A container as CRI-O holds it: a bundle, a mounted root file system, fifos, and a connection of its own to the shim.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use containerd_shim_protos::{
    api::{
        CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{MessageField, well_known_types::any::Any},
};
use serde_json::Value;
use tests::failure::{Failure, Result, Trying, claim, same};

use crate::{
    bundle,
    connection::{Connection, Pending},
    crio::{Crio, short},
    fifo::{self, Reader, Writer},
    rootfs::Rootfs,
};

/// How long an ordinary request may take on a loaded machine without hardware virtualization.
pub const ORDINARY: Duration = Duration::from_secs(20);
/// How long a Create may take that boots a virtual machine there.
pub const BOOT: Duration = Duration::from_secs(90);
/// SIGTERM and SIGKILL on the wire.
pub const TERM: u32 = 15;
/// The signal that nothing survives.
pub const KILL: u32 = 9;

/// The fifos of a process.
#[derive(Debug, Clone)]
pub struct Fifos {
    folder: PathBuf,
    /// Empty without standard input, as in the requests.
    pub stdin: String,
    /// Always there.
    pub stdout: String,
    /// Always there in the requests, though nobody reads it beside a terminal.
    pub stderr: String,
}

impl Fifos {
    /// Makes the fifos of a container or exec in a folder of their own.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make(id: &str, stdin: bool) -> Result<Fifos> {
        let folder = Path::new("/run/vc/crio/fifo/io").join(new_id()?.get(..16).unwrap_or_default());
        fs::create_dir_all(&folder).trying(format!("making {}", folder.display()))?;
        let path = |stream: &str| folder.join(format!("{id}-{stream}"));
        let text = |stream: &str| path(stream).display().to_string();
        for stream in if stdin {
            &["stdin", "stdout", "stderr"][..]
        } else {
            &["stdout", "stderr"]
        } {
            fifo::make(&path(stream))?;
        }
        Ok(Fifos {
            stdin: if stdin { text("stdin") } else { String::new() },
            stdout: text("stdout"),
            stderr: text("stderr"),
            folder,
        })
    }

    /// Opens the process's input for writing, once the shim reads it.
    ///
    /// # Errors
    /// When nobody reads it.
    pub fn input(&self) -> Result<Writer> {
        Writer::open(Path::new(&self.stdin))
    }

    /// Removes them with their folder.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self) -> Result {
        fs::remove_dir_all(&self.folder).trying(format!("removing {}", self.folder.display()))
    }
}

/// The readers of a process's output.
#[derive(Debug)]
pub struct Streams {
    /// Standard output, or the terminal.
    pub stdout: Reader,
    /// Standard error; none beside a terminal.
    pub stderr: Option<Reader>,
}

impl Streams {
    /// Opens CRI-O's ends of the output fifos.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(fifos: &Fifos, tty: bool) -> Result<Streams> {
        let stderr = if tty {
            None
        } else {
            Some(Reader::open(Path::new(&fifos.stderr))?)
        };
        Ok(Streams {
            stdout: Reader::open(Path::new(&fifos.stdout))?,
            stderr,
        })
    }
}

/// A container of CRI-O.
pub struct Task<'c, 'n> {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What the shim's `start` printed.
    pub address: String,
    /// Its fifos.
    pub fifos: Fifos,
    /// Its output, while CRI-O reads it.
    pub streams: Option<Streams>,
    /// Its root file system.
    pub rootfs: Rootfs,
    /// Its config.json.
    pub spec: Value,
    /// The CRI-O it belongs to.
    pub crio: &'c Crio<'n>,
    connection: Option<Connection>,
    /// The answer to the Wait that CRI-O sends after Start.
    pub exit: Option<Pending<WaitResponse>>,
}

impl<'c, 'n> Task<'c, 'n> {
    /// Makes the bundle, runs `start`, dials the shim, and makes the fifos: all that comes before Create.
    ///
    /// # Errors
    /// When any of it fails; what was made is removed then.
    pub fn prepare(crio: &'c Crio<'n>, id: &str, spec_at: impl FnOnce(&Path, &Path) -> Value) -> Result<Task<'c, 'n>> {
        let mut rootfs = Rootfs::mount(crio, id)?;
        let bundle = bundle_of(id);
        fs::create_dir_all(&bundle).trying(format!("making {}", bundle.display()))?;
        fs::write(bundle.join(".containerenv"), "").trying("writing .containerenv")?;
        let spec = spec_at(&bundle, &rootfs.merged);
        fs::write(bundle.join("config.json"), spec.to_string()).trying("writing config.json")?;
        let address = match crio.start(id, &bundle) {
            Ok(address) => address,
            Err(failure) => {
                crio.forget_log(id);
                return rootfs.remove().and_then(|()| remove_bundle(id)).and(Err(failure));
            }
        };
        let connection = Some(Connection::dial(&address)?);
        let fifos = Fifos::make(id, spec["annotations"]["io.kubernetes.cri-o.Stdin"] == "true")?;
        let streams = Some(Streams::open(&fifos, terminal_of(&spec))?);
        Ok(Task {
            id: id.into(),
            bundle,
            address,
            fifos,
            streams,
            rootfs,
            spec,
            crio,
            connection,
            exit: None,
        })
    }

    /// The connection of this container.
    ///
    /// # Errors
    /// When it was dropped.
    pub fn connection(&self) -> Result<&Connection> {
        self.connection
            .as_ref()
            .ok_or_else(|| Failure::Claim("the connection is not there".into()))
    }

    /// Its name in a failure's message.
    pub fn name(&self) -> &str {
        short(&self.id)
    }

    /// Sends Create.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin_create(&self) -> Result<Pending<CreateTaskResponse>> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            terminal: terminal_of(&self.spec),
            stdin: self.fifos.stdin.clone(),
            stdout: self.fifos.stdout.clone(),
            stderr: self.fifos.stderr.clone(),
            options: MessageField(self.crio.options()?.map(Box::new)),
            ..CreateTaskRequest::default()
        };
        self.connection()?.ask("Create", &request)
    }

    /// Create; the pid in the answer must be a live process of the host, which CRI-O looks up at once.
    ///
    /// # Errors
    /// When it is refused or the pid is not alive.
    pub fn create(&self) -> Result<u32> {
        let pid = self.begin_create()?.granted(BOOT)?.pid;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // proc_pid_stat(5), field 22: CRI-O keeps the start time, to recognize the process later.
        let started = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(19)?.parse::<u64>().ok());
        claim(
            started.is_some_and(|started| started > 0),
            format!("Create answered pid {pid}, which is no live process: {stat:?}"),
        )?;
        Ok(pid)
    }

    /// Start, then a Wait in the background.
    ///
    /// # Errors
    /// When Start is refused.
    pub fn start(&mut self) -> Result {
        self.begin_start()?.granted(BOOT)?;
        self.exit = Some(self.begin_wait("")?);
        Ok(())
    }

    /// Sends Start.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin_start(&self) -> Result<Pending<StartResponse>> {
        self.connection()?.ask(
            "Start",
            &StartRequest {
                id: self.id.clone(),
                ..StartRequest::default()
            },
        )
    }

    /// Sends a Wait for the container, or for one of its execs.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin_wait(&self, exec: &str) -> Result<Pending<WaitResponse>> {
        self.connection()?.ask(
            "Wait",
            &WaitRequest {
                id: self.id.clone(),
                exec_id: exec.into(),
                ..WaitRequest::default()
            },
        )
    }

    /// State, now.
    ///
    /// # Errors
    /// When it is refused.
    pub fn state(&self) -> Result<StateResponse> {
        self.begin_state()?.granted(ORDINARY)
    }

    /// Sends State.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin_state(&self) -> Result<Pending<StateResponse>> {
        self.connection()?.ask(
            "State",
            &StateRequest {
                id: self.id.clone(),
                ..StateRequest::default()
            },
        )
    }

    /// State must be as the container is: this status, and the streams verbatim as they were given to Create.
    ///
    /// # Errors
    /// When it is not.
    pub fn is(&self, status: Status) -> Result<StateResponse> {
        let state = self.state()?;
        same("State.status", state.status.enum_value_or_default(), status)?;
        same("State.id", state.id.as_str(), self.id.as_str())?;
        same(
            "State.bundle",
            state.bundle.as_str(),
            self.bundle.display().to_string().as_str(),
        )?;
        same("State.stdin", &state.stdin, &self.fifos.stdin)?;
        same("State.stdout", &state.stdout, &self.fifos.stdout)?;
        same("State.stderr", &state.stderr, &self.fifos.stderr)?;
        same("State.terminal", state.terminal, terminal_of(&self.spec))?;
        Ok(state)
    }

    /// Sends Kill; CRI-O never says `all`.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn kill(&self, exec: &str, signal: u32) -> Result<Pending<Empty>> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal,
            all: false,
            ..KillRequest::default()
        };
        self.connection()?.ask("Kill", &request)
    }

    /// Waits for the exit that the Wait after Start reports, and holds State to it.
    ///
    /// # Errors
    /// When it does not come in time, or State says otherwise.
    pub fn exited(&self, deadline: Duration) -> Result<WaitResponse> {
        let wait = self
            .exit
            .as_ref()
            .ok_or_else(|| Failure::Claim("nobody waits for this container".into()))?;
        let exit = wait.granted(deadline)?;
        let at = exit.exited_at.as_ref().map(|at| at.seconds).unwrap_or_default();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs()
            .cast_signed();
        claim(
            (now - 3600..=now + 60).contains(&at),
            format!("Wait.exited_at is {at} s after the epoch, and now is {now}"),
        )?;
        let state = self.is(Status::STOPPED)?;
        same("State.exit_status", state.exit_status, exit.exit_status)?;
        same(
            "State.exited_at",
            state.exited_at.as_ref().map(|at| at.seconds),
            Some(at),
        )?;
        Ok(exit)
    }

    /// Stops as CRI-O does: Wait in the background, the stop signal, then SIGKILL after `grace`.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self, grace: Duration) -> Result<WaitResponse> {
        let stopped = self.begin_wait("")?;
        let gone = |answer: std::result::Result<Empty, crate::connection::Refusal>| match answer {
            Err(refusal) if !refusal.means_gone() => Err(Failure::Claim(format!(
                "Kill of {} was refused: {refusal}",
                self.name()
            ))),
            _ => Ok(()),
        };
        if !grace.is_zero() {
            gone(self.kill("", TERM)?.answer(ORDINARY)?)?;
            if let Ok(exit) = stopped.answer(grace) {
                return exit
                    .map_err(|refusal| Failure::Claim(format!("Wait of {} was refused: {refusal}", self.name())));
            }
        }
        gone(self.kill("", KILL)?.answer(ORDINARY)?)?;
        stopped.granted(ORDINARY)
    }

    /// Sends Delete for the container, or for one of its execs.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin_delete(&self, exec: &str) -> Result<Pending<DeleteResponse>> {
        self.connection()?.ask(
            "Delete",
            &DeleteRequest {
                id: self.id.clone(),
                exec_id: exec.into(),
                ..DeleteRequest::default()
            },
        )
    }

    /// Delete, then Shutdown: what CRI-O sends when a container is removed. A connection that Shutdown ends is fine.
    ///
    /// # Errors
    /// When either is refused.
    pub fn delete(&self) -> Result<DeleteResponse> {
        let deleted = self.begin_delete("")?.granted(ORDINARY)?;
        self.shutdown()?;
        Ok(deleted)
    }

    /// Shutdown alone.
    ///
    /// # Errors
    /// When it is refused by a live shim.
    pub fn shutdown(&self) -> Result {
        let request = ShutdownRequest {
            id: self.id.clone(),
            now: false,
            ..ShutdownRequest::default()
        };
        let answer: Pending<Empty> = self.connection()?.ask("Shutdown", &request)?;
        match answer.answer(ORDINARY)? {
            Err(refusal) if refusal.code.is_some() => Err(Failure::Claim(format!("Shutdown was refused: {refusal}"))),
            _ => Ok(()),
        }
    }

    /// Removes what CRI-O itself made for the container.
    ///
    /// # Errors
    /// The kernel's.
    pub fn discard(mut self) -> Result {
        self.hang_up();
        self.rootfs.remove()?;
        self.fifos.remove()?;
        self.crio.forget_log(&self.id);
        remove_bundle(&self.id)?;
        let exits = exit_file(&self.id);
        if exits.exists() {
            fs::remove_file(&exits).trying(format!("removing {}", exits.display()))
        } else {
            Ok(())
        }
    }

    /// Removes a stopped container: Delete, Shutdown, and CRI-O's own part.
    ///
    /// # Errors
    /// When any of it fails.
    pub fn remove(self) -> Result {
        self.delete()?;
        self.discard()
    }

    /// CRI-O goes away: its connection and its ends of the fifos. Returns what it had read of standard output.
    ///
    /// # Errors
    /// The kernel's.
    pub fn abandon(&mut self) -> Result<Vec<u8>> {
        self.hang_up();
        self.streams
            .take()
            .map_or(Ok(Vec::new()), |streams| Ok(streams.stdout.close()?.bytes))
    }

    /// CRI-O is back: the `address` file, State, and the fifos that State names.
    ///
    /// # Errors
    /// When any of it fails.
    pub fn recover(&mut self) -> Result<StateResponse> {
        self.connection = Some(self.crio.redial(&self.bundle)?);
        let state = self.state()?;
        let fifos = Fifos {
            stdout: state.stdout.clone(),
            stderr: state.stderr.clone(),
            stdin: state.stdin.clone(),
            ..self.fifos.clone()
        };
        self.streams = Some(Streams::open(&fifos, state.terminal)?);
        Ok(state)
    }

    /// Ends the connection and what is pending on it.
    pub fn hang_up(&mut self) {
        self.exit = None;
        self.connection = None;
    }

    /// Statistics: the Any as it came.
    ///
    /// # Errors
    /// When they are refused.
    pub fn stats(&self) -> Result<Any> {
        let answer: Pending<StatsResponse> = self.connection()?.ask(
            "Stats",
            &StatsRequest {
                id: self.id.clone(),
                ..StatsRequest::default()
            },
        )?;
        answer
            .granted(ORDINARY)?
            .stats
            .into_option()
            .ok_or_else(|| Failure::Claim("Stats answered without statistics".into()))
    }

    /// Update with resources, as the runtime specification writes them.
    ///
    /// # Errors
    /// When it is refused.
    pub fn update(&self, resources: &Value) -> Result {
        let resources = Any {
            type_url: bundle::RESOURCES_TYPE.into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(resources),
            ..UpdateTaskRequest::default()
        };
        let answer: Pending<Empty> = self.connection()?.ask("Update", &request)?;
        answer.granted(ORDINARY).map(drop)
    }

    /// Its standard output, which must be read by somebody.
    ///
    /// # Errors
    /// When CRI-O has abandoned it.
    pub fn stdout(&self) -> Result<&Reader> {
        self.streams
            .as_ref()
            .map(|streams| &streams.stdout)
            .ok_or_else(|| Failure::Claim("nobody reads this container".into()))
    }
}

/// Where CRI-O keeps a container's bundle.
pub fn bundle_of(id: &str) -> PathBuf {
    Path::new("/run/containers/storage/overlay-containers")
        .join(id)
        .join("userdata")
}

/// Removes a container's bundle, if it is still there.
///
/// # Errors
/// The kernel's.
pub fn remove_bundle(id: &str) -> Result {
    let bundle = bundle_of(id);
    let folder = bundle.parent().unwrap_or(&bundle);
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).trying(format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The file in CRI-O's `container_exits_dir` that tells of a container's exit.
pub fn exit_file(id: &str) -> PathBuf {
    Path::new("/var/run/crio/exits").join(id)
}

/// A new id of 64 hexadecimal digits.
///
/// # Errors
/// The kernel's.
pub fn new_id() -> Result<String> {
    let one = || fs::read_to_string("/proc/sys/kernel/random/uuid").trying("making an id");
    Ok(format!("{}{}", one()?, one()?)
        .chars()
        .filter(char::is_ascii_hexdigit)
        .collect())
}

fn terminal_of(spec: &Value) -> bool {
    spec["process"]["terminal"] == true
}
