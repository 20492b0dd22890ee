use super::*;
use crate::volumes::Placed;
use serde_json::{Value, json};

const CRIO_SANDBOX: &str = include_str!("samples/crio-sandbox.json");
const CRIO_CONTAINER: &str = include_str!("samples/crio-container.json");
const CONTAINERD_SANDBOX: &str = include_str!("samples/containerd-sandbox.json");
const CONTAINERD_CONTAINER: &str = include_str!("samples/containerd-container.json");

fn spec(sample: &str) -> Spec {
    serde_json::from_str(sample).unwrap()
}

/// `sample` with the value at `pointer` replaced.
fn with(sample: &str, pointer: &str, value: Value) -> Spec {
    let mut json: Value = serde_json::from_str(sample).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match json.pointer_mut(parent).unwrap() {
        Value::Array(list) => list.push(value),
        parent => parent[key] = value,
    }
    serde_json::from_value(json).unwrap()
}

fn in_guest(spec: &Spec, id: &str) -> Result<GuestContainer, SpecError> {
    in_guest_of(spec, id, None)
}

/// In a pod with these ID mappings.
fn in_guest_of(spec: &Spec, id: &str, id_maps: Option<&IdMaps>) -> Result<GuestContainer, SpecError> {
    let role = crate::annotations::identify(spec.annotations().as_ref().unwrap())
        .unwrap()
        .role;
    let none = HashMap::new();
    let bundle = Path::new("/run/bundle");
    translate(
        spec,
        &Context {
            container_id: id,
            bundle,
            role: &role,
            disable_guest_seccomp: false,
            pod_sees_guest: false,
            pod_sysctls: &none,
            pid_target: None,
            id_maps,
            vfio_groups: &BTreeSet::from([12]),
            open_files: (1024, 4096),
        },
    )
}

fn mount<'a>(guest: &'a GuestContainer, destination: &str) -> &'a oci_spec::runtime::Mount {
    let mounts = guest.spec.mounts().as_ref().unwrap();
    mounts
        .iter()
        .find(|mount| mount.destination() == Path::new(destination))
        .unwrap()
}

#[test]
fn a_crio_container_finds_its_files_in_the_share() {
    let guest = in_guest(&spec(CRIO_CONTAINER), "c0ffee").unwrap();
    let root = guest.spec.root().as_ref().unwrap();
    assert_eq!(
        root.path(),
        Path::new("/run/kata-containers/shared/containers/c0ffee/rootfs")
    );

    let shares: Vec<_> = guest
        .shares
        .iter()
        .map(|share| {
            (
                share.destination.to_str().unwrap(),
                share.share_path.to_str().unwrap(),
                share.readonly,
            )
        })
        .collect();
    assert_eq!(
        shares,
        [
            ("/etc/resolv.conf", "c0ffee/mounts/7", true),
            ("/run/.containerenv", "c0ffee/mounts/8", false),
            ("/etc/nginx", "c0ffee/mounts/9", true),
            ("/srv", "c0ffee/mounts/10", false),
        ]
    );
    assert!(guest.shares[2].recursive && !guest.shares[0].recursive);
    assert_eq!(guest.shares[2].propagation, Propagation::Private);
    assert_eq!(guest.shares[3].propagation, Propagation::Slave);
    assert_eq!(
        guest.shares[3].source,
        Path::new("/var/lib/kubelet/pods/0e5b/volumes/kubernetes.io~csi/pvc-1/mount")
    );

    let srv = mount(&guest, "/srv");
    let source = Path::new("/run/kata-containers/shared/containers/c0ffee/mounts/10");
    assert_eq!(srv.source().as_deref(), Some(source));
    let shm = mount(&guest, "/dev/shm");
    assert_eq!(shm.source().as_deref(), Some(Path::new(GUEST_SHM)));
    assert_eq!(shm.options().as_ref().unwrap(), &["rbind"]);
    assert_eq!(mount(&guest, "/proc").typ().as_deref(), Some("proc"));
}

#[test]
fn what_is_mounted_below_a_read_only_volume_is_a_mount_of_its_own() {
    let mut guest = in_guest(&spec(CRIO_CONTAINER), "c0ffee").unwrap();
    let placed = Placed {
        path: "volumes/2/conf".into(),
        options: vec!["noexec"],
        writable: ["cache", "cache/hot", "logs"].map(PathBuf::from).to_vec(),
    };
    guest.shares[2].is_at(&placed, &mut guest.spec);
    let mounts = guest.spec.mounts().as_ref().unwrap();
    let destinations = mounts.iter().map(|mount| mount.destination().to_str().unwrap());
    let found: Vec<_> = destinations.filter(|path| path.starts_with("/etc/nginx")).collect();
    assert_eq!(found, ["/etc/nginx", "/etc/nginx/cache", "/etc/nginx/logs"]);
    let cache = mount(&guest, "/etc/nginx/cache");
    let source = Path::new("/run/kata-containers/shared/containers/volumes/2/conf/cache");
    assert_eq!(cache.source().as_deref(), Some(source));
    let whole = mount(&guest, "/etc/nginx");
    assert_eq!(whole.source().as_deref(), source.parent());
    assert_eq!(whole.options().as_ref().unwrap().last().unwrap(), "noexec");
    assert_eq!(cache.options().as_ref().unwrap(), &["rbind", "rprivate", "rw"]);
}

#[test]
fn what_a_cgroup_is_told_by_its_files_reaches_the_guest_as_far_as_it_has_them() {
    let unified =
        json!({"memory.oom.group": "1", "memory.high": "1000000", "io.max": "8:0 rbps=1", "cpuset.cpus": "3"});
    let guest = in_guest(&with(CRIO_CONTAINER, "/linux/resources/unified", unified), "c0ffee").unwrap();
    let json = serde_json::to_value(&guest.spec).unwrap();
    let kept = json!({"memory.oom.group": "1", "memory.high": "1000000"});
    assert_eq!(json["linux"]["resources"]["unified"], kept);
    for lost in ["unified.cpuset.cpus", "unified.io.max"] {
        let warned = guest
            .warnings
            .iter()
            .any(|warning| warning.starts_with(&format!("`{lost}` is left out")));
        assert!(warned, "{:?}", guest.warnings);
    }
}

#[test]
fn a_crio_containers_limits_and_filter_hold_in_the_guest_and_the_hosts_own_things_do_not() {
    let guest = in_guest(&spec(CRIO_CONTAINER), "c0ffee").unwrap();
    let json = serde_json::to_value(&guest.spec).unwrap();
    assert_eq!(json["linux"]["resources"]["memory"], json!({"limit": 134_217_728}));
    assert_eq!(
        json["linux"]["resources"]["cpu"],
        json!({"shares": 512, "quota": 50000, "period": 100_000})
    );
    assert_eq!(json["linux"]["resources"]["pids"]["limit"], 1024);
    assert_eq!(json["linux"]["resources"]["devices"].as_array().unwrap().len(), 3);
    assert_eq!(json["linux"]["resources"]["blockIO"], Value::Null);
    assert_eq!(json["linux"]["seccomp"]["defaultErrnoRet"], 38);
    assert_eq!(json["linux"]["cgroupsPath"], "/kata/c0ffee");
    assert_eq!(
        json["linux"]["namespaces"],
        json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}]),
        "a host with cgroup v1 asks for no cgroup namespace"
    );
    assert_eq!(json["linux"]["maskedPaths"].as_array().unwrap().len(), 3);
    assert_eq!(json["process"]["user"]["additionalGids"], json!([1000]));
    assert_eq!(json["process"]["noNewPrivileges"], true);
    assert_eq!(json["hooks"], Value::Null);
    assert_eq!(
        json["annotations"]["io.katacontainers.pkg.oci.container_type"],
        "pod_container"
    );
    assert!(!guest.sandbox_pidns);
    for what in ["cpu.mems", "blockIO", "hooks"] {
        assert!(
            guest.warnings.iter().any(|warning| warning.contains(what)),
            "{what}: {:?}",
            guest.warnings
        );
    }
    // Every container has these where the node has the module, so they are no warnings.
    for what in ["SELinux", "AppArmor"] {
        let of_it = |text: &str| text.contains(what);
        assert!(guest.notes.iter().any(|note| of_it(note)), "{what}: {:?}", guest.notes);
        assert!(!guest.warnings.iter().any(|warning| of_it(warning)), "{what}");
    }
}

#[test]
fn an_apparmor_profile_that_somebody_has_chosen_is_a_warning_with_its_name() {
    for (profile, noted, warned) in [
        ("cri-containerd.apparmor.d", true, false),
        ("crio-default", true, false),
        ("unconfined", false, false),
        ("", false, false),
        ("my-profile", false, true),
    ] {
        let container = with(CRIO_CONTAINER, "/process/apparmorProfile", json!(profile));
        let guest = in_guest(&container, "c1").unwrap();
        let names = |text: &str| text.contains("AppArmor");
        assert_eq!(guest.notes.iter().any(|note| names(note)), noted, "{profile:?}");
        let warning = guest.warnings.iter().find(|warning| names(warning));
        assert_eq!(
            warning.is_some_and(|warning| warning.contains(profile)),
            warned,
            "{profile:?}"
        );
    }
}

#[test]
fn a_containerd_container_of_a_pod_with_one_pid_namespace_joins_it() {
    let guest = in_guest(&spec(CONTAINERD_CONTAINER), "c1").unwrap();
    assert!(guest.sandbox_pidns);
    let json = serde_json::to_value(&guest.spec).unwrap();
    let kinds = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}]);
    assert_eq!(json["linux"]["namespaces"], kinds);
    assert_eq!(json["process"]["terminal"], true);
    let log = mount(&guest, "/dev/termination-log");
    assert!(
        log.source().as_ref().unwrap().starts_with(GUEST_SHARE),
        "its source is not a device"
    );
    assert_eq!(
        mount(&guest, "/host/proc").source().as_deref(),
        Some(Path::new("/proc"))
    );
    assert!(
        guest
            .warnings
            .contains(&"the mount of /proc shows the guest's own, not the host's.".to_owned())
    );
    let bundle = Path::new("/run/bundle");
    assert_eq!(
        host_rootfs(&spec(CONTAINERD_CONTAINER), bundle).unwrap(),
        Path::new("/run/bundle/rootfs")
    );
    assert!(
        host_rootfs(&spec(CRIO_CONTAINER), bundle)
            .unwrap()
            .starts_with("/var/lib/containers")
    );
}

#[test]
fn host_pid_is_the_guests_namespace_by_an_annotation_that_others_ignore() {
    let mut spec = spec(CRIO_CONTAINER);
    // What a pod's author writes there is not the shim's word.
    let annotations = spec.annotations_mut().as_mut().unwrap();
    annotations.insert(agent_protocol::GUEST_PIDS.into(), "true".into());
    let guest = in_guest(&spec, "c1").unwrap();
    assert!(
        !guest
            .spec
            .annotations()
            .as_ref()
            .unwrap()
            .contains_key(agent_protocol::GUEST_PIDS)
    );
    let namespaces = spec.linux_mut().as_mut().unwrap().namespaces_mut().as_mut().unwrap();
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
    let guest = in_guest(&spec, "c1").unwrap();
    assert_eq!(
        guest.spec.annotations().as_ref().unwrap()[agent_protocol::GUEST_PIDS],
        "true"
    );
    assert!(guest.sandbox_pidns, "for an agent that does not know the annotation");
}

#[test]
fn a_pause_container_can_be_translated_too() {
    for (sample, id) in [(CRIO_SANDBOX, "5ab1"), (CONTAINERD_SANDBOX, "77")] {
        let guest = in_guest(&spec(sample), id).unwrap();
        assert!(!guest.sandbox_pidns);
        let annotations = guest.spec.annotations().as_ref().unwrap();
        assert_eq!(annotations["io.katacontainers.pkg.oci.container_type"], "pod_sandbox");
        assert!(
            guest
                .shares
                .iter()
                .any(|share| share.destination == Path::new("/etc/resolv.conf"))
        );
    }
}

#[test]
fn open_files_are_limited_as_those_of_the_cri_are() {
    let limit = |process: Value, open_files| {
        let process = guest_process(serde_json::from_value(process).unwrap(), open_files).unwrap();
        let limits = process.rlimits().clone().unwrap();
        let own = limits
            .iter()
            .filter(|limit| limit.typ() == PosixRlimitType::RlimitNofile);
        own.map(|limit| (limit.soft(), limit.hard())).collect::<Vec<_>>()
    };
    let none = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["x"]});
    let mut own = none.clone();
    own["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 7, "hard": 8}]);
    assert_eq!(limit(none.clone(), (1024, 524_288)), [(1024, 524_288)]);
    assert_eq!(limit(own, (1024, 524_288)), [(7, 8)]);
    let systemds = 1 << 30;
    assert_eq!(
        limit(none, (systemds, systemds)),
        [(1 << 20, 1 << 20)],
        "no more than the guest's kernel allows"
    );
}

#[test]
fn a_pods_sysctls_reach_its_containers() {
    let pod = HashMap::from([
        ("net.core.somaxconn".into(), "9".into()),
        ("kernel.shmmax".into(), "1".into()),
    ]);
    let spec = with(CRIO_CONTAINER, "/linux/sysctl", json!({"kernel.shmmax": "2"}));
    let context = Context {
        container_id: "c",
        bundle: Path::new("/b"),
        role: &Role::Container { sandbox_id: "s".into() },
        disable_guest_seccomp: true,
        pod_sees_guest: false,
        pod_sysctls: &pod,
        pid_target: None,
        id_maps: None,
        vfio_groups: &BTreeSet::new(),
        open_files: (1024, 4096),
    };
    let guest = translate(&spec, &context).unwrap();
    let linux = guest.spec.linux().as_ref().unwrap();
    let sysctl = linux.sysctl().as_ref().unwrap();
    assert_eq!(
        (sysctl["net.core.somaxconn"].as_str(), sysctl["kernel.shmmax"].as_str()),
        ("9", "2")
    );
    assert!(linux.seccomp().is_none(), "the node's configuration says so");
    assert!(
        guest
            .warnings
            .iter()
            .any(|warning| warning.contains("disable_guest_seccomp"))
    );
}

#[test]
fn the_network_namespace_is_the_pods_or_there_is_no_pod() {
    assert_eq!(
        pod_netns(&spec(CRIO_SANDBOX)),
        Ok(NetNs::Path("/var/run/netns/8d1c".into()))
    );
    let new = with(CRIO_SANDBOX, "/linux/namespaces", json!([{"type": "network"}]));
    assert_eq!(pod_netns(&new), Ok(NetNs::New));
    for namespaces in [
        json!([{"type": "pid"}]),
        json!([{"type": "network", "path": "/proc/1/ns/net"}]),
    ] {
        let host = with(CRIO_SANDBOX, "/linux/namespaces", namespaces);
        assert_eq!(pod_netns(&host), Err(SpecError::HostNetwork));
    }
}

#[test]
fn what_a_guest_cannot_have_is_refused_by_name() {
    let bind = |source: &str, options: Value| json!({"destination": "/x", "type": "bind", "source": source, "options": options});
    let device = |path: &str, typ: &str, major: i64, minor: i64| json!([{"path": path, "type": typ, "major": major, "minor": minor}]);
    let cases = [
        (
            "/mounts/-",
            bind("/dev/sda", json!(["rbind"])),
            "host device /dev/sda cannot be had in a VM",
        ),
        (
            "/mounts/-",
            bind("/etc/../dev/sda", json!(["rbind"])),
            "host device /dev/sda",
        ),
        (
            "/mounts/-",
            bind("/mnt", json!(["rbind", "rshared"])),
            "`Bidirectional` at /x",
        ),
        (
            "/mounts/-",
            bind("/mnt", json!(["rbind", "ridmap"])),
            "the mount at /x is to be ID-mapped, but neither it nor the container says how",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "overlay", "source": "overlay", "options": ["lowerdir=/a:/b"]}),
            "the image volume at /x",
        ),
        (
            "/mounts/-",
            json!({"destination": "/x", "type": "nfs", "source": "server:/"}),
            "the mount of type `nfs` at /x",
        ),
        (
            "/linux/devices",
            device("/dev/sda", "b", 8, 0),
            "host device /dev/sda (b 8:0)",
        ),
        (
            "/linux/devices",
            device("/dev/vfio/13", "c", 240, 1),
            "the VFIO device /dev/vfio/13 cannot be had in a VM: the pod's VM was started without it, and gets none later: set `cold_plug_vfio = \"root-port\"`",
        ),
        (
            "/linux/devices",
            device("/dev/vfio/devices/vfio0", "c", 240, 1),
            "the VFIO device /dev/vfio/devices/vfio0",
        ),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 65536, "size": 65536}]),
            "`linux.uidMappings` and `linux.gidMappings`",
        ),
        (
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2MB", "limit": 4_194_304}, {"pageSize": "1GB", "limit": 1_073_741_824}]),
            "`hugepages` of 1GB cannot be had in a VM: the guest has pages of 2MB",
        ),
        (
            "/linux/personality",
            json!({"domain": "LINUX32"}),
            "`linux.personality`",
        ),
        ("/linux/intelRdt", json!({"closID": "x"}), "`linux.intelRdt`"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/s"}),
            "`linux.seccomp.listenerPath`",
        ),
        ("/domainname", json!("example.org"), "`domainname`"),
    ];
    for (pointer, value, sentence) in cases {
        let error = in_guest(&with(CRIO_CONTAINER, pointer, value), "c")
            .unwrap_err()
            .to_string();
        assert!(error.contains(sentence), "{pointer}: {error}");
    }
}

/// A container as CRI-O makes it for a pod with `hostUsers: false`.
fn with_user_namespace() -> Value {
    let mut value = serde_json::to_value(spec(CRIO_CONTAINER)).unwrap();
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    value["linux"]["uidMappings"] = mappings.clone();
    value["linux"]["gidMappings"] = mappings.clone();
    let namespaces = value["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user", "path": "/var/run/userns/8d1c"}));
    value["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ridmap"],
        "uidMappings": mappings, "gidMappings": mappings,
    }));
    value
}

#[test]
fn a_user_namespace_is_the_pods_and_its_files_are_mapped_on_the_host() {
    let spec: Spec = serde_json::from_value(with_user_namespace()).unwrap();
    let maps = id_maps(&spec).unwrap().unwrap();
    assert_eq!(maps, IdMaps::parse("0:100000:65536", "0:100000:65536").unwrap());
    let guest = in_guest_of(&spec, "c", Some(&maps)).unwrap();
    let linux = guest.spec.linux().as_ref().unwrap();
    let mut namespaces = linux.namespaces().iter().flatten();
    let user = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User);
    assert_eq!(user.unwrap().path(), &None, "the path is the host's");
    assert_eq!(guest.shares.last().unwrap().maps, Some(maps.clone()));
    let data = mount(&guest, "/data");
    assert_eq!(
        (data.uid_mappings(), data.options()),
        (&None, &Some(vec!["rbind".to_owned()]))
    );

    let of_another = IdMaps::parse("0:200000:65536", "0:200000:65536").unwrap();
    for (pod, said) in [
        (None, "are not those of its pod, which has none"),
        (
            Some(&of_another),
            "are not those of its pod, users 0:200000:65536 groups 0:200000:65536",
        ),
    ] {
        let refused = in_guest_of(&spec, "c", pod).unwrap_err().to_string();
        assert!(refused.ends_with(said), "{refused}");
    }
    let mut without_maps = with_user_namespace();
    without_maps["linux"]["gidMappings"] = json!([]);
    let refused = id_maps(&serde_json::from_value(without_maps).unwrap())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("are no ID mappings"), "{refused}");
    let mut without_root = with_user_namespace();
    without_root["linux"]["uidMappings"] = json!([{"containerID": 1, "hostID": 100_000, "size": 65536}]);
    let refused = id_maps(&serde_json::from_value(without_root).unwrap())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("have no root"), "{refused}");
    let mut with_disk = with_user_namespace();
    with_disk["linux"]["devices"] = json!([{"path": "/dev/data", "type": "b", "major": 7, "minor": 3}]);
    with_disk["linux"]["resources"]["devices"] =
        json!([{"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rwm"}]);
    let refused = in_guest_of(&serde_json::from_value(with_disk).unwrap(), "c", Some(&maps)).unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("a block device in a pod with `hostUsers: false`"),
        "{refused}"
    );
}

#[test]
fn what_every_kernel_has_stays_as_it_is() {
    for (path, typ, major, minor) in [
        ("/dev/fuse", "c", 10, 229),
        ("/dev/net/tun", "c", 10, 200),
        ("/dev/tty", "u", 5, 0),
    ] {
        let devices = json!([{"path": path, "type": typ, "major": major, "minor": minor}]);
        let guest = in_guest(&with(CRIO_CONTAINER, "/linux/devices", devices), "c").unwrap();
        assert_eq!(
            guest.spec.linux().as_ref().unwrap().devices().as_ref().unwrap().len(),
            1
        );
    }
    let null = json!({"destination": "/etc/secret", "type": "bind", "source": "/dev/null", "options": ["bind"]});
    let guest = in_guest(&with(CRIO_CONTAINER, "/mounts/-", null), "c").unwrap();
    assert_eq!(
        mount(&guest, "/etc/secret").source().as_deref(),
        Some(Path::new("/dev/null"))
    );
    let root = json!({"destination": "/host", "type": "bind", "source": "/", "options": ["rbind", "ro"]});
    let guest = in_guest(&with(CRIO_CONTAINER, "/mounts/-", root), "c").unwrap();
    assert_eq!(guest.shares.last().unwrap().share_path, Path::new("c/mounts/11"));
}

#[test]
fn a_vfio_device_that_the_vm_has_is_its_kernels() {
    let mut value = serde_json::to_value(spec(CRIO_CONTAINER)).unwrap();
    let device =
        |path: &str, major: i64, minor: i64| json!({"path": path, "type": "c", "major": major, "minor": minor});
    let rule = |typ: &str, major: i64, minor: i64| json!({"allow": true, "type": typ, "major": major, "minor": minor, "access": "rwm"});
    value["linux"]["devices"] = json!([
        device("/dev/vfio/12", 240, 3),
        device("/dev/fuse", 10, 229),
        device("/dev/vfio/vfio", 10, 196)
    ]);
    value["linux"]["resources"]["devices"] = json!([
        rule("c", 240, 3),
        rule("b", 240, 3),
        rule("c", 10, 196),
        rule("c", 10, 229)
    ]);
    let guest = in_guest(&serde_json::from_value(value).unwrap(), "c").unwrap();
    let linux = guest.spec.linux().as_ref().unwrap();
    let files: Vec<_> = linux
        .devices()
        .as_ref()
        .unwrap()
        .iter()
        .map(|device| device.path())
        .collect();
    assert_eq!(files, [Path::new("/dev/fuse")]);
    let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
    let rules: Vec<_> = rules.iter().map(|rule| (rule.typ(), rule.major())).collect();
    let kept = [
        (Some(oci_spec::runtime::LinuxDeviceType::B), Some(240)),
        (Some(oci_spec::runtime::LinuxDeviceType::C), Some(10)),
    ];
    assert_eq!(rules, kept);
}

#[test]
fn a_privileged_container_has_none_of_the_hosts_devices() {
    let mut value = serde_json::to_value(spec(CRIO_CONTAINER)).unwrap();
    let device = |path: &str, kind: &str, major: u32, minor: u32| json!({"path": path, "type": kind, "major": major, "minor": minor});
    value["linux"]["devices"] = json!([
        device("/dev/kvm", "c", 10, 232),
        device("/dev/sda", "b", 8, 0),
        device("/dev/vfio/vfio", "c", 10, 196),
        device("/dev/fuse", "c", 10, 229),
        device("/dev/data", "b", 7, 3),
        // The rule below has its numbers, and is for another kind.
        device("/dev/vcs3", "c", 7, 3)
    ]);
    value["linux"]["resources"]["devices"] = json!([
        {"allow": true, "access": "rwm"},
        {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rwm"}
    ]);
    let guest = in_guest(&serde_json::from_value(value.clone()).unwrap(), "c").unwrap();
    let linux = guest.spec.linux().as_ref().unwrap();
    let files: Vec<_> = linux.devices().iter().flatten().map(|device| device.path()).collect();
    assert_eq!(files, [Path::new("/dev/fuse"), Path::new("/dev/data")]);
    let disks: Vec<_> = guest.disks.iter().map(|disk| disk.path.as_path()).collect();
    assert_eq!(disks, [Path::new("/dev/data")]);
    assert!(
        guest.notes.iter().any(|note| note.contains("devices")),
        "{:?}",
        guest.notes
    );

    // Without a rule for all it is refused, as before.
    value["linux"]["resources"]["devices"] = json!([]);
    let refused = in_guest(&serde_json::from_value(value).unwrap(), "c").unwrap_err();
    assert!(refused.to_string().starts_with("host device /dev/kvm"), "{refused}");
}

#[test]
fn a_block_device_is_a_volume_if_a_rule_names_it() {
    let rule = |access: &str, numbers: Option<(i64, i64)>| {
        let (major, minor) = numbers.unzip();
        json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": major, "minor": minor, "access": access}])
    };
    let volume = |rules: Value| {
        let mut value = serde_json::to_value(spec(CRIO_CONTAINER)).unwrap();
        value["linux"]["devices"] = json!([{"path": "/dev/data", "type": "b", "major": 7, "minor": 3}]);
        value["linux"]["resources"]["devices"] = rules;
        in_guest(&serde_json::from_value(value).unwrap(), "c1").map(|guest| guest.disks)
    };
    let numbers = Numbers { major: 7, minor: 3 };
    for (access, read_only) in [("rwm", false), ("rw", false), ("r", true), ("mr", true)] {
        let path = PathBuf::from("/dev/data");
        let expected = vec![BlockDevice {
            numbers,
            path,
            read_only,
        }];
        assert_eq!(volume(rule(access, Some((7, 3)))).unwrap(), expected, "{access}");
    }
    for rules in [rule("rwm", None), rule("rwm", Some((7, 4)))] {
        let refused = volume(rules).unwrap_err().to_string();
        assert!(
            refused.starts_with("host device /dev/data (b 7:3) cannot be had"),
            "{refused}"
        );
    }
}
