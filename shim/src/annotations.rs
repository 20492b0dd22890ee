//! What the CRI says about a container in the annotations of its OCI spec.
//!
//! Sources: `pkg/cri/annotations/annotations.go` of containerd, `pkg/annotations` of CRI-O (1.34 and before, and
//! after).

use crate::undo::PodName;
use serde::Deserialize;
use std::collections::HashMap;

/// Who wrote the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Manager {
    /// CRI-O: wants an `oom` file in the bundle and an exit file.
    CriO,
    /// containerd's CRI plugin.
    Containerd,
    /// Neither: `ctr run`, nerdctl.
    None,
}

/// What a task is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The pod itself (the "pause container"); its id is the sandbox's.
    Sandbox,
    /// A container of the sandbox with this id.
    Container {
        /// Id of the sandbox.
        sandbox_id: String,
    },
    /// A container that is its own pod.
    Single,
}

/// Who a task is, read once from its annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who wrote the spec.
    pub manager: Manager,
    /// What the task is.
    pub role: Role,
    /// Name of the pod, for people.
    pub pod_name: Option<String>,
    /// Namespace of the pod.
    pub pod_namespace: Option<String>,
    /// Name of the container in its pod; `None` for the sandbox.
    pub container_name: Option<String>,
}

impl Identity {
    /// The pod's full name; `None` without a CRI.
    pub fn name(&self) -> Option<PodName> {
        Some(PodName {
            namespace: self.pod_namespace.clone()?,
            name: self.pod_name.clone()?,
        })
    }
}

/// What kubelet told the CRI about the whole pod: the sum of its containers' resources. A hint: containers that run one
/// after the other are counted together, and the CRI may send nothing at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodResources {
    /// Memory limit, bytes; `None` when the pod has none.
    pub memory: Option<u64>,
    /// CPU limit, thousandths of a CPU; `None` when the pod has none.
    pub milli_cpus: Option<u64>,
    /// Bytes of huge pages, which the memory limit does not hold. No annotation of the CRI speaks of them.
    pub huge_pages: u64,
}

/// Why annotations cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AnnotationError {
    /// A container type that does not exist.
    #[error("annotation `{key}` is `{value}`, which is no container type")]
    Type {
        /// Full key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A container without a sandbox.
    #[error("annotation `{0}` is missing from a container of a pod")]
    NoSandbox(&'static str),
    /// A size that cannot be parsed.
    #[error("annotation `{key}` does not hold a pod's resources: {problem}")]
    Resources {
        /// Full key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
}

type Annotations = HashMap<String, String>;

/// The keys of one manager.
struct Keys {
    kind: &'static str,
    sandbox_id: &'static str,
    pod_name: &'static str,
    pod_namespace: &'static str,
    container_name: &'static str,
}

const CRIO: Keys = Keys {
    kind: "io.kubernetes.cri-o.ContainerType",
    sandbox_id: "io.kubernetes.cri-o.SandboxID",
    // The pod's names under CRI-O are only on the sandbox; kubelet's labels are on both.
    pod_name: "io.kubernetes.pod.name",
    pod_namespace: "io.kubernetes.pod.namespace",
    container_name: "io.kubernetes.container.name",
};
const CONTAINERD: Keys = Keys {
    kind: "io.kubernetes.cri.container-type",
    sandbox_id: "io.kubernetes.cri.sandbox-id",
    pod_name: "io.kubernetes.cri.sandbox-name",
    pod_namespace: "io.kubernetes.cri.sandbox-namespace",
    container_name: "io.kubernetes.cri.container-name",
};

/// Reads who a task is.
///
/// # Errors
/// A container type that does not exist, or a container without its sandbox's id.
pub fn identify(annotations: &Annotations) -> Result<Identity, AnnotationError> {
    let (manager, keys) = if annotations.contains_key(CRIO.kind) {
        (Manager::CriO, &CRIO)
    } else if annotations.contains_key(CONTAINERD.kind) {
        (Manager::Containerd, &CONTAINERD)
    } else {
        (Manager::None, &CONTAINERD)
    };
    let text = |key: &str| annotations.get(key).filter(|value| !value.is_empty()).cloned();
    let role = match annotations.get(keys.kind).map(String::as_str) {
        None => Role::Single,
        Some("sandbox" | "podsandbox") => Role::Sandbox,
        Some("container") => Role::Container {
            sandbox_id: text(keys.sandbox_id).ok_or(AnnotationError::NoSandbox(keys.sandbox_id))?,
        },
        Some(other) => {
            return Err(AnnotationError::Type {
                key: keys.kind,
                value: other.to_owned(),
            });
        }
    };
    let container_name = if role == Role::Sandbox {
        None
    } else {
        text(keys.container_name)
    };
    Ok(Identity {
        manager,
        role,
        pod_name: text(keys.pod_name).or_else(|| text("io.kubernetes.cri-o.KubeName")),
        pod_namespace: text(keys.pod_namespace).or_else(|| text("io.kubernetes.cri-o.Namespace")),
        container_name,
    })
}

/// Whether the pod's containers share one PID namespace; `None` when the annotations do not say (containerd never does:
/// there only a container's spec tells, by the path of its PID namespace).
pub fn shares_pid_namespace(annotations: &Annotations) -> Option<bool> {
    // CRI's NamespaceMode: POD = 0 (and left out of the JSON), CONTAINER = 1, NODE = 2, TARGET = 3.
    #[derive(Deserialize)]
    struct NamespaceOptions {
        #[serde(default)]
        pid: u32,
    }
    let options = annotations.get("io.kubernetes.cri-o.NamespaceOptions")?;
    let options: NamespaceOptions = serde_json::from_str(options).ok()?;
    Some(matches!(options.pid, 0 | 2))
}

/// Reads the resources of the whole pod from its sandbox's annotations; `None` when nobody sent them.
///
/// # Errors
/// An annotation of the right name that does not hold what it should.
pub fn pod_resources(annotations: &Annotations) -> Result<Option<PodResources>, AnnotationError> {
    for key in ["pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"] {
        if let Some(json) = annotations.get(key) {
            return crio_resources(key, json);
        }
    }
    const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
    const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
    const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
    if ![MEMORY, QUOTA, PERIOD].iter().any(|key| annotations.contains_key(*key)) {
        return Ok(None);
    }
    let number = |key: &'static str| -> Result<i64, AnnotationError> {
        let text = annotations.get(key).map_or("0", |text| text.trim());
        text.parse().map_err(|_| AnnotationError::Resources {
            key,
            problem: format!("`{text}` is not a number"),
        })
    };
    Ok(Some(resources(number(MEMORY)?, number(QUOTA)?, number(PERIOD)?)))
}

fn crio_resources(key: &'static str, json: &str) -> Result<Option<PodResources>, AnnotationError> {
    // The CRI's LinuxContainerResources as protobuf's JSON; `null` when kubelet sent none.
    #[derive(Deserialize)]
    struct LinuxContainerResources {
        #[serde(default)]
        cpu_period: i64,
        #[serde(default)]
        cpu_quota: i64,
        #[serde(default)]
        memory_limit_in_bytes: i64,
    }
    let parsed: Option<LinuxContainerResources> =
        serde_json::from_str(json).map_err(|error| AnnotationError::Resources {
            key,
            problem: error.to_string(),
        })?;
    Ok(parsed.map(|found| resources(found.memory_limit_in_bytes, found.cpu_quota, found.cpu_period)))
}

/// Zero and below mean "no limit" in the CRI.
fn resources(memory: i64, quota: i64, period: i64) -> PodResources {
    PodResources {
        memory: u64::try_from(memory).ok().filter(|bytes| *bytes > 0),
        milli_cpus: milli_cpus(Some(quota), u64::try_from(period).ok()),
        huge_pages: 0,
    }
}

/// A CFS quota and period as thousandths of a CPU, rounded up; `None` when they set no limit.
pub fn milli_cpus(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let quota = u64::try_from(quota?).ok().filter(|quota| *quota > 0)?;
    // The kernel's default period.
    let period = period.filter(|period| *period > 0).unwrap_or(100_000);
    u64::try_from((u128::from(quota) * 1000).div_ceil(u128::from(period))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Annotations {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_task_is_told_apart_by_its_managers_own_keys() {
        let crio = identify(&map(&[
            ("io.container.manager", "cri-o"),
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "5ab"),
            ("io.kubernetes.pod.name", "web-0"),
            ("io.kubernetes.pod.namespace", "shop"),
            ("io.kubernetes.container.name", "nginx"),
        ]))
        .unwrap();
        assert_eq!(crio.manager, Manager::CriO);
        assert_eq!(
            crio.role,
            Role::Container {
                sandbox_id: "5ab".into()
            }
        );
        assert_eq!(
            (crio.pod_name.as_deref(), crio.container_name.as_deref()),
            (Some("web-0"), Some("nginx"))
        );

        let containerd = identify(&map(&[
            ("io.kubernetes.cri.container-type", "sandbox"),
            ("io.kubernetes.cri.sandbox-id", "77"),
            ("io.kubernetes.cri.sandbox-name", "web-0"),
            ("io.kubernetes.cri.sandbox-namespace", "shop"),
        ]))
        .unwrap();
        assert_eq!(
            (containerd.manager, &containerd.role),
            (Manager::Containerd, &Role::Sandbox)
        );
        assert_eq!(containerd.pod_namespace.as_deref(), Some("shop"));

        let ctr = identify(&map(&[])).unwrap();
        assert_eq!((ctr.manager, ctr.role), (Manager::None, Role::Single));
    }

    #[test]
    fn a_container_without_its_sandbox_or_of_no_known_type_is_refused() {
        let lost = identify(&map(&[("io.kubernetes.cri.container-type", "container")])).unwrap_err();
        assert_eq!(lost, AnnotationError::NoSandbox("io.kubernetes.cri.sandbox-id"));
        let strange = identify(&map(&[("io.kubernetes.cri-o.ContainerType", "vm")])).unwrap_err();
        assert!(strange.to_string().contains("`vm`, which is no container type"));
    }

    #[test]
    fn the_pods_size_is_read_in_all_three_spellings() {
        let half_gib = PodResources {
            memory: Some(512 << 20),
            milli_cpus: Some(1500),
            huge_pages: 0,
        };
        let json = r#"{"cpu_period":100000,"cpu_quota":150000,"cpu_shares":1536,"memory_limit_in_bytes":536870912}"#;
        let containerd = map(&[
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "1536"),
            ("io.kubernetes.cri.sandbox-memory", "536870912"),
        ]);
        assert_eq!(pod_resources(&containerd), Ok(Some(half_gib)));
        assert_eq!(
            pod_resources(&map(&[("pod-linux-resources.crio.io", json)])),
            Ok(Some(half_gib))
        );
        assert_eq!(
            pod_resources(&map(&[("io.kubernetes.cri-o.PodLinuxResources", json)])),
            Ok(Some(half_gib))
        );
    }

    #[test]
    fn no_limit_has_many_spellings() {
        let none = PodResources::default();
        let zero = map(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "-1"),
            ("io.kubernetes.cri.sandbox-memory", "0"),
        ]);
        assert_eq!(pod_resources(&zero), Ok(Some(none)));
        assert_eq!(
            pod_resources(&map(&[("pod-linux-resources.crio.io", r#"{"cpu_shares":2}"#)])),
            Ok(Some(none))
        );
        assert_eq!(
            pod_resources(&map(&[("pod-linux-resources.crio.io", "null")])),
            Ok(None)
        );
        assert_eq!(pod_resources(&map(&[])), Ok(None));
        assert!(pod_resources(&map(&[("io.kubernetes.cri.sandbox-memory", "1Gi")])).is_err());
    }

    #[test]
    fn only_crio_says_whether_a_pod_shares_its_pid_namespace() {
        let options = |json: &str| map(&[("io.kubernetes.cri-o.NamespaceOptions", json)]);
        assert_eq!(shares_pid_namespace(&options(r#"{"pid":1}"#)), Some(false));
        assert_eq!(shares_pid_namespace(&options("{}")), Some(true));
        assert_eq!(shares_pid_namespace(&options(r#"{"network":2,"pid":2}"#)), Some(true));
        assert_eq!(shares_pid_namespace(&map(&[])), None);
    }
}
