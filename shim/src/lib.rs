//! containerd-shim-kata-v2: one pod, one virtual machine.

pub mod annotations;
pub mod boot;
pub mod cgroup;
pub mod check;
pub mod cli;
pub mod config;
pub mod container;
pub mod disks;
pub mod error;
pub mod events;
pub mod follow;
pub mod forward;
#[cfg(test)]
mod fuzz;
pub mod io;
pub mod log;
pub mod mirror;
pub mod mountinfo;
pub mod net;
pub mod options;
pub mod pod;
pub mod process;
pub mod rootfs;
pub mod sandbox;
pub mod serve;
pub mod service;
pub mod sizer;
pub mod sizing;
pub mod spec;
pub mod start;
pub mod stats;
pub mod sys;
pub mod trace;
pub mod undo;
