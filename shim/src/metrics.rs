//! Metrics of one sandbox, on `/run/kata/<sandbox>/shim-monitor.sock`: of the shim, QEMU, virtiofsd and the guest,
//! under the names that Kata's dashboards know (`docs/design/kata-2-0-metrics.md` there). Nothing is measured, and
//! nothing wakes, until somebody asks.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use agent_protocol::{
    client::{Durations, LONGEST_READ},
    exposition::{Exposition, NETWORK, open_files, read},
    protocol::agent::{GetMetricsRequest, StatsContainerRequest},
};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::{
    accept,
    boot::Guest,
    console,
    container::Kind,
    error::{Context, Error, Result},
    families::Families,
    http::{self, Answer, Request},
    sandbox::Sandbox,
    undo::{State, Undo, dir_of},
};

/// How long the guest may take for its part.
const GUEST: Duration = Duration::from_secs(5);
/// The most text that a guest may add, in bytes: some three times what one with two processors says.
const GUEST_TEXT: usize = LONGEST_READ as usize;
/// What a guest may speak of.
const OF_A_GUEST: &[&str] = &["kata_agent_", "kata_guest_"];

/// Where a sandbox's shim answers.
pub fn socket(sandbox: &str) -> PathBuf {
    dir_of(sandbox).join("shim-monitor.sock")
}

/// Makes the socket, for root only.
///
/// # Errors
/// The kernel's.
pub fn listen(sandbox: &str, state: &mut State) -> Result<UnixListener> {
    let path = socket(sandbox);
    state.push(Undo::File(path.clone()))?;
    let listener = UnixListener::bind(&path).at("bind", &path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).at("set the mode of", &path)?;
    listener.set_nonblocking(true).at("prepare", &path)?;
    Ok(listener)
}

/// Serves `/metrics`, `/containers` and `/exec`, the debug console, until the runtime ends. Must be called in it.
///
/// # Errors
/// The runtime's.
pub fn serve(listener: UnixListener, sandbox: Arc<Sandbox>) -> Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener).action("serve metrics")?;
    tokio::spawn(async move {
        loop {
            let (stream, _) = accept::next(|| listener.accept()).await;
            let sandbox = sandbox.clone();
            tokio::spawn(async move {
                if let Err(error) = converse(stream, &sandbox).await {
                    tracing::debug!(%error, "a scrape or a console ended early");
                }
            });
        }
    });
    Ok(())
}

async fn converse(mut stream: UnixStream, sandbox: &Sandbox) -> io::Result<()> {
    let answer = match http::request(&mut stream).await? {
        Ok(Request { target, .. }) => match http::path(&target) {
            "/exec" => return console::serve(stream, sandbox, &target).await,
            path => respond(sandbox, path).await,
        },
        Err(refusal) => refusal,
    };
    http::answer(&mut stream, &answer).await
}

async fn respond(sandbox: &Sandbox, path: &str) -> Answer {
    match path {
        "/metrics" => match text(sandbox).await {
            Ok(text) => Answer::ok(http::METRICS, text),
            Err(error) => Answer::unavailable(error.to_string()),
        },
        "/containers" => Answer::ok(http::JSON, serde_json::json!(containers(sandbox)).to_string()),
        _ => Answer::not_found("here are /metrics, /containers and /exec"),
    }
}

/// A task as `/containers` lists it: a JSON array of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// Whether it stands for the sandbox itself.
    pub sandbox: bool,
    /// `created`, `running`, `paused`, `stopped`, or what is between them.
    pub status: String,
}

fn containers(sandbox: &Sandbox) -> Vec<Task> {
    let task = |container: &Arc<crate::container::Container>| Task {
        id: container.id.clone(),
        sandbox: container.kind == Kind::Sandbox,
        status: container.init.status().word().into(),
    };
    sandbox.all().iter().map(task).collect()
}

/// Measures. What has ended has no part in the text; neither has a guest that does not answer, which the log tells.
async fn text(sandbox: &Sandbox) -> Result<String> {
    let mut out = Exposition::default();
    shim(&mut out, sandbox).action("measure the shim")?;
    let Ok(guest) = sandbox.guest() else {
        return Ok(out.into_text());
    };
    let of_host = hypervisor(&mut out, guest).and_then(|()| virtiofsd(&mut out, guest));
    if let Err(error) = of_host {
        tracing::info!(%error, "a process ended while it was measured");
    }
    match of_guest(guest).await {
        Ok(families) => {
            overhead(&mut out, sandbox, guest).await;
            Ok(out.into_text() + &families.render())
        }
        Err(error) => {
            tracing::warn!(%error, "no metrics from the guest");
            Ok(out.into_text())
        }
    }
}

fn shim(out: &mut Exposition, sandbox: &Sandbox) -> io::Result<()> {
    process(out, "kata_shim", "self")?;
    out.process_totals("kata_shim", "self")?;
    let name = "kata_shim_rpc_durations_histogram_milliseconds";
    durations(out, name, "Durations of the task API's calls", &sandbox.durations());
    if let Ok(guest) = sandbox.guest() {
        let name = "kata_shim_agent_rpc_durations_histogram_milliseconds";
        durations(out, name, "Durations of calls to the agent", &guest.agent.durations());
    }
    Ok(())
}

fn durations(out: &mut Exposition, name: &str, help: &str, all: &Durations) {
    out.family(name, "histogram", help);
    for (action, histogram) in all {
        out.histogram(name, &[("action", action)], histogram);
    }
}

fn hypervisor(out: &mut Exposition, guest: &Guest) -> io::Result<()> {
    let pid = guest.vm.child().pid().to_string();
    process(out, "kata_hypervisor", &pid)?;
    // Only the pod's network: the shim's is the node's, with a device for every other pod.
    let devices = read(&format!("/proc/{pid}/net/dev"))?;
    let help = "Network devices of the pod on the host";
    out.table("kata_hypervisor_netdev", (help, "interface"), &NETWORK, &devices);
    Ok(())
}

fn virtiofsd(out: &mut Exposition, guest: &Guest) -> io::Result<()> {
    let first = guest.virtiofsd.child().pid().to_string();
    // With its own namespaces virtiofsd forks once, and the child does the work.
    let children = read(&format!("/proc/{first}/task/{first}/children"))?;
    let worker = children.split_whitespace().next().unwrap_or(&first);
    process(out, "kata_virtiofsd", worker)
}

/// The parts that Kata has for each of its processes on the host.
fn process(out: &mut Exposition, prefix: &str, pid: &str) -> io::Result<()> {
    let open = open_files(pid)? as f64;
    out.single(&format!("{prefix}_fds"), "gauge", "Open files of the process", open);
    out.process(prefix, pid, |key| key.to_ascii_lowercase().replace('_', ""))
}

/// What agent and guest say, as far as it is theirs to say.
async fn of_guest(guest: &Guest) -> Result<Families> {
    let agent = guest.agent.with_deadline(GUEST);
    let text = agent.get_metrics(GetMetricsRequest::new()).await?.metrics;
    if text.len() > GUEST_TEXT {
        let length = text.len();
        return Err(Error::Invalid(format!(
            "the guest's metrics have {length} bytes; {GUEST_TEXT} are taken"
        )));
    }
    Ok(Families::parse(&text).only(OF_A_GUEST))
}

/// What the pod's cgroup on the host is charged beyond what its containers use in the guest.
async fn overhead(out: &mut Exposition, sandbox: &Sandbox, guest: &Guest) {
    let agent = guest.agent.with_deadline(GUEST);
    let containers = sandbox.all().into_iter();
    let asked = containers
        .filter(|container| container.kind != Kind::Sandbox)
        .map(|container| {
            let mut request = StatsContainerRequest::new();
            request.container_id = container.id.clone();
            agent.stats_container(request)
        });
    // One that is not there yet, or not any more, uses nothing.
    let used = join_all(asked).await.into_iter().flatten();
    // The guest says how much each uses.
    let used = used.map(|stats| stats.cgroup_stats.memory_stats.usage.usage);
    let used = used.fold(0, u64::saturating_add);
    let Some(cgroup) = &guest.cgroup else { return };
    match cgroup.usage() {
        Ok(charged) => out.single(
            "kata_shim_pod_overhead_memory_in_bytes",
            "gauge",
            "Memory that the host charges to the pod beyond what its containers use, in bytes",
            charged.memory_stats.usage.usage.saturating_sub(used) as f64,
        ),
        Err(error) => tracing::info!(%error, "the pod's cgroup cannot be read"),
    }
}
