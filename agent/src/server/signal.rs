//! Signals to processes and to whole containers.

use std::{collections::BTreeSet, fs};

use agent_protocol::protocol::agent::SignalProcessRequest;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    error::{Doing, Error, Result},
    members,
    sandbox::Sandbox,
    sys,
};
/// The largest number that the kernel knows (`SIGRTMAX`).
const LARGEST: i32 = 64;

/// How often a group of processes is searched for those that were not there the time before.
const ROUNDS: usize = 16;

/// Signals a process, or a whole container (the conventions are those of `src/agent/src/rpc.rs` of kata-containers).
pub(super) fn send(sandbox: &Sandbox, request: &SignalProcessRequest) -> Result<()> {
    let signal = i32::try_from(request.signal)
        .ok()
        .filter(|signal| (0..=LARGEST).contains(signal));
    let signal = signal.ok_or_else(|| Error::Invalid(format!("signal {} does not exist", request.signal)))?;
    let container = sandbox.container(&request.container_id)?;
    let all = request.all || request.exec_id.is_empty();
    if all && signal == Signal::SIGKILL as i32 {
        return kill_all(sandbox, &container.id);
    }
    if request.all {
        return signal_all(sandbox, &container.id, signal);
    }
    let process = container.process(&request.exec_id)?;
    let gone = || container.no_process(&request.exec_id);
    if process.exit.now().is_some() {
        return Err(gone());
    }
    let sent = sandbox.reaper.signal(&process.exit, signal);
    if !sent.doing(|| format!("send signal {signal} to {:?} of {:?}", request.exec_id, container.id))? {
        return Err(gone());
    }
    if signal == libc::SIGKILL && !container.is_init(&request.exec_id) {
        kill_session(process.exit.pid());
    }
    Ok(())
}

/// Kills what an exec has started and left in its session, of which it is the leader: a probe whose time is up takes
/// its pipeline along. What is forked in between is met in the next round; the leader, killed before, forks no more.
fn kill_session(leader: i32) {
    for _ in 0..ROUNDS {
        let members = session_members(leader);
        if members.is_empty() {
            return;
        }
        for member in members {
            // One that has ended meanwhile needs no signal.
            let _ended = kill(Pid::from_raw(member), Signal::SIGKILL);
        }
    }
}

/// The living processes of a session but for its leader.
fn session_members(leader: i32) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let in_session = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        *pid != leader && living_session(&stat) == Some(leader)
    };
    pids.filter(in_session).collect()
}

/// The session of a process that is not dead, from the text of `/proc/<pid>/stat` (proc_pid_stat(5)).
fn living_session(stat: &str) -> Option<i32> {
    // The name in parentheses may hold anything: the fields are counted behind it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(2)?.parse().ok())?
}

/// Kills every process in a container's cgroup and below it, also a frozen one.
fn kill_all(sandbox: &Sandbox, container: &str) -> Result<()> {
    let cgroup = sandbox.engine.cgroup(container)?;
    fs::write(cgroup.join("cgroup.kill"), "1").doing(|| format!("kill container {container:?}"))
}

/// Signals every process in a container's cgroup and below it, each once. What is forked in between is met in the next
/// round.
fn signal_all(sandbox: &Sandbox, container: &str, signal: i32) -> Result<()> {
    let cgroup = sandbox.engine.cgroup(container)?;
    let mut signalled = BTreeSet::new();
    for _ in 0..ROUNDS {
        let members = members::of(&cgroup).doing(|| format!("find the processes of {container:?}"))?;
        let mut new = members.difference(&signalled).copied().peekable();
        if new.peek().is_none() {
            break;
        }
        for member in new {
            signal_member(member, signal)
                .doing(|| format!("send signal {signal} to the processes of {container:?}"))?;
        }
        signalled.extend(members);
    }
    Ok(())
}

/// One that has ended meanwhile needs no signal.
fn signal_member(member: i32, signal: i32) -> nix::Result<()> {
    match sys::kill(member, signal) {
        Err(Errno::ESRCH) => Ok(()),
        sent => sent,
    }
}

#[cfg(test)]
mod tests {
    use super::living_session;

    #[test]
    fn the_session_is_read_behind_any_name_and_the_dead_have_none() {
        assert_eq!(living_session("7 (a) b (c) S 1 7 5 0 -1 4194560"), Some(5));
        assert_eq!(living_session("7 (sleep) Z 1 7 5 0 -1 4194560"), None);
        assert_eq!(living_session(""), None);
    }
}
