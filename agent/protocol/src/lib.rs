//! What shim and agent both speak: the agent protocol and a typed client for it, the table between OCI and its messages,
//! and the guest's paths, annotations and kernel parameters that both sides use.

pub mod client;
pub mod exposition;
mod guard;
pub mod idmap;
pub mod oci;

/// Annotation of a container that runs in the guest's own PID namespace (`hostPID` of a pod), which the protocol has no
/// field for; an agent that does not know it gives the container the pod's namespace.
pub const GUEST_PIDS: &str = "io.sandpod.guest-pid-namespace";

/// Annotation of a container that runs in the PID namespace of another container of its pod, by that one's id (`kubectl
/// debug --target`); an agent that does not know it gives the container the pod's namespace.
pub const PID_TARGET: &str = "io.sandpod.pid-target";

/// Where the guest finds what the host shares; upstream's agent knows no other place.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";

/// The folder in the share whose parts several containers of the pod use; each part is one file system in the guest
/// as long as one of them does.
pub const GUEST_VOLUMES: &str = "volumes";

/// Where the guest has the pod's volumes of its own memory; upstream's agent and shims use the same place.
pub const GUEST_MEMORY: &str = "/run/kata-containers/sandbox/ephemeral";

/// The link that the kubelet swaps to update all files of a volume at once (`AtomicWriter` in `pkg/volume/util` of
/// Kubernetes).
pub const KUBELET_DATA: &str = "..data";

/// Messages and services of the agent protocol, generated from `agent/protocol/proto/`.
pub mod protocol {
    /// The message of calls and replies that say nothing.
    pub mod empty {
        pub use protobuf::well_known_types::empty::Empty;
    }

    include!(concat!(env!("OUT_DIR"), "/protocol.rs"));
}
