//! containerd-shim-kata-v2: one pod, one virtual machine.

pub mod annotations;
pub mod cgroup;
pub mod config;
pub mod net;
pub mod sizing;
pub mod spec;
pub mod sys;
