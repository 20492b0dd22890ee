//! containerd-shim-kata-v2: one pod, one virtual machine.

pub mod annotations;
pub mod config;
pub mod spec;
