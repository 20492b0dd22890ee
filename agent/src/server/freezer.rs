//! Freezing and thawing the processes of a cgroup.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{Doing, Result};

/// How long processes may take to freeze: one in an uninterruptible call does when it returns.
const PATIENCE: Duration = Duration::from_secs(10);

/// Freezes or thaws everything in a cgroup and below it; returns when it is done. Idempotent. Blocks.
pub(super) fn set(cgroup: &Path, frozen: bool) -> Result<()> {
    let what = || {
        format!(
            "{} the processes in {}",
            if frozen { "freeze" } else { "thaw" },
            cgroup.display()
        )
    };
    let value = if frozen { "1" } else { "0" };
    fs::write(cgroup.join("cgroup.freeze"), value).doing(what)?;
    let done = wait(cgroup, &format!("frozen {value}"));
    if done.is_err() && frozen {
        // Half frozen is worse than not; the first error is the one to tell.
        let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
    }
    done.doing(what)
}

/// Whether a cgroup is frozen, or about to be.
pub(super) fn is_set(cgroup: &Path) -> Result<bool> {
    let path = cgroup.join("cgroup.freeze");
    let state = fs::read_to_string(&path).doing(|| format!("read {}", path.display()))?;
    Ok(state.trim() == "1")
}

fn wait(cgroup: &Path, state: &str) -> io::Result<()> {
    let mut events = File::open(cgroup.join("cgroup.events"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == state) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // The kernel signals a change of the file (cgroup-v2.rst, "cgroup.events").
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)?;
    }
}
