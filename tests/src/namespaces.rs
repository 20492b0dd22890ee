//! New mount, network, IPC and pid namespaces, which end with the harness.
//!
//! Their first process holds a pipe from the harness and ends with it; the kernel then ends every other process in
//! them, and the mounts go with the last one.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};

use crate::{
    failure::{Failure, Result, Trying},
    procs, run,
};

/// What the first process does when its place is furnished. `cat` ends with the pipe from the harness; the shell
/// collects orphans.
const REMAIN: &str = "echo ready
cat >/dev/null || :
exit 0";

/// Namespaces with a first process.
#[derive(Debug)]
pub struct Namespaces {
    init: i32,
    first: Option<(Child, ChildStdin)>,
}

impl Namespaces {
    /// Makes them; a shell in them runs `script` as root, with these variables, before anything else does.
    ///
    /// # Errors
    /// When this user may not, or the script fails.
    pub fn make(script: &str, variables: &[(&str, &Path)]) -> Result<Namespaces> {
        let mut command = run::in_new_namespaces();
        command
            .args(["sh", "-c", &format!("set -e\n{script}\n{REMAIN}")])
            .envs(variables.iter().copied());
        // A terminal's interrupt is for the harness, which then ends what it started.
        let mut child = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .trying("making namespaces (needs root)")?;
        let refused = || Failure::Missing {
            what: "a node's namespaces".into(),
            remedy: "run as root".into(),
        };
        let pipe = child.stdin.take().ok_or_else(refused)?;
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().ok_or_else(refused)?);
        output
            .read_line(&mut line)
            .trying("waiting for the first process of new namespaces")?;
        if line.trim() != "ready" {
            drop(child.wait());
            return Err(refused());
        }
        Ok(Namespaces {
            init: procs::child_of(child.id()).ok_or_else(refused)?,
            first: Some((child, pipe)),
        })
    }

    /// The pid of the first process, outside.
    #[must_use]
    pub fn init(&self) -> i32 {
        self.init
    }

    /// A command that runs inside.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--",
            program,
        ]);
        command
    }

    /// A file or folder inside (such as one under /run) as seen from outside.
    #[must_use]
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// Enters a network, given by a file of its namespace, for the rest of the calling thread.
    ///
    /// # Errors
    /// When there is none.
    pub fn enter(network: &Path) -> Result {
        let what = |doing: &str| format!("{doing} the network at {}", network.display());
        let namespace = fs::File::open(network).trying(what("opening"))?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).trying(what("entering"))
    }

    /// Runs `work` in a thread whose network is the one at a path inside.
    ///
    /// # Errors
    /// When there is none, and those of the work.
    pub fn in_network_at<T: Send>(&self, path: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let enter = || {
            Namespaces::enter(&self.inside(path))?;
            work()
        };
        thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|_| Err(Failure::Claim("the thread in another network panicked".into())))
    }

    /// Ends every process inside. What is ended already stays so.
    ///
    /// # Errors
    /// When the first one does not end.
    pub fn end(&mut self) -> Result {
        let Some((first, pipe)) = self.first.take() else {
            return Ok(());
        };
        drop(pipe);
        run::wait(first, Duration::from_secs(20), "the first process of namespaces").map(drop)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Err(failure) = self.end() {
            eprintln!("namespaces were not ended: {failure}");
        }
    }
}
