//! `config.json` as CRI-O 1.37 writes it for a handler of type `vm`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// The type of a process in an Any.
pub const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The type of resources in an Any.
pub const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// What every container of a pod has in common.
#[derive(Debug, Clone)]
pub struct PodFacts {
    /// The sandbox's id, 64 hex digits.
    pub id: String,
    /// The pod's name; its namespace is `contract`.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The sandbox's bundle, with resolv.conf, hostname and shm.
    pub bundle: PathBuf,
    /// Paths by kind of the namespaces that CRI-O made, empty for one that the runtime is to make; a pod on the host's
    /// network has no `network`.
    pub namespaces: Vec<(&'static str, PathBuf)>,
    /// The pod's address.
    pub address: String,
    /// The cgroup that kubelet made for the pod.
    pub cgroup: String,
    /// The pod's own annotations, which CRI-O passes on verbatim.
    pub annotations: Vec<(String, String)>,
    /// The sum of the containers' resources as kubelet states it.
    pub resources: Value,
    /// The pod's sysctls.
    pub sysctls: Vec<(String, String)>,
    /// Without CAP_SYS_RESOURCE runc cannot lower the score for the OOM killer.
    pub lower_oom_score: bool,
}

/// What a container is made of.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Its command line.
    pub args: Vec<String>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it has standard input.
    pub stdin: bool,
    /// Its memory limit in bytes.
    pub memory: Option<u64>,
    /// Whether an OOM kill is to end all of it: the kubelet of Kubernetes 1.28 and later asks for that on nodes with
    /// cgroup v2.
    pub killed_whole: bool,
    /// The host's processors that the kubelet's static CPU manager has given it.
    pub cpus: Option<&'static str>,
    /// Its limit of CPUs.
    pub cpu_limit: Option<u64>,
    /// Its limit of huge pages of 2 MiB, in bytes.
    pub huge_pages: u64,
    /// Whether it is privileged: CRI-O then lists the devices of the host.
    pub privileged: bool,
    /// Volumes: host path, path in the container, whether read-only.
    pub volumes: Vec<(PathBuf, String, bool)>,
}

impl Wanted {
    /// A container that runs a shell script.
    pub fn shell(script: &str) -> Wanted {
        Wanted {
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            ..Wanted::default()
        }
    }

    /// A container that runs until it is stopped, and ends at once when it is asked to.
    pub fn idle() -> Wanted {
        Wanted::shell("trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done")
    }

    /// With a terminal.
    pub fn with_tty(self) -> Wanted {
        Wanted { tty: true, ..self }
    }

    /// With standard input.
    pub fn with_stdin(self) -> Wanted {
        Wanted { stdin: true, ..self }
    }

    /// With a memory limit in MiB.
    pub fn with_memory(self, mib: u64) -> Wanted {
        Wanted {
            memory: Some(mib << 20),
            ..self
        }
    }

    /// Killed as a whole when its memory is not enough.
    pub fn killed_whole(self) -> Wanted {
        Wanted {
            killed_whole: true,
            ..self
        }
    }

    /// With a limit of CPUs.
    pub fn with_cpu_limit(self, cpus: u64) -> Wanted {
        Wanted {
            cpu_limit: Some(cpus),
            ..self
        }
    }

    /// With these processors of the host.
    pub fn with_cpus(self, cpus: &'static str) -> Wanted {
        Wanted {
            cpus: Some(cpus),
            ..self
        }
    }

    /// With huge pages, in MiB.
    pub fn with_huge_pages(self, mib: u64) -> Wanted {
        Wanted {
            huge_pages: mib << 20,
            ..self
        }
    }

    /// Privileged.
    pub fn privileged(self) -> Wanted {
        Wanted {
            privileged: true,
            ..self
        }
    }

    /// With a volume.
    pub fn with_volume(mut self, host: &Path, container: &str, readonly: bool) -> Wanted {
        self.volumes.push((host.into(), container.into(), readonly));
        self
    }
}

/// The sandbox's specification.
pub fn of_sandbox(pod: &PodFacts, root: &Path) -> Value {
    // Like the pause program: ends on TERM, and collects orphans.
    let pause = Wanted::shell("trap 'exit 0' TERM INT; while :; do sleep 2147483647 & wait $!; done");
    let mut annotations = common_annotations(pod, &pod.id, "sandbox", root);
    let own = [
        ("Namespace", "contract".to_owned()),
        ("KubeName", pod.name.clone()),
        ("HostName", pod.name.clone()),
        (
            "HostNetwork",
            (!pod.namespaces.iter().any(|(kind, _)| *kind == "network")).to_string(),
        ),
        ("HostnamePath", pod.bundle.join("hostname").display().to_string()),
        ("ShmPath", pod.bundle.join("shm").display().to_string()),
        ("CgroupParent", pod.cgroup.clone()),
        ("NamespaceOptions", json!({"pid": 1}).to_string()),
        ("PortMappings", "[]".to_owned()),
        ("PrivilegedRuntime", "false".to_owned()),
        ("RuntimeHandler", "kata".to_owned()),
        (
            "CNIResult",
            json!({"cniVersion": "1.0.0", "ips": [{"address": format!("{}/24", pod.address)}]}).to_string(),
        ),
        ("ContainerName", format!("k8s_POD_{}_contract_{}_0", pod.name, pod.uid)),
    ];
    annotations.extend(own.map(|(key, value)| (format!("io.kubernetes.cri-o.{key}"), json!(value))));
    annotations.insert("pod-linux-overhead.crio.io".into(), json!("null"));
    annotations.insert("pod-linux-resources.crio.io".into(), json!(pod.resources.to_string()));
    let mut mounts = system_mounts();
    mounts.push(bind(
        &pod.bundle.join("resolv.conf"),
        "/etc/resolv.conf",
        &["bind", "ro", "nodev", "nosuid", "noexec"],
    ));
    mounts.push(bind(&pod.bundle.join("shm"), "/dev/shm", &["rw", "bind"]));
    mounts.push(bind(
        &pod.bundle.join("hostname"),
        "/etc/hostname",
        &["ro", "bind", "nodev", "nosuid", "noexec"],
    ));
    let mut spec = specification(pod, &pod.id, &pause, root, &mounts);
    spec["annotations"] = Value::Object(annotations);
    spec["linux"]["resources"]["cpu"] = json!({"shares": 2});
    if pod.lower_oom_score {
        spec["process"]["oomScoreAdj"] = json!(-998);
    }
    for (key, value) in &pod.sysctls {
        spec["linux"]["sysctl"][key] = json!(value);
    }
    spec
}

/// The specification of a container of the pod.
pub fn of_container(pod: &PodFacts, id: &str, bundle: &Path, root: &Path, wanted: &Wanted) -> Value {
    let mut annotations = common_annotations(pod, id, "container", root);
    let own = [
        ("IP.0", pod.address.clone()),
        ("ImageRef", "0".repeat(64)),
        ("ImageRepoDigests", String::new()),
        ("Stdin", wanted.stdin.to_string()),
        ("StdinOnce", "false".to_owned()),
        ("TTY", wanted.tty.to_string()),
        ("Volumes", volumes_annotation(wanted).to_string()),
    ];
    annotations.extend(own.map(|(key, value)| (format!("io.kubernetes.cri-o.{key}"), json!(value))));
    annotations.insert("io.kubernetes.container.name".into(), json!("story"));
    annotations.insert("platform-runtime-path.crio.io".into(), json!(""));
    let mut mounts = system_mounts();
    let options = ["nosuid", "noexec", "nodev", "relatime", "ro"];
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}));
    mounts.push(bind(&pod.bundle.join("shm"), "/dev/shm", &["rw", "bind"]));
    mounts.push(bind(
        &pod.bundle.join("resolv.conf"),
        "/etc/resolv.conf",
        &["bind", "rw", "nodev", "nosuid", "noexec"],
    ));
    mounts.push(bind(&pod.bundle.join("hostname"), "/etc/hostname", &["bind", "rw"]));
    mounts.push(bind(
        &bundle.join(".containerenv"),
        "/run/.containerenv",
        &["bind", "rw"],
    ));
    for (host, container, readonly) in &wanted.volumes {
        let access = if *readonly { "ro" } else { "rw" };
        mounts.push(bind(host, container, &[access, "rbind", "rprivate", "bind"]));
    }
    let mut spec = specification(pod, id, wanted, root, &mounts);
    spec["annotations"] = Value::Object(annotations);
    spec["process"]["oomScoreAdj"] = json!(1000);
    spec["linux"]["resources"]["cpu"] = json!({"shares": 102, "quota": 0, "period": 100_000});
    if let Some(cpus) = wanted.cpus {
        spec["linux"]["resources"]["cpu"]["cpus"] = json!(cpus);
    }
    spec["linux"]["resources"]["pids"] = json!({"limit": -1});
    if wanted.huge_pages > 0 {
        spec["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": wanted.huge_pages}]);
    }
    if wanted.privileged {
        // By numbers that are other devices in the guest, or none.
        let devices = [
            ("kvm", "c", 10, 232),
            ("sda", "b", 8, 0),
            ("vfio/vfio", "c", 10, 196),
            ("nvidia0", "c", 195, 0),
        ];
        let devices = devices.map(|(name, kind, major, minor)| {
            json!({"path": format!("/dev/{name}"), "type": kind, "major": major, "minor": minor, "fileMode": 0o660, "uid": 0, "gid": 6})
        });
        spec["linux"]["devices"] = json!(devices);
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    }
    if wanted.killed_whole {
        spec["linux"]["resources"]["unified"] = json!({"memory.oom.group": "1"});
    }
    if let Some(bytes) = wanted.memory {
        spec["linux"]["resources"]["memory"] = json!({"limit": bytes, "swap": bytes});
    }
    if let Some(cpus) = wanted.cpu_limit {
        spec["linux"]["resources"]["cpu"] = json!({"quota": cpus * 100_000, "period": 100_000});
    }
    spec
}

fn volumes_annotation(wanted: &Wanted) -> Value {
    let volume = |(host, container, readonly): &(PathBuf, String, bool)| json!({"container_path": container, "host_path": host, "readonly": readonly, "propagation": 0});
    wanted.volumes.iter().map(volume).collect()
}

fn common_annotations(pod: &PodFacts, id: &str, kind: &str, root: &Path) -> Map<String, Value> {
    let labels = json!({
        "io.kubernetes.pod.name": pod.name, "io.kubernetes.pod.namespace": "contract", "io.kubernetes.pod.uid": pod.uid,
    });
    let mut annotations: Map<String, Value> = pod
        .annotations
        .iter()
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    annotations.extend(labels.as_object().cloned().unwrap_or_default());
    annotations.insert("io.container.manager".into(), json!("cri-o"));
    let own = [
        ("Annotations", "{}".to_owned()),
        ("Labels", labels.to_string()),
        (
            "Metadata",
            json!({"name": pod.name, "uid": pod.uid, "namespace": "contract"}).to_string(),
        ),
        ("ContainerID", id.to_owned()),
        ("SandboxID", pod.id.clone()),
        ("SandboxName", format!("k8s_{}_contract_{}_0", pod.name, pod.uid)),
        ("Name", format!("k8s_{kind}_{}_contract_{}_0", pod.name, pod.uid)),
        ("ContainerType", kind.to_owned()),
        (
            "LogPath",
            format!("/var/log/pods/contract_{}_{}/story/0.log", pod.name, pod.uid),
        ),
        ("Created", "2026-01-01T00:00:00.000000000Z".to_owned()),
        ("MountPoint", root.display().to_string()),
        ("ResolvPath", pod.bundle.join("resolv.conf").display().to_string()),
        ("SeccompProfilePath", "Unconfined".to_owned()),
        ("Image", "0".repeat(64)),
        ("ImageName", "docker.io/library/sandpod-test:latest".to_owned()),
    ];
    annotations.extend(own.map(|(key, value)| (format!("io.kubernetes.cri-o.{key}"), json!(value))));
    annotations
}

fn specification(pod: &PodFacts, id: &str, wanted: &Wanted, root: &Path, mounts: &[Value]) -> Value {
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
    namespaces.extend(
        pod.namespaces
            .iter()
            .map(|(kind, path)| match path.as_os_str().is_empty() {
                true => json!({"type": kind}),
                false => json!({"type": kind, "path": path}),
            }),
    );
    json!({
        "ociVersion": "1.2.1",
        "process": process(pod, wanted),
        "root": {"path": root, "readonly": false},
        "hostname": pod.name,
        "mounts": mounts,
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": format!("{}/crio-{id}", pod.cgroup),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn process(pod: &PodFacts, wanted: &Wanted) -> Value {
    let granted = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_KILL",
    ];
    let mut environment = vec![
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        format!("HOSTNAME={}", pod.name),
    ];
    if wanted.tty {
        environment.push("TERM=xterm".into());
    }
    json!({
        "terminal": wanted.tty,
        "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
        "args": wanted.args,
        "env": environment,
        "cwd": "/",
        "capabilities": {"bounding": granted, "effective": granted, "permitted": granted},
    })
}

fn system_mounts() -> Vec<Value> {
    let one = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    vec![
        one("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        one("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        one(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        one("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        one("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ]
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}
