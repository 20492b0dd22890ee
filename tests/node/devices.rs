//! Devices that the node lacks, or has for others: what `kata-ctl check` says is what happens to a pod.

use tests::{
    failure::{Result, claim, contains},
    machine::Machine,
};

use crate::{
    Story,
    install::{HANDLER, KATA_CTL, ensure, pods_are_gone, qemu},
};

pub const STORIES: &[Story] = &[
    ("without_vhost_pods_run_slower", without_vhost_pods_run_slower),
    ("a_kvm_of_roots_alone", a_kvm_of_roots_alone),
];

/// The modules cannot be loaded: first there are no devices, then there are files of devices that the kernel does not
/// have, as udev makes them for modules that are not loaded yet.
fn without_vhost_pods_run_slower(node: &Machine) -> Result {
    ensure(node)?;
    node.run(
        "printf 'install vhost_vsock /bin/false\\ninstall vhost_net /bin/false\\n' >/etc/modprobe.d/story.conf && \
         modprobe -r vhost_vsock vhost_net && rm -f /dev/vhost-vsock /dev/vhost-net",
    )?;
    told_as_slower(node)?;
    // Their numbers in Linux' include/linux/miscdevice.h.
    node.run("mknod -m 600 /dev/vhost-vsock c 10 241 && mknod -m 600 /dev/vhost-net c 10 238")?;
    told_as_slower(node)?;
    a_pod_does_without(node)?;
    node.run(
        "rm /etc/modprobe.d/story.conf /dev/vhost-vsock /dev/vhost-net && \
         modprobe -a vhost_vsock vhost_net && test -c /dev/vhost-vsock",
    )
    .map(drop)
}

fn told_as_slower(node: &Machine) -> Result {
    let check = node.run(&format!("{KATA_CTL} check"))?;
    for device in ["/dev/vhost-vsock", "/dev/vhost-net"] {
        let line = line_of(&check, device);
        claim(
            line.starts_with("slower"),
            format!("{device} should be told of as slower: {check}"),
        )?;
    }
    Ok(())
}

fn a_pod_does_without(node: &Machine) -> Result {
    let pod = node.pod(HANDLER, "slower").run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    contains("an exec", &container.shell("echo here")?, "here")?;
    let qemu = qemu(node)?;
    for part in ["vhost-vsock", "vhost=on"] {
        claim(!qemu.contains(part), format!("there is no {part} to be had: {qemu}"))?;
    }
    contains("QEMU's command line", &qemu, "virtserialport")?;
    pod.remove()?;
    pods_are_gone(node)
}

/// As on a node whose image has no rule of udev for it. Either the pod runs, or `check` says that none can and what to
/// do.
fn a_kvm_of_roots_alone(node: &Machine) -> Result {
    ensure(node)?;
    node.run("chown root:root /dev/kvm && chmod 0600 /dev/kvm")?;
    let check = node.try_run(&format!("{KATA_CTL} check"))?;
    let told = check.text();
    let line = line_of(&told, "KVM");
    let pod = node.pod(HANDLER, "closed").run();
    match &pod {
        Ok(_) => claim(
            check.code == 0 && line.starts_with("ok"),
            format!("the pod runs, and check says: {told}"),
        )?,
        Err(failure) => {
            claim(
                check.code != 0 && line.starts_with("MISSING") && line.contains("/dev/kvm"),
                format!("the pod cannot start ({failure}), and check says: {told}"),
            )?;
            contains("the pod's failure", &failure.to_string(), "/dev/kvm")?;
        }
    }
    if let Ok(pod) = pod {
        pod.remove()?;
    }
    node.run("chown root:kvm /dev/kvm && chmod 0660 /dev/kvm")?;
    pods_are_gone(node)
}

/// The line of `check` about a part of the node.
fn line_of<'a>(check: &'a str, part: &str) -> &'a str {
    let is_its = |line: &&str| line.split_whitespace().nth(1) == Some(part);
    check.lines().find(is_its).unwrap_or_default()
}
