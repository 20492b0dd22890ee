//! A node that has nothing but containerd: Sandpod comes to it, is replaced while pods run, and goes again.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use operator::report::{Accelerator, Code, Phase, Report};
use serde_json::Value;
use tests::{
    config,
    failure::{Failure, Result, Trying, claim, contains, same},
    images,
    installer::{self, Installer},
    node::Node,
    procs::Process,
    run,
    tree::Tree,
};

/// A story and its name.
type Story = (&'static str, fn(&Node) -> Result);

/// Stories of the installer.
pub const ON_A_BARE_NODE: &[Story] = &[
    ("one_command_brings_pods_and_another_takes_them_away", one_command),
    ("a_pod_outlives_three_versions", a_pod_outlives_three_versions),
    ("qemu_needs_nothing_of_the_node", qemu_needs_nothing_of_the_node),
    ("another_prefix_is_as_good", another_prefix),
    ("an_installer_that_is_killed_is_run_again", killed_and_run_again),
    ("what_fails_is_undone", what_fails_is_undone),
    ("a_bad_node_gets_one_sentence_and_no_change", bad_nodes),
    ("files_are_labelled_where_selinux_is_enabled", labels),
    ("the_nodes_own_configuration_stays_as_it_is", own_configuration_stays),
    ("an_edit_that_waits_for_a_restart_is_told", edit_is_told),
    ("what_is_damaged_goes_too", damaged_goes_too),
    ("the_locks_are_roots_alone", locks_are_roots),
];

/// Stories of a node whose containerd takes one version for all files of its configuration.
pub const ON_AN_EARLIER_NODE: &[Story] = &[
    ("one_command_brings_pods_and_another_takes_them_away", one_command),
    ("the_nodes_own_configuration_stays_as_it_is", own_configuration_stays),
    ("a_drop_in_of_another_version_is_put_right", drop_in_put_right),
];

/// Stories of a node whose containerd is of Debian.
pub const ON_AN_OLD_NODE: &[Story] = &[("an_old_containerd_is_refused", an_old_containerd_is_refused)];

/// Takes longer than it is worth each time.
pub const AT_LENGTH: &[Story] = &[("an_installer_that_is_killed_at_any_moment", killed_at_any_moment)];

const HANDLER: &str = "kata";
const DROP_IN: &str = "/etc/containerd/conf.d/50-kata.toml";

/// The administrator says that guests are emulated, where this machine has no KVM.
fn administrator(node: &Node) -> Result {
    match config::accelerator() {
        "tcg" => node.write(
            &node.inside("/etc/sandpod/config.d/10-tcg.toml"),
            "[hypervisor.qemu]\naccelerator = \"tcg\"\n",
        ),
        _ => Ok(()),
    }
}

/// Ends a story: what the administrator wrote goes, too.
fn forget_administrator(node: &Node) -> Result {
    match fs::remove_dir_all(node.inside("/etc/sandpod")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).trying("removing /etc/sandpod"),
        _ => Ok(()),
    }
}

/// Plays on a node whose administrator has said how guests run, and claims that its files are as they were in the end.
fn play(node: &Node, tell: impl FnOnce(&Installer) -> Result) -> Result {
    administrator(node)?;
    let told = node.with_installer(|installer| {
        let before = installer.tree()?;
        tell(installer)?;
        installer.tree()?.same_as(&before)
    });
    told.and(forget_administrator(node))
}

/// Only what starts pods is left out: what there is is installed in a moment.
fn small(path: &str) -> bool {
    path.starts_with("bin/containerd-shim") || path == "configuration.toml" || path.starts_with("share/doc")
}

fn one_command(node: &Node) -> Result {
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
fn qemu_needs_nothing_of_the_node(node: &Node) -> Result {
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
fn another_prefix(node: &Node) -> Result {
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
fn a_pod_outlives_three_versions(node: &Node) -> Result {
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

/// What a run has done to the node.
fn done(what: &str, report: &Report, changed: bool, restarted: bool) -> Result {
    same(
        &format!("{what}: changed, restarted"),
        (report.changed, report.restarted),
        (changed, restarted),
    )
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

/// Fails unless the report has this error.
fn sentence(report: &Report, code: Code, beginning: &str) -> Result {
    let problem = report.error.as_ref();
    let got = problem.map(|problem| (problem.code, problem.text.clone()));
    claim(
        got.as_ref()
            .is_some_and(|(kind, text)| *kind == code && text.starts_with(beginning) && !text.contains('\n')),
        format!("expected {code:?}, {beginning:?}, got {got:?}"),
    )
}

/// At each line that it says, both on the way in and on the way out.
fn killed_and_run_again(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload, "--log-level", "debug"];
        let absent = installer.tree()?;
        installer.succeed(&install)?;
        let present = installer.tree()?;
        installer.succeed(&["uninstall"])?;
        for at in 0.. {
            let Some(line) = installer.kill_at(at, &install)? else {
                break;
            };
            let at_line = |failure| Failure::Claim(format!("after a death at {line:?}: {failure}"));
            if at % 2 == 0 {
                installer.succeed(&install).map_err(at_line)?;
                installer.tree()?.same_as(&present).map_err(at_line)?;
            }
            installer.succeed(&["uninstall"]).map_err(at_line)?;
            installer.tree()?.same_as(&absent).map_err(at_line)?;
        }
        for at in 0.. {
            installer.succeed(&install)?;
            let line = installer.kill_at(at, &["uninstall"])?;
            let at_line = |failure| Failure::Claim(format!("after a death at {line:?}: {failure}"));
            installer.succeed(&["uninstall"]).map_err(at_line)?;
            installer.tree()?.same_as(&absent).map_err(at_line)?;
            if line.is_none() {
                break;
            }
        }
        Ok(())
    })
}

/// As above, at moments that nobody has chosen.
fn killed_at_any_moment(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload, "--log-level", "debug"];
        let absent = installer.tree()?;
        for round in 0..60 {
            let moment = Duration::from_millis(3 + round * 10);
            installer.kill_after(moment, &install)?;
            if round % 2 == 0 {
                installer.succeed(&install)?;
                installer.kill_after(moment, &["uninstall"])?;
            }
            installer.succeed(&["uninstall"])?;
            let at_moment = |failure| Failure::Claim(format!("after a death at {moment:?}: {failure}"));
            installer.tree()?.same_as(&absent).map_err(at_moment)?;
        }
        Ok(())
    })
}

/// A restart that does not happen, or fails: the node is as it was before, with or without an earlier version.
fn what_fails_is_undone(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let before = installer.tree()?;
        let install = |more: &[&str]| installer.run(&[&["install", "--payload", &payload], more].concat());
        let absent = install(&["--restart-command", "true"])?;
        same("the phase", absent.phase, Phase::Failed)?;
        sentence(
            &absent,
            Code::HandlerAbsent,
            "containerd runs and does not list the handler `kata`",
        )?;
        installer.tree()?.same_as(&before)?;
        let failing = install(&["--restart-command", "false"])?;
        sentence(
            &failing,
            Code::RestartFailed,
            "`false` ended with exit status: 1; the log of containerd says more",
        )?;
        let silent = node.path("no-such-program").display().to_string();
        sentence(
            &install(&["--restart-command", &format!("sh {silent}")])?,
            Code::RestartFailed,
            &format!(
                "`sh {silent}` ended with exit status: 2 and said \"sh: 0: cannot open {silent}: No such file\"; "
            ),
        )?;
        installer.tree()?.same_as(&before)?;

        installer.succeed(&["install", "--payload", &payload])?;
        let installed = installer.tree()?;
        for arguments in [&["install", "--payload", &payload], &["uninstall"][..]] {
            let elsewhere = installer.run(&[arguments, &["--prefix", "/opt/else"]].concat())?;
            sentence(
                &elsewhere,
                Code::OtherPrefix,
                "Sandpod is installed in /opt/sandpod: uninstall it there first",
            )?;
        }
        fs::write(node.inside(DROP_IN), "# Sandpod: edited\n").trying("editing the drop-in")?;
        let verified = installer.run(&["verify"])?;
        sentence(
            &verified,
            Code::Damaged,
            "/etc/containerd/conf.d/50-kata.toml is not what was installed",
        )?;
        let repaired = installer.succeed(&["install", "--payload", &payload])?;
        done("a repair", &repaired, true, true)?;
        installer.tree()?.same_as(&installed)?;
        let broken = installer.payload("2.0.0", |path| small(path) || path == "virtiofsd")?;
        damage(Path::new(&broken))?;
        let refused = installer.run(&["install", "--payload", &broken])?;
        same("the phase", refused.phase, Phase::Refused)?;
        sentence(
            &refused,
            Code::Payload,
            "the payload is not usable: the contents of virtiofsd are not",
        )?;
        installer.tree()?.same_as(&installed)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

/// Other bytes in a file of a payload; what has the same bytes under other names keeps them.
fn damage(payload: &Path) -> Result {
    let file = payload.join("virtiofsd");
    fs::remove_file(&file)
        .and_then(|()| fs::write(&file, "something else"))
        .trying("damaging a payload")
}

/// What is wrong with a node, what puts it right, and what the installer says of it.
struct Bad {
    what: &'static str,
    right: &'static str,
    arguments: &'static [&'static str],
    code: Code,
    sentence: &'static str,
}

const BAD: &[Bad] = &[
    Bad {
        what: "mv /run/containerd/containerd.sock /run/containerd/away",
        right: "mv /run/containerd/away /run/containerd/containerd.sock",
        arguments: &[],
        code: Code::NoCri,
        sentence: "no container runtime was found: there is neither /run/crio/crio.sock nor /run/containerd/containerd.sock",
    },
    Bad {
        what: "mkdir /etc/containerd/conf.d && printf '[plugins.x.containerd.runtimes.kata]\\n' >/etc/containerd/conf.d/99-theirs.toml",
        right: "rm -r /etc/containerd/conf.d",
        arguments: &[],
        code: Code::ForeignHandler,
        sentence: "/etc/containerd/conf.d/99-theirs.toml already defines a handler `kata`",
    },
    Bad {
        what: "sed -i 1d /etc/containerd/config.toml",
        right: "sed -i '1i imports = [\"/etc/containerd/conf.d/*.toml\"]' /etc/containerd/config.toml",
        arguments: &[],
        code: Code::DropInNotRead,
        sentence: "containerd does not read /etc/containerd/conf.d: add `imports = ",
    },
    Bad {
        what: "sed -i '/^version = 2/d' /etc/containerd/config.toml",
        right: "sed -i '1a version = 2' /etc/containerd/config.toml",
        arguments: &[],
        code: Code::ConfigInvalid,
        sentence: "/etc/containerd/config.toml has no `version`, or the version 1: write into it what ",
    },
    Bad {
        what: "ln -s /etc /run/sandpod",
        right: "rm /run/sandpod",
        arguments: &[],
        code: Code::ForeignFile,
        sentence: "/run/sandpod is not a folder: remove it and try again",
    },
    Bad {
        what: "sed -i 's/^version = 2/version = 99/' /etc/containerd/config.toml",
        right: "sed -i 's/^version = 99/version = 2/' /etc/containerd/config.toml",
        arguments: &[],
        code: Code::ConfigInvalid,
        sentence: "containerd's configuration is not valid: ",
    },
    Bad {
        what: "mkdir -p /opt/read-only && mount -t tmpfs -o ro tmpfs /opt/read-only",
        right: "umount /opt/read-only && rmdir /opt/read-only",
        arguments: &["--prefix", "/opt/read-only/sandpod"],
        code: Code::ReadOnlyPrefix,
        sentence: "/opt/read-only cannot be written: Read-only file system",
    },
    Bad {
        what: "mkdir -p /opt/full && mount -t tmpfs -o size=8m tmpfs /opt/full",
        right: "umount /opt/full && rmdir /opt/full",
        arguments: &["--prefix", "/opt/full/sandpod"],
        code: Code::DiskFull,
        sentence: "/opt/full has 8 MiB free and the installation needs ",
    },
    Bad {
        what: "mkdir -p /etc/sandpod/config.d && echo '[runtime]' >/etc/sandpod/config.d/90.toml && echo 'enable_bug = 1' >>/etc/sandpod/config.d/90.toml",
        right: "rm /etc/sandpod/config.d/90.toml; rmdir /etc/sandpod/config.d /etc/sandpod || :",
        arguments: &[],
        code: Code::ConfigInvalid,
        sentence: "the configuration of the node's pods in /etc/sandpod/config.d is not valid: unknown configuration key `runtime.enable_bug`",
    },
    Bad {
        what: "mkdir -p /etc/sandpod/config.d && printf '[hypervisor.qemu]\\naccelerator = \"kvm\"\\n' >/etc/sandpod/config.d/90.toml; mount --bind /dev/null /proc/cpuinfo",
        right: "umount /proc/cpuinfo; rm /etc/sandpod/config.d/90.toml; rmdir /etc/sandpod/config.d /etc/sandpod || :",
        arguments: &[],
        code: Code::NoKvm,
        sentence: "the CPU offers no hardware virtualisation",
    },
    // As when a node was replaced by another one of its name.
    Bad {
        what: "true",
        right: "true",
        arguments: &["--boot-id", "another"],
        code: Code::OtherBoot,
        sentence: "the node's boot is ",
    },
];

fn bad_nodes(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        for bad in BAD {
            let before = installer.tree()?;
            shell(node, bad.what)?;
            let wrong = installer.tree();
            let report = installer.run(&[&["install", "--payload", &payload], bad.arguments].concat());
            let after = installer.tree();
            shell(node, bad.right)?;
            let report = report?;
            sentence(&report, bad.code, bad.sentence)?;
            same("the phase", report.phase, Phase::Refused)?;
            done("a refusal", &report, false, false)?;
            after?.same_as(&wrong?)?;
            installer.tree()?.same_as(&before)?;
        }
        same("restarts", installer.restarts(), 0)
    })
}

/// An uninstall needs neither the state nor a manifest to be whole.
fn damaged_goes_too(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        installer.succeed(&["install", "--payload", &payload, "--log-level", "debug"])?;
        let manifest = node.inside("/opt/sandpod/current/MANIFEST");
        fs::write(&manifest, "sandpod 1.0.0\nnonsense\n").trying("damaging the manifest")?;
        fs::write(node.inside("/opt/sandpod/state.json"), "{").trying("damaging the state")?;
        let refused = installer.run(&["install", "--payload", &payload])?;
        sentence(&refused, Code::ConfigInvalid, "/opt/sandpod/state.json is not valid: ")?;
        let gone = installer.succeed(&["uninstall"])?;
        let warnings = gone.warnings.join("\n");
        contains("the warnings", &warnings, "/opt/sandpod/state.json is damaged: ")?;
        contains(
            "the warnings",
            &warnings,
            "goes with all that is in it: its manifest has the line",
        )?;
        // Nobody remembers who has made the folders of others.
        shell(
            node,
            "rmdir /etc/containerd/conf.d; rmdir /etc/sandpod/config.d /etc/sandpod || :",
        )
    })
}

/// Whoever may open a lock may hold it: nobody but root may, whatever an earlier installer has left.
fn locks_are_roots(node: &Node) -> Result {
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

/// containerd's configuration on a bare node.
const MAIN: &str = "/etc/containerd/config.toml";

/// Plays on a node whose administrator has a cgroup driver and a runtime of his own, and whose containerd runs with them.
fn play_with_own_configuration(node: &Node, tell: impl FnOnce(&Installer) -> Result) -> Result {
    const EXTRA: &str = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.extra]\n\
                         runtime_type = \"io.containerd.runc.v2\"\n";
    play(node, |installer| {
        let main = node.inside(MAIN);
        let before = fs::read_to_string(&main).trying("reading containerd's configuration")?;
        let own = before.replace("SystemdCgroup = false", "SystemdCgroup = true") + EXTRA;
        fs::write(&main, own)
            .trying("writing containerd's configuration")
            .and_then(|()| node.restart_containerd())?;
        let told = tell(installer);
        fs::write(&main, before).trying("writing containerd's configuration back")?;
        told.and(node.restart_containerd())
    })
}

/// What containerd makes of its configuration, without the handler: as the CRI tells it, and as its program prints it.
#[derive(Debug, PartialEq)]
struct Effective {
    told: Value,
    printed: Vec<String>,
}

impl Effective {
    fn of(node: &Node) -> Result<Effective> {
        let info = node.crictl(["info", "--output", "json"])?.text();
        let info: Value = serde_json::from_str(&info).trying("reading what the CRI tells of itself")?;
        let mut told = info["config"].clone();
        if let Some(runtimes) = told.pointer_mut("/containerd/runtimes").and_then(Value::as_object_mut) {
            runtimes.remove(HANDLER);
        }
        let mut command = node.command("containerd");
        let dump = run::succeed(command.args(["--config", MAIN, "config", "dump"]), run::ORDINARY)?.text();
        let sections = dump.split("\n\n").map(|section| section.trim().to_owned());
        let printed = sections.filter(|section| !section.starts_with(&format!("[{OURS}]")));
        Ok(Effective {
            told,
            printed: printed.collect(),
        })
    }

    /// Fails unless it has what the administrator of [`play_with_own_configuration`] has asked for.
    fn is_the_administrators(&self) -> Result {
        let runtimes = &self.told["containerd"]["runtimes"];
        same(
            "the extra runtime",
            runtimes["extra"]["runtimeType"].as_str(),
            Some("io.containerd.runc.v2"),
        )?;
        let cgroup = runtimes["runc"]["options"]["SystemdCgroup"].as_bool();
        same("the cgroup driver", cgroup, Some(true))?;
        let pause = |section: &String| section.contains(&format!("sandbox = '{}'", images::PAUSE));
        claim(
            self.printed.iter().any(pause),
            "the pause image should be the administrator's",
        )
    }
}

/// The section of our handler in what containerd 2 prints.
const OURS: &str = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata";

/// The pause image, the cgroup driver and other runtimes are read with the handler as without it.
fn own_configuration_stays(node: &Node) -> Result {
    play_with_own_configuration(node, |installer| {
        let before = Effective::of(node)?;
        before.is_the_administrators()?;
        let payload = installer.payload("1.0.0", small)?;
        let report = installer.succeed(&["install", "--payload", &payload])?;
        claim(
            compared(&report),
            "the installer should have compared the configuration",
        )?;
        same("containerd's configuration", Effective::of(node)?, before)?;
        same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

/// A restart that brings more than the handler is undone. Nothing tells that the rest is the administrator's own edit;
/// he is told what has changed, and the next install finds it in force.
fn edit_is_told(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload];
        let main = node.inside(MAIN);
        let text = fs::read_to_string(&main).trying("reading containerd's configuration")?;
        let edited = text.replace("SystemdCgroup = false", "SystemdCgroup = true");
        fs::write(&main, edited).trying("editing containerd's configuration")?;
        let before = installer.tree()?;
        let failed = installer.run(&install)?;
        same("the phase", failed.phase, Phase::Failed)?;
        sentence(
            &failed,
            Code::ConfigInvalid,
            "containerd had not the same `containerd.runtimes.runc.options.SystemdCgroup` after its restart as before: ",
        )?;
        done("what was undone", &failed, false, true)?;
        installer.tree()?.same_as(&before)?;
        installer.succeed(&install)?;
        installer.succeed(&["uninstall"])?;
        fs::write(&main, text).trying("writing containerd's configuration back")?;
        node.restart_containerd()
    })
}

/// Whether the installer has compared what containerd made of its configuration before and after its restart.
fn compared(report: &Report) -> bool {
    !report
        .warnings
        .iter()
        .any(|warning| warning.contains("was not compared"))
}

/// A Sandpod that wrote the same drop-in for all nodes has made containerd ignore what the node's own file says.
fn drop_in_put_right(node: &Node) -> Result {
    const OF_VERSION_3: &str = include_str!("../../deploy/cri/50-kata.containerd-2.toml");
    play_with_own_configuration(node, |installer| {
        let before = Effective::of(node)?;
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload];
        installer.succeed(&install)?;
        let installed = installer.tree()?;
        fs::write(node.inside(DROP_IN), OF_VERSION_3).trying("writing another drop-in")?;
        node.restart_containerd()?;
        let ignored = Effective::of(node)?.is_the_administrators();
        claim(ignored.is_err(), "containerd should ignore its main file by now")?;
        sentence(
            &installer.run(&["verify"])?,
            Code::Damaged,
            "/etc/containerd/conf.d/50-kata.toml has not the `version` of the configuration that imports it",
        )?;
        let repaired = installer.succeed(&install)?;
        done("a repair", &repaired, true, true)?;
        claim(
            !compared(&repaired),
            "a configuration that was not read cannot be compared",
        )?;
        installer.tree()?.same_as(&installed)?;
        same("containerd's configuration", Effective::of(node)?, before)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

fn an_old_containerd_is_refused(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let refusal = installer.run(&["install", "--payload", &payload])?;
        same("the phase", refusal.phase, Phase::Refused)?;
        sentence(&refusal, Code::CriTooOld, "containerd 1.6.")?;
        let text = refusal.error.map(|problem| problem.text).unwrap_or_default();
        contains(
            "the refusal",
            &text,
            "is too old: update it to 2.0 or later, or add the handler",
        )
    })
}

fn shell(node: &Node, script: &str) -> Result {
    let mut command: Command = node.command("sh");
    run::succeed(command.args(["-c", script]), run::ORDINARY).map(drop)
}

/// The labels of a distribution's policy, as an enforcing kernel would ask for them; where the file system has none,
/// one sentence and no change.
fn labels(node: &Node) -> Result {
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
