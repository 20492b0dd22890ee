//! Sandpod comes to a node with systemd by `install.sh`, runs pods by KVM, and goes again.

use std::collections::BTreeSet;

use tests::{
    failure::{Result, claim, contains},
    machine::{Machine, ORDINARY},
    places,
};

use crate::Story;

pub const STORIES: &[Story] = &[("one_command_brings_pods_and_another_takes_them_away", one_command)];

/// Runs `install.sh` of this checkout in the node, with the payload that was made.
pub fn script(node: &Machine, arguments: &str) -> Result<String> {
    node.run(&format!(
        "SANDPOD_PAYLOAD={} {}/deploy/install.sh {arguments}",
        places::payload()?.display(),
        places::workspace().display()
    ))
}

/// Everything where an installer or a pod may leave something: kind, mode, owner, path, target of a link.
pub fn tree(node: &Machine) -> Result<BTreeSet<String>> {
    const FOLDERS: &str = "/etc /opt /run/kata /run/lock /run/netns /var/lib/sandpod";
    let listed = node.try_run(&format!("find {FOLDERS} -printf '%y %m %u %p %l\\n' 2>/dev/null"))?;
    Ok(listed.text().lines().map(str::to_owned).collect())
}

/// Fails unless both trees are the same, with what differs.
pub fn unchanged(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Result {
    let differs: Vec<_> = before.symmetric_difference(after).collect();
    claim(
        differs.is_empty(),
        format!("the node's files are not as before: {differs:?}"),
    )
}

/// A pod by KVM with the kernel's vsock and vhost-net; without a trace afterwards.
fn one_command(node: &Machine) -> Result {
    node.load_images()?;
    let before = tree(node)?;
    script(node, "")?;
    let pod = node.pod("kata", "first").run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    let kernel = node.run("uname -r")?;
    claim(
        container.shell("uname -r")? != kernel,
        format!("the pod runs on the node's kernel, {kernel}"),
    )?;
    let qemu = node.run("tr '\\0' ' ' </proc/$(pidof qemu-system-x86_64)/cmdline")?;
    for part in ["-accel kvm", "vhost-vsock-pci", "vhost=on"] {
        contains("QEMU's command line", &qemu, part)?;
    }
    pod.remove()?;
    node.until("the end of the shim", "! pidof containerd-shim-kata-v2", ORDINARY)?;
    script(node, "--uninstall")?;
    unchanged(&before, &tree(node)?)
}
