//! containerd-shim-kata-v2: one pod, one virtual machine.

pub mod annotations;
pub mod config;
pub mod net;
pub mod spec;
pub mod sys;
