//! A double of a kubelet: runs the installer's pods that are pinned to its node, with the node's own folder as the
//! host, and reports as a kubelet does.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    pin::pin,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::StreamExt;
use installer_report::{Report, Verb};
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
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde_json::{Value, json};
use tests::{failure::Result, namespaces::Namespaces, places, procs};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    runtime::Runtime,
    sync::Notify,
    task::JoinHandle,
};

use super::controller::Said;

/// The version that the installer's stand-in carries.
pub const VERSION: &str = "0.1.0-1a2b3c4d";

/// A stand-in for the installer, for stories about the controller alone: it changes one file, says its steps as the
/// real one does, and does what files in the host's folder tell it: `refuse` holds the text of a problem that it finds
/// before it changes anything, `fail` of one that comes afterwards, `gate` is a FIFO that it waits on, `version` its version, `deaths` the steps at which it kills itself, once.
const STAND_IN: &str = r#"
verb=$1; shift
while [ $# -gt 0 ]; do
  case $1 in --host-root) root=$2 ;; --result) result=$2 ;; esac
  shift 2
done
step() {
  echo "installer: $verb $1" >&2
  if grep -qx "$verb $1" "$root/deaths" 2>/dev/null; then
    sed -i "/^$verb $1\$/d" "$root/deaths"
    kill -KILL $$
  fi
}
step begins
[ ! -p "$root/gate" ] || read -r _ < "$root/gate"
version=$(cat "$root/version")
if [ -e "$root/refuse" ]; then
  printf '{"verb":"%s","phase":"refused","error":{"code":"NoKvm","text":"%s"}}' "$verb" "$(cat "$root/refuse")" >"$result"
  exit 1
fi
step 'changes the host'
if [ -e "$root/fail" ]; then
  printf '{"verb":"%s","phase":"failed","changed":true,"error":{"code":"NotFit","text":"%s"}}' "$verb" "$(cat "$root/fail")" >"$result"
  exit 1
fi
case $verb in
install) echo "$version" >"$root/kata"; phase=installed seen=true ;;
uninstall) rm -f "$root/kata"; phase=uninstalled seen=false ;;
verify) phase=verified seen=true
  [ -e "$root/kata" ] || { printf '{"verb":"verify","phase":"failed","error":{"code":"NotInstalled","text":"kata is gone"}}' >"$result"; exit 1; } ;;
esac
step 'is done'
printf '{"verb":"%s","phase":"%s","version":"%s","changed":true,"restarted":true,"handlerSeen":%s}' "$verb" "$phase" "$version" "$seen" >"$result"
"#;

/// What plays the container's image.
#[derive(Clone)]
pub enum Image {
    /// The stand-in.
    StandIn,
    /// The real installer, in a host's namespaces, and the folder that is its payload.
    Real {
        program: PathBuf,
        payload: PathBuf,
        namespaces: Arc<Namespaces>,
    },
}

impl Image {
    /// The real installer for a host.
    pub fn real(namespaces: &Arc<Namespaces>, payload: PathBuf) -> Result<Image> {
        Ok(Image::Real {
            program: places::binaries()?.join("sandpod-installer"),
            payload,
            namespaces: Arc::clone(namespaces),
        })
    }
}

/// When installers die.
#[derive(Debug, Default)]
struct Deaths {
    /// At each step of this verb at which none has died yet.
    verb: Option<&'static str>,
    /// What they had said last, for each death.
    happened: Vec<String>,
}

impl Deaths {
    /// Whether an installer that was asked for this dies after this line.
    fn strike(&mut self, verb: &str, line: &str) -> bool {
        let new = self.verb == Some(verb) && !self.happened.iter().any(|before| before == line);
        if new {
            self.happened.push(line.to_owned());
        }
        new
    }
}

/// What a kubelet and a story share.
struct Shared {
    name: String,
    folder: PathBuf,
    image: Mutex<Image>,
    client: Client,
    said: Said,
    deaths: Mutex<Deaths>,
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
            image: Mutex::new(image),
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

    /// From now on runs of this verb die at each step at which none has died yet, until one comes through.
    pub fn die_at_every_step_of(&self, verb: &'static str) {
        *locked(&self.shared.deaths) = Deaths {
            verb: Some(verb),
            ..Deaths::default()
        };
    }

    /// What those that died had said last.
    pub fn deaths(&self) -> Vec<String> {
        locked(&self.shared.deaths).happened.clone()
    }

    /// The image has another payload from now on.
    pub fn carry(&self, new: PathBuf) {
        if let Image::Real { payload, .. } = &mut *locked(&self.shared.image) {
            *payload = new;
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
pub fn now() -> String {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

/// The command that the container's arguments say, with the paths as they are outside of the container.
fn command(shared: &Shared, arguments: &[String], result: &Path) -> Command {
    let image = locked(&shared.image).clone();
    let mut command = match &image {
        Image::StandIn => {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", STAND_IN, "installer"]);
            command
        }
        Image::Real {
            program, namespaces, ..
        } => namespaces.command(&program.display().to_string()),
    };
    for argument in arguments {
        match (argument.as_str(), &image) {
            ("/host", _) => command.arg(&shared.folder),
            ("/dev/termination-log", _) => command.arg(result),
            ("/payload", Image::Real { payload, .. }) => command.arg(payload),
            (other, _) => command.arg(other),
        };
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Command::from(command)
}

/// Runs the installer, and kills it where a story says so, or when its pod is deleted.
async fn execute(shared: &Shared, arguments: &[String], result: &Path, end: &Notify) -> i32 {
    let verb = arguments.first().map_or("", String::as_str);
    let Ok(mut child) = command(shared, arguments, result).kill_on_drop(true).spawn() else {
        return 127;
    };
    let mut lines = child.stderr.take().map(|log| BufReader::new(log).lines());
    let ended = async {
        while let Some(lines) = &mut lines
            && let Ok(Some(line)) = lines.next_line().await
        {
            let dies = is_step(&line) && locked(&shared.deaths).strike(verb, &line);
            shared.said.add(line);
            if dies {
                kill(&child);
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

fn is_step(line: &str) -> bool {
    line.starts_with("installer: ") && !line.starts_with("installer: warning")
}

/// Kills the installer itself, not the one that has entered namespaces for it. It may have ended meanwhile.
fn kill(child: &Child) {
    let Some(pid) = child.id() else { return };
    let program = procs::child_of(pid).unwrap_or(pid.cast_signed());
    let _ = signal::kill(Pid::from_raw(program), Signal::SIGKILL);
}

/// As a kubelet does after it has heard from its container runtime.
async fn list_handlers(shared: &Shared, report: &Report) {
    let has = report.handler_seen == Some(true) && report.verb != Verb::Uninstall;
    let handlers: Vec<Value> = ["runc"]
        .into_iter()
        .chain(has.then_some("kata"))
        .map(|name| json!({"name": name}))
        .collect();
    let status = Patch::Merge(json!({"status": {"runtimeHandlers": handlers}}));
    let nodes = Api::<Node>::all(shared.client.clone());
    drop(nodes.patch_status(&shared.name, &PatchParams::default(), &status).await);
}
