//! Pods on a node with KVM and systemd.

use serde_json::json;
use tests::{
    failure::{Failure, Result, claim, same},
    machine::{Container, Machine, ORDINARY, Pod},
};

use crate::{
    Story,
    install::{HANDLER, SETTINGS, configure, ensure, pods_are_gone},
};

pub const STORIES: &[Story] = &[
    (
        "processors_and_memory_come_and_go_with_a_container",
        processors_and_memory_come_and_go_with_a_container,
    ),
    (
        "more_processors_than_there_are_is_said_once",
        more_processors_than_there_are_is_said_once,
    ),
    (
        "a_pod_has_a_name_and_one_line_on_what_its_containers_lack",
        name_and_lack,
    ),
    (
        "a_configmap_is_followed_where_nobody_may_watch_more",
        a_configmap_is_followed_where_nobody_may_watch_more,
    ),
];

/// Where the kubelet of a pod's node puts a ConfigMap.
const CONFIG: &str = "/var/lib/kubelet/pods/watched/volumes/kubernetes.io~configmap/config";

/// A guest whose kernel knows one processor, and what chooses it.
const ONE: &str = "/var/lib/one-processor";

/// What the guest's kernel may keep of memory that came and went (a block of virtio-mem, and pages that describe it),
/// in KiB.
const KEPT: u64 = 16 << 10;

/// A container's limits are plugged into the VM before it starts, and what was plugged is the node's again when it has
/// gone; emulated guests keep processors. More processors than the node has cannot be had, which one line says.
fn processors_and_memory_come_and_go_with_a_container(node: &Machine) -> Result {
    ensure(node)?;
    let pod = node.pod(HANDLER, "sizes").run()?;
    let idle = ["sleep", "infinity"];
    let small = pod.container("small", &idle)?;
    let before = size(&small)?;
    same("processors before", before.0, 1)?;
    let large = pod.container_with("large", &idle, |container| {
        container["linux"]["resources"] =
            json!({ "cpu_period": 100_000, "cpu_quota": 96 * 100_000, "memory_limit_in_bytes": 512_u64 << 20 });
    })?;
    let grown = size(&large)?;
    same("processors with the large container", grown.0, 2)?;
    are_said_once(node, &pod, 2)?;
    claim(
        grown.1 >= before.1 + (500 << 10),
        format!("{} KiB before the large container, {} KiB with it", before.1, grown.1),
    )?;
    node.crictl(&["rm", "--force", large.id()])?;
    let shrunk = format!(
        "crictl exec --sync {} sh -c 'nproc; grep MemTotal /proc/meminfo' | \
         awk '/^[0-9]/ {{ n = $1 }} /MemTotal/ {{ m = $2 }} {{ print }} END {{ exit !(n == 1 && m <= {}) }}'",
        small.id(),
        before.1 + KEPT
    );
    node.until("the machine as small as before", &shrunk, ORDINARY)?;
    let id = pod.id().to_owned();
    pod.remove()?;
    pods_are_gone(node)?;
    // A size that its end takes back is no trouble.
    let warned = said_of(node, &id, " WARN ")?;
    let warnings: Vec<_> = warned
        .lines()
        .filter(|line| !line.contains("more than the VM may have"))
        .collect();
    claim(warnings.is_empty(), format!("the pod's warnings: {warnings:?}"))
}

/// Processors and KiB of memory that a container sees.
fn size(container: &Container<'_>) -> Result<(u64, u64)> {
    let said = container.shell("nproc; grep MemTotal /proc/meminfo")?;
    let numbers: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match numbers[..] {
        [processors, kib] => Ok((processors, kib)),
        _ => Err(Failure::Claim(format!("{said:?} is not processors and memory"))),
    }
}

/// The part of a pod's identifier by which its shim's log and a pod without a name call it.
fn short(pod: &str) -> Result<&str> {
    pod.get(..13)
        .ok_or_else(|| Failure::Claim(format!("{pod:?} is no pod's identifier")))
}

/// What the pod of an identifier has said in the node's journal about something.
pub fn said_of(node: &Machine, pod: &str, text: &str) -> Result<String> {
    let short = short(pod)?;
    node.run(&format!(
        "journalctl --no-pager --output cat --unit containerd | grep -F 'kata[{short}]' | grep -F '{text}' || true"
    ))
}

/// Containers with limits of 96 processors run in a guest whose kernel knows one, and one line says so.
fn more_processors_than_there_are_is_said_once(node: &Machine) -> Result {
    ensure(node)?;
    // As if the kernel had been built for one.
    node.run(&format!(
        "set -e; mkdir {ONE}; cd /opt/sandpod/current
         ln -s $PWD/vmlinux {ONE}; sed 's/\"cpus\": [0-9]*/\"cpus\": 1/' manifest.json >{ONE}/manifest.json"
    ))?;
    configure(node, &format!("kernel = \"{ONE}/vmlinux\""))?;
    let pod = node.pod(HANDLER, "one").run()?;
    for name in ["one", "two"] {
        let container = pod.container_with(name, &["sleep", "infinity"], |container| {
            container["linux"]["resources"] = json!({ "cpu_period": 100_000, "cpu_quota": 96 * 100_000 });
        })?;
        same("processors of a large container", size(&container)?.0, 1)?;
    }
    are_said_once(node, &pod, 1)?;
    pod.remove()?;
    pods_are_gone(node)?;
    node.run(&format!("rm -r {ONE} {SETTINGS}")).map(drop)
}

/// One line of a pod's says how many processors it has instead of what its limits ask for.
fn are_said_once(node: &Machine, pod: &Pod<'_>, processors: u64) -> Result {
    let said = said_of(node, pod.id(), "the limits ask for more than the VM may have")?;
    let lines: Vec<_> = said.lines().collect();
    claim(
        matches!(lines[..], [line] if line.contains(&format!("vcpus={processors}"))),
        format!("what is said of too few processors: {lines:?}"),
    )
}

/// Programs look up their own name, so a pod without one gets one. The node has AppArmor, so its CRI gives every
/// container a profile: the pod's log says once that the guest has none, and not as a warning.
fn name_and_lack(node: &Machine) -> Result {
    ensure(node)?;
    let nameless = |pod: &mut serde_json::Value| {
        pod.as_object_mut().map(|pod| pod.remove("hostname"));
    };
    let pod = node.pod(HANDLER, "nameless").with(nameless).run()?;
    let container = pod.container("one", &["sleep", "infinity"])?;
    let short = short(pod.id())?;
    same("the name", container.shell("uname -n")?.as_str(), short)?;
    pod.container("two", &["sleep", "infinity"])?;
    let said = said_of(node, pod.id(), "AppArmor")?;
    let lines: Vec<_> = said.lines().collect();
    claim(
        matches!(lines[..], [line] if line.contains(" INFO ") && !line.contains("WARN")),
        format!("what is said of AppArmor: {lines:?}"),
    )?;
    pod.remove()?;
    pods_are_gone(node)
}

/// All of the node's inotify instances are in use, as by some hundred pods: a ConfigMap is mounted all the same, its
/// update arrives, and the pod is removed.
fn a_configmap_is_followed_where_nobody_may_watch_more(node: &Machine) -> Result {
    ensure(node)?;
    // As the kubelet does it, by the swap of a link.
    let write = |text: &str| {
        node.run(&format!(
            "set -e; mkdir -p {CONFIG}/..{text}; cd {CONFIG}; echo {text} >..{text}/key
             ln -s ..{text} ..data_tmp; mv -T ..data_tmp ..data; ln -sfn ..data/key key"
        ))
    };
    write("first")?;
    let most = node.run("cd /proc/sys/fs/inotify; cat max_user_instances; echo 1 >max_user_instances")?;
    let told = followed(node, &write);
    node.run(&format!(
        "echo {} >/proc/sys/fs/inotify/max_user_instances; rm -r {CONFIG}",
        most.trim()
    ))?;
    told?;
    pods_are_gone(node)
}

fn followed(node: &Machine, write: &dyn Fn(&str) -> Result<String>) -> Result {
    let pod = node.pod(HANDLER, "watched").run()?;
    let reader = pod.container_with("reader", &["sleep", "infinity"], |container| {
        container["mounts"] = json!([{ "host_path": CONFIG, "container_path": "/config", "readonly": true }]);
    })?;
    same("the key", reader.shell("cat /config/key")?.trim(), "first")?;
    write("second")?;
    let updated = format!("crictl exec --sync {} cat /config/key | grep -x second", reader.id());
    node.until("the update of the ConfigMap", &updated, ORDINARY)?;
    pod.remove()
}
