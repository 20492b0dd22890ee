//! Tasks without a kubelet: `ctr run`, which knows nothing of pods and sets none of the CRI's annotations.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    config::Runtime,
    failure::{Failure, Result, Trying},
    images,
    node::Node,
    run::{self, Output, finish},
    wait::patient,
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

    /// Starts it and its client, and does not wait for either.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn launch(self, arguments: &[&str]) -> Result<Launch<'n>> {
        let mut command = self.command(arguments);
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut client = command.spawn().trying("starting ctr")?;
        let (told, first) = mpsc::channel();
        let (output, errors) = (client.stdout.take(), client.stderr.take());
        thread::spawn(move || {
            let mut output = BufReader::new(output.into_iter().next()?);
            let mut line = String::new();
            let count = output.read_line(&mut line).ok()?;
            let at = Instant::now();
            if count == 0 {
                let mut said = String::new();
                // What could not be read is not shown.
                drop(errors?.read_to_string(&mut said));
                told.send(Err(said)).ok()
            } else {
                told.send(Ok(at)).ok()?;
                // The rest is read so that the task is not held up.
                std::io::copy(&mut output, &mut std::io::sink()).ok().map(drop)
            }
        });
        let task = Task {
            node: self.node,
            id: self.id,
        };
        Ok(Launch {
            task,
            line: run::describe(&command),
            client,
            began,
            first,
        })
    }
}

/// A task on its way.
pub struct Launch<'n> {
    task: Task<'n>,
    line: String,
    client: Child,
    began: Instant,
    first: mpsc::Receiver<std::result::Result<Instant, String>>,
}

impl<'n> Launch<'n> {
    /// Waits for the first line of its output.
    ///
    /// # Errors
    /// When the task ends without one, with what its client said.
    pub fn up(self) -> Result<Attached<'n>> {
        match self.first.recv_timeout(patient(run::ORDINARY)) {
            Ok(Ok(at)) => Ok(Attached {
                task: self.task,
                client: self.client,
                first_output: at - self.began,
            }),
            Ok(Err(output)) => Err(Failure::Command {
                command: self.line,
                status: "no output".into(),
                output: output.trim().to_owned(),
            }),
            Err(_) => Err(Failure::Deadline {
                what: format!("the first output of `{}`", self.line),
                deadline: run::ORDINARY,
                detail: String::new(),
            }),
        }
    }
}

/// A running task whose client shows its output.
pub struct Attached<'n> {
    /// The task.
    pub task: Task<'n>,
    /// How long it was from the client's start to the first line of output.
    pub first_output: Duration,
    client: Child,
}

impl Attached<'_> {
    /// Kills it, and returns how long it was from there until the client saw the task deleted. Removes the container
    /// too.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn kill(self) -> Result<Duration> {
        let (node, id) = (self.task.node, &self.task.id);
        let began = Instant::now();
        node.ctr(["tasks", "kill", "--signal", "SIGKILL", id])?;
        run::wait(self.client, run::ORDINARY, "ctr run")?;
        let took = began.elapsed();
        node.ctr(["containers", "delete", id])?;
        Ok(took)
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

    /// Removes the container of a task whose shim is dead, after containerd has removed the task itself.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove_orphaned(self) -> Result {
        let tasks = || {
            let listed = self.node.ctr(["tasks", "list", "--quiet"]);
            let listed = listed.map_err(|failure| failure.to_string())?.text();
            if listed.lines().any(|id| id == self.id) {
                return Err(listed);
            }
            Ok(())
        };
        self.node
            .events()
            .bell
            .until("no task of the dead shim", run::ORDINARY, tasks)?;
        self.node.ctr(["containers", "delete", &self.id]).map(drop)
    }
}
