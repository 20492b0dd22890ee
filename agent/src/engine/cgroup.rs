//! A container's cgroup (v2) beyond what libcontainer does with it.

use std::{
    fs,
    io::{self, ErrorKind, Read, Seek},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub(super) const ROOT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to leave (a process in an uninterruptible call leaves when it returns).
const LEAVE: Duration = Duration::from_secs(10);

/// The folder of a relative cgroup path.
pub(super) fn folder(path: &Path) -> PathBuf {
    Path::new(ROOT).join(path)
}

/// Kills what is left in a cgroup and below it, and removes it. Nothing to do if there is none.
///
/// libcontainer's removal sleeps, gives up after 100 ms and leaves cgroups that the container made itself.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    match remove_tree(folder) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
        other => return other,
    }
    fs::write(folder.join("cgroup.kill"), "1")?;
    wait_empty(folder)?;
    remove_tree(folder)
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match fs::remove_dir(folder) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
        other => return gone(other),
    }
    // Busy: it has processes, or children. Its files vanish with it.
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    gone(fs::remove_dir(folder))
}

fn wait_empty(folder: &Path) -> io::Result<()> {
    let mut events = fs::File::open(folder.join("cgroup.events"))?;
    let deadline = Instant::now() + LEAVE;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("the processes in {} do not end", folder.display());
            return Err(io::Error::new(ErrorKind::TimedOut, text));
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
