//! Signals to processes and to whole containers.

use std::fs;

use nix::sys::signal::Signal;

use super::{
    error::{Doing, Error, Result},
    process::Process,
    sandbox::Sandbox,
};
use crate::protocol::agent::SignalProcessRequest;

/// The largest number that the kernel knows (`SIGRTMAX`).
const LARGEST: i32 = 64;

/// Signals a process, or a whole container (the conventions are those of `agent-protocol.md` §1.2).
pub(super) fn send(sandbox: &Sandbox, request: &SignalProcessRequest) -> Result<()> {
    let signal = i32::try_from(request.signal)
        .ok()
        .filter(|signal| (0..=LARGEST).contains(signal));
    let signal = signal.ok_or_else(|| Error::Invalid(format!("signal {} does not exist", request.signal)))?;
    let container = sandbox.container(&request.container_id)?;
    if request.exec_id.is_empty() && signal == Signal::SIGKILL as i32 {
        return kill_all(sandbox, &container.id);
    }
    let process = container.process(&request.exec_id)?;
    let gone = || container.no_process(&request.exec_id);
    if process.exit.now().is_some() {
        return Err(gone());
    }
    let signal = match signal {
        libc::SIGTERM if container.is_init(&request.exec_id) && ignores_term(&process) => libc::SIGKILL,
        signal => signal,
    };
    let sent = sandbox.reaper.signal(&process.exit, signal);
    match sent.doing(|| format!("send signal {signal} to {:?} of {:?}", request.exec_id, container.id))? {
        true => Ok(()),
        false => Err(gone()),
    }
}

/// Kills every process in a container's cgroup and below it, also a frozen one.
fn kill_all(sandbox: &Sandbox, container: &str) -> Result<()> {
    let cgroup = sandbox.engine.cgroup(container)?;
    fs::write(cgroup.join("cgroup.kill"), "1").doing(|| format!("kill container {container:?}"))
}

/// Whether the kernel would drop SIGTERM: it protects PID 1 of a namespace from signals without a handler, so that the
/// process would die only after the pod's grace period.
fn ignores_term(process: &Process) -> bool {
    let path = format!("/proc/{}/status", process.exit.pid());
    fs::read_to_string(path).is_ok_and(|status| is_protected_from(&status, libc::SIGTERM))
}

/// From the text of `/proc/<pid>/status` (proc_pid_status(5)): PID 1 of its namespace, and the signal is neither
/// blocked (somebody waits for it), ignored on purpose, nor caught.
fn is_protected_from(status: &str, signal: i32) -> bool {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    let is_leader = field("NSpid").and_then(|pids| pids.split_whitespace().last()) == Some("1");
    let mut sets = ["SigBlk", "SigIgn", "SigCgt"].into_iter().filter_map(field);
    let has = |set: &str| u64::from_str_radix(set.trim(), 16).map_or(true, |set| set >> (signal - 1) & 1 == 1);
    is_leader && !sets.any(has)
}

#[cfg(test)]
mod tests {
    use super::is_protected_from;

    fn status(nspid: &str, caught: &str) -> String {
        let zero = "0000000000000000";
        format!("Name:\tsleep\nNSpid:\t{nspid}\nSigPnd:\t{zero}\nSigBlk:\t{zero}\nSigIgn:\t{zero}\nSigCgt:\t{caught}\n")
    }

    #[test]
    fn only_the_first_process_without_a_handler_needs_a_kill() {
        assert!(is_protected_from(&status("42\t1", "0000000000000000"), 15));
        assert!(!is_protected_from(&status("42\t1", "0000000000004000"), 15));
        assert!(!is_protected_from(&status("42\t7", "0000000000000000"), 15));
        assert!(!is_protected_from("", 15));
    }
}
