//! The containerd of a node: started, stopped, killed, listened to.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Stdio},
    sync::{MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::Node;
use crate::{
    failure::{Failure, Result, Trying},
    procs, run,
    wait::patient,
};

/// containerd and the reader of its events.
#[derive(Debug)]
pub(super) struct Daemon {
    pid: i32,
    child: Child,
    listener: Child,
}

impl Node {
    /// The pid of containerd, outside the node.
    #[must_use]
    pub fn containerd_pid(&self) -> i32 {
        self.daemon().as_ref().map_or(0, |daemon| daemon.pid)
    }

    /// How many file descriptors containerd has open.
    #[must_use]
    pub fn containerd_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.containerd_pid())).map_or(0, Iterator::count)
    }

    /// Stops containerd and starts it again, as an upgrade of it would; pods keep running.
    ///
    /// # Errors
    /// When it does not end or start.
    pub fn restart_containerd(&self) -> Result {
        self.stop_containerd()?;
        self.start_containerd()
    }

    /// Ends containerd at once, as a crash would; [`Node::restart_containerd`] brings it back.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_containerd(&self) -> Result {
        let daemon = self.daemon();
        let daemon = daemon
            .as_ref()
            .ok_or_else(|| Failure::Claim("there is no containerd to kill".into()))?;
        kill(Pid::from_raw(daemon.pid), Signal::SIGKILL).trying("killing containerd")
    }

    pub(super) fn start_containerd(&self) -> Result {
        if let Some(text) = &self.generated {
            // What it imports stays; what somebody has written into it goes.
            self.write(&self.inside(&self.configuration.display().to_string()), text)?;
        }
        let program = self.programs.join("containerd").display().to_string();
        let mut command = self.command(&program);
        command.arg("--config").arg(&self.configuration);
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().trying("starting containerd")?;
        let log = child
            .stderr
            .take()
            .ok_or_else(|| Failure::Claim("containerd has no log".into()))?;
        let booted = follow(log, self.path("containerd.log"), "containerd successfully booted");
        if booted.recv_timeout(patient(run::ORDINARY)).is_err() {
            let log = self.log();
            drop(child.kill());
            return Err(Failure::Command {
                command: program,
                status: "no word of success".into(),
                output: log,
            });
        }
        let pid = procs::child_of(child.id()).unwrap_or_default();
        let listener = self.listen()?;
        *self.daemon() = Some(Daemon { pid, child, listener });
        // 1.6 says that it has booted while its CRI still looks for the pods that were there before.
        self.events.bell.until("an answer of the CRI", run::ORDINARY, || {
            self.crictl(["version"])
                .map(drop)
                .map_err(|failure| failure.to_string())
        })
    }

    /// Subscribes to containerd's events, and is back when the first one came through.
    fn listen(&self) -> Result<Child> {
        let mut command = self.ctr_command(["events"]);
        let mut listener = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .trying("subscribing to containerd's events")?;
        if let Some(stream) = listener.stdout.take() {
            self.events.listen(stream);
        }
        let marker = format!("heard-{}", self.serial());
        self.events.bell.until("an event from containerd", run::ORDINARY, || {
            self.ctr(["namespaces", "label", "default", &format!("{marker}=yes")])
                .map_err(|error| error.to_string())?;
            self.events
                .mentions("/namespaces/update", &marker)
                .then_some(())
                .ok_or_else(|| "silence".into())
        })?;
        Ok(listener)
    }

    pub(super) fn stop_containerd(&self) -> Result {
        let Some(mut daemon) = self.daemon().take() else {
            return Ok(());
        };
        // One that is gone already needs no signal.
        let _ = kill(Pid::from_raw(daemon.pid), Signal::SIGTERM);
        let ended = run::wait(daemon.child, Duration::from_secs(20), "containerd");
        drop(daemon.listener.kill());
        drop(daemon.listener.wait());
        ended.map(drop)
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Daemon>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last lines of containerd's log.
    #[must_use]
    pub fn log(&self) -> String {
        run::last_of(
            &fs::read_to_string(self.path("containerd.log")).unwrap_or_default(),
            4000,
        )
    }
}

/// Copies a log to a file, and tells when a line contains `sign`.
fn follow(log: impl std::io::Read + Send + 'static, path: PathBuf, sign: &'static str) -> mpsc::Receiver<()> {
    let (told, seen) = mpsc::channel();
    thread::spawn(move || {
        let Ok(mut file) = fs::OpenOptions::new().create(true).append(true).open(path) else {
            return;
        };
        for line in BufReader::new(log).lines().map_while(std::result::Result::ok) {
            // A full disk shows elsewhere; nobody listening any more is fine.
            drop(std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes()));
            if line.contains(sign) {
                let _ = told.send(());
            }
        }
    });
    seen
}
