//! What an administrator of a cluster is told: by a monitor on each node, and in a report of everything.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::Path,
    process::Command,
    time::Duration,
};

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tests::{
    cluster::{NODE, operator::NAMESPACE},
    failure::{Failure, Result, Trying, claim, contains, same},
    places,
    run::{Output, succeed},
};

use crate::{
    ground::{Ground, Story},
    real::hello,
};

pub const STORIES: &[Story] = &[(
    "a_monitor_on_the_node_and_a_report_of_the_cluster",
    a_monitor_on_the_node_and_a_report_of_the_cluster,
)];

/// How long a monitor's pod may take to be ready, and a report to be made.
const SOON: Duration = Duration::from_secs(120);

/// Where the monitor listens.
const PORT: u16 = 8090;

/// What nobody but its owner is to read.
const SECRET: &str = "hunter2";

/// The monitor's pod comes to the node that has kata and sees its sandboxes, with few rights; and what is gathered has
/// its word, and no secret.
fn a_monitor_on_the_node_and_a_report_of_the_cluster(ground: &Ground) -> Result {
    let api = ground.api();
    let word = json!({ "word": SECRET });
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "kept" }, "stringData": word });
    api.apply(&secret.to_string())?;
    api.kubectl(["annotate", "node", NODE, &format!("example.com/word={SECRET}")])?;
    let mut server = hello();
    server["env"] = json!([{ "name": "WORD", "value": SECRET }]);
    ground.run(
        "watched",
        json!({ "terminationGracePeriodSeconds": 1, "containers": [server] }),
    )?;

    let before = gather(ground)?;
    let of_node = format!("nodes/{NODE}");
    contains(
        "a node without a monitor",
        file(&before, &format!("{of_node}.txt"))?,
        "Run `/opt/sandpod/current/bin/kata-ctl gather` there as root",
    )?;
    has_everything(&before)?;

    let manifest = places::workspace().join("deploy/monitoring/daemonset.yaml");
    let manifest = manifest.display().to_string();
    api.kubectl(["apply", "--filename", &manifest])?;
    is_scraped(ground)?;
    let after = gather(ground)?;
    has_everything(&after)?;
    for (name, part) in [
        ("top.txt", "default/watched"),
        ("env.toml", "[host]"),
        ("list.txt", "running"),
    ] {
        contains(name, file(&after, &format!("{of_node}/kata-gather/{name}"))?, part)?;
    }
    api.kubectl([
        "delete",
        "--filename",
        &manifest,
        "--cascade=foreground",
        "--timeout=60s",
    ])?;
    api.kubectl(["annotate", "node", NODE, "example.com/word-"])?;
    ground.remove(&["pod/watched", "secret/kept"])
}

/// The monitor tells of the pod, to Prometheus and to people; it has no rights at the API server.
fn is_scraped(ground: &Ground) -> Result {
    let ready = ["rollout", "status", "daemonset/sandpod-monitor", "--timeout=100s"];
    let words = ["--namespace", NAMESPACE].into_iter().chain(ready);
    let rolled = succeed(&mut ground.api().kubectl_command(words)?, SOON);
    ground.cluster.explained(rolled)?;
    let selector = "app.kubernetes.io/component=monitor";
    let pods = ground
        .api()
        .json(["get", "pods", "--namespace", NAMESPACE, "--selector", selector])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    same("the monitors", pods.len(), 1)?;
    same("the monitor's node", &pods[0]["spec"]["nodeName"], NODE)?;
    let ip = pods[0]["status"]["podIP"].as_str().unwrap_or_default();
    let get = |target: &str| ground.node().get(ip, PORT, target);

    let metrics = get("/metrics")?;
    let shims = metrics
        .lines()
        .find_map(|line| line.strip_prefix("kata_monitor_running_shim_count "));
    let shims = shims.and_then(|count| count.parse::<u32>().ok());
    claim(shims > Some(0), format!("running shims: {shims:?}"))?;
    let of_pod = |name: &str| {
        let mut lines = metrics.lines().filter(|line| line.starts_with(name));
        lines.any(|line| line.contains("cri_namespace=\"default\",cri_name=\"watched\""))
    };
    for name in ["kata_guest_meminfo", "kata_hypervisor_threads", "kata_virtiofsd_fds"] {
        claim(of_pod(name), format!("{name} of the pod is not told"))?;
    }

    let report: Value = serde_json::from_str(&get("/sandboxes.json")?).map_err(|source| Failure::Json {
        what: "/sandboxes.json".into(),
        source,
    })?;
    same("the node", &report["node"], NODE)?;
    let mut sandboxes = report["sandboxes"].as_array().into_iter().flatten();
    let watched = sandboxes.find(|sandbox| sandbox["pod"]["name"] == "watched");
    let watched = watched.ok_or_else(|| Failure::Claim(format!("the pod is not in {report}")))?;
    for part in ["guest", "qemu", "virtiofsd", "shim"] {
        claim(
            watched["memory"][part].as_u64() > Some(1 << 20),
            format!("{part} of {watched}"),
        )?;
    }
    contains("the page", &get("/")?, "default/watched")
}

/// The files of a report by their names; those of a node's own archive are below `nodes/<node>`.
type Files = BTreeMap<String, String>;

fn file<'a>(files: &'a Files, name: &str) -> Result<&'a str> {
    let known = || files.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
    let text = files.get(name).map(String::as_str);
    text.ok_or_else(|| Failure::Claim(format!("{name} is not among {}", known())))
}

/// Runs the script, which a shell without any extensions understands.
fn gather(ground: &Ground) -> Result<Files> {
    let folder = tempfile::tempdir().trying("making a folder for a report")?;
    let report = folder.path().join("report");
    let mut command = Command::new("sh");
    command
        .arg(places::workspace().join("deploy/must-gather.sh"))
        .arg(&report);
    command.env("KUBECTL", places::peers()?.join("kubectl"));
    command
        .env("KUBECONFIG", ground.api().kubeconfig())
        .env("HOME", folder.path());
    let output: Output = succeed(&mut command, SOON)?;
    let archive = report.with_extension("tar.gz");
    same("what it prints", output.text(), archive.display().to_string())?;
    let mut files = Files::new();
    unpack(&archive, "", &mut files)?;
    // Somebody may not want to send the folder.
    let listed = fs::read_dir(&report).trying("reading the report's folder")?.count();
    claim(listed > 5, format!("{listed} entries in the folder"))?;
    Ok(files)
}

fn unpack(archive: &Path, place: &str, files: &mut Files) -> Result {
    let reader = File::open(archive).trying("opening a report")?;
    let mut inner = Vec::new();
    for entry in tar::Archive::new(GzDecoder::new(reader))
        .entries()
        .trying("reading a report")?
    {
        let mut entry = entry.trying("reading a report")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().trying("reading a report")?.display().to_string();
        let name = format!("{place}{}", path.strip_prefix("report/").unwrap_or(&path));
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).trying("reading a report")?;
        match name.strip_suffix(".tar.gz") {
            Some(node) => inner.push((format!("{node}/"), bytes)),
            None => drop(files.insert(name, String::from_utf8_lossy(&bytes).into_owned())),
        }
    }
    for (place, bytes) in inner {
        let file = tempfile::NamedTempFile::new().trying("keeping a node's archive")?;
        fs::write(file.path(), bytes).trying("keeping a node's archive")?;
        unpack(file.path(), &place, files)?;
    }
    Ok(())
}

fn has_everything(files: &Files) -> Result {
    for (name, part) in [
        ("versions.yaml", "gitVersion: v1.36.3"),
        ("kataconfigs.yaml", "name: cluster-kataconfig"),
        ("runtimeclasses.yaml", "handler: kata"),
        ("nodes.txt", "worker-0 label katacontainers.io/kata-runtime=true"),
        ("nodes.txt", "worker-0 annotation sandpod.io/installed-version="),
        ("nodes.txt", "worker-0 condition Ready=True"),
        ("pods.txt", "default/watched class kata on worker-0: Running"),
        ("operator/objects.yaml", "image: sandpod.io/operator:"),
        ("operator/lease.yaml", "holderIdentity:"),
        ("events-of-nodes.txt", NODE),
        ("operator/events.txt", "sandpod-operator"),
    ] {
        contains(name, file(files, name)?, part)?;
    }
    let of_controller = |ending: &str, part: &str| {
        let mut all = files
            .iter()
            .filter(|(name, _)| name.starts_with("operator/sandpod-operator-"));
        let found = all.find(|(name, _)| name.ends_with(ending));
        let text = found.map_or("", |(_, text)| text.as_str());
        contains(&format!("the controller's{ending}"), text, part)
    };
    of_controller(".log", NODE)?;
    of_controller(".metrics", "kata_operator_leader 1")?;
    let failed: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".errors")).collect();
    same("complaints", failed, Vec::<(&String, &String)>::new())?;
    let told: Vec<_> = files.iter().filter(|(_, text)| text.contains(SECRET)).collect();
    same("files with a secret", told, Vec::<(&String, &String)>::new())
}
