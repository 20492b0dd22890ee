//! The guest agent: it serves the agent protocol, and runs containers with the engine behind it.
//!
//! The program `kata-agent` is PID 1 of the guest.

pub mod engine;
pub mod server;
