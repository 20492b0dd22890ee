//! A sandbox's pod, read once from the specification of the task that makes it.

use std::{collections::HashMap, path::PathBuf};

use agent_protocol::idmap::IdMaps;
use oci_spec::runtime::Spec;

use crate::{
    annotations::{Identity, Manager, PodResources, identify, pod_resources, shares_pid_namespace},
    error::Result,
    log::SHORT_ID,
    selinux::Labels,
    spec::{NetNs, id_maps, pod_netns, sees_the_guest},
    vfio,
};

/// As Linux has it (`HOST_NAME_MAX`).
const LONGEST_HOST_NAME: usize = 64;

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

    /// Its host name, as long as Linux allows. That of a pod without one is the beginning of the sandbox's id, as the
    /// CRI's tools show it: programs look up their own name.
    pub fn host_name(&self, sandbox: &str) -> String {
        if !self.hostname.is_empty() {
            return self.hostname.chars().take(LONGEST_HOST_NAME).collect();
        }
        let letter = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
        let name: String = sandbox.chars().take(SHORT_ID).map(letter).collect();
        match name.trim_matches('-') {
            "" => "sandbox".to_owned(),
            name => name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_a_host_name_always() {
        let name = |hostname: &str, sandbox: &str| {
            let linux = r#"{"namespaces":[{"type":"network"}]}"#;
            let spec = format!(r#"{{"ociVersion":"1.2.0","hostname":"{hostname}","linux":{linux}}}"#);
            Pod::of(&serde_json::from_str(&spec).unwrap())
                .unwrap()
                .host_name(sandbox)
        };
        assert_eq!(name("web-0", "0123456789abcdef"), "web-0");
        assert_eq!(name(&"x".repeat(70), "0123456789abcdef"), "x".repeat(64));
        assert_eq!(name("", "0123456789abcdef"), "0123456789abc");
        assert_eq!(name("", "my_task.1"), "my-task-1");
        assert_eq!(name("", "_task_"), "task");
        assert_eq!(name("", "___"), "sandbox");
    }
}
