//! A sandbox's pod, read once from the specification of the task that makes it.

use std::{collections::HashMap, path::PathBuf};

use agent::idmap::IdMaps;
use oci_spec::runtime::Spec;

use crate::{
    annotations::{Identity, Manager, PodResources, identify, pod_resources, shares_pid_namespace},
    error::Result,
    selinux::Labels,
    spec::{NetNs, id_maps, pod_netns, sees_the_guest},
    vfio,
};

/// What the sandbox's own specification says of the pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Who it is, and who manages it.
    pub identity: Identity,
    /// All annotations.
    pub annotations: HashMap<String, String>,
    /// Its network namespace.
    pub netns: NetNs,
    /// Sysctls of the pod; its containers set them, since nothing runs in the guest for the sandbox itself.
    pub sysctls: HashMap<String, String>,
    /// The sum of its containers' resources, where the CRI tells it.
    pub resources: Option<PodResources>,
    /// Whether its containers share one PID namespace, as far as the annotations tell.
    pub shared_pidns: bool,
    /// Whether it has no PID namespace.
    pub sees_guest: bool,
    /// Path of the host's cgroup for the sandbox.
    pub cgroups_path: Option<String>,
    /// What the IDs of its containers are in the guest, if it has a user namespace.
    pub id_maps: Option<IdMaps>,
    /// Host name.
    pub hostname: String,
    /// The host's file that is bound to `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// The host's file system that is bound to `/dev/shm`.
    pub shm: Option<PathBuf>,
    /// Its SELinux labels.
    pub labels: Labels,
    /// The devices of the host that it asks for.
    pub devices: vfio::Asked,
}

impl Pod {
    /// Reads a pod; refuses the host's network.
    pub fn of(spec: &Spec) -> Result<Pod> {
        let annotations = spec.annotations().clone().unwrap_or_default();
        let linux = spec.linux().as_ref();
        let source_of = |destination: &str| {
            let mut mounts = spec.mounts().iter().flatten();
            let mount = mounts.find(|mount| mount.destination().ends_with(destination))?;
            mount.source().clone().filter(|source| source.is_absolute())
        };
        Ok(Pod {
            identity: identify(&annotations)?,
            netns: pod_netns(spec)?,
            sysctls: linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default(),
            resources: pod_resources(&annotations)?,
            shared_pidns: shares_pid_namespace(&annotations).unwrap_or(false),
            sees_guest: sees_the_guest(spec),
            cgroups_path: linux
                .and_then(|linux| linux.cgroups_path().as_ref())
                .map(|path| path.display().to_string()),
            id_maps: id_maps(spec)?,
            hostname: spec.hostname().clone().unwrap_or_default(),
            resolv_conf: source_of("etc/resolv.conf"),
            shm: source_of("dev/shm"),
            labels: Labels::of(spec),
            devices: vfio::Asked::of(spec),
            annotations,
        })
    }

    /// Whether CRI-O manages it.
    pub fn is_crio(&self) -> bool {
        self.identity.manager == Manager::CriO
    }
}
