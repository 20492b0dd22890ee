//! What a caller may do with the processes of a sandbox: start, exec, signal, pause, resize, update, measure, delete.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use agent_protocol::{client::ClientError, protocol::agent as wire};
use containerd_shim_protos::{
    api::ExecProcessRequest,
    events::task::{TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart},
    protobuf::well_known_types::any::Any,
    topics,
};
use oci_spec::runtime::LinuxResources;

use super::{Sandbox, lock};
use crate::{
    boot::Guest,
    cgroup::CpuList,
    container::{Container, Exec, Kind},
    error::{Error, Result, decode},
    follow::{self, KILLED},
    io::{ProcessName, Stdio},
    process::{Exit, Process, Status},
    service::timestamp,
    sizing::Limits,
    spec, stats,
    trace::Mark,
};

/// How long the guest may take to pass a signal on; the process may take longer to obey it.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// A container that is killed may be slow to die: it may have data to write out, or wait for a file that the host is
/// slow to give. When it is not dead by then its guest is ended, a little before CRI-O and containerd lose their
/// patience, after 120 s.
const OBEY: Duration = Duration::from_secs(100);
/// A terminal of the wrong size is no reason to hold up the answer to Start.
const RESIZE: Duration = Duration::from_secs(5);

/// The most processes that a container is told to have: each is an entry of an answer, and the guest says how many.
const MOST_PROCESSES: u32 = 1 << 16;

impl Sandbox {
    /// Starts a container's init (empty exec id) or an exec; returns the pid.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.begin_start(if exec.is_empty() { id } else { exec })?;
        let result = if exec.is_empty() {
            self.start_init(&container).await
        } else {
            self.start_exec(&container, exec).await
        };
        match &result {
            Ok(()) => {}
            Err(Error::Agent(ClientError::Gone)) => {
                let lost = follow::lost(self.clone(), container, exec.to_owned(), process);
                // The end of an exec is told at once, that of a container when the host has let go of it.
                match exec.is_empty() {
                    true => drop(tokio::spawn(lost)),
                    false => lost.await,
                }
            }
            Err(_) => process.end_start(false),
        }
        result.map(|()| self.pid())
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let guest = self.guest()?;
        if container.kind == Kind::Sandbox {
            container.init.end_start(true);
        } else {
            let streams = container.init.stdio.open()?;
            let mut request = wire::StartContainerRequest::new();
            request.container_id = container.id.clone();
            guest.agent.start_container(request).await?;
            self.mark_first_container();
            let name = container.init_name();
            self.apply_size(guest, &container.init, &name).await;
            follow::process(self.clone(), guest, container.clone(), None, name, streams);
        }
        let event = TaskStart {
            container_id: container.id.clone(),
            pid: self.pid(),
            ..TaskStart::default()
        };
        self.events.send(topics::TASK_START_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, id: &str) -> Result<()> {
        let guest = self.guest()?;
        let exec = container.exec(id)?;
        let streams = exec.process.stdio.open()?;
        let name = container.exec_name(id);
        let mut request = wire::ExecProcessRequest::new();
        request.container_id = container.id.clone();
        request.exec_id = id.into();
        let mut process = agent_protocol::oci::process_to_wire(&exec.spec);
        process.NoInput = !exec.process.stdio.has_input();
        request.process = Some(process).into();
        guest.agent.exec_process(request).await?;
        self.apply_size(guest, &exec.process, &name).await;
        follow::process(self.clone(), guest, container.clone(), Some(id.into()), name, streams);
        let event = TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: id.into(),
            pid: self.pid(),
            ..TaskExecStarted::default()
        };
        self.events.send(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        Ok(())
    }

    fn mark_first_container(&self) {
        let mut trace = lock(&self.trace);
        if !trace.has(Mark::ContainerExec) {
            trace.set(Mark::ContainerExec, SystemTime::now());
            trace.keep(&self.id);
        }
    }

    /// A terminal's size that was asked for before the terminal was there.
    async fn apply_size(&self, guest: &Guest, process: &Process, name: &ProcessName) {
        let size = *process.size.borrow();
        if let Some((rows, columns)) = size
            && let resized = guest
                .agent
                .with_deadline(RESIZE)
                .tty_win_resize(name.resize(rows, columns))
            && let Err(error) = resized.await
        {
            tracing::debug!(%error, ?name, "the terminal was not resized");
        }
    }

    /// Records an exec; it runs at its start.
    pub fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        if container.kind == Kind::Sandbox {
            return Err(Error::Invalid(
                "exec in the sandbox itself is refused: no process of the guest belongs to it; name a container".into(),
            ));
        }
        if request.exec_id.is_empty() || request.exec_id == request.id {
            return Err(Error::Invalid("exec_id is empty or the container's own".into()));
        }
        // What is only created has its namespaces and files already.
        if !matches!(container.init.status(), Status::Created | Status::Running) {
            return Err(Error::Precondition(format!(
                "container {} is {}",
                container.id,
                container.init.status().word()
            )));
        }
        let spec: oci_spec::runtime::Process =
            serde_json::from_slice(&request.spec.value).map_err(decode("the exec's process"))?;
        let mut spec = spec::guest_process(spec, self.spawner.open_files())?;
        // CRI-O sends the container's process with other args: only the request says whether this one has a terminal.
        spec.set_terminal(Some(request.terminal));
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.add_exec(
            &request.exec_id,
            Exec {
                process: Arc::new(Process::new(stdio)),
                spec,
            },
        )?;
        let event = TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        };
        self.events.send(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Signals a process. What has ended already is a success, except for the probe with signal 0. Nothing has ended
    /// because of the signal before this returns: containerd closes the connection as soon as it hears of an exit, and
    /// takes a `Kill` that is not answered by then for a failure.
    ///
    /// `all` is for every process of a container, and means nothing for an exec.
    pub async fn kill(self: &Arc<Self>, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if signal == 0 {
            return match process.exit() {
                None => Ok(()),
                Some(_) => Err(Error::NotFound(format!("a process of {id}"))),
            };
        }
        if process.has_ended() {
            return Ok(());
        }
        if container.kind == Kind::Sandbox {
            if matches!(
                signal as i32,
                nix::libc::SIGTERM | nix::libc::SIGKILL | nix::libc::SIGINT | nix::libc::SIGQUIT | nix::libc::SIGHUP
            ) {
                self.bring_down_soon("was stopped".into(), 128 + signal);
            }
            return Ok(());
        }
        let Ok(guest) = self.guest() else { return Ok(()) };
        if ends_by_default(signal) && self.end_unstarted(&container, exec, &process, signal) {
            return Ok(());
        }
        let killing = signal == nix::libc::SIGKILL as u32;
        if killing {
            process.killed.send_replace(true);
        }
        let mut request = wire::SignalProcessRequest::new();
        request.container_id = id.into();
        request.signal = signal;
        request.all = all && exec.is_empty();
        request.exec_id = match exec {
            // The empty exec id means every process of the container: to our agent with SIGKILL, to upstream's with any
            // signal. Those that are killed would not outlive the init anyway.
            "" if killing || all => String::new(),
            "" => id.into(),
            exec => exec.into(),
        };
        let sent = guest.agent.with_deadline(KILL_DEADLINE).signal_process(request).await;
        // Whatever the guest says. An exec may take its time: it ends with its container at the latest.
        let seen_to = killing && exec.is_empty();
        if seen_to {
            self.end_if_it_outlives(process.clone(), container.id.clone());
        }
        match sent {
            // Its end is on its way, or that of the VM is.
            Ok(()) | Err(ClientError::NotFound(_) | ClientError::Gone) => Ok(()),
            // It ended meanwhile, and with it what the guest knew of it.
            Err(_) if process.has_ended() => Ok(()),
            // The agent itself does not answer: it is not the container that is slow to die.
            Err(ClientError::Deadline(_)) if seen_to => {
                self.bring_down_soon(format!("was killed: its agent did not take SIGKILL for {id}"), KILLED);
                Ok(())
            }
            // It may still arrive. An error would end the CRI's attempt to stop the container before it comes to
            // SIGKILL.
            Err(error @ ClientError::Deadline(_)) => {
                tracing::warn!(%error, signal, container = id, "the guest is slow to take a signal");
                Ok(())
            }
            Err(error) if seen_to => {
                tracing::warn!(%error, container = id, "the guest refuses to kill the container");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ends what has not been started, and so has no handler for a signal; false for anything else.
    fn end_unstarted(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec: &str,
        process: &Arc<Process>,
        signal: u32,
    ) -> bool {
        let exit = Exit::now(128 + signal);
        match process.status() {
            // Whoever creates it finds it so.
            Status::Creating => process.stop(exit),
            Status::Created if process.begin_end() => {
                process.killed.send_replace(true);
                let (sandbox, container, exec, process) =
                    (self.clone(), container.clone(), exec.to_owned(), process.clone());
                tokio::spawn(async move { follow::ended(&sandbox, &container, &exec, &process, exit).await });
                true
            }
            _ => false,
        }
    }

    fn bring_down_soon(self: &Arc<Self>, reason: String, status: u32) {
        let sandbox = self.clone();
        tokio::spawn(async move { sandbox.bring_down(&reason, status).await });
    }

    /// Every stop ends: a guest that does not end a killed container is ended itself.
    fn end_if_it_outlives(self: &Arc<Self>, process: Arc<Process>, id: String) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            if process.outlives(OBEY).await {
                let reason = format!("was killed: {id} did not end within {OBEY:?} of SIGKILL");
                sandbox.bring_down(&reason, KILLED).await;
            }
        });
    }

    /// Freezes or thaws a container.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        if container.kind == Kind::Sandbox {
            return Err(Error::Invalid(
                "pausing the sandbox itself is refused; pause its containers".into(),
            ));
        }
        if paused {
            let mut request = wire::PauseContainerRequest::new();
            request.container_id = id.into();
            guest.agent.pause_container(request).await?;
            self.events.send(
                topics::TASK_PAUSED_EVENT_TOPIC,
                &TaskPaused {
                    container_id: id.into(),
                    ..TaskPaused::default()
                },
            );
        } else {
            let mut request = wire::ResumeContainerRequest::new();
            request.container_id = id.into();
            guest.agent.resume_container(request).await?;
            self.events.send(
                topics::TASK_RESUMED_EVENT_TOPIC,
                &TaskResumed {
                    container_id: id.into(),
                    ..TaskResumed::default()
                },
            );
        }
        container.init.set_paused(paused);
        Ok(())
    }

    /// Resizes a terminal, now or when it is there.
    pub async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.size.send_replace(Some((rows, columns)));
        if process.status() != Status::Running {
            return Ok(());
        }
        let name = if exec.is_empty() {
            container.init_name()
        } else {
            container.exec_name(exec)
        };
        self.guest()?.agent.tty_win_resize(name.resize(rows, columns)).await?;
        Ok(())
    }

    /// Changes a container's resources. The VM grows before the limit does, and shrinks after it.
    pub async fn update(&self, id: &str, resources: Option<&Any>) -> Result<()> {
        let container = self.container(id)?;
        let value = resources.map(|any| any.value.as_slice()).unwrap_or_default();
        let resources: LinuxResources = serde_json::from_slice(value).map_err(decode("the resources to update"))?;
        if container.kind == Kind::Sandbox {
            return Ok(());
        }
        let guest = self.guest()?;
        let mut warnings = Vec::new();
        let mut request = wire::UpdateContainerRequest::new();
        request.container_id = id.into();
        request.resources = Some(agent_protocol::oci::resources_to_wire(&spec::guest_resources(
            resources.clone(),
            &mut warnings,
        )))
        .into();
        let cpus = CpuList::of(&resources)?;
        if cpus != CpuList::default() {
            guest.bind(id, cpus).await?;
        }
        let before = guest.sizer.grow(id, Limits::of_resources(&resources)).await?;
        let updated = guest.agent.update_container(request).await;
        let limits = if updated.is_ok() {
            before.updated(&resources)
        } else {
            before
        };
        guest.sizer.set(id, limits).await?;
        Ok(updated?)
    }

    /// A container's statistics from its guest cgroup; the sandbox's from the host's. The two are never added.
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let container = self.container(id)?;
        if container.kind == Kind::Sandbox {
            return stats::of_host(self.guest.get().and_then(|guest| guest.cgroup.as_ref()));
        }
        // What has ended, or is about to because its VM has, is asked for once more by containerd.
        if let (None, Ok(guest)) = (container.init.exit(), self.guest()) {
            let mut request = wire::StatsContainerRequest::new();
            request.container_id = id.into();
            match guest.agent.stats_container(request).await {
                Ok(stats) => container.keep_stats(stats)?,
                Err(ClientError::Gone) => {}
                Err(_) if container.init.has_ended() => {}
                // containerd asks for every task each second, also while it is being made: the guest may not have it
                // yet.
                Err(_) if container.init.status() == Status::Created => {}
                Err(error) => return Err(error.into()),
            }
        }
        stats::of_guest(&container.last_stats(), container.oom.load(Ordering::SeqCst))
    }

    /// How many processes a container has; one stands for what the guest does not count.
    pub async fn processes(&self, id: &str) -> Result<usize> {
        let container = self.container(id)?;
        let mut count = 1;
        if let (false, Status::Running | Status::Paused, Ok(guest)) =
            (container.kind == Kind::Sandbox, container.init.status(), self.guest())
        {
            let mut request = wire::StatsContainerRequest::new();
            request.container_id = id.into();
            request.count_processes = true;
            match guest.agent.stats_container(request).await {
                Ok(stats) => count = stats.processes.clamp(1, MOST_PROCESSES),
                Err(error) => tracing::debug!(%error, container = id, "its processes are not counted"),
            }
        }
        Ok(count as usize)
    }

    /// Forgets a task that has ended, or never began; returns its pid and exit.
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = self.pid();
        let exit = match process.status() {
            Status::Stopped(exit) => exit,
            Status::Creating | Status::Created => {
                let exit = Exit::now(KILLED);
                if exec.is_empty() {
                    self.delete_unstarted(&container, exit).await;
                }
                exit
            }
            status => {
                let name = if exec.is_empty() { id } else { exec };
                return Err(Error::Precondition(format!(
                    "{name} cannot be deleted: it is {}",
                    status.word()
                )));
            }
        };
        if !exec.is_empty() {
            // Subscribers hear of the deletion of tasks only, as from containerd's shim for runc.
            container.remove_exec(exec);
            return Ok((pid, exit));
        }
        lock(&self.containers).remove(id);
        self.keep_record();
        let event = TaskDelete {
            container_id: id.into(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskDelete::default()
        };
        self.events.send(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok((pid, exit))
    }

    async fn delete_unstarted(self: &Arc<Self>, container: &Arc<Container>, exit: Exit) {
        match container.kind {
            Kind::Sandbox => {
                self.bring_down("was deleted before it was started", exit.status).await;
            }
            // Whoever creates it finds it so, and takes it back.
            Kind::Member if container.init.status() == Status::Creating => drop(container.init.stop(exit)),
            Kind::Member | Kind::Single => follow::ended(self, container, "", &container.init, exit).await,
        }
    }
}

/// Whether a signal ends a process that has no handler for it (signal(7)).
fn ends_by_default(signal: u32) -> bool {
    use nix::libc::{SIGCHLD, SIGCONT, SIGRTMAX, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH};
    let harmless = [SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH];
    let signal = signal.cast_signed();
    (1..=SIGRTMAX()).contains(&signal) && !harmless.contains(&signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_end_what_has_no_handler_but_for_eight() {
        let ending = (1..=64).filter(|signal| ends_by_default(*signal)).count();
        assert_eq!(ending, 64 - 8);
        assert!(ends_by_default(15) && !ends_by_default(17) && !ends_by_default(0) && !ends_by_default(65));
    }
}
