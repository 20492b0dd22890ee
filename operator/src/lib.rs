//! The controller: installs Sandpod on the nodes of a cluster and registers the `kata` RuntimeClass.

pub mod api;
pub mod control;
pub mod decide;

pub use installer_report::{self as report, handler, log_level};
