//! The guest agent: the protocol it speaks, a typed client for it, and the container engine behind it.
//!
//! The program `kata-agent` is PID 1 of the guest.

pub mod client;
pub mod engine;
pub mod oci;
pub mod server;

/// Annotation of a container that runs in the guest's own PID namespace (`hostPID` of a pod), which the protocol has no
/// field for; an agent that does not know it gives the container the pod's namespace.
pub const GUEST_PIDS: &str = "io.sandpod.guest-pid-namespace";

/// Messages and services of the agent protocol, generated from `agent/proto/`.
pub mod protocol {
    /// The message of calls and replies that say nothing.
    pub mod empty {
        pub use protobuf::well_known_types::empty::Empty;
    }

    include!(concat!(env!("OUT_DIR"), "/protocol.rs"));
}
