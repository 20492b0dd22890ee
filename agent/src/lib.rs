//! The guest agent: the protocol it speaks, a typed client for it, and the container engine behind it.
//!
//! The program `kata-agent` is PID 1 of the guest.

pub mod client;
pub mod engine;
pub mod oci;
pub mod server;

/// Messages and services of the agent protocol, generated from `agent/proto/`.
pub mod protocol {
    /// The message of calls and replies that say nothing.
    pub mod empty {
        pub use protobuf::well_known_types::empty::Empty;
    }

    include!(concat!(env!("OUT_DIR"), "/protocol.rs"));
}
