//! Tasks without a kubelet: `ctr run`, which knows nothing of pods and sets none of the CRI's annotations.

use std::process::Command;

use crate::{
    config::Runtime,
    failure::Result,
    images,
    node::Node,
    run::{self, Output, finish},
};

/// A task that does not exist yet, in containerd's namespace `default`.
pub struct TaskSpec<'n> {
    node: &'n Node,
    id: String,
    flags: Vec<String>,
}

impl Node {
    /// Describes a task.
    ///
    /// # Errors
    /// When what the runtime needs has not been built.
    pub fn task(&self, runtime: Runtime, name: &str) -> Result<TaskSpec<'_>> {
        runtime.require()?;
        Ok(match runtime {
            Runtime::Runc => self.task_of("io.containerd.runc.v2", name),
            Runtime::Kata(_) => self.task_with_handler(&runtime.handler(), name),
        })
    }

    /// Describes a task with our shim and a handler's configuration.
    #[must_use]
    pub fn task_with_handler(&self, handler: &str, name: &str) -> TaskSpec<'_> {
        let configuration = self.configuration_of(handler).display().to_string();
        self.task_of("io.containerd.kata.v2", name)
            .flag("--runtime-config-path")
            .flag(&configuration)
    }

    fn task_of(&self, shim: &str, name: &str) -> TaskSpec<'_> {
        let id = format!("{name}-{}", self.serial());
        self.remember(&id);
        let cgroup = format!("{}/{id}", self.cgroup());
        TaskSpec {
            node: self,
            id,
            flags: Vec::new(),
        }
        .flag("--runtime")
        .flag(shim)
        .flag("--cgroup")
        .flag(&cgroup)
    }
}

impl<'n> TaskSpec<'n> {
    /// Adds a flag, or a flag's value, of `ctr run`.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The command that runs it; `ctr` ends with the task's exit code.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let flags = self.flags.iter().map(String::as_str);
        let what = [images::TEST, &self.id].into_iter().chain(arguments.iter().copied());
        self.node.ctr_command(["run"].into_iter().chain(flags).chain(what))
    }

    /// Runs it to its end and removes it, whatever its exit code.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(self, arguments: &[&str]) -> Result<Output> {
        finish(&mut self.flag("--rm").command(arguments), None, run::ORDINARY)
    }

    /// Starts it in the background; [`Task::remove`] ends it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start(self, arguments: &[&str]) -> Result<Task<'n>> {
        let spec = self.flag("--detach").flag("--null-io");
        run::succeed(&mut spec.command(arguments), run::ORDINARY)?;
        Ok(Task {
            node: spec.node,
            id: spec.id,
        })
    }
}

/// A running task.
pub struct Task<'n> {
    node: &'n Node,
    id: String,
}

impl Task<'_> {
    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs a command in it, whatever its exit code.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn exec(&self, arguments: &[&str]) -> Result<Output> {
        let name = format!("exec-{}", self.node.serial());
        let client = ["tasks", "exec", "--exec-id", &name, &self.id]
            .into_iter()
            .chain(arguments.iter().copied());
        finish(&mut self.node.ctr_command(client), None, run::ORDINARY)
    }

    /// Kills it and removes it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove(self) -> Result {
        self.node.ctr(["tasks", "delete", "--force", &self.id])?;
        self.node.ctr(["containers", "delete", &self.id]).map(drop)
    }
}
