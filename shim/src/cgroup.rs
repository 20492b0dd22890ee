//! The sandbox's cgroup on the host: the shim enters it before it starts anything, so that QEMU, virtiofsd and the shim itself are
//! counted, and limited, as the pod.
//!
//! The path is the sandbox's `linux.cgroupsPath`, in cgroupfs form (`/kubepods/pod1/abc`) or as systemd's triple
//! (`kubepods-pod1.slice:crio:abc`). A triple becomes a folder of the slice, made directly: systemd leaves what it does not know alone, and the
//! pod's limits are the slice's. Limits are never written here; kubelet and the CRI do that.
//! Sources: cgroups(7), `Documentation/admin-guide/cgroup-v2.rst`, `docs/design/host-cgroups.md` of kata-containers.

mod usage;

use crate::mountinfo;
use cgroups_rs::Cgroup;
use cgroups_rs::CgroupPid;
use cgroups_rs::hierarchies::{self, is_cgroup2_unified_mode};
use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// How long killed processes may take to be gone: one may be in the middle of unmapping all of the guest's memory.
const END: Duration = Duration::from_secs(5);

/// The host has one cgroup tree (v2); otherwise one for each controller (v1).
pub fn is_v2() -> bool {
    is_cgroup2_unified_mode()
}

/// The cgroup of a sandbox, before and after it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxCgroup {
    path: String,
    record: Record,
}

/// What [`SandboxCgroup::create`] is going to make, for whoever has to remove it later, in another process if need be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Folders that did not exist, parents first.
    made: Vec<PathBuf>,
    /// In each hierarchy, the sandbox's folder and the one that the shim came from.
    leaves: Vec<Leaf>,
    v2: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Leaf {
    folder: PathBuf,
    home: PathBuf,
    root: PathBuf,
}

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// Neither a path nor a triple.
    #[error("`{0}` is not a cgroup: a path, or `slice:prefix:name`")]
    Path(String),
    /// No hierarchy is mounted.
    #[error("this host has no cgroups mounted")]
    NoHierarchy,
    /// The folder cannot be made.
    #[error("cannot make cgroup {path}: {source}")]
    Create {
        /// Relative to the hierarchies.
        path: String,
        /// What the library says.
        source: cgroups_rs::error::Error,
    },
    /// A process cannot be moved.
    #[error("cannot move process {pid} into cgroup {path}: {source}")]
    Add {
        /// The process.
        pid: u32,
        /// Relative to the hierarchies.
        path: String,
        /// What the library says.
        source: cgroups_rs::error::Error,
    },
    /// A file of the cgroup cannot be used.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Killed processes are still there.
    #[error("processes of cgroup {0} did not end within 5 s of being killed")]
    Busy(PathBuf),
}

impl SandboxCgroup {
    /// Finds out what a sandbox with this `linux.cgroupsPath` needs. Changes nothing.
    ///
    /// # Errors
    /// Not a cgroup's path; no cgroups on this host.
    pub fn plan(cgroups_path: &str) -> Result<Self, CgroupError> {
        let path = relative(cgroups_path)?;
        let mut made = Vec::new();
        let mut leaves: Vec<Leaf> = Vec::new();
        for (root, home) in trees()? {
            let folder = root.join(&path);
            if leaves.iter().any(|leaf| leaf.folder == folder) {
                continue;
            }
            let missing = folder
                .ancestors()
                .take_while(|folder| !folder.exists())
                .map(Path::to_owned);
            let missing: Vec<_> = missing.collect();
            made.extend(missing.into_iter().rev());
            leaves.push(Leaf { folder, home, root });
        }
        if leaves.is_empty() {
            return Err(CgroupError::NoHierarchy);
        }
        Ok(Self {
            path,
            record: Record {
                made,
                leaves,
                v2: is_v2(),
            },
        })
    }

    /// What has to be removed in the end.
    pub fn record(&self) -> Record {
        self.record.clone()
    }

    /// Makes the folders that do not exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create(&self) -> Result<(), CgroupError> {
        self.handle().create().map_err(|source| CgroupError::Create {
            path: self.path.clone(),
            source,
        })
    }

    /// Moves a process here, with all its threads; what it starts later starts here.
    ///
    /// # Errors
    /// The process is gone, or may not be moved.
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        let moved = self.handle().add_task_by_tgid(CgroupPid::from(u64::from(pid)));
        moved.map_err(|source| CgroupError::Add {
            pid,
            path: self.path.clone(),
            source,
        })
    }

    fn handle(&self) -> Cgroup {
        Cgroup::load(hierarchies::auto(), &self.path)
    }
}

impl Record {
    /// Kills whoever is still in the sandbox's cgroup, but for this process, which goes back to where it came from; waits
    /// for their end and removes the folders that the sandbox made. Succeeds on what is already gone. Blocks for up to 5 s.
    ///
    /// # Errors
    /// Something that was killed does not end; the kernel refuses.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for leaf in self.leaves.iter().filter(|leaf| leaf.folder.exists()) {
            leave(leaf)?;
        }
        for leaf in self.leaves.iter().filter(|leaf| self.made.contains(&leaf.folder)) {
            self.empty(&leaf.folder)?;
        }
        for folder in self.made.iter().rev() {
            let is_leaf = self.leaves.iter().any(|leaf| leaf.folder == *folder);
            match std::fs::remove_dir(folder) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // A parent that somebody else has moved into since is theirs now.
                Err(error) if !is_leaf && error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(source) => return Err(file("remove", folder, source)),
            }
        }
        Ok(())
    }

    /// Kills everything in `folder` and waits until it is empty.
    fn empty(&self, folder: &Path) -> Result<(), CgroupError> {
        let deadline = Instant::now() + END;
        // What a dying process has started is met in the next round.
        while let processes = processes(folder)?
            && !processes.is_empty()
        {
            if Instant::now() >= deadline {
                return Err(CgroupError::Busy(folder.to_owned()));
            }
            self.kill(folder, &processes, deadline)?;
        }
        Ok(())
    }

    fn kill(&self, folder: &Path, processes: &[u32], deadline: Instant) -> Result<(), CgroupError> {
        // Held before they are killed: a pidfd tells the end of a process, and never means another one.
        let mut held = Vec::new();
        for pid in processes {
            held.extend(crate::sys::pidfd_open(*pid).map_err(|source| file("hold a process of", folder, source))?);
        }
        let kill_file = folder.join("cgroup.kill");
        if self.v2 && kill_file.exists() {
            write(&kill_file, "1")?;
        } else {
            // Frozen first, so that nothing is started in between.
            freeze(folder, true)?;
            let killed = held.iter().try_for_each(crate::sys::pidfd_kill);
            freeze(folder, false)?;
            killed.map_err(|source| file("kill a process of", folder, source))?;
        }
        for process in &held {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut end = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            poll(&mut end, u16::try_from(left).unwrap_or(u16::MAX))
                .map_err(|error| file("wait for a process of", folder, error.into()))?;
        }
        Ok(())
    }
}

/// Takes this process out of the sandbox's cgroup.
fn leave(leaf: &Leaf) -> Result<(), CgroupError> {
    let own = std::process::id();
    if !processes(&leaf.folder)?.contains(&own) {
        return Ok(());
    }
    let own = own.to_string();
    // Where it came from may be gone, or on v2 have become a folder that only holds folders; the root takes everybody.
    write(&leaf.home.join("cgroup.procs"), &own).or_else(|_| write(&leaf.root.join("cgroup.procs"), &own))
}

/// Processes directly in `folder`; none when it is gone.
fn processes(folder: &Path) -> Result<Vec<u32>, CgroupError> {
    let path = folder.join("cgroup.procs");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid != 0)
            .collect()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => Ok(Vec::new()),
        Err(error) if error.raw_os_error() == Some(nix::Error::ENODEV as i32) => Ok(Vec::new()),
        Err(source) => Err(file("read", &path, source)),
    }
}

/// Freezes or thaws, in a hierarchy that can. A frozen process of v1 dies when it is thawed.
fn freeze(folder: &Path, frozen: bool) -> Result<(), CgroupError> {
    let (v1, v2) = (folder.join("freezer.state"), folder.join("cgroup.freeze"));
    if v1.exists() {
        write(&v1, if frozen { "FROZEN" } else { "THAWED" })
    } else if v2.exists() {
        write(&v2, if frozen { "1" } else { "0" })
    } else {
        Ok(())
    }
}

/// For each hierarchy: where it is mounted, and this process's folder in it. The one that can freeze comes first, so that it is
/// emptied first.
fn trees() -> Result<Vec<(PathBuf, PathBuf)>, CgroupError> {
    let path = Path::new("/proc/self/cgroup");
    let own = std::fs::read_to_string(path).map_err(|source| file("read", path, source))?;
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
        let root = PathBuf::from(hierarchies::UNIFIED_MOUNTPOINT);
        let home = home(&root, Path::new("/"), &str::is_empty);
        return Ok(vec![(root, home)]);
    }
    let subsystems = hierarchies::auto().subsystems();
    let mut trees = Vec::new();
    let mounts = mountinfo::mounts().map_err(|source| file("read", Path::new("/proc/self/mountinfo"), source))?;
    for mount in mounts {
        let root = mount.point;
        if subsystems
            .iter()
            .any(|subsystem| subsystem.to_controller().path() == root)
        {
            let home = home(&root, &mount.root, &|name| {
                mount.super_options.iter().any(|option| option == name)
            });
            trees.push((root, home));
        }
    }
    trees.sort_by_key(|(root, _)| !root.ends_with("freezer"));
    Ok(trees)
}

/// The folder below each hierarchy's mount point: never the root itself, never outside.
fn relative(cgroups_path: &str) -> Result<String, CgroupError> {
    let wrong = || CgroupError::Path(cgroups_path.to_owned());
    let path = match cgroups_path.split(':').collect::<Vec<_>>().as_slice() {
        [path] => path.trim_matches('/').to_owned(),
        [slice, prefix, name] if !name.is_empty() && !name.contains('/') && !prefix.contains('/') => {
            // What runc takes when the CRI names none.
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let slice = expand_slice(slice).ok_or_else(wrong)?;
            let unit = if prefix.is_empty() {
                format!("{name}.scope")
            } else {
                format!("{prefix}-{name}.scope")
            };
            format!("{slice}/{unit}").trim_start_matches('/').to_owned()
        }
        _ => return Err(wrong()),
    };
    let plain = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || !plain {
        Err(wrong())
    } else {
        Ok(path)
    }
}

/// The folder of a slice: its name tells its parents (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(String::new());
    }
    let parts: Vec<_> = name.split('-').collect();
    let plain = parts.iter().all(|part| !part.is_empty() && !part.contains('/'));
    let folders = (1..=parts.len()).map(|end| format!("{}.slice", parts[..end].join("-")));
    plain.then(|| folders.collect::<Vec<_>>().join("/"))
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    std::fs::write(path, text).map_err(|source| file("write", path, source))
}

fn file(action: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
