//! What can go wrong with a VM.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use vmm_host::KvmError;

use crate::{process::ExitReason, qmp::QmpError, spec::SpecError};

/// Why a VM could not be started, reached or resized.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The description contradicts itself.
    #[error("the VM's description is invalid: {0}")]
    Spec(#[from] SpecError),
    /// The node cannot run VMs.
    #[error("KVM cannot be used: {0}")]
    Kvm(#[from] KvmError),
    /// The files handed over do not fit the description.
    #[error("the VM has {devices} {device} devices but got {files} open files for them")]
    Files {
        /// Kind of device.
        device: &'static str,
        /// How many the description has.
        devices: usize,
        /// How many files came.
        files: usize,
    },
    /// The kernel, the initrd or a device file cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program cannot be started.
    #[error("cannot start {}: {source}", program.display())]
    Spawn {
        /// Which program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program cannot be started with its label: the kernel does not know the label, or the policy forbids the change
    /// to it.
    #[error("cannot start {} with the SELinux label {label:?}: {source}", program.display())]
    Label {
        /// Which program.
        program: PathBuf,
        /// Which label.
        label: String,
        /// Why not.
        source: io::Error,
    },
    /// A program ended before it was ready.
    #[error("{program} {reason} before it was ready; it said: {log}")]
    Died {
        /// Which program.
        program: &'static str,
        /// How it ended.
        reason: ExitReason,
        /// The end of its log, in one line.
        log: String,
    },
    /// A system call failed on the way.
    #[error("cannot {action}: {source}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// No place for another disk.
    #[error("the VM has {0} block devices already, the most that its controller takes")]
    TooManyDisks(u8),
    /// No place for another interface.
    #[error("the VM has one network interface that came after its start already, and a place for one only")]
    NoPlaceForInterface,
    /// The controller did not let go of a disk.
    #[error("QEMU keeps the block device {0}")]
    DiskKept(String),
    /// QEMU refused a command or cannot be talked to.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The virtio-serial port carries one stream for the VM's life.
    #[error("the stream to the agent has been taken already")]
    StreamTaken,
    /// Nobody listens in the guest.
    #[error("the agent could not be reached within {0:?}")]
    Unreachable(Duration),
    /// More memory than the VM was described with.
    #[error("{asked_mib} MiB of memory are not within {boot_mib} MiB (at boot) and {max_mib} MiB (at most)")]
    MemoryRange {
        /// What was asked for.
        asked_mib: u64,
        /// What the VM booted with.
        boot_mib: u64,
        /// The most it can have.
        max_mib: u64,
    },
    /// More vCPUs than the VM was described with.
    #[error("{asked} vCPUs are more than the {max} that this VM can have")]
    TooManyVcpus {
        /// What was asked for.
        asked: u32,
        /// The most it can have.
        max: u32,
    },
    /// Every slot for memory modules is taken.
    #[error("all {0} slots for memory modules are taken")]
    NoSlot(u32),
}

impl VmError {
    /// A program's end before it was ready, told in one line whatever its log is.
    pub(crate) fn died(program: &'static str, reason: ExitReason, log: &str) -> VmError {
        let lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
        VmError::Died {
            program,
            reason,
            log: lines.collect::<Vec<_>>().join("; "),
        }
    }

    /// Why a program was not started. Both the label and the program's own execution may be what was refused, with the
    /// same error; a program that is not there is neither.
    pub(crate) fn spawn(program: &Path, label: Option<&str>, source: io::Error) -> VmError {
        let program = program.to_owned();
        match label {
            Some(label) if source.kind() != io::ErrorKind::NotFound => VmError::Label {
                program,
                label: label.to_owned(),
                source,
            },
            _ => VmError::Spawn { program, source },
        }
    }

    /// Names what was being done when a system call failed.
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> VmError {
        move |source| VmError::System {
            action,
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_program_that_died_are_one_line() {
        let error = VmError::died("QEMU", ExitReason::Code(1), "no disk\r\n\nqemu: giving up\n");
        let sentence = "QEMU exited with code 1 before it was ready; it said: no disk; qemu: giving up";
        assert_eq!(error.to_string(), sentence);
    }
}
