//! The tasks that follow what runs: each started process to its exit, the guest's OOM kills, and the VM's own end.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    topics,
};

use agent_protocol::{client::ClientError, protocol::agent as wire};
use tokio::time::timeout;

use crate::{
    boot::Guest,
    container::{Container, Kind},
    io::{ProcessName, Streams},
    process::{Exit, Process},
    sandbox::Sandbox,
    service::timestamp,
    vm_end::{HANG_UP, vm_end},
};

/// Where CRI-O learns of exits after its own restart, when nobody calls Wait any more (`container_exits_dir`).
const CRIO_EXITS: &str = "/var/run/crio/exits";

/// The exit of what died with its VM: 128 + SIGKILL.
pub const KILLED: u32 = 137;
/// The exit that nobody knows.
const UNKNOWN: u32 = 255;

/// How long the statistics of a container that has ended may delay its exit.
const LAST_LOOK: Duration = Duration::from_secs(5);
/// The same for its removal from the guest, where its last processes may still be dying.
const REMOVAL: Duration = Duration::from_secs(10);

/// How long the execs of a container that has ended may delay its exit: their ends are told before its own.
const EXECS: Duration = Duration::from_secs(5);

/// Follows a process that was just started: copies its streams, waits for its end and makes the end known.
pub fn process(
    sandbox: Arc<Sandbox>,
    guest: &Guest,
    container: Arc<Container>,
    exec: Option<String>,
    name: ProcessName,
    streams: Streams,
) {
    let exec = exec.unwrap_or_default();
    let Ok(process) = container.process(&exec) else { return };
    process.end_start(true);
    let agent = guest.agent.clone();
    let mut copies = streams.copy(&agent, &name, process.close_stdin.subscribe());
    let own = guest.about.own;
    let mut request = wire::WaitProcessRequest::new();
    request.container_id = name.container.clone();
    request.exec_id = name.exec.clone();
    tokio::spawn(async move {
        if !own {
            // To upstream's agent the answer to WaitProcess is the end of the streams, whatever is still in them
            // (`do_wait_process` in `src/agent/src/rpc.rs` of kata-containers): its own shims ask when they have read
            // them to the end.
            copies.ended(process.killed.subscribe()).await;
        }
        let status = match agent.wait_process(request).await {
            // What no process of Linux can end with is no answer.
            Ok(reply) => u8::try_from(reply.status).map_or(UNKNOWN, u32::from),
            // The agent has no record of the process.
            Err(ClientError::NotFound(_)) => UNKNOWN,
            // The VM died under it, which kills it.
            Err(error) => {
                tracing::info!(%error, ?name, "the process ended with its VM");
                ended_with_the_vm(&sandbox, &container, &exec)
            }
        };
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        process.begin_end();
        let unread = copies.finish(!exec.is_empty() && sandbox.under_crio()).await;
        // Nobody comes back for an exec: it ends with the daemon that asked for it.
        if exec.is_empty() {
            process.keep_unread(unread);
        }
        ended(&sandbox, &container, &exec, &process, exit).await;
    });
}

/// The exit of a process that has ended with its VM.
fn ended_with_the_vm(sandbox: &Sandbox, container: &Container, exec: &str) -> u32 {
    if exec.is_empty() && sandbox.out_of_memory() {
        oom(sandbox, container);
    }
    KILLED
}

/// The VM died while the guest started a process. Whether the process ran, nobody knows; its end is told in any case.
pub async fn lost(sandbox: Arc<Sandbox>, container: Arc<Container>, exec: String, process: Arc<Process>) {
    process.end_start(true);
    process.begin_end();
    let exit = Exit::now(ended_with_the_vm(&sandbox, &container, &exec));
    ended(&sandbox, &container, &exec, &process, exit).await;
}

/// Makes a process's end known: first the host lets go of what a container held, then waiters, then subscribers hear.
/// The ends of a container's execs are told before that of its init, which ends them (as containerd's shim for runc
/// does in `handleInitExit` of its `task/service.go`).
pub async fn ended(sandbox: &Arc<Sandbox>, container: &Arc<Container>, exec: &str, process: &Arc<Process>, exit: Exit) {
    if exec.is_empty() {
        container_ended(sandbox, container, exit).await;
        if timeout(EXECS, container.execs_ended()).await.is_err() {
            tracing::warn!(container = container.id, "an exec has not ended with its container");
        }
    }
    if process.stop(exit) {
        announce(sandbox, container, exec, exit);
    }
}

/// Tells whoever does not wait of an end.
pub fn announce(sandbox: &Sandbox, container: &Container, exec: &str, exit: Exit) {
    let event = TaskExit {
        container_id: container.id.clone(),
        id: if exec.is_empty() {
            container.id.clone()
        } else {
            exec.into()
        },
        pid: sandbox.pid(),
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..TaskExit::default()
    };
    sandbox.events().send(topics::TASK_EXIT_EVENT_TOPIC, &event);
    if exec.is_empty() && sandbox.under_crio() {
        sandbox.keep_record();
        tell_crio(&container.id, exit);
    }
}

async fn container_ended(sandbox: &Arc<Sandbox>, container: &Arc<Container>, exit: Exit) {
    let Ok(guest) = sandbox.guest() else { return };
    if !*container.init.killed.borrow() {
        last_look(sandbox, guest, container, exit).await;
    }
    if container.kind == Kind::Single {
        return sandbox
            .bring_down("is not needed any more: its container ended", exit.status)
            .await;
    }
    remove(sandbox, guest, container).await;
}

/// Takes a container back from the guest and the host.
pub async fn remove(sandbox: &Sandbox, guest: &Guest, container: &Container) {
    let mut request = wire::RemoveContainerRequest::new();
    request.container_id = container.id.clone();
    request.timeout = 10;
    let removed = guest.agent.with_deadline(REMOVAL).remove_container(request).await;
    if let Err(error) = removed {
        tracing::warn!(%error, container = container.id, "the guest did not remove the container");
    }
    sandbox.let_go(&container.id);
}

/// Keeps the last statistics, and finds out whether it was out of memory that it ended.
async fn last_look(sandbox: &Sandbox, guest: &Guest, container: &Container, exit: Exit) {
    let mut request = wire::StatsContainerRequest::new();
    request.container_id = container.id.clone();
    // An exit by SIGKILL may be the OOM killer's; the event may still be on its way, the counter is not.
    match guest.agent.with_deadline(LAST_LOOK).stats_container(request).await {
        Ok(stats) => {
            let kills = stats
                .cgroup_stats
                .memory_stats
                .stats
                .get("oom_kill")
                .copied()
                .unwrap_or(0);
            if let Err(error) = container.keep_stats(stats) {
                tracing::warn!(%error, container = container.id, "no last statistics");
            }
            if exit.status == 137 && kills > 0 {
                oom(sandbox, container);
            }
        }
        Err(error) => tracing::info!(%error, container = container.id, "no last statistics"),
    }
}

fn oom(sandbox: &Sandbox, container: &Container) {
    if container.set_oom() {
        let event = TaskOOM {
            container_id: container.id.clone(),
            ..TaskOOM::default()
        };
        sandbox.events().send(topics::TASK_OOM_EVENT_TOPIC, &event);
    }
}

fn tell_crio(container: &str, exit: Exit) {
    let path = std::path::Path::new(CRIO_EXITS).join(container);
    // Without the directory this CRI-O keeps its exits elsewhere, and learns of them by Wait.
    if path.parent().is_some_and(std::path::Path::is_dir)
        && let Err(error) = std::fs::write(&path, exit.status.to_string())
    {
        tracing::warn!(%error, path = %path.display(), "cannot tell CRI-O of the exit");
    }
}

/// Watches a new guest: its OOM kills, and the end of its VM.
pub fn watch_guest(sandbox: Arc<Sandbox>) {
    tokio::spawn(watch_oom(sandbox.clone()));
    tokio::spawn(async move {
        let Ok(guest) = sandbox.guest() else { return };
        let reason = tokio::select! {
            biased;
            // A guest without its file server hangs on the next access: better it ends.
            end = vm_end(&guest.vm, &guest.virtiofsd) => format!("ended: {end}"),
            // Without its monitor a VM gets no memory, disk or interface for a container to come, nor gives any back.
            nonsense = guest.vm.monitor_lost() => format!("was ended: {nonsense}"),
        };
        bring_down(&sandbox, reason).await;
    });
}

/// Ends a sandbox whose VM has ended, or has to, though nobody asked for it.
async fn bring_down(sandbox: &Arc<Sandbox>, mut reason: String) {
    if sandbox.out_of_memory() {
        reason += ": the host is out of memory, or the pod's cgroup has reached its limit (those of the containers, and the RuntimeClass's overhead)";
    }
    sandbox.bring_down(&reason, KILLED).await;
}

async fn watch_oom(sandbox: Arc<Sandbox>) {
    let Ok(guest) = sandbox.guest() else { return };
    let agent = guest.agent.clone();
    loop {
        match agent.get_oom_event(wire::GetOOMEventRequest::new()).await {
            Ok(event) => {
                if let Ok(container) = sandbox.container(&event.container_id) {
                    oom(&sandbox, &container);
                }
            }
            // This call is open as long as the agent is there. The agent hangs up with its VM, or has broken the
            // protocol: nobody can speak to that guest again.
            Err(error @ ClientError::Gone) => {
                let end = timeout(HANG_UP, vm_end(&guest.vm, &guest.virtiofsd)).await;
                let reason = end.map_or_else(|_| format!("was ended: {error}"), |end| format!("ended: {end}"));
                return bring_down(&sandbox, reason).await;
            }
            Err(error) => {
                tracing::debug!(%error, "no more OOM events");
                return;
            }
        }
    }
}
