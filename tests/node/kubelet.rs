//! A real kubelet with systemd as its cgroup driver: what it asks for the pods of each class is what a VM gets, and a
//! pod that it has ended harms nobody.

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, claim, contains, same},
    machine::{Kubelet, Machine, ORDINARY},
};

use crate::{
    Story,
    install::{ensure, pods_are_gone},
};

pub const STORIES: &[Story] = &[
    ("a_pod_of_each_class_is_what_the_kubelet_says", pods_of_each_class),
    ("pods_that_have_ended_wait_to_be_removed", pods_that_have_ended),
    ("processors_of_its_own_are_all_that_a_pod_uses", processors_of_its_own),
];

/// What runs until its pod is ended.
const IDLE: &[&str] = &["sleep", "infinity"];

/// The kubelet's classes: the pod's name, what its container has, and systemd's slice of the class.
fn classes() -> [(&'static str, Value, &'static str); 3] {
    let few = json!({ "cpu": "200m", "memory": "128Mi" });
    [
        (
            "guaranteed",
            json!({ "requests": few, "limits": few }),
            "kubepods.slice",
        ),
        (
            "burstable",
            json!({ "requests": { "memory": "256Mi" } }),
            "kubepods-burstable.slice",
        ),
        ("besteffort", json!({}), "kubepods-besteffort.slice"),
    ]
}

/// Their processes are as protected from the host's OOM killer as their containers would be, in the class's slice, and
/// counted; the limits of a container that runs change in the guest and on the host.
fn pods_of_each_class(node: &Machine) -> Result {
    ensure(node)?;
    let kubelet = node.kubelet(&json!({}))?;
    for (name, resources, _) in classes() {
        kubelet.create(name, IDLE, |spec| spec["containers"][0]["resources"] = resources)?;
    }
    for (name, _, slice) in classes() {
        kubelet.wait_for("condition=Ready", name)?;
        let sandbox = kubelet.sandbox(name)?;
        let container = container(node, &sandbox)?;
        let asked = node.crictl(&[
            "inspect",
            "--output",
            "go-template",
            "--template",
            "{{.info.runtimeSpec.process.oomScoreAdj}}",
            &container,
        ])?;
        same(
            &format!("the score of the {name} pod's QEMU and virtiofsd"),
            scores(node, &sandbox)?,
            asked,
        )?;
        let folder = node.run(&format!("cut -d : -f 3 /proc/{}/cgroup", qemu(node, &sandbox)?))?;
        contains("the cgroup of QEMU", &folder, slice)?;
        contains(
            "the cgroup of QEMU",
            &folder,
            &format!("/cri-containerd-{sandbox}.scope"),
        )?;
    }
    counted(&kubelet)?;
    resized(node, &kubelet)?;
    kubelet.delete(&classes().map(|(name, ..)| name))?;
    pods_are_gone(node)
}

/// The kubelet knows what each pod uses.
fn counted(kubelet: &Kubelet<'_>) -> Result {
    kubelet.until("numbers of each pod", || {
        let summary = kubelet.says("stats/summary").map_err(|failure| failure.to_string())?;
        let missing = |name: &&str| {
            let is_its = |pod: &&Value| pod["podRef"]["name"] == **name;
            let pod = summary["pods"].as_array().into_iter().flatten().find(is_its);
            let number = |path: &str| pod.and_then(|pod| pod.pointer(path)?.as_u64()).unwrap_or_default();
            // A guest that has booted uses that much at least.
            number("/memory/workingSetBytes") < 50 << 20 || number("/cpu/usageCoreNanoSeconds") == 0
        };
        match classes().map(|(name, ..)| name).iter().find(|name| missing(name)) {
            Some(name) => Err(format!("none of {name}: {}", summary["pods"])),
            None => Ok(()),
        }
    })
}

/// Limits change without a restart.
fn resized(node: &Machine, kubelet: &Kubelet<'_>) -> Result {
    let sandbox = kubelet.sandbox("guaranteed")?;
    let container = container(node, &sandbox)?;
    let more = json!({ "cpu": "300m", "memory": "192Mi" });
    let patch =
        json!({ "spec": { "containers": [{ "name": "main", "resources": { "requests": more, "limits": more } }] } });
    kubelet.api().kubectl([
        "patch",
        "pod",
        "guaranteed",
        "--subresource",
        "resize",
        "--patch",
        &patch.to_string(),
    ])?;
    kubelet.wait_for(
        "jsonpath={.status.containerStatuses[0].resources.limits.memory}=192Mi",
        "guaranteed",
    )?;
    let inside = node.crictl(&["exec", "--sync", &container, "cat", "/sys/fs/cgroup/memory.max"])?;
    same("the container's memory limit", inside, (192 << 20).to_string())?;
    let inside = node.crictl(&["exec", "--sync", &container, "cat", "/sys/fs/cgroup/cpu.max"])?;
    same("the container's processor limit", inside.as_str(), "30000 100000")?;
    let slice = format!(
        "/sys/fs/cgroup$(cut -d : -f 3 /proc/{}/cgroup)/..",
        qemu(node, &sandbox)?
    );
    // The container's and the overhead of the runtime class.
    let limit = ((192_u64 + 350) << 20).to_string();
    same(
        "the pod's memory limit",
        node.run(&format!("cat {slice}/memory.max"))?,
        limit,
    )?;
    let restarts = &kubelet.pod("guaranteed")?["status"]["containerStatuses"][0]["restartCount"];
    same("restarts", restarts, &json!(0))
}

/// The kubelet stops the sandbox of a pod whose containers have ended, and removes its cgroup; the shim answers for it
/// until the pod is deleted. A pod that takes too much is evicted.
fn pods_that_have_ended(node: &Machine) -> Result {
    ensure(node)?;
    let kubelet = node.kubelet(&json!({}))?;
    kubelet.create("brief", &["sh", "-c", "echo ended; exit 3"], |spec| {
        spec["restartPolicy"] = "Never".into();
    })?;
    kubelet.create(
        "greedy",
        &["sh", "-c", "head -c 8000000 /dev/zero >/scratch/file; sleep infinity"],
        |spec| {
            spec["volumes"] = json!([{ "name": "scratch", "emptyDir": { "sizeLimit": "1Mi" } }]);
            spec["containers"][0]["volumeMounts"] = json!([{ "name": "scratch", "mountPath": "/scratch" }]);
        },
    )?;
    kubelet.wait_for("jsonpath={.status.phase}=Failed", "brief")?;
    let pod = kubelet.pod("brief")?;
    let status = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    same("the exit code", &status["exitCode"], &json!(3))?;
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().replace('-', "_");
    node.until(
        "the removal of the pod's cgroup",
        &format!("[ ! -e /sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice ]"),
        ORDINARY,
    )?;
    let sandbox = kubelet.sandbox("brief")?;
    node.run(&format!(
        "pgrep -f 'containerd-shim-kata-v2 .*{sandbox}' && ! pgrep -f 'qemu.*{sandbox}'"
    ))?;
    contains(
        "the container's log",
        &node.crictl(&["logs", &container(node, &sandbox)?])?,
        "ended",
    )?;

    kubelet.wait_for("jsonpath={.status.reason}=Evicted", "greedy")?;
    kubelet.delete(&["brief", "greedy"])?;
    pods_are_gone(node)?;
    let journal = node.run("journalctl --no-pager --output cat --unit containerd")?;
    claim(
        !journal.contains("cleaning up after shim disconnected") && !journal.contains("shim disconnected"),
        "containerd lost a shim",
    )
}

/// The static CPU manager: a container with a processor of its own has it alone, the others have the rest.
fn processors_of_its_own(node: &Machine) -> Result {
    ensure(node)?;
    let kubelet = node.kubelet(&json!({
        "cpuManagerPolicy": "static",
        "cpuManagerReconcilePeriod": "5s",
        "reservedSystemCPUs": "0",
    }))?;
    kubelet.create("shared", IDLE, |_| ())?;
    kubelet.wait_for("condition=Ready", "shared")?;
    let shared = kubelet.sandbox("shared")?;
    same("processors of a pod before", processors(node, &shared)?.as_str(), "0-1")?;
    kubelet.create("alone", IDLE, |spec| {
        let one = json!({ "cpu": "1", "memory": "128Mi" });
        spec["containers"][0]["resources"] = json!({ "requests": one, "limits": one });
    })?;
    kubelet.wait_for("condition=Ready", "alone")?;
    let alone = kubelet.sandbox("alone")?;
    same("the processor of its own", processors(node, &alone)?.as_str(), "1")?;
    let now = |list: &'static str| {
        kubelet.until("the processors that are left", || match processors(node, &shared) {
            Ok(now) if now == list => Ok(()),
            Ok(now) => Err(now),
            Err(failure) => Err(failure.to_string()),
        })
    };
    now("0")?;
    kubelet.delete(&["alone"])?;
    now("0-1")?;
    kubelet.delete(&["shared"])?;
    pods_are_gone(node)
}

/// The one container of a sandbox, running or not.
fn container(node: &Machine, sandbox: &str) -> Result<String> {
    node.crictl(&["ps", "--all", "--quiet", "--no-trunc", "--pod", sandbox])
}

fn qemu(node: &Machine, sandbox: &str) -> Result<String> {
    let found = node.run(&format!("pgrep -f '/qemu-system-x86_64 .*{sandbox}'"))?;
    match found.lines().collect::<Vec<_>>()[..] {
        [pid] => Ok(pid.to_owned()),
        _ => Err(Failure::Claim(format!("QEMUs of {sandbox}: {found:?}"))),
    }
}

/// The different values of `oom_score_adj` of all processes that a pod's VM is made of.
fn scores(node: &Machine, sandbox: &str) -> Result<String> {
    node.run(&format!(
        "for pid in $(pgrep -f '/(qemu-system-x86_64|virtiofsd) .*{sandbox}'); do cat /proc/$pid/oom_score_adj; done | sort -u"
    ))
}

/// The processors that a pod's processes may run on.
fn processors(node: &Machine, sandbox: &str) -> Result<String> {
    node.run(&format!(
        "for pid in $(pgrep -f {sandbox}); do grep -h Cpus_allowed_list /proc/$pid/task/*/status; done | cut -f 2 | sort -u"
    ))
}
