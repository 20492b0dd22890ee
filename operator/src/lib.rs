//! Installs Sandpod on the nodes of a cluster and registers the `kata` RuntimeClass.

pub mod api;
pub mod control;
pub mod decide;
pub mod handler;
pub mod install;
pub mod log_level;
pub mod report;
