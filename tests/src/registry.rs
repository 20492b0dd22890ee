//! A registry of container images in the network of a node.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    failure::{Failure, Result, Trying},
    node::Node,
    places, procs,
};

/// The port at which it listens, by HTTP, in the node's network.
pub const PORT: u16 = 5000;

/// A running registry; its images are in its memory.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    pid: Pid,
}

impl Registry {
    /// Starts the registry of a node; it is empty.
    ///
    /// # Errors
    /// When it has not been built, or does not start.
    pub fn serve(node: &Node) -> Result<Registry> {
        let program = places::peers()?.join("registry");
        let mut command = node.command(&program.display().to_string());
        command
            .args(["-port", &PORT.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().trying("starting the registry")?;
        let mut line = String::new();
        if let Some(log) = child.stderr.take() {
            let mut log = BufReader::new(log);
            // It says that it serves, or why it does not, and then has a line for each request.
            log.read_line(&mut line).trying("waiting for the registry")?;
            std::thread::spawn(move || log.lines().map_while(std::result::Result::ok).for_each(drop));
        }
        let parent = child.id().cast_signed();
        let process = procs::all().into_iter().find(|process| process.parent == parent);
        match process {
            Some(process) if line.contains("serving on port") => Ok(Registry {
                child,
                pid: Pid::from_raw(process.pid),
            }),
            _ => {
                drop(child.kill());
                drop(child.wait());
                Err(Failure::Claim(format!("the registry did not start: {line}")))
            }
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Gone already is as good as ended; then its parent, which enters the namespaces for it, ends too.
        let _ = kill(self.pid, Signal::SIGKILL);
        drop(self.child.wait());
    }
}
