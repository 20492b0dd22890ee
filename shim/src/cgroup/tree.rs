//! The host's hierarchies, and how a folder comes to be in them.
//!
//! A new folder of v1's cpuset has no processors and takes no process before it is given some. On v2 a folder has the
//! controllers that its parent passes on (`cgroup.subtree_control`). Sources:
//! `Documentation/admin-guide/cgroup-v1/cpusets.rst`, `Documentation/admin-guide/cgroup-v2.rst`.

use super::{CgroupError, Leaf, file, write};
use crate::mountinfo::{self, Mount};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use std::fs;
use std::path::{Path, PathBuf};

/// Where systemd, and everybody after it, mounts v2, or v1's hierarchies in folders.
const MOUNT: &str = "/sys/fs/cgroup";

/// What a sandbox's usage is read from, and what its processors are bound with. The pod's limits, of these and of
/// others, are set above.
const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "cpuset"];

/// The host has one cgroup tree (v2); otherwise one for each controller (v1).
pub fn is_v2() -> bool {
    statfs(MOUNT).is_ok_and(|host| host.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// For each hierarchy: where it is mounted, and this process's folder in it. The one that can freeze comes first, so
/// that it is emptied first.
pub(super) fn trees() -> Result<Vec<(PathBuf, PathBuf)>, CgroupError> {
    let path = Path::new("/proc/self/cgroup");
    let own = fs::read_to_string(path).map_err(|source| file("read", path, source))?;
    // `id:controllers:path`, without controllers on v2; the path itself may hold colons.
    let own: Vec<_> = own
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
        .collect();
    let home = |root: &Path, mounted: &Path, names: &dyn Fn(&str) -> bool| {
        let path = own
            .iter()
            .find(|(controllers, _)| controllers.split(',').any(names))
            .map_or("/", |(_, path)| path);
        let path = Path::new(path).strip_prefix(mounted).unwrap_or(Path::new(path));
        let home = root.join(path.strip_prefix("/").unwrap_or(path));
        if home.exists() { home } else { root.to_owned() }
    };
    if is_v2() {
        let root = PathBuf::from(MOUNT);
        let home = home(&root, Path::new("/"), &str::is_empty);
        return Ok(vec![(root, home)]);
    }
    let mounts = mountinfo::mounts().map_err(|source| file("read", Path::new("/proc/self/mountinfo"), source))?;
    let mut trees: Vec<(PathBuf, PathBuf)> = Vec::new();
    let mut devices: Vec<&str> = Vec::new();
    for mount in mounts.iter().filter(|mount| is_hierarchy(mount)) {
        // A hierarchy that is mounted twice is one.
        if devices.contains(&mount.device.as_str()) {
            continue;
        }
        devices.push(&mount.device);
        let names = |name: &str| mount.super_options.iter().any(|option| option == name);
        trees.push((mount.point.clone(), home(&mount.point, &mount.root, &names)));
    }
    trees.sort_by_key(|(root, _)| !root.ends_with("freezer"));
    Ok(trees)
}

/// Whether a mount is a hierarchy of v1 that a container's processes are in: one of controllers, or systemd's.
fn is_hierarchy(mount: &Mount) -> bool {
    let name = mount
        .super_options
        .iter()
        .find_map(|option| option.strip_prefix("name="));
    mount.kind == "cgroup" && name.is_none_or(|name| name == "systemd")
}

/// Makes the folder, and those above it.
pub(super) fn create_folder(leaf: &Leaf) -> Result<(), CgroupError> {
    fs::create_dir_all(&leaf.folder).map_err(|source| file("make", &leaf.folder, source))?;
    for folder in below(&leaf.root, &leaf.folder) {
        for name in ["cpuset.cpus", "cpuset.mems"] {
            inherit(folder, name)?;
        }
    }
    Ok(())
}

/// Gives a folder of v1's cpuset what its parent has, unless it has some of its own.
fn inherit(folder: &Path, name: &str) -> Result<(), CgroupError> {
    let (path, parent) = (folder.join(name), folder.parent().map(|parent| parent.join(name)));
    // v2 has the file too, and there an empty one means the parent's. Its root has none, and v1's has one.
    let Some(parent) =
        parent.filter(|parent| path.exists() && parent.exists() && !folder.join("cgroup.controllers").exists())
    else {
        return Ok(());
    };
    let read = |path: &Path| fs::read_to_string(path).map_err(|source| file("read", path, source));
    match read(&path)?.trim() {
        "" => write(&path, read(&parent)?.trim()),
        _ => Ok(()),
    }
}

/// Lets the controllers that are needed reach a folder of v2, as far as they do not yet. What is missing is missing in
/// the statistics, which say so.
pub(super) fn enable_controllers(leaf: &Leaf) {
    let above = below(&leaf.root, &leaf.folder).into_iter().filter_map(Path::parent);
    for folder in above {
        let words = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let (offered, passed_on) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
        let has = |list: &str, controller: &str| list.split_whitespace().any(|word| word == controller);
        let missing = |controller: &&str| has(&offered, controller) && !has(&passed_on, controller);
        for controller in CONTROLLERS.iter().filter(|controller| missing(controller)) {
            if let Err(error) = write(&folder.join("cgroup.subtree_control"), &format!("+{controller}")) {
                tracing::warn!(%error, controller, "the pod has not this controller");
            }
        }
    }
}

/// The folders from the one below `root` to `folder`.
fn below<'a>(root: &Path, folder: &'a Path) -> Vec<&'a Path> {
    let mut folders: Vec<_> = folder.ancestors().take_while(|folder| *folder != root).collect();
    folders.reverse();
    folders
}
