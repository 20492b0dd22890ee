//! The life of Sandpod on a real node: from `kubectl apply` over an upgrade to its removal.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tests::{
    cluster::{
        Cluster, NODE,
        operator::{CONTROLLER, INSTALLING, KATA_CONFIG_NAME, NAMESPACE},
    },
    failure::{Failure, Result, Trying, claim, contains, same},
    images::{GREETING, HELLO_PORT},
    installer::other_payload,
    places,
    run::succeed,
};

use crate::{
    ground::{Neighbour, READY, container, manifest},
    real::hello,
};

/// A story and its name.
type Story = (&'static str, fn() -> Result);

pub const STORIES: &[Story] = &[("from_apply_to_removal", from_apply_to_removal)];

/// How long the first pod may take from the creation of the KataConfig on, with the images there.
const FIRST_POD: Duration = Duration::from_secs(60);

/// What the condition says while pods are in the way of a removal, word for word as in the guide.
const BLOCKED: &str = "Existing pods using \"kata\" RuntimeClass found. Please delete the pods manually for KataConfig deletion to proceed";

/// The annotation with the version that a node has.
const INSTALLED: &str = "sandpod.io/installed-version";

/// One manifest, one KataConfig, and pods run; a new version while they run; and the node as before.
fn from_apply_to_removal() -> Result {
    let cluster = Cluster::start()?;
    let neighbour = Neighbour::settle(&cluster)?;
    cluster.prepare()?;
    cluster.install_operator()?;
    let before = (cluster.node().tree()?, containerd(&cluster)?);
    let start = Instant::now();
    cluster.create_kata_config()?;
    let class = start.elapsed();
    run_hello(&cluster, "first")?;
    let first = start.elapsed();
    println!("from `kubectl create` to the RuntimeClass {class:.1?}, to the first pod that is ready {first:.1?}");
    claim(first < FIRST_POD, format!("the first pod was ready after {first:?}"))?;
    cluster.await_kata()?;
    let shown = cluster.watched()?;
    contains("the guide's command", &shown, "Ready Node Count:  1")?;
    contains("the guide's command", &shown, &format!("Installed:\n      {NODE}"))?;
    neighbour.is_untouched(&cluster)?;
    upgrade(&cluster)?;
    neighbour.is_untouched(&cluster)?;
    remove(&cluster)?;
    neighbour.is_untouched(&cluster)?;
    cluster.node().tree()?.same_as(&before.0)?;
    same("containerd's configuration", containerd(&cluster)?, before.1)
}

/// Runs the guide's hello pod and asks it.
pub fn run_hello(cluster: &Cluster, name: &str) -> Result {
    let specification =
        json!({ "runtimeClassName": "kata", "terminationGracePeriodSeconds": 1, "containers": [hello()] });
    let pod = format!("pod/{name}");
    cluster.api().create(&manifest(name, specification))?;
    cluster.explained(cluster.api().wait_for("condition=Ready", &[&pod], READY))?;
    answers(cluster, name)
}

fn answers(cluster: &Cluster, name: &str) -> Result {
    let pod = cluster.api().json(["get", "pod", name])?;
    let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
    same("the page", cluster.node().get(ip, HELLO_PORT, "/")?.as_str(), GREETING)
}

/// A new version of the operator installs its own version; a running pod keeps the one that it was started with.
fn upgrade(cluster: &Cluster) -> Result {
    let (api, old) = (cluster.api(), installed(cluster)?);
    let folder = tempfile::tempdir().trying("making a folder for newer images")?;
    let new = newer_images(folder.path())?;
    claim(old != new, format!("the newer images install {old} too"))?;
    let before = container(api, "first")?;
    cluster.load_operator_images(folder.path())?;
    api.kubectl(["--namespace", NAMESPACE, "rollout", "restart", CONTROLLER])?;
    cluster.explained(cluster.await_controller())?;
    let name = format!("node/{NODE}");
    let condition = format!(
        "jsonpath={{.metadata.annotations.{}}}={new}",
        INSTALLED.replace('.', "\\.")
    );
    cluster.explained(api.wait_for(&condition, &[&name], INSTALLING))?;
    cluster.await_kata()?;
    same("the running pod's container", container(api, "first")?, before)?;
    answers(cluster, "first")?;
    run_hello(cluster, "second")?;
    for (pod, version) in [("first", old), ("second", new)] {
        contains(&format!("the shim of the {pod} pod"), &shim(cluster, pod)?, &version)?;
    }
    Ok(())
}

/// The version that the node has.
fn installed(cluster: &Cluster) -> Result<String> {
    let node = cluster.api().json(["get", "node", NODE])?;
    Ok(node["metadata"]["annotations"][INSTALLED]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// The program of a pod's shim.
fn shim(cluster: &Cluster, pod: &str) -> Result<String> {
    let label = format!("io.kubernetes.pod.name={pod}");
    let sandbox = cluster.node().crictl(["pods", "--quiet", "--label", &label])?.text();
    let processes = cluster.node().processes_of(&sandbox);
    let shim = processes
        .iter()
        .find(|process| process.program().starts_with("containerd-shim-kata"));
    let pid = shim.map_or(0, |process| process.pid);
    let program = fs::read_link(format!("/proc/{pid}/exe")).trying(format!("looking for the shim of {pod}"))?;
    Ok(program.display().to_string())
}

/// Makes container images in `folder` as another version has them, and returns the version that they install: one
/// without a text that nothing reads.
pub(crate) fn newer_images(folder: &Path) -> Result<String> {
    let (payload, version) = (folder.join("payload"), env!("CARGO_PKG_VERSION"));
    other_payload(&payload, version, |path| path != "share/doc/debian-packages")?;
    let mut script = Command::new(places::workspace().join("deploy/images.sh"));
    succeed(script.arg(places::binaries()?).arg(&payload).arg(folder), INSTALLING)?;
    let manifest = fs::read(payload.join("MANIFEST")).trying("reading the newer payload's manifest")?;
    let digest = Sha256::digest(&manifest);
    let digest: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{version}-{digest}"))
}

/// The deletion of the KataConfig waits for the pods, lets no new ones in, and then takes everything away.
fn remove(cluster: &Cluster) -> Result {
    let api = cluster.api();
    api.kubectl(["delete", KATA_CONFIG_NAME, "--wait=false"])?;
    let blocked = "jsonpath={.status.conditions[?(@.type==\"InProgress\")].reason}=BlockedByExistingKataPods";
    cluster.explained(api.wait_for(blocked, &[KATA_CONFIG_NAME], INSTALLING))?;
    let status = api.json(["get", KATA_CONFIG_NAME])?;
    let condition = &status["status"]["conditions"][0];
    same("the condition", &condition["status"], "False")?;
    contains(
        "its message",
        condition["message"].as_str().unwrap_or_default(),
        BLOCKED,
    )?;
    claim(
        run_hello(cluster, "late").is_err(),
        "a pod was let in while kata was being removed",
    )?;
    answers(cluster, "first")?;
    let start = Instant::now();
    api.kubectl(["delete", "pod", "first", "second"])?;
    cluster.explained(api.wait_for("delete", &[KATA_CONFIG_NAME], INSTALLING))?;
    println!(
        "from the end of the last pod to the end of kata {:.1?}",
        start.elapsed()
    );
    let classes = api.json(["get", "runtimeclasses"])?;
    same("the RuntimeClasses", &classes["items"], &json!([]))?;
    let node = api.json(["get", "node", NODE])?;
    let ours = |key: &&String| key.contains("kata") || key.contains("sandpod");
    let left: Vec<_> = ["labels", "annotations"]
        .iter()
        .filter_map(|kind| node["metadata"][kind].as_object())
        .flat_map(|map| map.keys().filter(ours))
        .collect();
    same("the node's labels and annotations of ours", left, Vec::<&String>::new())
}

/// What containerd makes of its configuration.
fn containerd(cluster: &Cluster) -> Result<String> {
    let info = cluster.node().crictl(["info"])?.text();
    let info: Value = serde_json::from_str(&info).map_err(|source| Failure::Json {
        what: "crictl info".into(),
        source,
    })?;
    Ok(json!([info["config"], info["runtimeHandlers"]]).to_string())
}
