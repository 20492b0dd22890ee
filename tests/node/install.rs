//! Sandpod comes to a node with systemd by `install.sh`, is replaced while pods run, and goes again.

use std::{collections::BTreeSet, time::Duration};

use tests::{
    failure::{Failure, Result, claim, contains},
    machine::{Machine, ORDINARY},
    places,
};

use crate::Story;

/// The node has nothing but containerd before the first one.
pub const FIRST: &[Story] = &[
    ("one_command_brings_pods", one_command),
    (
        "a_pod_outlives_an_upgrade_and_its_containerd",
        a_pod_outlives_an_upgrade_and_its_containerd,
    ),
];

/// What takes it away.
pub const LAST: &[Story] = &[("another_command_takes_everything_away", another_command)];

/// How long an install may take: it reads, writes and hashes some 100 MiB.
pub const INSTALL: Duration = Duration::from_secs(1200);

/// The runtime handler that the installer makes.
pub const HANDLER: &str = "kata";

/// Our client on a node where Sandpod is installed.
pub const KATA_CTL: &str = "/opt/sandpod/current/bin/kata-ctl";

/// The administrator's own folder, which an install neither makes nor removes.
pub const SETTINGS: &str = "/etc/sandpod";

/// Where the node remembers what it had before anything was installed.
const BEFORE: &str = "/root/before";

/// Runs `install.sh` of this checkout in the node, with the payload that was made.
pub fn script(node: &Machine, arguments: &str) -> Result<String> {
    let script = format!(
        "SANDPOD_PAYLOAD={} {}/deploy/install.sh {arguments}",
        places::payload()?.display(),
        places::workspace().display()
    );
    node.run_within(&script, INSTALL)
}

/// The installer's command line for a payload.
pub fn installer(payload: &str) -> Result<String> {
    let program = places::binaries()?.join("sandpod-installer");
    Ok(format!("{} install --payload {payload}", program.display()))
}

/// A payload of another version with the same files, until the next boot.
pub fn payload(node: &Machine, version: &str) -> Result<String> {
    let folder = format!("/run/payloads/{version}");
    let given = places::payload()?;
    node.run(&format!(
        "set -e; mkdir -p {folder}/upper {folder}/work {folder}/all
         mount -t overlay -o lowerdir={},upperdir={folder}/upper,workdir={folder}/work overlay {folder}/all
         sed -i '1s/.*/sandpod {version}/' {folder}/all/MANIFEST",
        given.display()
    ))?;
    Ok(format!("{folder}/all"))
}

/// Makes a node that has the test images and Sandpod, unless it is one.
pub fn ensure(node: &Machine) -> Result {
    if node.try_run("test -e /opt/sandpod/current")?.code == 0 {
        return Ok(());
    }
    node.load_images()?;
    let before: Vec<_> = tree(node)?.into_iter().collect();
    node.put(BEFORE, before.join("\n").as_bytes())?;
    script(node, "").map(drop)
}

/// Lays an administrator's settings of QEMU over the configuration, until [`SETTINGS`] is removed.
pub fn configure(node: &Machine, settings: &str) -> Result {
    let text = format!("[hypervisor.qemu]\n{settings}\n");
    node.put(&format!("{SETTINGS}/config.d/50-story.toml"), text.as_bytes())
}

/// Everything where an installer or a pod may leave something: kind, mode, owner, path, target of a link. What the
/// harness has mounted there is left out.
fn tree(node: &Machine) -> Result<BTreeSet<String>> {
    const FOLDERS: &str = "/etc /opt /run/netns /run/sandpod /var/lib/sandpod";
    let listed = node.try_run(&format!(
        "find {FOLDERS} -xdev -mindepth 1 -printf '%y %m %u %p %l\\n' 2>/dev/null"
    ))?;
    Ok(listed.text().lines().map(|line| line.trim_end().to_owned()).collect())
}

/// The command line of the one QEMU that runs.
pub fn qemu(node: &Machine) -> Result<String> {
    node.run("pid=$(pidof qemu-system-x86_64) && tr '\\0' ' ' </proc/$pid/cmdline && readlink /proc/$pid/exe")
}

/// Waits until no pod of ours holds anything of the node, and systemd has forgotten their scopes. The list of users
/// outlives pods.
pub fn pods_are_gone(node: &Machine) -> Result {
    let nothing = "! pidof containerd-shim-kata-v2 qemu-system-x86_64 virtiofsd && \
                   [ -z \"$(find /run/kata -mindepth 1 ! -name uids)\" ] && \
                   ! systemctl list-units --all --no-legend 'cri-containerd-*.scope' | grep 'Sandpod virtual machine'";
    node.until("a node without pods", nothing, ORDINARY).map(drop)
}

/// A pod by KVM with the kernel's vsock and vhost-net. Its start can be looked at before it has a container.
fn one_command(node: &Machine) -> Result {
    ensure(node)?;
    let pod = node.pod(HANDLER, "first").run()?;
    let trace = node.run(&format!("{KATA_CTL} trace {}", pod.id()))?;
    for mark in ["QEMU spawned", "kernel entered", "PID 1", "agent connected"] {
        contains("the trace of a pod without containers", &trace, mark)?;
    }
    let qemu = qemu(node)?;
    for part in ["-accel kvm", "vhost-vsock-pci", "vhost=on"] {
        contains("QEMU's command line", &qemu, part)?;
    }
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    let kernel = node.run("uname -r")?;
    claim(
        container.shell("uname -r")? != kernel,
        format!("the pod runs on the node's kernel, {kernel}"),
    )?;
    let trace = node.run(&format!("{KATA_CTL} trace {}", pod.id()))?;
    contains("the trace of a pod with a container", &trace, "container exec'd")?;
    pod.remove()?;
    pods_are_gone(node)
}

/// Upgrades do not restart containerd, and a pod keeps the files of its version; systemd restarts containerd, and pods
/// go on.
fn a_pod_outlives_an_upgrade_and_its_containerd(node: &Machine) -> Result {
    ensure(node)?;
    let version = || node.run("readlink -f /opt/sandpod/current");
    let first = version()?;
    let old = node.pod(HANDLER, "old").run()?;
    let container = old.container("sleeper", &["sleep", "infinity"])?;
    let containerd = node.run("pidof containerd")?;
    node.run_within(&installer(&payload(node, "2.0.0")?)?, INSTALL)?;
    let second = version()?;
    claim(second != first, format!("{second} is the version from before"))?;
    claim(
        node.run("pidof containerd")? == containerd,
        "an upgrade restarts containerd",
    )?;
    node.run("systemctl restart containerd")?;
    claim(
        node.run("pidof containerd")? != containerd,
        "systemd did not restart containerd",
    )?;
    contains("an exec", &container.shell("echo here")?, "here")?;
    contains("the old pod's QEMU", &qemu(node)?, &first)?;
    old.container("late", &["sleep", "infinity"])?.shell("true")?;
    old.remove()?;
    pods_are_gone(node)?;
    let new = node.pod(HANDLER, "new").run()?;
    contains("the new pod's QEMU", &qemu(node)?, &second)?;
    new.remove()?;
    pods_are_gone(node)
}

/// The node's files are what they were before the first install.
fn another_command(node: &Machine) -> Result {
    ensure(node)?;
    uninstall(node)
}

/// Takes Sandpod away, and claims that the node's files are what they were before.
pub fn uninstall(node: &Machine) -> Result {
    script(node, "--uninstall")?;
    let before = String::from_utf8(node.get(BEFORE)?).map_err(|error| Failure::Claim(error.to_string()))?;
    let before: BTreeSet<_> = before.lines().map(str::to_owned).collect();
    let differs: Vec<_> = before.symmetric_difference(&tree(node)?).cloned().collect();
    claim(
        differs.is_empty(),
        format!("the node's files are not what they were: {differs:?}"),
    )
}
