//! Describe a virtual machine, run it, resize it, end it. Knows nothing of containers or pods.
#![allow(dead_code, unused_variables)] // signatures first
mod channel;
mod error;
pub mod spec;

use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::PathBuf,
    time::{Duration, SystemTime},
};

pub use channel::AgentStream;
pub use error::{KvmError, VmError};
use spec::VmSpec;

/// The thread that starts every child and never ends.
#[derive(Debug)]
pub struct Spawner(());
impl Spawner {
    /// Starts the thread.
    pub fn new() -> io::Result<Spawner> {
        Ok(Spawner(()))
    }
}

/// A child process, killed when dropped.
#[derive(Debug)]
pub struct Child(());
impl Child {
    /// Process id.
    pub fn pid(&self) -> u32 {
        0
    }
    /// Waits for its end; any number of tasks may.
    pub async fn exited(&self) -> ExitReason {
        std::future::pending().await
    }
    /// Sends SIGKILL.
    pub fn kill(&self) {}
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}
impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::Code(code) => write!(f, "exited with code {code}"),
            ExitReason::Signal(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// What virtiofsd serves and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtiofsdSpec {
    /// The virtiofsd program, 1.14.
    pub program: PathBuf,
    /// The folder it serves.
    pub shared_dir: PathBuf,
    /// Its cache policy.
    pub cache: String,
    /// Further arguments.
    pub extra_args: Vec<String>,
}

/// A running virtiofsd.
#[derive(Debug)]
pub struct Virtiofsd(Child);
impl Virtiofsd {
    /// Starts virtiofsd; returns it and the connected end for QEMU.
    pub fn start(spawner: &Spawner, spec: &VirtiofsdSpec) -> Result<(Virtiofsd, OwnedFd), VmError> {
        Err(VmError::Unready)
    }
    /// The process.
    pub fn child(&self) -> &Child {
        &self.0
    }
    /// Last 64 KiB of its log.
    pub fn log_tail(&self) -> String {
        String::new()
    }
}

/// Where and as whom QEMU runs.
#[derive(Debug)]
pub struct Placement {
    /// Network namespace to run in.
    pub netns: Option<OwnedFd>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Open files that QEMU takes over.
#[derive(Debug, Default)]
pub struct VmFds {
    /// Connection to virtiofsd; present exactly if the VM has a virtiofs device.
    pub fs: Option<OwnedFd>,
    /// One tap per interface.
    pub taps: Vec<OwnedFd>,
    /// Empty, or one `/dev/vhost-net` per interface.
    pub vhost_net: Vec<OwnedFd>,
}

/// Guest memory as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryState {
    /// Present since boot, in MiB.
    pub boot_mib: u64,
    /// Plugged beyond that as asked for, in MiB.
    pub requested_mib: u64,
    /// Plugged beyond that as the guest has it, in MiB.
    pub plugged_mib: u64,
}

/// A running VM.
#[derive(Debug)]
pub struct Vm(Child);
impl Vm {
    /// Validates, checks the accelerator, starts QEMU and shakes hands over QMP.
    pub async fn start(spawner: &Spawner, spec: &VmSpec, fds: VmFds, placement: &Placement) -> Result<Vm, VmError> {
        Err(VmError::Unready)
    }
    /// QEMU.
    pub fn child(&self) -> &Child {
        &self.0
    }
    /// When QEMU was started.
    pub fn spawned_at(&self) -> SystemTime {
        SystemTime::now()
    }
    /// When QEMU answered.
    pub fn qmp_ready_at(&self) -> SystemTime {
        SystemTime::now()
    }
    /// The stream to the agent.
    pub async fn agent_stream(&self, deadline: Duration) -> Result<AgentStream, VmError> {
        Err(VmError::Unready)
    }
    /// Resizes memory to boot + plugged = `total_mib`.
    pub async fn set_memory(&self, total_mib: u64) -> Result<MemoryState, VmError> {
        Err(VmError::Unready)
    }
    /// Memory as it is.
    pub async fn memory(&self) -> Result<MemoryState, VmError> {
        Err(VmError::Unready)
    }
    /// Resizes to `n` vCPUs; returns how many there are.
    pub async fn set_vcpus(&self, n: u32) -> Result<u32, VmError> {
        Err(VmError::Unready)
    }
    /// Ends QEMU, by SIGKILL after `deadline`.
    pub async fn stop(&self, deadline: Duration) -> ExitReason {
        self.0.exited().await
    }
    /// Last 64 KiB of the guest's console.
    pub fn console_tail(&self) -> String {
        String::new()
    }
    /// Last 64 KiB of QEMU's log.
    pub fn log_tail(&self) -> String {
        String::new()
    }
}

/// Whether KVM works here, strictly.
pub fn kvm_ready() -> Result<(), KvmError> {
    Err(KvmError::Unready)
}
