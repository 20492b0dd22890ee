//! Pods of an emulated node, as its kubelet would ask for them: with a slice of systemd's above their containers.

use std::time::Duration;

use serde_json::{Value, json};

use super::Machine;
use crate::{
    failure::{Failure, Result},
    images,
    run::Output,
};

/// How long a pod may take to run: longer than the kubelet waits, which has no emulated processor.
const RUN_POD: Duration = Duration::from_secs(900);

/// A pod that is not running yet.
#[derive(Debug, Clone)]
pub struct PodSpec<'m> {
    machine: &'m Machine,
    handler: String,
    name: String,
    slice: String,
    configuration: Value,
}

impl Machine {
    /// Describes a BestEffort pod for a runtime handler.
    #[must_use]
    pub fn pod(&self, handler: &str, name: &str) -> PodSpec<'_> {
        let name = format!("{name}-{}", self.serial());
        // systemd reads a hyphen as another slice above.
        let slice = format!("kubepods-besteffort-pod{}.slice", name.replace('-', "_"));
        let configuration = json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "hostname": name,
            "log_directory": format!("/var/log/pods/{name}"),
            "linux": {
                "cgroup_parent": format!("/kubepods.slice/kubepods-besteffort.slice/{slice}"),
                // The network is the pod's own (POD), processes the container's (CONTAINER), as the kubelet asks by
                // default.
                "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } },
            },
        });
        PodSpec {
            machine: self,
            handler: handler.to_owned(),
            name,
            slice,
            configuration,
        }
    }

    /// Runs the CRI's client; it must succeed.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn crictl(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.crictl_within(arguments, super::ORDINARY)?.text())
    }

    /// What the CRI knows of a container (`inspect`) or a sandbox (`inspectp`), by a Go template.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn inspect(&self, verb: &str, id: &str, template: &str) -> Result<String> {
        self.crictl(&[verb, "--output", "go-template", "--template", template, id])
    }

    fn crictl_within(&self, arguments: &[&str], deadline: Duration) -> Result<Output> {
        let timeout = format!("{}s", deadline.as_secs());
        let words = [&["crictl", "--timeout", &timeout], arguments].concat();
        // The client's own deadline comes first and says more.
        self.start(&words, false)?.succeed(deadline + Duration::from_secs(60))
    }
}

impl<'m> PodSpec<'m> {
    /// Changes what the CRI is asked for, a `PodSandboxConfig`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.configuration);
        self
    }

    /// Runs the pod.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn run(self) -> Result<Pod<'m>> {
        let file = format!("/run/pods/{}.json", self.name);
        self.machine.put(&file, self.configuration.to_string().as_bytes())?;
        self.machine.run(&format!("systemctl start {}", self.slice))?;
        let words = ["runp", "--runtime", &self.handler, &file];
        let id = self.machine.crictl_within(&words, RUN_POD)?.text();
        Ok(Pod {
            machine: self.machine,
            id,
            name: self.name,
            slice: self.slice,
            configuration: self.configuration,
            file,
        })
    }
}

/// A pod of the node, which keeps it until it is removed.
#[derive(Debug)]
pub struct Pod<'m> {
    machine: &'m Machine,
    id: String,
    name: String,
    slice: String,
    configuration: Value,
    file: String,
}

impl<'m> Pod<'m> {
    /// Its sandbox identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of systemd's slice above its containers.
    #[must_use]
    pub fn slice(&self) -> &str {
        &self.slice
    }

    /// The folder of its slice in the node's cgroup hierarchy.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("/sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/{}", self.slice)
    }

    /// Runs a container of the test image.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn container(&self, name: &str, command: &[&str]) -> Result<Container<'m>> {
        self.container_with(name, command, |_| ())
    }

    /// As [`Pod::container`], after a change of what the CRI is asked for, a `ContainerConfig`.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn container_with(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Container<'m>> {
        let options = self.configuration["linux"]["security_context"]["namespace_options"].clone();
        let mut configuration = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": images::TEST },
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": { "security_context": { "namespace_options": options } },
        });
        change(&mut configuration);
        let file = format!("/run/pods/{}.{name}.json", self.name);
        self.machine.put(&file, configuration.to_string().as_bytes())?;
        let id = self.machine.crictl(&["create", &self.id, &file, &self.file])?;
        self.machine.crictl(&["start", &id])?;
        Ok(Container {
            machine: self.machine,
            id,
        })
    }

    /// Removes it, running or not, and its slice.
    ///
    /// # Errors
    /// What the CRI or systemd answer.
    pub fn remove(self) -> Result {
        self.machine.crictl(&["rmp", "--force", &self.id])?;
        self.machine.run(&format!("systemctl stop {}", self.slice)).map(drop)
    }
}

/// A container; it goes with its pod.
#[derive(Debug)]
pub struct Container<'m> {
    machine: &'m Machine,
    id: String,
}

impl Container<'_> {
    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs a shell script in it, as a probe does (ExecSync); it must succeed. Returns its output.
    ///
    /// # Errors
    /// What the CRI answers, and any exit code but 0.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.machine.crictl(&["exec", "--sync", &self.id, "sh", "-c", script])
    }

    /// What it has written so far.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn logs(&self) -> Result<String> {
        self.machine.crictl(&["logs", &self.id])
    }

    /// Waits for its exit and returns its code.
    ///
    /// # Errors
    /// When it does not exit in time.
    pub fn wait_exit(&self) -> Result<i64> {
        let script = format!(
            "[ \"$(crictl inspect --output go-template --template '{{{{.status.state}}}}' {id})\" = CONTAINER_EXITED ] && \
             crictl inspect --output go-template --template '{{{{.status.exitCode}}}}' {id}",
            id = self.id
        );
        let code = self.machine.until("the container's exit", &script, super::ORDINARY)?;
        code.parse()
            .map_err(|_| Failure::Claim(format!("{code:?} is no exit code")))
    }
}
