//! Labels of SELinux, and locks that only root may take.

use std::fs;

use installer_report::{Code, Phase};
use tests::{
    failure::{Result, Trying, claim, contains, same},
    installer::Installer,
    node::Node,
    run,
    tree::Tree,
};

use super::{done, play, sentence, shell, small};

/// Whoever may open a lock may hold it: nobody but root may, whatever an earlier installer has left.
pub fn locks_are_roots(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        // On a node of Debian everybody may create files here.
        shell(node, "chmod 1777 /run/lock")?;
        as_nobody(node, "touch /run/lock/sandpod.lock")?;
        installer.succeed(&["install", "--payload", &payload])?;
        let open = "exec 9</opt/sandpod/current/.lock";
        claim(
            as_nobody(node, open).is_err(),
            "only root should open the lock of a version",
        )?;
        shell(node, "chmod 644 /opt/sandpod/current/.lock")?;
        as_nobody(node, open)?;
        let report = installer.succeed(&["install", "--payload", &payload])?;
        done("closing the lock", &report, true, false)?;
        claim(
            as_nobody(node, open).is_err(),
            "only root should open the lock of a version again",
        )?;
        installer.succeed(&["uninstall"])?;
        shell(node, "rm /run/lock/sandpod.lock && chmod 755 /run/lock")
    })
}

fn as_nobody(node: &Node, script: &str) -> Result {
    let mut command = node.command("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "sh",
        "-c",
        script,
    ]);
    run::succeed(&mut command, run::ORDINARY).map(drop)
}

/// The labels of a distribution's policy, as an enforcing kernel would ask for them; where the file system has none,
/// one sentence and no change.
pub fn labels(node: &Node) -> Result {
    const ON: &str = "mount -t tmpfs tmpfs /sys/fs && mkdir /sys/fs/selinux && echo 1 >/sys/fs/selinux/enforce";
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        shell(node, ON)?;
        let before = installer.tree()?;
        let done = labelled(node, installer, &payload, &before);
        shell(node, "umount /sys/fs")?;
        done
    })
}

fn labelled(node: &Node, installer: &Installer, payload: &str, before: &Tree) -> Result {
    let report = installer.succeed(&["install", "--payload", payload])?;
    claim(report.facts.selinux, "SELinux should be among the facts")?;
    let shim = "/opt/sandpod/current/bin/containerd-shim-kata-v2";
    let mut command = node.command("getfattr");
    let label = run::succeed(
        command.args(["--only-values", "--absolute-names", "-n", "security.selinux", shim]),
        run::ORDINARY,
    )?;
    contains(
        "the shim's label",
        &label.text(),
        "system_u:object_r:container_runtime_exec_t:s0",
    )?;
    installer.succeed(&["uninstall"])?;
    installer.tree()?.same_as(before)?;
    // A file system without labels.
    shell(node, "mkdir /opt/plain && mount -t ramfs ramfs /opt/plain")?;
    let report = installer.run(&["install", "--payload", payload, "--prefix", "/opt/plain/sandpod"]);
    let after = fs::read_dir(node.inside("/opt/plain")).map(Iterator::count);
    shell(node, "umount /opt/plain && rmdir /opt/plain")?;
    let report = report?;
    sentence(
        &report,
        Code::SeLinux,
        "SELinux is enforcing and /opt/plain/sandpod/versions/",
    )?;
    same("the phase", report.phase, Phase::Refused)?;
    same("what is left", after.trying("looking at the prefix")?, 0)
}
