//! What a shim has running on the node, and its sudden end.

use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tests::{
    failure::{Failure, Result, Trying},
    procs::{self, Process},
    wait::Bell,
};

use crate::crio::{Crio, Runtime};

/// The processes below or beside a shim, by what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The daemon that serves the task API.
    Shim,
    /// The virtual machine.
    Vm,
    /// The file system server.
    FileServer,
    /// What ends the two when the shim ends.
    Keeper,
}

impl Kind {
    fn is(self, process: &Process, crio: &Crio<'_>) -> bool {
        match self {
            // The short-lived actions have other words at their end.
            Kind::Shim => {
                process.program() == crio.basename()
                    && !process.arguments.iter().any(|word| word == "start" || word == "delete")
            }
            Kind::Vm => process.program().starts_with("qemu-system-"),
            Kind::FileServer => process.program() == "virtiofsd",
            Kind::Keeper => process.program() == "vm-keeper",
        }
    }
}

/// Those of this kind that run on the node.
pub fn running(kind: Kind, crio: &Crio<'_>) -> Vec<i32> {
    procs::all()
        .iter()
        .filter(|process| kind.is(process, crio))
        .map(|process| process.pid)
        .collect()
}

/// The only one of this kind.
///
/// # Errors
/// When there is none, or more than one.
pub fn only(kind: Kind, crio: &Crio<'_>) -> Result<i32> {
    match running(kind, crio)[..] {
        [pid] => Ok(pid),
        ref others => Err(Failure::Claim(format!(
            "expected one process ({kind:?}), found {others:?}"
        ))),
    }
}

/// Waits until one of this kind runs.
///
/// # Errors
/// When none does in time.
pub fn appears(kind: Kind, crio: &Crio<'_>, deadline: Duration) -> Result {
    Bell::default().until(&format!("a process ({kind:?})"), deadline, || {
        match running(kind, crio)[..] {
            [] => Err("none".into()),
            _ => Ok(()),
        }
    })
}

/// Everything of the runtime that is a virtual machine's.
pub fn of_the_vm(crio: &Crio<'_>) -> Vec<i32> {
    match crio.runtime {
        Runtime::Reference => Vec::new(),
        Runtime::Sandpod => [Kind::Vm, Kind::FileServer, Kind::Keeper]
            .iter()
            .flat_map(|kind| running(*kind, crio))
            .collect(),
    }
}

/// Kills a process as the OOM killer would.
///
/// # Errors
/// When the kernel refuses.
pub fn murder(pid: i32) -> Result {
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        // It may have ended with its parent, which was killed before it.
        Err(Errno::ESRCH) => Ok(()),
        killed => killed.trying(format!("killing process {pid}")),
    }
}

/// Stops a process, which then does nothing but can be killed.
///
/// # Errors
/// When the kernel refuses.
pub fn stop(pid: i32) -> Result {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).trying(format!("stopping process {pid}"))
}

/// A copy of the open file whose number follows `word` in an argument of a process.
///
/// # Errors
/// When it has no such argument, or the kernel refuses.
pub fn file_of(pid: i32, word: &str) -> Result<File> {
    let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).trying(format!("reading of process {pid}"))?;
    let number = arguments
        .split('\0')
        .find_map(|argument| argument.strip_prefix(word)?.parse::<i32>().ok());
    let number = number.ok_or_else(|| Failure::Claim(format!("no argument begins with {word}: {arguments}")))?;
    let process = rustix::process::Pid::from_raw(pid).ok_or_else(|| Failure::Claim("a process 0".into()))?;
    let copied = pidfd_open(process, PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()));
    let file = copied
        .map_err(std::io::Error::from)
        .trying(format!("copying file {number} of process {pid}"))?;
    Ok(file.into())
}

/// Waits until none of these processes is left.
///
/// # Errors
/// When one is.
pub fn gone(what: &str, pids: &[i32], deadline: Duration) -> Result {
    Bell::default().until(&format!("the end of {what}"), deadline, || {
        let left: Vec<_> = pids
            .iter()
            .filter(|pid| Path::new(&format!("/proc/{pid}")).exists())
            .collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("processes {left:?}"))
        }
    })
}
