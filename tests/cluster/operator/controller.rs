//! The controller, as a process that a story can kill.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    failure::{Failure, Result, Trying},
    places, run,
    wait::Bell,
};

/// What a program says, line by line.
#[derive(Debug, Default)]
pub struct Said {
    lines: Mutex<Vec<String>>,
    pub bell: Bell,
}

impl Said {
    /// Takes in a line.
    pub fn add(&self, line: String) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        self.bell.ring();
    }

    /// Everything so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How a controller is started.
#[derive(Debug, Clone)]
pub struct Settings {
    pub identity: String,
    pub version: String,
    pub retry_first: &'static str,
    pub settle: &'static str,
    pub restart_command: Option<&'static str>,
    pub api_timeout: &'static str,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            identity: "controller-0".into(),
            version: super::kubelet::VERSION.into(),
            retry_first: "1s",
            settle: "0s",
            restart_command: None,
            api_timeout: "120s",
        }
    }
}

/// A running controller. It ends with this value.
pub struct Controller {
    child: Option<Child>,
    pub said: Arc<Said>,
    /// Hears it out.
    listener: Option<JoinHandle<()>>,
}

impl Controller {
    /// Starts one with the rights in `kubeconfig`.
    pub fn start(kubeconfig: &Path, settings: &Settings) -> Result<Controller> {
        let Settings {
            identity,
            version,
            retry_first,
            settle,
            restart_command,
            api_timeout,
        } = settings;
        let mut child = Command::new(places::binaries()?.join("sandpod-operator"))
            .args([
                "--installer-image",
                "registry.example/installer:test",
                "--listen",
                "127.0.0.1:0",
            ])
            .args(["--identity", identity, "--version", version])
            .args(["--retry-first", retry_first, "--settle", settle])
            .args(["--api-timeout", api_timeout])
            .args(
                restart_command
                    .iter()
                    .flat_map(|command| ["--restart-command", command]),
            )
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .trying("starting the controller")?;
        let said = Arc::<Said>::default();
        let log = child.stderr.take();
        let ears = Arc::clone(&said);
        let listener = thread::spawn(move || {
            for line in log
                .into_iter()
                .flat_map(|log| BufReader::new(log).lines().map_while(std::result::Result::ok))
            {
                ears.add(line);
            }
            ears.bell.ring();
        });
        Ok(Controller {
            child: Some(child),
            said,
            listener: Some(listener),
        })
    }

    /// Waits until it has said this.
    pub fn until_said(&self, what: &str, deadline: Duration) -> Result<String> {
        self.until_said_times(what, 1, deadline)
    }

    /// Waits until it has said this so many times; the last of these lines.
    pub fn until_said_times(&self, what: &str, times: usize, deadline: Duration) -> Result<String> {
        self.said
            .bell
            .until(&format!("the controller's word {what:?}"), deadline, || {
                let lines = self.said.lines();
                let found = lines.iter().filter(|line| line.contains(what)).nth(times - 1).cloned();
                found.ok_or_else(|| lines.last().cloned().unwrap_or_default())
            })
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// One of its metrics, without labels.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = self.metrics()?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        let value = lines.find_map(|rest| rest.strip_prefix(' ')?.trim().parse().ok());
        value.ok_or_else(|| Failure::Claim(format!("there is no {name} in {text}")))
    }

    /// All of its metrics.
    pub fn metrics(&self) -> Result<String> {
        let url = format!("http://{}/metrics", self.address()?);
        Ok(run::succeed(Command::new("curl").args(["-sS", &url]), run::ORDINARY)?.text())
    }

    /// Where it serves metrics and health.
    pub fn address(&self) -> Result<String> {
        let line = self.until_said("serving address=", run::ORDINARY)?;
        Ok(line.rsplit('=').next().unwrap_or_default().trim().to_owned())
    }

    /// Ends it without a chance to say or do anything.
    pub fn kill(&mut self) -> Result {
        self.end(Signal::SIGKILL).map(drop)
    }

    /// Asks it to end, and returns its exit code.
    pub fn stop(&mut self) -> Result<i32> {
        self.end(Signal::SIGTERM)
    }

    fn end(&mut self, signal: Signal) -> Result<i32> {
        let child = self
            .child
            .take()
            .ok_or_else(|| Failure::Claim("the controller has ended before".into()))?;
        // One that has ended by itself needs no signal.
        let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
        self.hear_out(child, run::ORDINARY)
    }

    /// Waits until it has ended by itself, and returns its exit code.
    pub fn until_ended(&mut self, deadline: Duration) -> Result<i32> {
        let child = self
            .child
            .take()
            .ok_or_else(|| Failure::Claim("the controller has ended before".into()))?;
        self.hear_out(child, deadline)
    }

    /// Waits for its end and for its last words, and returns its exit code.
    fn hear_out(&mut self, child: Child, deadline: Duration) -> Result<i32> {
        let status = run::wait(child, deadline, "the controller")?;
        // Nobody else holds its end of the pipe.
        drop(self.listener.take().map(JoinHandle::join));
        Ok(run::code_of(status))
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
