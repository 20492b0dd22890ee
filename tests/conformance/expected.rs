//! The specs that do not pass, each with its reason. What is not listed must pass, and what is listed must not: the
//! lists stay true.

/// How a spec ends that does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instead {
    /// It fails.
    Fails,
    /// critest finds that it does not apply.
    Skips,
}

/// Specs that do not pass.
#[derive(Debug)]
pub struct Exception {
    /// What their names begin with.
    pub specs: &'static str,
    /// What they do instead.
    pub instead: Instead,
    /// Why, in a sentence.
    pub reason: &'static str,
}

const fn fails(specs: &'static str, reason: &'static str) -> Exception {
    Exception {
        specs,
        instead: Instead::Fails,
        reason,
    }
}

const fn skips(specs: &'static str, reason: &'static str) -> Exception {
    Exception {
        specs,
        instead: Instead::Skips,
        reason,
    }
}

/// With every runtime.
pub const ALWAYS: &[Exception] = &[
    skips(
        "AppArmor ",
        "AppArmor is off in the kernels that these tests are for, the host's and the guest's",
    ),
    fails(
        "Image Manager public image with digest should be pulled and removed",
        "only gcr.io has the image with this digest, and tests need no network",
    ),
];

/// With Sandpod.
pub const SANDPOD: &[Exception] = &[
    fails(
        "Container Mount Propagation runtime should support mount propagation mount with 'rshared'",
        "a mount made in the guest cannot appear on the host, and the shim refuses such a volume",
    ),
    fails(
        "Security Context NamespaceOption runtime should support HostIpc is true",
        "shared memory is a kernel's own: the pod shares it with its VM, not with the host",
    ),
    fails(
        "Security Context NamespaceOption runtime should support HostNetwork is true",
        "a VM has no part in the host's network, and the shim refuses such a pod",
    ),
    fails(
        "Streaming runtime should support streaming interfaces runtime should support portforward in host network",
        "a VM has no part in the host's network, and the shim refuses such a pod",
    ),
];

/// With runc.
pub const RUNC: &[Exception] = &[skips(
    "Security Context UserNamespaces ",
    "Debian's runc maps no user IDs of mounts, so containerd does not advertise them",
)];
