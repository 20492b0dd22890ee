use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::{install::dropin, log_level::LogLevel};

struct Node {
    _root: tempfile::TempDir,
    host: Host,
}

impl Node {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let node = Self {
            host: Host::new(root.path()),
            _root: root,
        };
        fs::create_dir_all(node.host.at("/run")).unwrap();
        for (path, text) in files {
            node.put(path, text);
        }
        node
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.host.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A program of the node: a script that finds what it is asked in `$*`.
    fn program(&self, name: &str, script: &str) {
        let path = format!("/usr/bin/{name}");
        self.put(&path, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(self.host.at(path), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn refusal(&self, kind: Kind) -> Option<String> {
        let refused = refuse_foreign(&self.host, kind, &ours(kind));
        refused.err().map(|error| error.to_string())
    }

    fn verdict(&self, kind: Kind) -> Option<String> {
        let version = Version::parse(match kind {
            Kind::Crio => "1.33.0",
            Kind::Containerd => "v2.4.2",
        });
        let folder = RuntimeFolder::make(&self.host).unwrap();
        let verdict = validate(&self.host, &folder, kind, &version, &ours(kind));
        drop(folder);
        assert!(files::names(&self.host.at("/run")).unwrap().is_empty());
        verdict.err().map(|error| error.to_string())
    }
}

fn ours(kind: Kind) -> Vec<DropIn> {
    dropin::all(kind, Path::new("/opt/sandpod"), LogLevel::Debug)
}

const CRIO_HANDLER: &str = "[crio.runtime.runtimes.kata]\nruntime_path = \"/usr/bin/containerd-shim-kata-v2\"\n";
const CONTAINERD_HANDLER: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\nruntime_type = \"io.containerd.kata.v2\"\n";
const IMPORTS: &str = "version = 3\nimports = [\"conf.d/*.toml\"]\n";

fn foreign(path: &str) -> Option<String> {
    Some(format!(
        "{path} already defines a handler `kata`, which Sandpod did not write: remove it from there and install again"
    ))
}

#[test]
fn another_handler_of_crios_is_found_in_whatever_file() {
    for path in [
        "/etc/crio/crio.conf",
        "/etc/crio/crio.conf.d/sub/99-kata-deploy~",
        "/etc/crio/crio.conf.d/50-kata",
    ] {
        let node = Node::new(&[(path, CRIO_HANDLER)]);
        assert_eq!(node.refusal(Kind::Crio), foreign(path));
    }
    let other = CRIO_HANDLER.replace("kata]", "kata-remote]");
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata-remote", &other)]);
    assert_eq!(node.refusal(Kind::Crio), None);
    assert_eq!(Node::new(&[]).refusal(Kind::Crio), None);
}

#[test]
fn our_own_handler_is_not_foreign() {
    let text = ours(Kind::Crio)[0].text.clone().unwrap();
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata", &text)]);
    assert_eq!(node.refusal(Kind::Crio), None);
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata", "[crio.image]\n")]);
    let refusal = node.refusal(Kind::Crio).unwrap();
    assert_eq!(
        refusal,
        "/etc/crio/crio.conf.d/50-kata exists and is not Sandpod's: move it away and install again"
    );
}

#[test]
fn another_handler_of_containerds_is_found_in_what_it_imports() {
    let main = "/etc/containerd/config.toml";
    let both = format!("imports = [\"conf.d/*.toml\"]\n{CONTAINERD_HANDLER}");
    assert_eq!(Node::new(&[(main, &both)]).refusal(Kind::Containerd), foreign(main));
    let imported = "/opt/kata/drop-in.toml";
    let text = "imports = [\"/etc/containerd/conf.d/*.toml\", \"/opt/kata/drop-in.toml\"]\n";
    let node = Node::new(&[(main, text), (imported, CONTAINERD_HANDLER)]);
    assert_eq!(node.refusal(Kind::Containerd), foreign(imported));
    let drop_in = "/etc/containerd/conf.d/50-kata.toml";
    let node = Node::new(&[(main, IMPORTS), (drop_in, CONTAINERD_HANDLER)]);
    assert_eq!(node.refusal(Kind::Containerd), foreign(drop_in));
}

#[test]
fn a_containerd_that_does_not_read_the_folder_is_refused_with_the_line_to_add() {
    let sentence = "containerd does not read /etc/containerd/conf.d: add `imports = [\"/etc/containerd/conf.d/*.toml\"]` \
                    at the top of /etc/containerd/config.toml and install again";
    for main in ["version = 3\n", "imports = [\"/etc/containerd/other/*.toml\"]\n"] {
        let node = Node::new(&[("/etc/containerd/config.toml", main)]);
        assert_eq!(node.refusal(Kind::Containerd).as_deref(), Some(sentence));
    }
    assert_eq!(Node::new(&[]).refusal(Kind::Containerd).as_deref(), Some(sentence));
    for imports in [
        "conf.d/*.toml",
        "/etc/containerd/conf.d/*",
        "/etc/containerd/conf.d/50-kata.toml",
    ] {
        let main = format!("imports = [\"{imports}\"]\n");
        let node = Node::new(&[("/etc/containerd/config.toml", &main)]);
        assert_eq!(node.refusal(Kind::Containerd), None);
    }
}

#[test]
fn a_broken_file_of_the_nodes_is_named() {
    let node = Node::new(&[("/etc/crio/crio.conf.d/10-typo", "[crio.runtime\n")]);
    let refusal = node.refusal(Kind::Crio).unwrap();
    assert!(
        refusal.starts_with("/etc/crio/crio.conf.d/10-typo is not valid: "),
        "{refusal}"
    );
}

#[test]
fn crio_is_asked_with_its_own_files_and_ours() {
    let node = Node::new(&[
        ("/etc/crio/crio.conf", ""),
        ("/etc/crio/crio.conf.d/10-crio.conf", "[crio.image]\n"),
        ("/etc/crio/crio.conf.d/50-kata", "# Sandpod: an old one\n"),
    ]);
    assert_eq!(node.verdict(Kind::Crio), None);
    // It looks as the real one does: the main file by --config, all drop-ins by --config-dir.
    let look = "[ \"$1\" = --version ] && echo crio version 1.33.0 && exit\n\
                [ \"$1 $3 $5\" = '--config --config-dir config' ] && [ -f \"$2\" ] || exit 3\n\
                cd \"$4\" && grep -q image 10-crio.conf && grep -q debug 51-kata-log-level && exec grep -q runtime_path 50-kata";
    node.program("crio", look);
    assert_eq!(node.verdict(Kind::Crio), None);
    let refusing = "[ \"$1\" = --version ] && echo crio version 1.33.0 && exit\necho loading >&2\necho 'invalid runtime_path' >&2\nexit 1";
    node.program("crio", refusing);
    assert_eq!(
        node.verdict(Kind::Crio).as_deref(),
        Some("CRI-O's configuration with the handler `kata` is not valid: invalid runtime_path")
    );
}

#[test]
fn a_program_of_another_version_than_the_running_one_is_not_asked() {
    let node = Node::new(&[]);
    node.program(
        "crio",
        "[ \"$1\" = --version ] && echo crio version 1.30.1 && exit\nexit 1",
    );
    assert_eq!(node.verdict(Kind::Crio), None);
}

#[test]
fn containerd_is_asked_with_a_file_that_imports_both() {
    let node = Node::new(&[("/etc/containerd/config.toml", IMPORTS)]);
    let look = "[ \"$1\" = --version ] && echo containerd v2.4.2 && exit\n\
                [ \"$1 $3 $4\" = '--config config dump' ] && grep -q etc/containerd/config.toml \"$2\" || exit 1\n\
                exec grep -q kata \"${2%/main}/50-kata.toml\"";
    node.program("containerd", look);
    assert_eq!(node.verdict(Kind::Containerd), None);
}

#[test]
fn stars_stand_for_any_letters() {
    assert!(fits("*.toml", "50-kata.toml") && fits("50*k*a.toml", "50-kata.toml") && fits("a", "a") && fits("*", ""));
    assert!(!fits("*.conf", "50-kata.toml") && !fits("50-kata.tom", "50-kata.toml") && !fits("*a", "b"));
}
