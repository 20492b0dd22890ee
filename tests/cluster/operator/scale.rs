//! Large clusters: as many objects as the API server holds, whose kubelets are played by one task.

use std::{
    collections::BTreeSet,
    fs,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{
        WatchStreamExt,
        watcher::{Config, Event, watcher},
    },
};
use serde_json::{Value, json};
use tests::failure::{Failure, Result, Trying, claim, same};
use tokio::task::JoinHandle;

use super::{
    Story,
    controller::Settings,
    ground::{NAMESPACE, SOON},
    kubelet::{VERSION, now},
    rig::{self, NAME, Rig},
};

pub const STORIES: &[Story] = &[("a_thousand_nodes_get_kata_fifty_at_a_time", rollout)];

/// They take minutes, and memory for the API server.
pub const LONG: &[Story] = &[("five_thousand_nodes_and_their_pods", large)];

/// How many objects are made at a time.
const AT_ONCE: usize = 16;
/// How long a busy machine may take for thousands of objects.
const LATE: Duration = Duration::from_secs(1200);
/// What the controller's Deployment allows it, in KiB.
const LIMIT: u64 = 256 * 1024;
/// What it is to need at most for a thousand nodes, in KiB.
const GOAL: u64 = 128 * 1024;

/// The kubelets of all nodes: whatever an installer's pod is asked for has been done at once.
struct Fleet {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

/// The installer's pods.
#[derive(Default)]
struct Seen {
    there: BTreeSet<String>,
    /// How many there were at a time, at most.
    most: usize,
}

impl Fleet {
    fn start(rig: &Rig<'_>) -> Fleet {
        let seen = Arc::<Mutex<Seen>>::default();
        let task = rig
            .ground
            .runtime
            .spawn(live(rig.ground.client.clone(), Arc::clone(&seen)));
        Fleet { seen, task }
    }

    fn most(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).most
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn live(client: Client, seen: Arc<Mutex<Seen>>) {
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let mine = Config::default().labels("app.kubernetes.io/component=installer");
    let mut events = pin!(watcher(pods.clone(), mine).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) if pod.metadata.deletion_timestamp.is_some() => {
                let pods = pods.clone();
                tokio::spawn(async move {
                    // The controller may ask twice.
                    drop(
                        pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
                            .await,
                    );
                });
            }
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                if seen.there.insert(pod.uid().unwrap_or_default()) {
                    seen.most = seen.most.max(seen.there.len());
                    tokio::spawn(succeed(client.clone(), pod));
                }
            }
            Ok(Event::Delete(pod)) => {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.there.remove(&pod.uid().unwrap_or_default());
            }
            Ok(Event::Init | Event::InitDone) | Err(_) => {}
        }
    }
}

/// Reports success, as a kubelet does. What cannot be reported is missed by the story.
async fn succeed(client: Client, pod: Pod) {
    let spec = pod.spec.clone().unwrap_or_default();
    let verb = spec
        .containers
        .first()
        .and_then(|container| container.args.clone()?.first().cloned());
    let verb = verb.unwrap_or_default();
    let has = verb != "uninstall";
    let phase = match verb.as_str() {
        "install" => "installed",
        "verify" => "verified",
        _ => "uninstalled",
    };
    let report = json!({"verb": verb, "phase": phase, "version": VERSION, "changed": true, "restarted": true, "handlerSeen": has});
    let (started, ended) = (now(), now());
    let state = json!({"exitCode": 0, "reason": "Completed", "message": report.to_string(), "startedAt": started, "finishedAt": ended});
    let container = json!({"name": "installer", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": {"terminated": state}});
    let status = Patch::Merge(json!({"status": {"phase": "Succeeded", "containerStatuses": [container]}}));
    let handlers: Vec<Value> = ["runc"]
        .into_iter()
        .chain(has.then_some("kata"))
        .map(|name| json!({"name": name}))
        .collect();
    let handlers = Patch::Merge(json!({"status": {"runtimeHandlers": handlers}}));
    let nodes = Api::<Node>::all(client.clone());
    let pods = Api::<Pod>::namespaced(client, NAMESPACE);
    let manager = PatchParams::default();
    drop(
        nodes
            .patch_status(&spec.node_name.unwrap_or_default(), &manager, &handlers)
            .await,
    );
    drop(pods.patch_status(&pod.name_any(), &manager, &status).await);
}

/// Makes `count` objects, some at a time.
fn make<F>(rig: &Rig<'_>, count: usize, what: &str, one: impl Fn(usize) -> F) -> Result
where
    F: Future<Output = kube::Result<()>>,
{
    let all = stream::iter((0..count).map(Ok)).try_for_each_concurrent(AT_ONCE, one);
    let made = rig.ground.runtime.block_on(all);
    made.map_err(|error| Failure::Claim(format!("making {count} {what}: {error}")))
}

/// Workers that are Ready, with as many images as real ones have.
fn nodes(rig: &Rig<'_>, count: usize) -> Result {
    let nodes = Api::<Node>::all(rig.ground.client.clone());
    let images: Vec<Value> = (0..50)
        .map(|image| {
            let name = format!("registry.example.com/some-team/some-application-{image}");
            json!({"names": [format!("{name}@sha256:{image:064x}"), format!("{name}:v1.2.{image}")], "sizeBytes": 123_456_789})
        })
        .collect();
    let status =
        json!({"status": {"nodeInfo": rig::node_info()?, "conditions": [rig::condition(true)], "images": images}});
    make(rig, count, "nodes", |index| {
        let (nodes, status) = (nodes.clone(), Patch::Merge(status.clone()));
        async move {
            let name = format!("worker-{index}");
            let labels = json!({"node-role.kubernetes.io/worker": "", "kubernetes.io/hostname": name});
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
            let node = serde_json::from_value(node).map_err(kube::Error::SerdeError)?;
            nodes.create(&PostParams::default(), &node).await?;
            nodes
                .patch_status(&name, &PatchParams::default(), &status)
                .await
                .map(drop)
        }
    })
}

/// Ordinary pods, as large as real ones.
fn pods(rig: &Rig<'_>, count: usize, on: usize) -> Result {
    let pods = Api::<Pod>::namespaced(rig.ground.client.clone(), "default");
    make(rig, count, "pods", |index| {
        let pods = pods.clone();
        async move {
            let annotations = json!({"kubectl.kubernetes.io/last-applied-configuration": "x".repeat(3000)});
            let pod = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": format!("pod-{index}"), "labels": {"app": "pod"}, "annotations": annotations},
                "spec": {"nodeName": format!("worker-{}", index % on), "containers": [{"name": "c", "image": "image"}]},
            });
            let pod = serde_json::from_value(pod).map_err(kube::Error::SerdeError)?;
            pods.create(&PostParams::default(), &pod).await.map(drop)
        }
    })
}

/// The largest resident size that the controller ever had, in KiB.
fn peak(rig: &mut Rig<'_>) -> Result<u64> {
    let pid = rig.controller()?.pid().unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).trying("looking at the controller")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    peak.ok_or_else(|| Failure::Claim(format!("no peak in {status}")))
}

/// What the controller has done so far: passes, requests, and bytes of their answers.
fn work(rig: &mut Rig<'_>) -> Result<[f64; 3]> {
    let controller = rig.controller()?;
    Ok([
        controller.metric("kata_operator_passes_total")?,
        controller.metric("kata_operator_api_requests_total")?,
        controller.metric("kata_operator_api_received_bytes_total")?,
    ])
}

fn until_ready(rig: &Rig<'_>, count: usize) -> Result {
    let condition = format!("jsonpath={{.status.kataNodes.readyNodeCount}}={count}");
    rig.ground
        .server
        .wait_for(&condition, &[&format!("kataconfig/{NAME}")], LATE)
}

fn rollout(rig: &mut Rig<'_>) -> Result {
    const NODES: usize = 1000;
    nodes(rig, NODES)?;
    let fleet = Fleet::start(rig);
    rig.start_controller(&Settings::default())?;
    rig.controller()?.until_said("leading", SOON)?;
    let start = Instant::now();
    rig.create(NAME, &json!({"rollout": {"maxUnavailable": "5%"}}))?;
    until_ready(rig, NODES)?;
    let (took, [passes, requests, bytes], peak) = (start.elapsed(), work(rig)?, peak(rig)?);
    let most = fleet.most();
    println!(
        "{NODES} nodes in {took:.0?}, {most} at a time: {passes} passes, {requests} requests, {:.0} MB of answers, \
         the controller had {} MiB at most",
        bytes / 1e6,
        peak / 1024
    );
    same("the nodes that were changed at a time", most, 50)?;
    // Four writes and four events for each node, and the looks at the cluster.
    let each = requests / NODES as f64;
    claim(each < 20.0, format!("{each} requests for each node"))?;
    claim(peak < GOAL, format!("the controller had {peak} KiB"))
}

fn large(rig: &mut Rig<'_>) -> Result {
    const NODES: usize = 5000;
    nodes(rig, NODES)?;
    pods(rig, 30 * NODES, NODES)?;
    let _fleet = Fleet::start(rig);
    rig.start_controller(&Settings::default())?;
    rig.create(NAME, &json!({"rollout": {"maxUnavailable": "5%"}}))?;
    until_ready(rig, NODES)?;
    let [passes, requests, bytes] = work(rig)?;
    println!(
        "{NODES} nodes: {passes} passes, {requests} requests, {:.0} MB of answers",
        bytes / 1e6
    );
    let output = rig.kata_pod("one", "worker-7")?;
    same("the kata pod's making", output.code, 0)?;
    rig.delete(NAME)?;
    let blocked = "jsonpath={.status.conditions[0].reason}=BlockedByExistingKataPods";
    let config = format!("kataconfig/{NAME}");
    rig.ground.server.wait_for(blocked, &[&config], LATE)?;
    rig.must(&["delete", "pod", "one", "--grace-period", "0", "--force"], None)?;
    rig.ground.server.wait_for("delete", &[&config], LATE)?;
    let peak = peak(rig)?;
    let [passes, requests, bytes] = work(rig)?;
    println!(
        "and their removal beside {} pods: {passes} passes, {requests} requests, {:.0} MB of answers in all, the \
         controller had {} MiB at most",
        30 * NODES,
        bytes / 1e6,
        peak / 1024
    );
    claim(peak < LIMIT, format!("the controller had {peak} KiB"))
}
