//! One program of a cluster.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{
    failure::{Failure, Result, Trying},
    run,
    wait::Bell,
};

/// How much of a log is shown when its program fails.
const SHOWN: usize = 4000;

/// A program that runs until this value goes; what it says is in a file, and in the message when something does not
/// happen.
#[derive(Debug)]
pub struct Part {
    name: String,
    child: Mutex<Child>,
    log: PathBuf,
}

impl Part {
    /// Starts it, with its log in `folder`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, folder: &Path) -> Result<Part> {
        let line = run::describe(command);
        let program = line.split_whitespace().next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or(program).to_owned();
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log).trying(format!("making {}", log.display()))?;
        let same = file.try_clone().trying("sharing a log")?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(same)
            .stderr(file)
            .spawn()
            .trying(format!("starting {name}"))?;
        Ok(Part {
            name,
            child: Mutex::new(child),
            log,
        })
    }

    /// The last of what it said.
    #[must_use]
    pub fn said(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        run::last_of(String::from_utf8_lossy(&text).trim_end(), SHOWN)
    }

    /// Asks `look` until it answers with a value, as [`Bell::until`] does, and no longer than the program runs.
    ///
    /// # Errors
    /// When the program ends, or at the deadline; both with what the program said last.
    pub fn until<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut look: impl FnMut() -> std::result::Result<T, String>,
    ) -> Result<T> {
        let seen = Bell::default().until(what, deadline, || match self.ended() {
            Some(status) => Ok(Err(Failure::Command {
                command: self.name.clone(),
                status,
                output: self.said(),
            })),
            None => look().map(Ok),
        });
        match seen {
            Ok(answer) => answer,
            Err(Failure::Deadline { what, deadline, detail }) => Err(Failure::Deadline {
                what,
                deadline,
                detail: format!("{detail}; {} said: {}", self.name, self.said()),
            }),
            Err(failure) => Err(failure),
        }
    }

    /// How it ended, if it has.
    fn ended(&self) -> Option<String> {
        let mut child = self.child.lock().ok()?;
        let status = child.try_wait().ok()??;
        Some(format!("code {}", run::code_of(status)))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let Ok(child) = self.child.get_mut() else { return };
        // The one that entered the namespaces and the program itself are a group; gone already is as good as ended.
        let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
        drop(child.wait());
    }
}
