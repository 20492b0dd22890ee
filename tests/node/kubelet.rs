//! A real kubelet with systemd as its cgroup driver: what it asks for the pods of each class is what a VM gets, and a
//! pod that it has ended harms nobody.

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, contains, same},
    machine::{Kubelet, Machine, ORDINARY, OVERHEAD_MIB},
};

use crate::{
    Story,
    install::{ensure, pods_are_gone},
    pods::said_of,
};

pub const STORIES: &[Story] = &[("pods_are_what_their_kubelet_asks_for", pods_of_a_kubelet)];

/// What runs until its pod is ended.
const IDLE: &[&str] = &["sleep", "infinity"];

/// All that a pod runs on its node.
const PROGRAMS: &str = "containerd-shim-kata-v2|qemu-system-x86_64|virtiofsd";

/// Has a processor of its own.
const GUARANTEED: &str = "guaranteed";
const BURSTABLE: &str = "burstable";
/// Writes more than its volume may hold as soon as it is told to.
const BEST_EFFORT: &str = "besteffort";
/// Ends by itself.
const BRIEF: &str = "brief";

/// The pods that stay, and systemd's slice of the kubelet's class.
const CLASSES: &[(&str, &str)] = &[
    (GUARANTEED, "kubepods.slice"),
    (BURSTABLE, "kubepods-burstable.slice"),
    (BEST_EFFORT, "kubepods-besteffort.slice"),
];

fn pods_of_a_kubelet(node: &Machine) -> Result {
    ensure(node)?;
    let kubelet = node.kubelet(&json!({
        "cpuManagerPolicy": "static",
        "cpuManagerReconcilePeriod": "5s",
        "reservedSystemCPUs": "0",
    }))?;
    create(&kubelet)?;
    for (name, slice) in CLASSES {
        protected(node, &kubelet, name, slice)?;
    }
    counted(&kubelet)?;
    resized(node, &kubelet)?;
    ended(node, &kubelet)?;
    let sandboxes = [GUARANTEED, BURSTABLE, BEST_EFFORT, BRIEF].map(|name| kubelet.sandbox(name));
    let sandboxes = sandboxes.into_iter().collect::<Result<Vec<_>>>()?;
    evicted(node, &kubelet)?;
    processors_of_its_own(node, &kubelet)?;
    kubelet.delete(&[BURSTABLE, BEST_EFFORT, BRIEF])?;
    pods_are_gone(node)?;
    // A shim that is killed does not get to say so. "shim disconnected" is what containerd says of each that ends.
    for sandbox in &sandboxes {
        let last = "the virtual machine has ended";
        contains(&format!("the log of {sandbox}"), &said_of(node, sandbox, last)?, last)?;
    }
    Ok(())
}

fn create(kubelet: &Kubelet<'_>) -> Result {
    kubelet.create(GUARANTEED, IDLE, |spec| {
        let one = json!({ "cpu": "1", "memory": "128Mi" });
        spec["containers"][0]["resources"] = json!({ "requests": one, "limits": one });
    })?;
    kubelet.create(BURSTABLE, IDLE, |spec| {
        spec["containers"][0]["resources"] =
            json!({ "requests": { "memory": "96Mi" }, "limits": { "memory": "128Mi" } });
    })?;
    let greedy = "until [ -e /scratch/go ]; do sleep 1; done; head -c 8000000 /dev/zero >/scratch/file; sleep infinity";
    kubelet.create(BEST_EFFORT, &["sh", "-c", greedy], |spec| {
        spec["volumes"] = json!([{ "name": "scratch", "emptyDir": { "sizeLimit": "1Mi" } }]);
        spec["containers"][0]["volumeMounts"] = json!([{ "name": "scratch", "mountPath": "/scratch" }]);
    })?;
    kubelet.create(BRIEF, &["sh", "-c", "echo ended; exit 3"], |spec| {
        spec["restartPolicy"] = "Never".into();
    })
}

/// The processes of a pod are as protected from the host's OOM killer as its container would be, in the scope of the
/// pod in the class's slice.
fn protected(node: &Machine, kubelet: &Kubelet<'_>, name: &str, slice: &str) -> Result {
    kubelet.wait_for("condition=Ready", name)?;
    let sandbox = kubelet.sandbox(name)?;
    let asked = "{{.info.runtimeSpec.process.oomScoreAdj}}";
    let asked = node.inspect("inspect", &container(node, &sandbox)?, asked)?;
    let scores = scores(node, &sandbox)?;
    same(&format!("the score of {name}'s QEMU and virtiofsd"), scores, asked)?;
    let folder = node.run(&format!("cut -d : -f 3 /proc/{}/cgroup", qemu(node, &sandbox)?))?;
    contains("the cgroup of QEMU", &folder, slice)?;
    contains(
        "the cgroup of QEMU",
        &folder,
        &format!("/cri-containerd-{sandbox}.scope"),
    )
}

/// The kubelet knows what each pod uses.
fn counted(kubelet: &Kubelet<'_>) -> Result {
    kubelet.until("numbers of each pod", || {
        let summary = kubelet.says("stats/summary").map_err(|failure| failure.to_string())?;
        let missing = |name: &str| {
            let is_its = |pod: &&Value| pod["podRef"]["name"] == *name;
            let pod = summary["pods"].as_array().into_iter().flatten().find(is_its);
            let number = |path: &str| pod.and_then(|pod| pod.pointer(path)?.as_u64()).unwrap_or_default();
            // A guest that has booted uses that much at least.
            number("/memory/workingSetBytes") < 50 << 20 || number("/cpu/usageCoreNanoSeconds") == 0
        };
        match CLASSES.iter().find(|(name, _)| missing(name)) {
            Some((name, _)) => Err(format!("none of {name}: {}", summary["pods"])),
            None => Ok(()),
        }
    })
}

/// Limits change without a restart, in the guest and of the pod's slice.
fn resized(node: &Machine, kubelet: &Kubelet<'_>) -> Result {
    let sandbox = kubelet.sandbox(BURSTABLE)?;
    let resources = json!({ "requests": { "memory": "96Mi" }, "limits": { "memory": "192Mi" } });
    let patch = json!({ "spec": { "containers": [{ "name": "main", "resources": resources }] } }).to_string();
    let words = ["patch", "pod", BURSTABLE, "--subresource", "resize", "--patch", &patch];
    kubelet.api().kubectl(words)?;
    let told = "jsonpath={.status.containerStatuses[0].resources.limits.memory}=192Mi";
    kubelet.wait_for(told, BURSTABLE)?;
    let container = container(node, &sandbox)?;
    let inside = node.crictl(&["exec", "--sync", &container, "cat", "/sys/fs/cgroup/memory.max"])?;
    same("the container's limit", inside, (192 << 20).to_string())?;
    let scope = node.run(&format!("cut -d : -f 3 /proc/{}/cgroup", qemu(node, &sandbox)?))?;
    let outside = node.run(&format!("cat /sys/fs/cgroup{scope}/../memory.max"))?;
    // The container's, and the overhead of the runtime class.
    same("the pod's limit", outside, ((192 + OVERHEAD_MIB) << 20).to_string())?;
    let restarts = &kubelet.pod(BURSTABLE)?["status"]["containerStatuses"][0]["restartCount"];
    same("restarts", restarts, &json!(0))
}

/// The kubelet stops the sandbox of a pod whose containers have ended, and removes its cgroup, long before the pod is
/// deleted. containerd ends a shim that has nothing left to do.
fn ended(node: &Machine, kubelet: &Kubelet<'_>) -> Result {
    kubelet.wait_for("jsonpath={.status.phase}=Failed", BRIEF)?;
    let pod = kubelet.pod(BRIEF)?;
    let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    same("the exit code", &state["exitCode"], &json!(3))?;
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().replace('-', "_");
    node.until(
        "the removal of the pod's cgroup",
        &format!("[ ! -e /sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice ]"),
        ORDINARY,
    )?;
    let sandbox = kubelet.sandbox(BRIEF)?;
    let none = format!("! {}", pids(PROGRAMS, &sandbox));
    node.until("the end of the pod's processes", &none, ORDINARY)?;
    let log = node.crictl(&["logs", &container(node, &sandbox)?])?;
    contains("the container's log", &log, "ended")
}

fn evicted(node: &Machine, kubelet: &Kubelet<'_>) -> Result {
    let container = container(node, &kubelet.sandbox(BEST_EFFORT)?)?;
    node.crictl(&["exec", "--sync", &container, "touch", "/scratch/go"])?;
    kubelet.wait_for("jsonpath={.status.reason}=Evicted", BEST_EFFORT)
}

/// The static CPU manager: who has a processor alone uses no other, and the others have the rest, as long as it is so.
fn processors_of_its_own(node: &Machine, kubelet: &Kubelet<'_>) -> Result {
    let (alone, shared) = (kubelet.sandbox(GUARANTEED)?, kubelet.sandbox(BURSTABLE)?);
    let comes_to_be = |sandbox: &str, list: &str| {
        kubelet.until("the processors of a pod", || match processors(node, sandbox) {
            Ok(now) if now == list => Ok(()),
            Ok(now) => Err(now),
            Err(failure) => Err(failure.to_string()),
        })
    };
    same("the processor of its own", processors(node, &alone)?.as_str(), "1")?;
    comes_to_be(&shared, "0")?;
    kubelet.delete(&[GUARANTEED])?;
    comes_to_be(&shared, "0-1")
}

/// The one container of a sandbox, running or not.
fn container(node: &Machine, sandbox: &str) -> Result<String> {
    node.crictl(&["ps", "--all", "--quiet", "--no-trunc", "--pod", sandbox])
}

/// The shell's words for the processes of a sandbox that run these programs. The shell itself is none of them.
fn pids(programs: &str, sandbox: &str) -> String {
    format!("pgrep -f '[/]({programs}) .*{sandbox}'")
}

fn qemu(node: &Machine, sandbox: &str) -> Result<String> {
    let found = node.run(&pids("qemu-system-x86_64", sandbox))?;
    match found.lines().collect::<Vec<_>>()[..] {
        [pid] => Ok(pid.to_owned()),
        _ => Err(Failure::Claim(format!("QEMUs of {sandbox}: {found:?}"))),
    }
}

/// The different values of `oom_score_adj` of all processes that a pod's VM is made of.
fn scores(node: &Machine, sandbox: &str) -> Result<String> {
    let pids = pids("qemu-system-x86_64|virtiofsd", sandbox);
    node.run(&format!(
        "for pid in $({pids}); do cat /proc/$pid/oom_score_adj; done | sort -u"
    ))
}

/// The processors that a pod's processes may run on.
fn processors(node: &Machine, sandbox: &str) -> Result<String> {
    let pids = pids(PROGRAMS, sandbox);
    node.run(&format!(
        "for pid in $({pids}); do grep -h Cpus_allowed_list /proc/$pid/task/*/status; done | cut -f 2 | sort -u"
    ))
}
