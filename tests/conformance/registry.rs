//! The registry of a node, which stands for every registry that its containerd is sent to.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    config::REGISTRIES,
    failure::{Failure, Result, Trying},
    node::Node,
    places, procs,
};

use crate::images;

/// Where it listens, in the node's network.
const ADDRESS: &str = "localhost:5000";

/// The containerd namespace from which images are pushed: the CRI does not see it.
const NAMESPACE: &str = "publish";

/// A running registry; its images are in its memory.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    pid: Pid,
}

/// The name under which the registry serves an image.
pub fn name(image: &str) -> String {
    format!("{ADDRESS}/{image}")
}

impl Registry {
    /// Starts the registry of a node, fills it with critest's images, and sends containerd to it for images of every
    /// registry.
    ///
    /// # Errors
    /// When it has not been built, or does not start.
    pub fn start(node: &Node) -> Result<Registry> {
        let archive = images::archive()?.display().to_string();
        let registry = Registry::serve(node)?;
        node.ctr(["-n", NAMESPACE, "images", "import", &archive])?;
        let list = node.ctr(["-n", NAMESPACE, "images", "list", "--quiet"])?.text();
        for image in list.lines() {
            node.ctr(["-n", NAMESPACE, "images", "push", "--plain-http", image, image])?;
        }
        let mut remove = vec!["-n", NAMESPACE, "images", "remove", "--sync"];
        remove.extend(list.lines());
        node.ctr(remove)?;
        let hosts = format!(
            "server = \"http://{ADDRESS}\"\n[host.\"http://{ADDRESS}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        let path = format!("{REGISTRIES}/_default/hosts.toml");
        node.write(&node.path(&path), &hosts)?;
        Ok(registry)
    }

    fn serve(node: &Node) -> Result<Registry> {
        let program = places::peers()?.join("registry");
        let port = ADDRESS.rsplit(':').next().unwrap_or_default();
        let mut command = node.command(&program.display().to_string());
        command
            .args(["-port", port])
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
