//! Everything a node holds, so that two moments can be compared.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::procs;

/// Names of processes that the harness itself has in the node.
const HARNESS: &[&str] = &["cat", "nsenter", "containerd", "ctr", "crictl"];

/// Files that are kept for ever: CNI's host-local has which address it gave last, and its lock, and our shims have the
/// leases of QEMU's users.
const KEPT: &[&str] = &["last_reserved_ip.0", "lock", "uids"];

/// What a node holds at one moment, each thing as a line that a reader understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

/// Where to look.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The pid of the node's first process, outside the node.
    pub init: i32,
    /// The cgroup below which the node's pods live, such as `/sandpod-test-1-0`.
    pub cgroup: String,
    /// The identifiers of every pod so far: no cgroup may carry one of these names, wherever it is.
    pub identifiers: Vec<String>,
}

impl Census {
    /// Looks at processes, mounts, everything under /run (sockets, network namespaces, state folders, address leases),
    /// cgroups and sockets without a file. Network devices and filters in a pod's network namespace go with it.
    #[must_use]
    pub fn take(scope: &Scope) -> Self {
        let mut found = BTreeSet::new();
        for process in procs::in_namespace_of(scope.init) {
            if !HARNESS.contains(&process.program()) {
                found.insert(format!(
                    "process {} {}",
                    process.pid,
                    crate::run::last_of(&process.arguments.join(" "), 200)
                ));
            }
        }
        let own = PathBuf::from(format!("/proc/{}", scope.init));
        let read = |file: &str| fs::read_to_string(own.join(file)).unwrap_or_default();
        for line in read("mountinfo").lines() {
            let fields: Vec<_> = line.split(' ').collect();
            found.insert(format!("mount {}", fields.get(4).unwrap_or(&line)));
        }
        for line in read("net/unix").lines().skip(1) {
            // net/unix(5): flags 00010000 mark a listening socket.
            let fields: Vec<_> = line.split_whitespace().collect();
            if let (Some(&"00010000"), Some(path)) = (fields.get(3), fields.get(7)) {
                found.insert(format!("socket {path}"));
            }
        }
        for line in read("net/dev").lines().skip(2) {
            found.insert(format!(
                "network device {}",
                line.split(':').next().unwrap_or(line).trim()
            ));
        }
        walk(&own.join("root/run"), Path::new("/run"), &mut found);
        found.extend(cgroups(scope));
        Census(found)
    }

    /// How many things there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What is here and was not in `before`.
    #[must_use]
    pub fn since(&self, before: &Census) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// The mount points of this machine's cgroup hierarchies, v1 and v2.
#[must_use]
pub fn hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount_of = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup")
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    };
    table.lines().filter_map(mount_of).collect()
}

/// The folders below `root`, deepest first, with it.
#[must_use]
pub fn folders(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_path_buf()];
    let mut next = 0;
    while let Some(folder) = found.get(next).cloned() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        found.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        next += 1;
    }
    found.reverse();
    found
}

fn cgroups(scope: &Scope) -> Vec<String> {
    let mut found = Vec::new();
    for hierarchy in hierarchies() {
        let own = hierarchy.join(scope.cgroup.trim_start_matches('/'));
        for folder in folders(&hierarchy) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let below = folder.starts_with(&own) && folder != own;
            if below
                || scope
                    .identifiers
                    .iter()
                    .any(|identifier| name.contains(identifier.as_str()))
            {
                found.push(format!("cgroup {}", folder.display()));
            }
        }
    }
    found
}

fn walk(folder: &Path, shown: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let shown = shown.join(&name);
        if KEPT.contains(&name.to_string_lossy().as_ref()) {
            continue;
        }
        found.insert(format!("file {}", shown.display()));
        // Root file systems of containers and volumes are others' files: the mount table shows them.
        let within = entry.file_type().is_ok_and(|kind| kind.is_dir()) && name != "rootfs" && name != "shared";
        if within {
            walk(&entry.path(), &shown, found);
        }
    }
}
