//! A double of a kubelet: runs the installer's pods that are pinned to its node, with the node's own folder as the host, and reports as a kubelet does.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    pin::pin,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
};

use futures::StreamExt;
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{Config, Event, watcher},
    },
};
use operator::report::{Report, Verb};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    runtime::Runtime,
    sync::Notify,
    task::JoinHandle,
};

use super::controller::Said;

/// The version that the installer's stand-in carries.
pub const VERSION: &str = "0.1.0-1a2b3c4d";

/// A stand-in for the installer, for stories about the controller alone: it changes one file, says the steps as the real one does, and does what files in the host's
/// folder tell it: `refuse` holds the text of a problem, `gate` is a FIFO that it waits on, `version` its version.
const STAND_IN: &str = r#"
verb=$1; shift
while [ $# -gt 0 ]; do
  case $1 in --host-root) root=$2 ;; --result) result=$2 ;; esac
  shift 2
done
echo "installer: $verb begins" >&2
[ ! -p "$root/gate" ] || read -r _ < "$root/gate"
version=$(cat "$root/version")
if [ -e "$root/refuse" ]; then
  printf '{"verb":"%s","phase":"refused","error":{"code":"NoKvm","text":"%s"}}' "$verb" "$(cat "$root/refuse")" >"$result"
  exit 1
fi
echo "installer: $verb changes the host" >&2
case $verb in
install) echo "$version" >"$root/kata"; phase=installed seen=true ;;
uninstall) rm -f "$root/kata"; phase=uninstalled seen=false ;;
verify) phase=verified seen=true
  [ -e "$root/kata" ] || { printf '{"verb":"verify","phase":"failed","error":{"code":"NotInstalled","text":"kata is gone"}}' >"$result"; exit 1; } ;;
esac
echo "installer: $verb is done" >&2
printf '{"verb":"%s","phase":"%s","version":"%s","changed":true,"restarted":true,"handlerSeen":%s}' "$verb" "$phase" "$version" "$seen" >"$result"
"#;

/// What plays the container's image.
#[derive(Debug, Clone)]
pub enum Image {
    /// The stand-in.
    StandIn,
    /// The real installer, and the folder that is its payload.
    Real { program: PathBuf, payload: PathBuf },
}

/// What a kubelet and a story share.
struct Shared {
    name: String,
    folder: PathBuf,
    image: Image,
    client: Client,
    said: Said,
    /// The installer is killed when it says a line with the first of these.
    deaths: Mutex<Vec<String>>,
}

/// A node's kubelet.
pub struct Kubelet {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Kubelet {
    pub fn start(name: &str, folder: PathBuf, image: Image, client: Client, runtime: &Runtime) -> Kubelet {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            folder,
            image,
            client,
            said: Said::default(),
            deaths: Mutex::default(),
        });
        let task = runtime.spawn(live(Arc::clone(&shared)));
        Kubelet { shared, task }
    }

    /// The node's host.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// What the installers on this node said.
    pub fn said(&self) -> &Said {
        &self.shared.said
    }

    /// From now on installers die when they say these, each once, in this order.
    pub fn die_at(&self, lines: impl IntoIterator<Item = String>) {
        *self.shared.deaths.lock().unwrap_or_else(PoisonError::into_inner) = lines.into_iter().collect();
    }

    /// How many of these are to come.
    pub fn deaths_left(&self) -> usize {
        self.shared.deaths.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn live(shared: Arc<Shared>) {
    let pods = Api::<Pod>::all(shared.client.clone());
    let mine = Config::default().fields(&format!("spec.nodeName={}", shared.name));
    let mut events = pin!(watcher(pods, mine).default_backoff());
    let mut known = BTreeSet::new();
    let end = Arc::new(Notify::new());
    while let Some(event) = events.next().await {
        let Ok(Event::Apply(pod) | Event::InitApply(pod)) = event else {
            continue;
        };
        if pod.metadata.deletion_timestamp.is_some() {
            end.notify_waiters();
            let pods = Api::<Pod>::namespaced(shared.client.clone(), &pod.namespace().unwrap_or_default());
            // Somebody else may have been faster.
            drop(
                pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
                    .await,
            );
        } else if pod.labels().contains_key("app.kubernetes.io/component") && known.insert(pod.uid()) {
            tokio::spawn(run(Arc::clone(&shared), pod, Arc::clone(&end)));
        }
    }
}

/// A pod's life. What cannot be reported any more, because the pod or the story is gone, is not.
async fn run(shared: Arc<Shared>, pod: Pod, end: Arc<Notify>) {
    let pods = Api::<Pod>::namespaced(shared.client.clone(), &pod.namespace().unwrap_or_default());
    let name = pod.name_any();
    let report = |phase: &'static str, state: Value| {
        let container = json!({"name": "installer", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state});
        let status = Patch::Merge(json!({"status": {"phase": phase, "containerStatuses": [container]}}));
        let (pods, name) = (&pods, &name);
        async move { drop(pods.patch_status(name, &PatchParams::default(), &status).await) }
    };
    let started = now();
    report("Running", json!({"running": {"startedAt": started}})).await;
    let result = shared.folder.join(format!("{name}.termination"));
    let arguments = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.containers[0].args.clone())
        .unwrap_or_default();
    let code = execute(&shared, &arguments, &result, &end).await;
    let message = std::fs::read_to_string(&result).unwrap_or_default();
    if let Ok(told) = Report::parse(&message) {
        list_handlers(&shared, &told).await;
    }
    let terminated = json!({"exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" }, "message": message, "startedAt": started, "finishedAt": now()});
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    report(phase, json!({"terminated": terminated})).await;
}

/// The time, as a kubelet writes it: to the second.
fn now() -> String {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

/// Runs the installer, as the container's arguments say, with the paths as they are outside of the container.
async fn execute(shared: &Shared, arguments: &[String], result: &Path, end: &Notify) -> i32 {
    let folder = shared.folder.display().to_string();
    let mut command = match &shared.image {
        Image::StandIn => {
            let mut command = Command::new("sh");
            command.args(["-c", STAND_IN, "installer"]);
            command
        }
        Image::Real { program, .. } => Command::new(program),
    };
    for argument in arguments {
        match (argument.as_str(), &shared.image) {
            ("/host", _) => command.arg(&folder),
            ("/dev/termination-log", _) => command.arg(result),
            ("/payload", Image::Real { payload, .. }) => command.arg(payload),
            (other, _) => command.arg(other),
        };
    }
    command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let Ok(mut child) = command.spawn() else { return 127 };
    let mut lines = child.stderr.take().map(|log| BufReader::new(log).lines());
    let ended = async {
        while let Some(Ok(Some(line))) = match &mut lines {
            Some(lines) => Some(lines.next_line().await),
            None => None,
        } {
            let dies = {
                let mut deaths = shared.deaths.lock().unwrap_or_else(PoisonError::into_inner);
                let dies = deaths.first().is_some_and(|death| line.contains(death.as_str()));
                dies.then(|| deaths.remove(0)).is_some()
            };
            shared.said.add(line);
            if dies {
                // It may have ended by itself meanwhile.
                drop(child.start_kill());
            }
        }
        child.wait().await
    };
    let status = tokio::select! {
        status = ended => status,
        () = end.notified() => return 137,
    };
    status.map_or(127, |status| status.code().unwrap_or(137))
}

/// As a kubelet does after it has heard from its container runtime.
async fn list_handlers(shared: &Shared, report: &Report) {
    let has = report.handler_seen && report.verb != Verb::Uninstall;
    let handlers: Vec<Value> = ["runc"]
        .into_iter()
        .chain(has.then_some("kata"))
        .map(|name| json!({"name": name}))
        .collect();
    let status = Patch::Merge(json!({"status": {"runtimeHandlers": handlers}}));
    let nodes = Api::<Node>::all(shared.client.clone());
    drop(nodes.patch_status(&shared.name, &PatchParams::default(), &status).await);
}
