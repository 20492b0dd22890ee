//! The sandbox's cgroup on the host: the shim enters it before it starts anything, so that QEMU, virtiofsd and the shim
//! itself are counted, and limited, as the pod.
//!
//! The path is the sandbox's `linux.cgroupsPath`. In cgroupfs form (`/kubepods/pod1/abc`) the folders are made here. As
//! systemd's triple (`kubepods-pod1.slice:crio:abc`) it is a scope, which systemd makes: it takes the controllers back
//! from folders that it does not know. On a host that was not booted with systemd a triple is a folder as well. Limits
//! of the pod are never written here, kubelet and the CRI do that; only the processors of its containers are
//! ([`Processors`]). Sources: cgroups(7), `Documentation/admin-guide/cgroup-v2.rst`,
//! <https://systemd.io/CGROUP_DELEGATION>, `docs/design/host-cgroups.md` of kata-containers.

mod bus;
mod cpuset;
mod systemd;
mod tree;
mod usage;

pub use bus::BusError;
pub use cpuset::{CpuList, Processors};
pub use tree::is_v2;
pub use usage::OomKills;

use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};
use tree::{create_folder, trees};

/// How long killed processes may take to be gone: one may be in the middle of unmapping all of the guest's memory.
const END: Duration = Duration::from_secs(5);

/// The cgroup of a sandbox, before and after it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxCgroup {
    record: Record,
    /// What systemd has to make.
    scope: Option<Scope>,
}

/// A transient unit of systemd (systemd.scope(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Scope {
    slice: String,
    unit: String,
}

/// What [`SandboxCgroup::create`] is going to make, for whoever has to remove it later, in another process if need be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Folders that did not exist, parents first.
    made: Vec<PathBuf>,
    /// In each hierarchy, the sandbox's folder and the one that the shim came from.
    leaves: Vec<Leaf>,
    v2: bool,
    /// Whether the sandbox's folder is a scope, which systemd makes and removes.
    #[serde(default)]
    scope: bool,
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
    /// A process cannot be moved.
    #[error("cannot move process {pid} into cgroup {folder}: {source}")]
    Add {
        /// The process.
        pid: u32,
        /// The cgroup.
        folder: PathBuf,
        /// What the kernel said.
        source: io::Error,
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
    /// systemd does not do its part.
    #[error("systemd does not {action} {unit}: {source}")]
    Systemd {
        /// What it was asked for.
        action: &'static str,
        /// The scope.
        unit: String,
        /// Its answer, or why there is none.
        source: BusError,
    },
    /// A controller that the host has is not enabled for the sandbox.
    #[error("the pod's {controller} is not counted: the controller is not enabled in {folder}")]
    NotCounted {
        /// The controller.
        controller: &'static str,
        /// The cgroup.
        folder: PathBuf,
    },
    /// A list of processors that no kernel takes.
    #[error("`{0}` is no list of processors such as `0-3,8`")]
    Cpus(String),
    /// The host cannot bind the sandbox to processors.
    #[error("cannot bind the pod to processors {0}: the host has no cgroup controller cpuset for it")]
    NoCpuset(String),
}

impl SandboxCgroup {
    /// Finds out what a sandbox with this `linux.cgroupsPath` needs. Changes nothing.
    ///
    /// # Errors
    /// Not a cgroup's path; no cgroups on this host.
    pub fn plan(cgroups_path: &str) -> Result<Self, CgroupError> {
        let (path, scope) = located(cgroups_path)?;
        let scope = scope.filter(|_| systemd::is_booted());
        let mut leaves: Vec<Leaf> = Vec::new();
        for (root, home) in trees()? {
            let folder = root.join(&path);
            if leaves.iter().all(|leaf| leaf.folder != folder) {
                leaves.push(Leaf { folder, home, root });
            }
        }
        if leaves.is_empty() {
            return Err(CgroupError::NoHierarchy);
        }
        // Who has made the sandbox's cgroup has made it in the way that this host wants.
        let scope = scope.filter(|_| !leaves.iter().any(|leaf| leaf.folder.exists()));
        let missing = |leaf: &Leaf| -> Vec<PathBuf> {
            let missing = leaf.folder.ancestors().take_while(|folder| !folder.exists());
            // The slices above a scope are systemd's.
            let most = if scope.is_some() { 1 } else { usize::MAX };
            missing.take(most).map(Path::to_owned).collect()
        };
        let made = leaves.iter().flat_map(|leaf| missing(leaf).into_iter().rev()).collect();
        Ok(Self {
            record: Record {
                made,
                leaves,
                v2: is_v2(),
                scope: scope.is_some(),
            },
            scope,
        })
    }

    /// What has to be removed in the end.
    pub fn record(&self) -> Record {
        self.record.clone()
    }

    /// Makes the cgroup and moves a process there, with all its threads; what it starts later starts there. Blocks
    /// until systemd has made the scope, where it is one.
    ///
    /// # Errors
    /// The kernel or systemd refuses; the process is gone, or may not be moved.
    pub fn create(&self, pid: u32) -> Result<(), CgroupError> {
        if let Some(scope) = &self.scope {
            systemd::start(scope, pid)?;
        }
        for leaf in &self.record.leaves {
            create_folder(leaf)?;
            // Of a scope systemd does this, as it is delegated.
            if self.record.v2 && self.scope.is_none() {
                tree::enable_controllers(leaf);
            }
        }
        self.add(pid)
    }

    fn add(&self, pid: u32) -> Result<(), CgroupError> {
        for leaf in &self.record.leaves {
            let moved = std::fs::write(leaf.folder.join("cgroup.procs"), pid.to_string());
            moved.map_err(|source| CgroupError::Add {
                pid,
                folder: leaf.folder.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// The sandbox's folder where this controller is; on v2 all are in one place.
    fn folder_of(&self, controller: &str) -> Option<&Path> {
        let leaves = &self.record.leaves;
        // On v1 controllers share a hierarchy (`cpu,cpuacct`), which has one mount point.
        let with = |leaf: &&Leaf| {
            let name = leaf.root.file_name().unwrap_or_default().to_string_lossy();
            self.record.v2 || name.split(',').any(|part| part == controller)
        };
        leaves.iter().find(with).map(|leaf| leaf.folder.as_path())
    }
}

impl Record {
    /// Kills whoever is still in the sandbox's cgroup, but for this process, which goes back to where it came from;
    /// waits for their end and removes the folders that the sandbox made. Succeeds on what is already gone. Blocks for
    /// up to 10 s.
    ///
    /// # Errors
    /// Something that was killed does not end; the kernel refuses.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for leaf in self.leaves.iter().filter(|leaf| leaf.folder.exists()) {
            leave(leaf)?;
        }
        for leaf in self.leaves.iter().filter(|leaf| self.made.contains(&leaf.folder)) {
            self.empty(&leaf.folder)?;
            // On v1 the kernel itself tells systemd of an empty cgroup.
            if self.v2 && self.scope {
                systemd::wait_for_removal(&leaf.folder, END).map_err(|source| file("watch", &leaf.folder, source))?;
            }
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
            // Its last process may have ended by itself meanwhile, and systemd has removed the folder.
            match write(&kill_file, "1") {
                Err(CgroupError::File { source, .. }) if is_gone(&source) => return Ok(()),
                written => written?,
            }
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
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(source) => Err(file("read", &path, source)),
    }
}

/// The cgroup has been removed: before its file was opened, or after.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::Error::ENODEV as i32)
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

/// The folder below each hierarchy's mount point, never the root itself, never outside; and the scope that it is to
/// systemd, where it is one.
fn located(cgroups_path: &str) -> Result<(String, Option<Scope>), CgroupError> {
    let wrong = || CgroupError::Path(cgroups_path.to_owned());
    let (path, scope) = match cgroups_path.split(':').collect::<Vec<_>>().as_slice() {
        [path] => (path.trim_matches('/').to_owned(), None),
        [slice, prefix, name] if !name.is_empty() && !name.contains('/') && !prefix.contains('/') => {
            // What runc takes when the CRI names none.
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let folder = expand_slice(slice).ok_or_else(wrong)?;
            let unit = if prefix.is_empty() {
                format!("{name}.scope")
            } else {
                format!("{prefix}-{name}.scope")
            };
            let path = format!("{folder}/{unit}").trim_start_matches('/').to_owned();
            let slice = slice.to_owned();
            (path, Some(Scope { slice, unit }))
        }
        _ => return Err(wrong()),
    };
    let plain = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || !plain {
        Err(wrong())
    } else {
        Ok((path, scope))
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
