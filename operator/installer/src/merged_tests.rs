use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::{
    cri::Version,
    dropin::{DropIn, Wanted},
    dry_run::validate_with,
    imports::edit,
    log_level::LogLevel,
    runtime_folder::RuntimeFolder,
};

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

    fn refusal(&self, daemon: Daemon) -> Option<String> {
        let usual = match daemon.kind() {
            Kind::Crio => Format::Crio,
            Kind::Containerd => Format::ContainerdV3,
        };
        let format = format(&self.host, daemon).unwrap_or(usual);
        let refused = refuse_foreign(&self.host, daemon, format, &BTreeSet::from(["kata".to_owned()]));
        refused.err().map(|error| error.to_string())
    }

    fn format(&self) -> Result<Format> {
        format(&self.host, Daemon::Containerd)
    }

    fn verdict(&self, daemon: Daemon) -> Option<String> {
        let format = format(&self.host, daemon).unwrap();
        self.verdict_on(daemon, &ours_of(daemon, format))
    }

    fn verdict_on(&self, daemon: Daemon, ours: &[DropIn]) -> Option<String> {
        let version = Version::parse(match daemon.kind() {
            Kind::Crio => "1.33.0",
            Kind::Containerd => "v2.4.2",
        });
        let folder = RuntimeFolder::make(&self.host).unwrap();
        let verdict = validate_with(&self.host, &folder, daemon.site(), &version, ours);
        drop(folder);
        assert!(!self.host.at("/run/sandpod").exists());
        verdict.err().map(|error| error.to_string())
    }
}

fn ours_of(daemon: Daemon, format: Format) -> Vec<DropIn> {
    let wanted = Wanted {
        prefix: Path::new("/opt/sandpod"),
        level: LogLevel::Debug,
        configuration: "",
        classes: &BTreeMap::new(),
    };
    dropin::all(daemon, format, &wanted)
}

fn ours(format: Format) -> Vec<DropIn> {
    let daemon = match format {
        Format::Crio => Daemon::Crio,
        _ => Daemon::Containerd,
    };
    ours_of(daemon, format)
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
        assert_eq!(node.refusal(Daemon::Crio), foreign(path));
    }
    let other = CRIO_HANDLER.replace("kata]", "kata-remote]");
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata-remote", &other)]);
    assert_eq!(node.refusal(Daemon::Crio), None);
    assert_eq!(Node::new(&[]).refusal(Daemon::Crio), None);
}

#[test]
fn our_own_handler_is_not_foreign() {
    let text = ours(Format::Crio)[0].text.clone().unwrap();
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata", &text)]);
    assert_eq!(node.refusal(Daemon::Crio), None);
    let node = Node::new(&[("/etc/crio/crio.conf.d/50-kata", "[crio.image]\n")]);
    let refusal = node.refusal(Daemon::Crio).unwrap();
    assert_eq!(
        refusal,
        "/etc/crio/crio.conf.d/50-kata exists and is not Sandpod's: move it away and install again"
    );
}

#[test]
fn another_handler_of_containerds_is_found_in_what_it_imports() {
    let main = "/etc/containerd/config.toml";
    let both = format!("imports = [\"conf.d/*.toml\"]\n{CONTAINERD_HANDLER}");
    assert_eq!(Node::new(&[(main, &both)]).refusal(Daemon::Containerd), foreign(main));
    let imported = "/opt/kata/drop-in.toml";
    let text = "imports = [\"/etc/containerd/conf.d/*.toml\", \"/opt/kata/drop-in.toml\"]\n";
    let node = Node::new(&[(main, text), (imported, CONTAINERD_HANDLER)]);
    assert_eq!(node.refusal(Daemon::Containerd), foreign(imported));
    let drop_in = "/etc/containerd/conf.d/50-kata.toml";
    let node = Node::new(&[(main, IMPORTS), (drop_in, CONTAINERD_HANDLER)]);
    assert_eq!(node.refusal(Daemon::Containerd), foreign(drop_in));
}

#[test]
fn a_containerd_that_does_not_read_the_folder_is_refused_with_the_line_to_add() {
    let sentence = "containerd does not read /etc/containerd/conf.d: add `imports = [\"/etc/containerd/conf.d/*.toml\"]` \
                    at the top of /etc/containerd/config.toml and install again";
    for main in ["version = 3\n", "imports = [\"/etc/containerd/other/*.toml\"]\n"] {
        let node = Node::new(&[("/etc/containerd/config.toml", main)]);
        assert_eq!(node.refusal(Daemon::Containerd).as_deref(), Some(sentence));
    }
    // A file that is to be made has to have a version, too.
    assert_eq!(
        Node::new(&[]).refusal(Daemon::Containerd),
        Some(sentence.replace("add ", "add `version = 3` and "))
    );
    for imports in [
        "conf.d/*.toml",
        "/etc/containerd/conf.d/*",
        "/etc/containerd/conf.d/50-kata.toml",
    ] {
        let main = format!("imports = [\"{imports}\"]\n");
        let node = Node::new(&[("/etc/containerd/config.toml", &main)]);
        assert_eq!(node.refusal(Daemon::Containerd), None);
    }
}

#[test]
fn a_broken_file_of_the_nodes_is_named() {
    let node = Node::new(&[("/etc/crio/crio.conf.d/10-typo", "[crio.runtime\n")]);
    let refusal = node.refusal(Daemon::Crio).unwrap();
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
    assert_eq!(node.verdict(Daemon::Crio), None);
    // It looks as the real one does: the main file by --config, all drop-ins by --config-dir.
    let look = "[ \"$1\" = --version ] && echo crio version 1.33.0 && exit\n\
                [ \"$1 $3 $5\" = '--config --config-dir config' ] && [ -f \"$2\" ] || exit 3\n\
                cd \"$4\" && grep -q image 10-crio.conf && grep -q debug 51-kata-log-level && exec grep -q runtime_path 50-kata";
    node.program("crio", look);
    assert_eq!(node.verdict(Daemon::Crio), None);
    let refusing = "[ \"$1\" = --version ] && echo crio version 1.33.0 && exit\necho loading >&2\necho 'invalid runtime_path' >&2\nexit 1";
    node.program("crio", refusing);
    assert_eq!(
        node.verdict(Daemon::Crio).as_deref(),
        Some("CRI-O's configuration with the handlers of Sandpod is not valid: invalid runtime_path")
    );
}

#[test]
fn a_program_of_another_version_than_the_running_one_is_not_asked() {
    let node = Node::new(&[]);
    node.program(
        "crio",
        "[ \"$1\" = --version ] && echo crio version 1.30.1 && exit\nexit 1",
    );
    assert_eq!(node.verdict(Daemon::Crio), None);
}

/// A containerd that prints what it reads: the main file and everything in the folder that this one imports, without
/// the imports. As containerd 2.2, it takes the version that it reads last, and prints nothing of other versions.
const CONTAINERD: &str = r#"[ "$1" = --version ] && echo containerd v2.4.2 && exit
[ "$1 $3 $4" = '--config config dump' ] && [ "${2##*/etc/}" = containerd/config.toml ] || exit 3
all="$2 $(sed -n 's/^imports = \[\(.*\)\]$/\1/p' "$2" | tr -d '",')"
version=$(cat $all | sed -n 's/^version = //p' | tail -n 1)
[ "$version" -lt 5 ] || { echo "there is no version $version" >&2; exit 1; }
echo "version = $version"
for file in $all; do
  ! grep -q "^version = $version" $file || sed '/^version/d; /^imports/d' $file
done"#;

/// A main file of a version, with a cgroup driver.
fn main(version: u32) -> String {
    let plugin = match version {
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    };
    format!(
        "imports = [\"conf.d/*.toml\"]\nversion = {version}\n\
         [plugins.\"{plugin}\".containerd.runtimes.runc.options]\nSystemdCgroup = true\n"
    )
}

#[test]
fn the_drop_in_has_the_version_of_the_file_that_imports_it() {
    let format = |text: &str| Node::new(&[("/etc/containerd/config.toml", text)]).format();
    for (version, expected) in [
        (2, Format::ContainerdV2),
        (3, Format::ContainerdV3),
        (4, Format::ContainerdV3),
    ] {
        assert_eq!(format(&main(version)).unwrap(), expected);
    }
    assert_eq!(Node::new(&[]).format().unwrap(), Format::ContainerdV3);
    for text in ["", "version = 1\n", "version = \"2\"\n"] {
        assert_eq!(
            format(text).unwrap_err().to_string(),
            "/etc/containerd/config.toml has no `version`, or the version 1: write into it what `containerd config \
             migrate` prints and install again"
        );
    }
}

#[test]
fn containerd_is_asked_with_its_own_files_and_ours() {
    for version in [2, 3] {
        let node = Node::new(&[("/etc/containerd/config.toml", &main(version))]);
        assert_eq!(node.verdict(Daemon::Containerd), None);
        node.program("containerd", CONTAINERD);
        assert_eq!(node.verdict(Daemon::Containerd), None);
        // One that an earlier installer has written in another version makes no difference: ours takes its place.
        let earlier = [Format::ContainerdV3, Format::ContainerdV2][version as usize - 2];
        let earlier = ours(earlier)[0].text.clone().unwrap();
        node.put("/etc/containerd/conf.d/50-kata.toml", &earlier);
        assert_eq!(node.verdict(Daemon::Containerd), None);
    }
}

#[test]
fn a_containerd_that_would_refuse_its_files_is_not_restarted() {
    let node = Node::new(&[("/etc/containerd/config.toml", &main(5))]);
    node.program("containerd", CONTAINERD);
    assert_eq!(
        node.verdict(Daemon::Containerd).as_deref(),
        Some("containerd's configuration is not valid: there is no version 5")
    );
}

#[test]
fn a_containerd_that_would_read_less_with_ours_is_not_restarted() {
    // The file of somebody else has made containerd ignore the main one, which ours would bring back.
    let node = Node::new(&[
        ("/etc/containerd/config.toml", &main(2)),
        (
            "/etc/containerd/conf.d/10-theirs.toml",
            "version = 3\nroot = \"/data\"\n",
        ),
    ]);
    node.program("containerd", CONTAINERD);
    assert_eq!(
        node.verdict(Daemon::Containerd).as_deref(),
        Some(
            "containerd would not have the same `plugins` with /etc/containerd/conf.d/50-kata.toml as without it: give \
             every file that /etc/containerd/config.toml imports the `version` that /etc/containerd/config.toml has \
             and install again"
        )
    );
}

#[test]
fn what_an_import_imports_is_copied_too() {
    let node = Node::new(&[
        (
            "/etc/containerd/config.toml",
            "version = 3\nimports = [\"more/all.toml\"]\n",
        ),
        (
            "/etc/containerd/more/all.toml",
            "imports = [\"../conf.d/*.toml\", \"/opt/kept.toml\"]\nversion = 3\n",
        ),
        ("/opt/kept.toml", "version = 3\nroot = \"/data\"\n"),
    ]);
    let look = "[ \"$1\" = --version ] && echo containerd v2.4.2 && exit\n\
                cd \"${2%/etc/containerd/config.toml}\" || exit 3\n\
                grep -q \"$PWD/etc/containerd/more/all.toml\" etc/containerd/config.toml || exit 4\n\
                grep -q \"$PWD/opt/kept.toml\" etc/containerd/more/all.toml && grep -q /data opt/kept.toml || exit 5";
    node.program("containerd", look);
    assert_eq!(node.verdict(Daemon::Containerd), None);
}

#[test]
fn stars_stand_for_any_letters() {
    assert!(fits("*.toml", "50-kata.toml") && fits("50*k*a.toml", "50-kata.toml") && fits("a", "a") && fits("*", ""));
    assert!(!fits("*.conf", "50-kata.toml") && !fits("50-kata.tom", "50-kata.toml") && !fits("*a", "b"));
}

const MANAGED_MAIN: &str = "# k0s_managed=true\nversion = 3\nimports = [\"/run/k0s/containerd-cri.toml\"]\n";
const OF_RUNC: &str = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\na = 1\n";
const OF_K0S: &str = "/etc/k0s/containerd.d/50-kata.toml";

#[test]
fn what_k0s_makes_of_our_drop_in_is_ours_too() {
    let merged = "/run/k0s/containerd-cri.toml";
    let main = Daemon::K0s.site().main;
    let text = ours_of(Daemon::K0s, Format::ContainerdV3)[0].text.clone().unwrap();
    let node = Node::new(&[(main, MANAGED_MAIN), (merged, CONTAINERD_HANDLER), (OF_K0S, &text)]);
    assert_eq!(node.refusal(Daemon::K0s), None);
    let theirs = "/etc/k0s/containerd.d/99-theirs.toml";
    node.put(theirs, CONTAINERD_HANDLER);
    assert_eq!(node.refusal(Daemon::K0s), foreign(theirs));
    // Later ones have the main file import the folder.
    let later = "# k0s_managed=true\nversion = 3\nimports = [\"/etc/k0s/containerd.d/*.toml\"]\n";
    let node = Node::new(&[(main, later), (OF_K0S, &text)]);
    assert_eq!(node.refusal(Daemon::K0s), None);
    node.put(theirs, CONTAINERD_HANDLER);
    assert_eq!(node.refusal(Daemon::K0s), foreign(theirs));
    // One that its administrator has taken over reads what it imports.
    let node = Node::new(&[(main, "version = 3\n")]);
    assert_eq!(
        node.refusal(Daemon::K0s).as_deref(),
        Some(
            "k0s's containerd does not read /etc/k0s/containerd.d: add `imports = [\"/etc/k0s/containerd.d/*.toml\"]` \
             at the top of /etc/k0s/containerd.toml and install again"
        )
    );
}

#[test]
fn a_distribution_that_does_not_import_its_folder_has_a_cure_of_its_own() {
    let site = Daemon::Rke2.site();
    let folder = "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d";
    let node = Node::new(&[(site.main, "version = 3\n")]);
    assert_eq!(
        node.refusal(Daemon::Rke2),
        Some(format!(
            "RKE2's containerd does not read {folder}: {} has no `imports = [\"{folder}/*.toml\"]`; update RKE2 to a \
             version whose containerd does, or begin its template with that line and install again",
            site.main
        ))
    );
    node.put(site.main, &format!("version = 3\nimports = [\"{folder}/*.toml\"]\n"));
    assert_eq!(node.refusal(Daemon::Rke2), None);
    // The folder of the other version's drop-ins is another one.
    node.put(site.main, &format!("version = 2\nimports = [\"{folder}/*.toml\"]\n"));
    assert!(
        node.refusal(Daemon::Rke2)
            .is_some_and(|refusal| refusal.contains("config.toml.d: "))
    );
}

#[test]
fn what_k0s_will_merge_is_tried_before() {
    let main = Daemon::K0s.site().main;
    let node = Node::new(&[(main, MANAGED_MAIN), ("/run/k0s/containerd-cri.toml", OF_RUNC)]);
    let script = CONTAINERD.replace("containerd/config.toml", "k0s/containerd.toml");
    // The folder of drop-ins is imported where ours is.
    let look = "case $2 in\n*/with/*) grep -q 'containerd.d/\\*.toml' \"$2\" || exit 4 ;; esac\n";
    let script = script.replacen("all=", &format!("{look}all="), 1);
    node.put("/var/lib/k0s/bin/containerd", &format!("#!/bin/sh\n{script}\n"));
    let program = node.host.at("/var/lib/k0s/bin/containerd");
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(node.verdict(Daemon::K0s), None);
}

#[test]
fn an_import_that_would_wake_other_files_is_not_added() {
    let main = "/etc/containerd/config.toml";
    let lineless = format!("{}\n", main_text_without_imports());
    let node = Node::new(&[(main, &lineless)]);
    node.program("containerd", CONTAINERD);
    let with_line = |node: &Node| {
        let (file, _) = edit(&node.host, Daemon::Containerd.site(), Format::ContainerdV3).unwrap();
        let mut ours = ours(Format::ContainerdV3);
        ours.push(file);
        node.verdict_on(Daemon::Containerd, &ours)
    };
    assert_eq!(with_line(&node), None);
    node.put(
        "/etc/containerd/conf.d/10-forgotten.toml",
        "version = 3\n[plugins.x]\na = 1\n",
    );
    assert_eq!(
        with_line(&node).as_deref(),
        Some(
            "containerd would not have the same `plugins.x` with /etc/containerd/conf.d/50-kata.toml as without it: \
             move the other files away from its folder, which are not read so far, and install again"
        )
    );
}

fn main_text_without_imports() -> String {
    let text = main(3);
    text.lines().skip(1).map(|line| format!("{line}\n")).collect()
}
