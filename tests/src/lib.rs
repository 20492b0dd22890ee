//! The harness that runs Sandpod under real peers.
//!
//! A story starts a [`node::Node`] (a real containerd in its own namespaces), runs pods on it with [`cri`] or tasks
//! with `ctr`, and claims what it sees. [`stage`] plays stories one after another on a node and fails those that leave
//! anything behind.

#[cfg(test)]
mod architecture;
pub mod browser;
pub mod census;
pub mod cluster;
pub mod cold_read;
pub mod config;
pub mod console;
pub mod cri;
pub mod disk;
#[cfg(test)]
mod documentation;
pub mod events;
pub mod failure;
pub mod footprint;
pub mod images;
#[cfg(test)]
mod imports;
pub mod installer;
pub mod kubernetes;
pub mod machine;
pub mod namespaces;
pub mod network;
pub mod node;
pub mod oci;
pub mod places;
pub mod procs;
pub mod registry;
pub mod run;
pub mod stage;
pub mod suite;
pub mod tasks;
pub mod tree;
pub mod wait;
pub mod web;
