//! A node whose containerd is a unit of a distribution's, with its files elsewhere, beside the one of packages.

use tests::{
    failure::{Result, claim, contains, same},
    images,
    machine::Machine,
};

use crate::{
    Story,
    install::{HANDLER, INSTALL, installer, payload, pods_are_gone, script, uninstall},
};

pub const STORIES: &[Story] = &[("k3s_is_served_from_install_to_removal_without_a_boot", k3s)];

/// As k3s lays it out: the unit writes containerd's main file at each start.
const FURNISH: &str = r#"set -e
folder=/var/lib/rancher/k3s/agent/etc/containerd
mkdir -p $folder /run/systemd/system
{ echo "root = \"/var/lib/rancher/k3s/agent/containerd\""
  echo "state = \"/run/k3s/containerd\""
  sed "s|/etc/containerd/conf.d|$folder/config-v3.toml.d|" /etc/containerd/config.toml
  echo '[grpc]'
  echo 'address = "/run/k3s/containerd/containerd.sock"'
} >/run/k3s.toml
cat >/run/systemd/system/k3s.service <<END
[Service]
Type=notify
ExecStartPre=/bin/cp /run/k3s.toml $folder/config.toml
ExecStart=/usr/local/bin/containerd --config $folder/config.toml
Delegate=yes
KillMode=process
END
sed 's|/run/containerd/|/run/k3s/containerd/|' /etc/crictl.yaml >/run/crictl.yaml
mount --bind /run/crictl.yaml /etc/crictl.yaml
systemctl daemon-reload
systemctl start k3s"#;

const UNFURNISH: &str = "umount /etc/crictl.yaml; systemctl stop k3s; rm -r /run/systemd/system/k3s.service \
                         /run/k3s.toml /run/crictl.yaml /var/lib/rancher /run/k3s; systemctl daemon-reload";

/// What systemd runs as a service now.
fn main_process(node: &Machine, unit: &str) -> Result<String> {
    node.run(&format!("systemctl show --property MainPID --value {unit}"))
}

/// Install, upgrade, downgrade by one version, removal: k3s's own service is restarted twice, and no other one.
fn k3s(node: &Machine) -> Result {
    if node.try_run("test -e /opt/sandpod/current")?.code == 0 {
        uninstall(node)?;
    }
    node.run(FURNISH)?;
    let told = served(node);
    let gone = node.run(UNFURNISH);
    told.and(gone.map(drop))
}

fn served(node: &Machine) -> Result {
    const DROP_IN: &str = "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/50-kata.toml";
    let archive = images::archive()?;
    node.run(&format!(
        "ctr --address /run/k3s/containerd/containerd.sock -n k8s.io images import {}",
        archive.display()
    ))?;
    let boot = node.run("cat /proc/sys/kernel/random/boot_id")?;
    let (other, first) = (main_process(node, "containerd")?, main_process(node, "k3s")?);
    script(node, "")?;
    let installed = main_process(node, "k3s")?;
    claim(first != installed, "an install should have restarted k3s")?;
    contains("the drop-in", &node.run(&format!("cat {DROP_IN}"))?, "version = 3")?;
    same(
        "drop-ins of the other containerd",
        node.run("ls /etc/containerd/conf.d")?.as_str(),
        "",
    )?;

    let old = node.pod(HANDLER, "old").run()?;
    let container = old.container("sleeper", &["sleep", "infinity"])?;
    node.run_within(&installer(&payload(node, "2.0.0")?)?, INSTALL)?;
    contains(
        "the current version",
        &node.run("readlink /opt/sandpod/current")?,
        "2.0.0-",
    )?;
    script(node, "")?;
    let back = node.run("readlink /opt/sandpod/current")?;
    claim(!back.contains("2.0.0-"), format!("{back} is not the version of before"))?;
    contains("an exec", &container.shell("echo here")?, "here")?;
    same("k3s's process", main_process(node, "k3s")?, installed.clone())?;
    old.remove()?;
    pods_are_gone(node)?;

    script(node, "--uninstall")?;
    claim(
        main_process(node, "k3s")? != installed,
        "a removal should have restarted k3s",
    )?;
    same("the other containerd", main_process(node, "containerd")?, other)?;
    node.run(&format!("! ls {DROP_IN} /opt/sandpod"))?;
    same("the boot", node.run("cat /proc/sys/kernel/random/boot_id")?, boot)
}
