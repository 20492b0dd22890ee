//! Nodes on which nothing can be installed: each gets one sentence, and nothing is changed.

use installer_report::{Code, Phase};
use tests::{
    failure::{Result, contains, same},
    node::Node,
};

use super::{done, play, sentence, shell, small};

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
        what: "mkdir -p /opt/read-only && mount -t tmpfs -o ro,mode=755 tmpfs /opt/read-only",
        right: "umount /opt/read-only && rmdir /opt/read-only",
        arguments: &["--prefix", "/opt/read-only/sandpod"],
        code: Code::ReadOnlyPrefix,
        sentence: "/opt/read-only cannot be written: Read-only file system",
    },
    Bad {
        what: "mkdir -p /opt/open && chmod 777 /opt/open",
        right: "rmdir /opt/open",
        arguments: &["--prefix", "/opt/open/sandpod"],
        code: Code::UnsafePrefix,
        sentence: "/opt/open can be written by others than root",
    },
    Bad {
        what: "mkdir -p /opt/full && mount -t tmpfs -o size=8m,mode=755 tmpfs /opt/full",
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

pub fn bad_nodes(node: &Node) -> Result {
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

pub fn an_old_containerd_is_refused(node: &Node) -> Result {
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
