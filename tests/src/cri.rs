//! Pods and containers through the CRI, with `crictl` in the kubelet's place.

use std::{path::PathBuf, time::Duration};

use serde_json::{Value, json};

use crate::{
    config::Runtime,
    console::Console,
    failure::{Failure, Result, claim},
    images,
    node::Node,
    procs::Process,
    run::{self, Output, finish, refusal},
};

/// How long an exit may take to be known to the CRI after the process ended.
pub const EXIT: Duration = Duration::from_secs(30);

/// How long the kubelet waits for a pod: twice its `runtimeRequestTimeout` (`RunPodSandbox` in its
/// `pkg/kubelet/cri/remote`).
const RUN_POD: Duration = Duration::from_secs(240);

/// The CRI's namespace modes (cri-api, NamespaceMode).
const POD: u32 = 0;
const CONTAINER: u32 = 1;
const NODE: u32 = 2;
const TARGET: u32 = 3;

/// A pod that is not running yet.
#[derive(Clone)]
pub struct PodSpec<'n> {
    node: &'n Node,
    runtime: String,
    name: String,
    configuration: Value,
}

impl Node {
    /// Describes a pod as a kubelet would ask for it.
    ///
    /// # Errors
    /// When what the runtime needs has not been built.
    pub fn pod(&self, runtime: Runtime, name: &str) -> Result<PodSpec<'_>> {
        runtime.require()?;
        Ok(self.pod_with_handler(&runtime.handler(), name))
    }

    /// Describes a pod for a runtime handler of the node by its name.
    #[must_use]
    pub fn pod_with_handler(&self, handler: &str, name: &str) -> PodSpec<'_> {
        let name = format!("{name}-{}", self.serial());
        let configuration = json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "hostname": name,
            "log_directory": self.path(&format!("logs/{name}")),
            "linux": {
                "cgroup_parent": format!("{}/{name}", self.cgroup()),
                "security_context": { "namespace_options": { "network": POD, "pid": CONTAINER, "ipc": POD } },
            },
        });
        PodSpec {
            node: self,
            runtime: handler.to_owned(),
            name,
            configuration,
        }
    }
}

impl<'n> PodSpec<'n> {
    /// Its containers see each other's processes.
    #[must_use]
    pub fn sharing_processes(mut self) -> Self {
        self.configuration["linux"]["security_context"]["namespace_options"]["pid"] = json!(POD);
        self
    }

    /// Its containers see the processes of the node, which in a VM is the guest.
    #[must_use]
    pub fn with_host_processes(mut self) -> Self {
        self.configuration["linux"]["security_context"]["namespace_options"]["pid"] = json!(NODE);
        self
    }

    /// Its users, so many from 0 on, are those from `first` on to everybody else (`hostUsers: false`).
    #[must_use]
    pub fn with_users(mut self, first: u32, size: u32) -> Self {
        let ids = json!([{ "host_id": first, "container_id": 0, "length": size }]);
        let options = &mut self.configuration["linux"]["security_context"]["namespace_options"];
        options["userns_options"] = json!({ "mode": POD, "uids": ids, "gids": ids });
        self
    }

    /// It may hold privileged containers.
    #[must_use]
    pub fn privileged(mut self) -> Self {
        self.configuration["linux"]["security_context"]["privileged"] = json!(true);
        self
    }

    /// Sets a kernel parameter in the pod's namespaces.
    #[must_use]
    pub fn sysctl(mut self, name: &str, value: &str) -> Self {
        self.configuration["linux"]["sysctls"][name] = json!(value);
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.configuration["annotations"][name] = json!(value);
        self
    }

    /// Runs the pod.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn run(self) -> Result<Pod<'n>> {
        let node = self.node;
        let file = node.path(&format!("pods/{}.json", self.name));
        node.write(&file, &self.configuration.to_string())?;
        node.write(&node.path(&format!("logs/{}/.keep", self.name)), "")?;
        let mut command = node.crictl_command(["runp", "--runtime", &self.runtime, &file.display().to_string()])?;
        let id = run::succeed(&mut command, RUN_POD)?.text();
        node.remember(&id);
        Ok(Pod {
            node,
            id,
            name: self.name,
            configuration: self.configuration,
            file,
            removed: false,
        })
    }
}

/// A running pod; removed when it is dropped.
pub struct Pod<'n> {
    node: &'n Node,
    id: String,
    name: String,
    configuration: Value,
    file: PathBuf,
    removed: bool,
}

impl Pod<'_> {
    /// Its sandbox identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> &Node {
        self.node
    }

    /// The parent cgroup of its containers, which bounds the pod on the host.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("{}/{}", self.node.cgroup(), self.name)
    }

    /// Describes a container of this pod that runs a shell script.
    #[must_use]
    pub fn shell(&self, name: &str, script: &str) -> ContainerSpec<'_> {
        self.container(name, &["/bin/sh", "-c", script])
    }

    /// Describes a container of this pod.
    #[must_use]
    pub fn container(&self, name: &str, command: &[&str]) -> ContainerSpec<'_> {
        let options = self.configuration["linux"]["security_context"]["namespace_options"].clone();
        let configuration = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": images::TEST },
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": { "security_context": { "namespace_options": options } },
        });
        ContainerSpec {
            pod: self,
            name: name.to_owned(),
            configuration,
        }
    }

    /// The address that CNI gave it.
    ///
    /// # Errors
    /// When the CRI knows none.
    pub fn ip(&self) -> Result<String> {
        let status = self.status()?;
        let ip = status["status"]["network"]["ip"].as_str().unwrap_or_default();
        claim(!ip.is_empty(), format!("the pod has no address in {status}"))?;
        Ok(ip.to_owned())
    }

    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn state(&self) -> Result<String> {
        Ok(self.status()?["status"]["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    fn status(&self) -> Result<Value> {
        let output = self.node.crictl(["inspectp", "--output", "json", &self.id])?;
        parse("crictl inspectp", &output)
    }

    /// Its shim and everything below it.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        self.node.processes_of(&self.id)
    }

    /// Stops it and all its containers.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn stop(&self) -> Result {
        self.node.crictl(["stopp", &self.id]).map(drop)
    }

    /// Removes it, running or not.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn remove(mut self) -> Result {
        self.node.crictl(["rmp", "--force", &self.id])?;
        self.removed = true;
        Ok(())
    }

    /// Leaves its removal to somebody else.
    pub fn leave(mut self) {
        self.removed = true;
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.removed {
            // The story has failed or does not care; what this leaves is found by the census.
            drop(self.node.crictl(["rmp", "--force", &self.id]));
        }
    }
}

/// Whether a container may write to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may only read.
    ReadOnly,
    /// It may write.
    ReadWrite,
}

/// A container that does not exist yet.
pub struct ContainerSpec<'p> {
    pod: &'p Pod<'p>,
    name: String,
    configuration: Value,
}

impl<'p> ContainerSpec<'p> {
    /// Among the processes of another container (`kubectl debug --target`).
    #[must_use]
    pub fn among_those_of(mut self, target: &Container<'_>) -> Self {
        let options = &mut self.configuration["linux"]["security_context"]["namespace_options"];
        options["pid"] = json!(TARGET);
        options["target_id"] = json!(target.id());
        self
    }

    /// Limits its memory.
    #[must_use]
    pub fn memory_mib(mut self, limit: u64) -> Self {
        self.configuration["linux"]["resources"]["memory_limit_in_bytes"] = json!(limit << 20);
        self
    }

    /// Mounts a folder or file of the node.
    #[must_use]
    pub fn volume(mut self, host: &std::path::Path, inside: &str, access: Access) -> Self {
        let mut mount = json!({ "host_path": host, "container_path": inside, "readonly": access == Access::ReadOnly });
        // As the kubelet says for each volume of a pod with a user namespace.
        let users = &self.configuration["linux"]["security_context"]["namespace_options"]["userns_options"];
        if users.is_object() {
            mount["uidMappings"] = users["uids"].clone();
            mount["gidMappings"] = users["gids"].clone();
        }
        match self.configuration["mounts"].as_array_mut() {
            Some(mounts) => mounts.push(mount),
            None => self.configuration["mounts"] = json!([mount]),
        }
        self
    }

    /// Mounts a folder of the node whose later mounts show in the container (`HostToContainer`).
    #[must_use]
    pub fn following_volume(mut self, host: &std::path::Path, inside: &str) -> Self {
        self = self.volume(host, inside, Access::ReadWrite);
        if let Some(mount) = self.configuration["mounts"]
            .as_array_mut()
            .and_then(|mounts| mounts.last_mut())
        {
            // The number of PROPAGATION_HOST_TO_CONTAINER in the CRI.
            mount["propagation"] = json!(1);
        }
        self
    }

    /// Runs another image than the test image.
    #[must_use]
    pub fn image(mut self, name: &str) -> Self {
        self.configuration["image"]["image"] = json!(name);
        self
    }

    /// Gives it a device of the node (`volumeDevices`).
    #[must_use]
    pub fn device(mut self, host: &std::path::Path, inside: &str, access: Access) -> Self {
        let permissions = if access == Access::ReadOnly { "r" } else { "rwm" };
        let device = json!({ "host_path": host, "container_path": inside, "permissions": permissions });
        match self.configuration["devices"].as_array_mut() {
            Some(devices) => devices.push(device),
            None => self.configuration["devices"] = json!([device]),
        }
        self
    }

    /// Gives it a terminal and standard input.
    #[must_use]
    pub fn terminal(mut self) -> Self {
        self.configuration["tty"] = json!(true);
        self.with_input()
    }

    /// Keeps standard input open until the first client closes it.
    #[must_use]
    pub fn with_input(mut self) -> Self {
        self.configuration["stdin"] = json!(true);
        self.configuration["stdin_once"] = json!(true);
        self
    }

    /// All capabilities and no confinement.
    #[must_use]
    pub fn privileged(self) -> Self {
        self.security("privileged", json!(true))
    }

    /// The security context of a restricted pod: user 1000, no capability, the runtime's seccomp profile, no new
    /// privileges.
    #[must_use]
    pub fn restricted(self) -> Self {
        self.security("run_as_user", json!({ "value": 1000 }))
            .security("run_as_group", json!({ "value": 1000 }))
            .security("capabilities", json!({ "drop_capabilities": ["ALL"] }))
            .security("seccomp", json!({ "profile_type": 0 }))
            .security("no_new_privs", json!(true))
    }

    /// Sets a field of the CRI's LinuxContainerSecurityContext.
    #[must_use]
    pub fn security(mut self, field: &str, value: Value) -> Self {
        self.configuration["linux"]["security_context"][field] = value;
        self
    }

    /// With this working directory, which the runtime makes if it is not there.
    #[must_use]
    pub fn working_in(mut self, folder: &str) -> Self {
        self.configuration["working_dir"] = json!(folder);
        self
    }

    /// Creates it without starting it.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn create(self) -> Result<Container<'p>> {
        let (pod, node) = (self.pod, self.pod.node);
        let file = node.path(&format!("pods/{}.{}.json", pod.name, self.name));
        node.write(&file, &self.configuration.to_string())?;
        let arguments = [
            "create",
            &pod.id,
            &file.display().to_string(),
            &pod.file.display().to_string(),
        ];
        let id = node.crictl(arguments)?.text();
        node.remember(&id);
        Ok(Container { node, id })
    }

    /// Creates and starts it.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn run(self) -> Result<Container<'p>> {
        let container = self.create()?;
        container.start()?;
        Ok(container)
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// 128+signal for a signal.
    pub code: i64,
    /// `Completed`, `Error`, `OOMKilled` or a runtime's own.
    pub reason: String,
}

/// A container; it goes with its pod.
#[derive(Clone)]
pub struct Container<'n> {
    node: &'n Node,
    id: String,
}

impl Container<'_> {
    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts it.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn start(&self) -> Result {
        self.node.crictl(["start", &self.id]).map(drop)
    }

    /// Runs a shell script in it, as a probe does (ExecSync); it must succeed. Returns its output.
    ///
    /// # Errors
    /// What the CRI answers, and any exit code but 0.
    pub fn shell(&self, script: &str) -> Result<String> {
        let mut command = self
            .node
            .crictl_command(["exec", "--sync", &self.id, "sh", "-c", script])?;
        run::succeed(&mut command, run::ORDINARY).map(|output| output.text())
    }

    /// Runs a command in it through the streaming server, as `kubectl exec` does, with or without standard input.
    ///
    /// # Errors
    /// When the client does not end in time.
    pub fn exec(&self, command: &[&str], input: Option<Vec<u8>>, deadline: Duration) -> Result<Output> {
        let mut client = self.node.crictl_command(["exec"])?;
        if input.is_some() {
            client.arg("--interactive");
        }
        client.arg(&self.id).args(command);
        let mut output = finish(&mut client, input, deadline)?;
        // crictl itself always ends with 1 and says the code.
        if let Some((_, code)) = output.errors().rsplit_once("exit code ") {
            output.code = code
                .trim_matches(|c: char| !c.is_ascii_digit())
                .parse()
                .unwrap_or(output.code);
        }
        Ok(output)
    }

    /// Runs a command in it on a terminal.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn exec_on_terminal(&self, command: &[&str]) -> Result<Console> {
        let arguments = ["exec", "--interactive", "--tty", &self.id];
        Console::start(
            self.node,
            &self
                .node
                .crictl_command(arguments.into_iter().chain(command.iter().copied()))?,
        )
    }

    /// What it wrote to standard output and standard error so far, as the CRI's log has it.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn logs(&self) -> Result<String> {
        let output = self.node.crictl(["logs", &self.id])?;
        Ok(format!("{}\n{}", output.text(), output.errors()))
    }

    /// Waits until its log contains `text`.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with the log so far.
    pub fn wait_for_log(&self, text: &str) -> Result {
        self.wait_for_log_within(text, EXIT)
    }

    /// Waits up to a deadline until its log contains `text`.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with the log so far.
    pub fn wait_for_log_within(&self, text: &str, deadline: Duration) -> Result {
        let what = format!("{text:?} in the log");
        self.node.events().bell.until(&what, deadline, || match self.logs() {
            Ok(logs) if logs.contains(text) => Ok(()),
            Ok(logs) => Err(logs),
            Err(failure) => Err(failure.to_string()),
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when it is still running.
    pub fn wait_exit(&self) -> Result<Exit> {
        self.wait_exit_within(EXIT)
    }

    /// Waits for its end up to a deadline.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when it is still running.
    pub fn wait_exit_within(&self, deadline: Duration) -> Result<Exit> {
        self.node.events().bell.until("the end of a container", deadline, || {
            let status = self.status().map_err(|failure| failure.to_string())?;
            let state = status["state"].as_str().unwrap_or_default();
            if state != "CONTAINER_EXITED" {
                return Err(state.to_owned());
            }
            let reason = status["reason"].as_str().unwrap_or_default().to_owned();
            Ok(Exit {
                code: status["exitCode"].as_i64().unwrap_or(0),
                reason,
            })
        })
    }

    /// The CRI's ContainerStatus.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn status(&self) -> Result<Value> {
        let output = self.node.crictl(["inspect", "--output", "json", &self.id])?;
        Ok(parse("crictl inspect", &output)?["status"].take())
    }

    /// The CRI's ContainerStats.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn stats(&self) -> Result<Value> {
        let output = self.node.crictl(["stats", "--output", "json", "--id", &self.id])?;
        Ok(parse("crictl stats", &output)?["stats"][0].take())
    }

    /// Changes the limit of its memory while it runs.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn resize_mib(&self, limit: u64) -> Result {
        let limit = (limit << 20).to_string();
        self.node.crictl(["update", "--memory", &limit, &self.id]).map(drop)
    }

    /// Sends a signal by its name to its first process.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn kill(&self, signal: &str) -> Result {
        self.node
            .ctr(["-n", "k8s.io", "tasks", "kill", "--signal", signal, &self.id])
            .map(drop)
    }

    /// Asks it to end, and kills it after `grace` seconds.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn stop(&self, grace: u32) -> Result {
        self.node
            .crictl(["stop", "--timeout", &grace.to_string(), &self.id])
            .map(drop)
    }

    /// Removes it, running or not.
    ///
    /// # Errors
    /// What the CRI answers.
    pub fn remove(&self) -> Result {
        self.node.crictl(["rm", "--force", &self.id]).map(drop)
    }
}

/// What the CRI says when an operation that must fail fails.
///
/// # Errors
/// When it succeeded.
pub fn refused(node: &Node, arguments: &[&str], deadline: Duration) -> Result<String> {
    let mut command = node.crictl_command(arguments.iter().copied())?;
    let output = finish(&mut command, None, deadline)?;
    claim(
        output.code != 0,
        format!("`{}` should have failed", run::describe(&command)),
    )?;
    Ok(refusal(&command, &output).to_string())
}

fn parse(what: &str, output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).map_err(|source| Failure::Json {
        what: what.into(),
        source,
    })
}
