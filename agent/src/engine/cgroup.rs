//! A container's cgroup (v2) beyond what libcontainer does with it.

use std::{
    fs,
    io::{self, ErrorKind, Read, Seek},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

pub(super) const ROOT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to leave (a process in an uninterruptible call leaves when it returns).
const LEAVE: Duration = Duration::from_secs(10);
/// A process that comes into a cgroup after the others were killed is killed this much later.
const KILL_AGAIN: Duration = Duration::from_millis(100);

/// The folder of a relative cgroup path.
pub(super) fn folder(path: &Path) -> PathBuf {
    Path::new(ROOT).join(path)
}

/// Kills what is left in a cgroup and below it, and removes it, also when a process comes into it meanwhile or somebody
/// else removes it. Nothing to do if there is none.
///
/// libcontainer's removal sleeps, gives up after 100 ms and leaves cgroups that the container made itself.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    let deadline = Instant::now() + LEAVE;
    loop {
        match remove_tree(folder) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
            other => return other,
        }
        gone(fs::write(folder.join("cgroup.kill"), "1").and_then(|()| wait_empty(folder)))?;
        if Instant::now() > deadline {
            let text = format!("the processes in {} do not end", folder.display());
            return Err(io::Error::new(ErrorKind::TimedOut, text));
        }
    }
}

/// A cgroup that is not there, or whose file was open when it was removed, is removed.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        other => other,
    }
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
        other => return gone(other),
    }
    // Busy: it has processes, or children. Its files vanish with it.
    let entries = match fs::read_dir(folder) {
        Err(e) => return gone(Err(e)),
        Ok(entries) => entries,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    gone(fs::remove_dir(folder))
}

/// Waits until a cgroup and those below it have no process, or for [`KILL_AGAIN`].
fn wait_empty(folder: &Path) -> io::Result<()> {
    let mut events = fs::File::open(folder.join("cgroup.events"))?;
    let deadline = Instant::now() + KILL_AGAIN;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // The kernel signals a change of the file (cgroup-v2.rst, "cgroup.events").
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)?;
    }
}

/// Where a further process of a container goes: its cgroup, or that of its init if the container (say, systemd)
/// made children with controllers, after which its own cgroup takes no process.
pub(super) fn for_exec(path: &Path, init: i32) -> io::Result<PathBuf> {
    let delegated = fs::read_to_string(folder(path).join("cgroup.subtree_control"))?;
    if delegated.trim().is_empty() {
        return Ok(path.to_owned());
    }
    let membership = fs::read_to_string(format!("/proc/{init}/cgroup"))?;
    let found = membership.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(found.map_or_else(|| path.to_owned(), PathBuf::from))
}

/// Whether the kernel has swap, and so cgroups a limit of it.
pub(super) fn has_swap() -> bool {
    Path::new("/proc/swaps").exists()
}
