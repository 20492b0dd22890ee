//! Scopes: cgroups that systemd makes for processes that it has not started.
//! Sources: org.freedesktop.systemd1(5), systemd.scope(5), <https://systemd.io/CONTROL_GROUP_INTERFACE>.

use super::bus::{Bus, BusError, Object, Value};
use super::{CgroupError, CpuList, Scope};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// systemd answers in milliseconds, and in seconds when a node starts all its pods at once.
const PATIENCE: Duration = Duration::from_secs(60);

const MANAGER: Object = Object {
    service: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
};

/// The host was booted with systemd (sd_booted(3)).
pub(super) fn is_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes a scope with the process in it. Its slice is started if it is not there.
pub(super) fn start(scope: &Scope, pid: u32) -> Result<(), CgroupError> {
    start_unit(scope, pid).map_err(failed("start", scope))
}

/// Binds the processes of a scope to processors.
pub(super) fn bind(scope: &Scope, cpus: &CpuList) -> Result<(), CgroupError> {
    let bind = || -> Result<(), BusError> {
        let mask = cpus.mask();
        let properties = [("AllowedCPUs", Value::Bytes(&mask))];
        let until_reboot = Value::Bool(true);
        let arguments = [Value::Text(&scope.unit), until_reboot, Value::Properties(&properties)];
        Bus::connect(PATIENCE)?
            .call(MANAGER, "SetUnitProperties", &arguments)
            .map(drop)
    };
    bind().map_err(failed("bind the processors of", scope))
}

/// Waits until systemd has removed the folder of an empty scope, or the time is over.
///
/// systemd reads in the folder that nobody is in it. If somebody else has removed it by then, the scope never ends for
/// systemd, and a node that shuts down waits for it as long as for a process that does not end.
pub(super) fn wait_for_removal(folder: &Path, patience: Duration) -> io::Result<()> {
    /// How soon to look again where the node has no inotify instance or watch left for root.
    const AGAIN: Duration = Duration::from_millis(50);
    let deadline = Instant::now() + patience;
    let watched = || -> nix::Result<Inotify> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(folder.parent().unwrap_or(folder), AddWatchFlags::IN_DELETE)?;
        Ok(inotify)
    };
    let inotify = match watched() {
        Err(nix::Error::ENOENT) => return Ok(()),
        Err(nix::Error::EMFILE | nix::Error::ENOSPC) => None,
        watched => Some(watched?),
    };
    while folder.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            tracing::warn!(folder = %folder.display(), "systemd has not removed the scope's cgroup: the shim does");
            break;
        }
        let Some(inotify) = &inotify else {
            std::thread::sleep(left.min(AGAIN));
            continue;
        };
        let mut removals = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        if poll(&mut removals, u16::try_from(left.as_millis()).unwrap_or(u16::MAX))? > 0 {
            inotify.read_events()?;
        }
    }
    Ok(())
}

fn failed(action: &'static str, scope: &Scope) -> impl FnOnce(BusError) -> CgroupError {
    move |source| CgroupError::Systemd {
        action,
        unit: scope.unit.clone(),
        source,
    }
}

fn start_unit(scope: &Scope, pid: u32) -> Result<(), BusError> {
    let mut bus = Bus::connect(PATIENCE)?;
    bus.listen(MANAGER, "JobRemoved", &format!("arg2='{}'", scope.unit))?;
    let description = format!("Sandpod virtual machine {}", scope.unit);
    let properties = [
        ("Description", Value::Text(&description)),
        ("Slice", Value::Text(&scope.slice)),
        ("PIDs", Value::Numbers(&[pid])),
        // Controllers are on, and stay on, and what happens below is not systemd's business.
        ("Delegate", Value::Bool(true)),
        // The limits are the slice's.
        ("TasksMax", Value::Number(u64::MAX)),
        // A scope in which something was killed for want of memory is forgotten like any other.
        ("CollectMode", Value::Text("inactive-or-failed")),
        // At the node's end the kubelet stops pods in its order; systemd has no part in it.
        ("DefaultDependencies", Value::Bool(false)),
    ];
    let arguments = [
        Value::Text(&scope.unit),
        Value::Text("replace"),
        Value::Properties(&properties),
        Value::NoUnits,
    ];
    let answer = bus.call(MANAGER, "StartTransientUnit", &arguments)?;
    let job = answer.first().ok_or(BusError::Format("it names no job"))?;
    let result = bus.wait_for("JobRemoved", |texts| match texts {
        [removed, _unit, result] if removed == job => Some(result.clone()),
        _ => None,
    })?;
    match result.as_str() {
        "done" => Ok(()),
        _ => Err(BusError::Job(result)),
    }
}
