//! Sandpod comes to a node, is replaced while pods run, and goes again.

use std::{
    fs,
    process::{Command, Stdio},
};

use installer_report::{Accelerator, Code, Phase};
use tests::{
    config,
    failure::{Failure, Result, Trying, claim, contains, same},
    installer::{self, Installer},
    node::Node,
    procs::Process,
    run,
};

use super::{HANDLER, done, play, sentence, shell};

pub fn one_command(node: &Node) -> Result {
    play(node, |installer| {
        installer.script(&[])?;
        let pod = node.pod_with_handler(HANDLER, "first").run()?;
        let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
        let here = fs::read_to_string("/proc/sys/kernel/osrelease").trying("reading the kernel's release")?;
        let there = container.shell("uname -r")?;
        claim(
            there != here.trim(),
            format!("the pod runs on the node's kernel, {there}"),
        )?;
        let qemu = pod
            .processes()
            .into_iter()
            .find(|process| process.program().starts_with("qemu"));
        let qemu = qemu.map(|process| process.arguments[0].clone()).unwrap_or_default();
        same("QEMU", qemu.as_str(), "/opt/sandpod/current/bin/qemu-system-x86_64")?;
        pod.remove()?;
        same("restarts", installer.restarts(), 1)?;
        installer.script(&["--uninstall"])?;
        same("restarts", installer.restarts(), 2)
    })
}

/// In a root without libraries, programs and users, as somebody who owns nothing: it boots the guest to its first
/// process.
pub fn qemu_needs_nothing_of_the_node(node: &Node) -> Result {
    const QEMU: &str = "-nodefaults -no-user-config -no-reboot -display none -accel tcg -cpu max -m 256M \
        -machine q35,sata=off,smbus=off,vmport=off,usb=off -kernel vmlinux -initrd initrd -device virtio-serial-pci \
        -chardev stdio,id=console -device virtconsole,chardev=console -append";
    play(node, |installer| {
        installer.script(&[])?;
        let root = node.path("empty");
        let (here, name) = (root.display(), "/opt/sandpod/current");
        let mounts = ["proc", "opt"]
            .map(|folder| format!("mkdir -p {here}/{folder} && mount --rbind /{folder} {here}/{folder}"));
        shell(node, &mounts.join(" && "))?;
        let mut command = node.command("chroot");
        command.args(["--userspec=64620:64620"]).arg(&root);
        command.arg(format!("{name}/bin/qemu-system-x86_64"));
        let path = |word: &str| match word {
            "vmlinux" | "initrd" => format!("{name}/{word}"),
            _ => word.to_owned(),
        };
        command
            .args(QEMU.split_whitespace().map(path))
            .arg("console=hvc0 panic=-1");
        let started = first_process_of(&mut command);
        shell(node, &format!("umount -l {here}/proc {here}/opt"))?;
        claim(started?, "the guest's kernel should have started its first process")?;
        installer.script(&["--uninstall"]).map(drop)
    })
}

/// Whether a guest says on its console that it starts its first process; it is ended then.
fn first_process_of(command: &mut Command) -> Result<bool> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().trying("starting QEMU")?;
    let console = child
        .stdout
        .take()
        .ok_or_else(|| Failure::Claim("QEMU has no console".into()))?;
    let found = run::await_line(console, run::ORDINARY, |line| {
        line.contains("Run /init as init process")
    });
    installer::end(&child)?;
    run::wait(child, run::ORDINARY, "QEMU")?;
    Ok(found?.is_some())
}

/// Its folders are made and go, too.
pub fn another_prefix(node: &Node) -> Result {
    play(node, |installer| {
        let prefix = ["--prefix", "/opt/else/where"];
        installer.script(&prefix)?;
        let pod = node.pod_with_handler(HANDLER, "elsewhere").run()?;
        let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
        same("an exec", container.shell("echo here")?.as_str(), "here")?;
        let programs: Vec<_> = pod
            .processes()
            .iter()
            .map(|process| process.arguments[0].clone())
            .collect();
        for program in ["bin/qemu-system-x86_64", "virtiofsd"] {
            let path = format!("/opt/else/where/current/{program}");
            claim(programs.contains(&path), format!("{path} should run: {programs:?}"))?;
        }
        pod.remove()?;
        installer.script(&[&["--uninstall"], &prefix[..]].concat()).map(drop)
    })
}

/// Upgrades neither restart containerd nor disturb a pod, whose version stays as long as it runs.
pub fn a_pod_outlives_three_versions(node: &Node) -> Result {
    play(node, |installer| {
        let payloads: Result<Vec<_>> = ["1.0.0", "2.0.0", "3.0.0"]
            .map(|version| installer.payload(version, |_| true))
            .into_iter()
            .collect();
        let payloads = payloads?;
        install_and_look(installer, &payloads[0])?;
        let old = node.pod_with_handler(HANDLER, "old").run()?;
        let container = old.container("sleeper", &["sleep", "infinity"]).run()?;
        for (payload, version) in payloads.iter().zip(["1.0.0", "2.0.0", "3.0.0"]).skip(1) {
            let upgrade = installer.succeed(&["install", "--payload", payload])?;
            contains("the version", &upgrade.version, version)?;
            done("an upgrade", &upgrade, true, false)?;
            same("an exec", container.shell("echo here")?.as_str(), "here")?;
        }
        let late = old.container("late", &["true"]).run()?;
        same("the exit code of a container made later", late.wait_exit()?.code, 0)?;
        same("versions", versions(node)?.len(), 3)?;
        refused_while_pods_run(installer)?;
        old.remove()?;
        shims_end(node)?;
        let swept = installer.succeed(&["install", "--payload", &payloads[2]])?;
        done("a sweep", &swept, true, false)?;
        let left = versions(node)?;
        claim(
            left.len() == 2 && !left.iter().any(|name| name.starts_with("1.0.0-")),
            format!("the first version should have gone: {left:?}"),
        )?;
        let back = installer.run_from_outside(&["install", "--payload", &payloads[1]])?;
        contains("the version", &back.version, "2.0.0")?;
        let gone = installer.run_from_outside(&["uninstall"])?;
        same("the phase", gone.phase, Phase::Uninstalled)?;
        same("restarts", installer.restarts(), 2)?;
        done("a second uninstall", &installer.succeed(&["uninstall"])?, false, false)
    })
}

/// A first install says what it has found and done; a second one does nothing.
fn install_and_look(installer: &Installer, payload: &str) -> Result {
    let first = installer.succeed(&["install", "--payload", payload])?;
    same("the phase", first.phase, Phase::Installed)?;
    done("a first install", &first, true, true)?;
    claim(first.handler_seen == Some(true), "the handler should have been seen")?;
    contains("the CRI", &first.facts.cri, "containerd 2.4")?;
    let accelerator = match config::accelerator() {
        "tcg" => Accelerator::Tcg,
        _ => Accelerator::Kvm,
    };
    same("the accelerator", first.facts.accelerator, accelerator)?;
    let again = installer.succeed(&["install", "--payload", payload])?;
    done("a second install", &again, false, false)?;
    same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)
}

/// A shim ends a moment after its pod; the lock of its version goes with it.
fn shims_end(node: &Node) -> Result {
    let is_shim = |process: &Process| process.program().starts_with("containerd-shim-kata");
    node.events().bell.until("the end of the shim", run::ORDINARY, || {
        match node.processes().into_iter().find(is_shim) {
            None => Ok(()),
            Some(shim) => Err(format!("{shim:?}")),
        }
    })
}

fn refused_while_pods_run(installer: &Installer) -> Result {
    let before = installer.tree()?;
    let refusal = installer.run(&["uninstall"])?;
    same("the phase", refusal.phase, Phase::Refused)?;
    sentence(
        &refusal,
        Code::SandboxesExist,
        "pods with the handler `kata` still run (1, such as default/old-",
    )?;
    installer.tree()?.same_as(&before)
}

fn versions(node: &Node) -> Result<Vec<String>> {
    let folder = node.inside("/opt/sandpod/versions");
    let entries = fs::read_dir(&folder).trying(format!("reading {}", folder.display()))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}
