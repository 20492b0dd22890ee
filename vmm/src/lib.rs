//! Describe a virtual machine, run it, resize it, end it. Knows nothing of containers or pods.
//!
//! ```text
//! VmSpec ──validate──▶ args ──▶ QEMU ◀── QMP: hot-plug
//!                                 │ ◀──▶ agent stream (virtio-serial or vsock)
//! VirtiofsdSpec ──▶ virtiofsd ◀───┘
//! ```
//!
//! Everything here belongs to the process that started it: when that dies, the kernel ends the rest.

pub mod args;
mod channel;
mod clock;
mod disk;
mod error;
mod hotplug;
mod nic;
pub mod pcie;
mod process;
mod qmp;
pub mod spec;
mod sys;
mod tail;
mod virtiofsd;
mod vm;

pub use channel::AgentStream;
pub use disk::Disk;
pub use error::VmError;
pub use hotplug::MemoryState;
pub use process::{Child, ExitReason, Spawner};
pub use qmp::QmpError;
pub use virtiofsd::{Virtiofsd, VirtiofsdSpec};
pub use vm::{Placement, Vm, VmFds};
