//! What upstream's two shims ask for, from the first question of a pod to its last, in their order and with their
//! spellings.
//!
//! The shim that is written in Go names a container's init by the container's id and everything else as `config.json`
//! does; runtime-rs, the one in Rust, names an init by nothing, and namespaces and capabilities as its types are
//! displayed. Neither sends a PID, network or cgroup namespace. Both send how many processors there are to be in all.

use std::sync::Arc;

use agent_protocol::{
    client::{Client, ClientError},
    oci,
    protocol::{
        agent::*,
        oci as wire,
        types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route},
    },
};
use serde_json::{Value, json};

use super::{
    boot::TAG,
    pod::{Pod, SHARE, SHM, base, process, root_file_system, storage},
};

super::cases![a_pod_as_the_shim_in_go_runs_it, a_pod_as_runtime_rs_runs_it];

const SANDBOX: &str = "5d1f";
const EPHEMERAL: &str = "/run/kata-containers/sandbox/ephemeral/cache";

/// How a shim spells what both ask for.
#[derive(Clone, Copy, PartialEq)]
enum Shim {
    Go,
    Rust,
}

impl Shim {
    /// The name of a container's init in messages about a process.
    fn init(self, container: &str) -> String {
        match self {
            Shim::Go => container.to_owned(),
            Shim::Rust => String::new(),
        }
    }

    /// Where the share has a container's root file system.
    fn rootfs(self, container: &str) -> String {
        match self {
            Shim::Go => format!("{container}/rootfs"),
            Shim::Rust => format!("passthrough/{container}/rootfs"),
        }
    }

    /// A specification as it leaves the shim.
    fn specification(self, container: &str, script: &str) -> wire::Spec {
        let mut spec = base(script);
        spec["root"]["path"] = json!(format!("{SHARE}/{}", self.rootfs(container)));
        spec["annotations"] = json!({ "io.katacontainers.pkg.oci.container_type": "pod_container" });
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024 }]);
        spec["linux"] = json!({
            "cgroupsPath": format!("/kubepods/burstable/pod1/{container}"),
            "namespaces": [{ "type": "mount" }, { "type": "uts" }, { "type": "ipc" }],
            "resources": { "memory": { "limit": 268435456 }, "cpu": { "shares": 512, "quota": 150000, "period": 100000 } },
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [{
                    "names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                    "args": [{ "index": 1, "value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ" }]
                }]
            }
        });
        let volume =
            json!({ "destination": "/cache", "type": "bind", "source": EPHEMERAL, "options": ["rbind", "rw"] });
        spec["mounts"].as_array_mut().unwrap().push(volume);
        let mut spec = oci::spec_to_wire(&serde_json::from_value(spec).unwrap());
        if self == Shim::Rust {
            self.respell(&mut spec);
        }
        spec
    }

    fn respell(self, spec: &mut wire::Spec) {
        for namespace in &mut spec.Linux.mut_or_insert_default().Namespaces {
            namespace.Type = match namespace.Type.as_str() {
                "mount" => "mnt".into(),
                other => other.into(),
            };
        }
        let sets = spec
            .Process
            .mut_or_insert_default()
            .Capabilities
            .mut_or_insert_default();
        for set in [&mut sets.Bounding, &mut sets.Effective, &mut sets.Permitted] {
            for name in set {
                *name = name.trim_start_matches("CAP_").to_owned();
            }
        }
    }

    fn creation(self, pod: &Pod, container: &str, script: &str) -> CreateContainerRequest {
        let root = pod.share().join(self.rootfs(container));
        root_file_system(&root).unwrap();
        let mut request = CreateContainerRequest::new();
        (request.container_id, request.exec_id) = (container.into(), self.init(container));
        request.storages = vec![storage("ephemeral", "tmpfs", "tmpfs", &["fsgid=1234"], EPHEMERAL)];
        request.OCI = Some(self.specification(container, script)).into();
        request
    }

    /// The network and the sandbox: Go's shim adds neighbours last, runtime-rs before the routes.
    async fn sandbox(self, client: &Client) {
        client.update_interface(interface()).await.unwrap();
        if self == Shim::Rust {
            client.add_arp_neighbors(neighbours()).await.unwrap();
        }
        let routes = client.update_routes(routes()).await.unwrap().Routes;
        assert!(routes.iter().any(|route| route.gateway == "10.1.2.1"), "{routes:?}");
        if self == Shim::Go {
            client.add_arp_neighbors(neighbours()).await.unwrap();
        }
        let mut request = CreateSandboxRequest::new();
        (request.sandbox_id, request.hostname) = (SANDBOX.into(), "web-0".into());
        request.dns = vec!["nameserver 10.96.0.10".into(), "search default.svc".into()];
        let shm = ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"];
        request.storages = vec![
            storage("virtio-fs", TAG, "virtiofs", &["nodev"], &format!("{SHARE}/")),
            storage("ephemeral", "shm", "tmpfs", &shm, SHM),
        ];
        // A storage that cannot be had fails the call, which the shim may repeat.
        let mut hopeless = request.clone();
        hopeless.storages.push(storage(
            "virtio-fs",
            "nobody",
            "virtiofs",
            &[],
            "/run/kata-containers/none",
        ));
        client.create_sandbox(hopeless).await.unwrap_err();
        client.create_sandbox(request).await.unwrap();
        let mut request = GuestDetailsRequest::new();
        (request.mem_block_size, request.mem_hotplug_probe) = (true, true);
        let details = client.get_guest_details(request).await.unwrap();
        assert!(details.mem_block_size_bytes > 0 && !details.support_mem_hotplug_probe);
    }
}

fn interface() -> UpdateInterfaceRequest {
    let mut interface = Interface::new();
    (interface.device, interface.name, interface.hwAddr) = ("eth0".into(), "eth0".into(), "02:00:00:00:00:01".into());
    (interface.mtu, interface.type_) = (1450, "veth".into());
    for (ip, mask) in [("10.1.2.3", "24"), ("fd00::3", "64")] {
        let mut address = IPAddress::new();
        (address.address, address.mask) = (ip.into(), mask.into());
        address.family = if ip.contains(':') {
            IPFamily::v6.into()
        } else {
            IPFamily::v4.into()
        };
        interface.IPAddresses.push(address);
    }
    let mut request = UpdateInterfaceRequest::new();
    request.interface = Some(interface).into();
    request
}

fn routes() -> UpdateRoutesRequest {
    let route = |dest: &str, gateway: &str, scope: u32| {
        let mut route = Route::new();
        (route.dest, route.gateway, route.device, route.scope) = (dest.into(), gateway.into(), "eth0".into(), scope);
        route
    };
    let mut request = UpdateRoutesRequest::new();
    request.routes.mut_or_insert_default().Routes = vec![route("", "10.1.2.1", 0), route("10.5.0.0/16", "", 253)];
    request
}

fn neighbours() -> AddARPNeighborsRequest {
    let mut neighbour = ARPNeighbor::new();
    neighbour.toIPAddress.mut_or_insert_default().address = "10.1.2.1/32".into();
    (neighbour.device, neighbour.lladdr, neighbour.state) = ("eth0".into(), "02:00:00:00:00:99".into(), 0x80);
    let mut request = AddARPNeighborsRequest::new();
    request.neighbors.mut_or_insert_default().ARPNeighbors.push(neighbour);
    request
}

async fn online(pod: &Pod, wait: bool, cpu_only: bool) {
    pod.plug_processor();
    let mut request = OnlineCPUMemRequest::new();
    (request.wait, request.nb_cpus, request.cpu_only) = (wait, 2, cpu_only);
    pod.client.online_cpu_mem(request).await.unwrap();
}

/// Runs a process and reads it to its end, as both do: input, output, and only then its exit.
async fn followed(pod: &Pod, container: &str, exec: &str, input: &[u8], ends: bool) -> (i32, String) {
    if !input.is_empty() {
        pod.write(container, exec, input).await;
    }
    if ends {
        let mut request = CloseStdinRequest::new();
        (request.container_id, request.exec_id) = (container.into(), exec.into());
        pod.client.close_stdin(request).await.unwrap();
    } else {
        // Nothing is the end, to runtime-rs.
        pod.write(container, exec, &[]).await;
    }
    let output = pod.output(container, exec).await;
    let errors = pod.errors(container, exec).await;
    assert_eq!(errors, "");
    (pod.wait(container, exec).await, String::from_utf8(output).unwrap())
}

/// What a container finds, whichever shim has made it.
const LOOK: &str = "hostname; grep -c ^processor /proc/cpuinfo; cat /proc/self/cgroup /sys/fs/cgroup/memory.max; ulimit -n; \
                    stat -c '%g %a' /cache; touch /tmp/f; chmod 4755 /tmp/f 2>/dev/null || echo refused; chmod 755 /tmp/f && echo done; cat";
const SEEN: &str = "web-0\n2\n0::/\n268435456\n1024\n1234 3777\nrefused\ndone\n";

async fn execs(pod: &Pod, container: &str, without_capabilities: bool) {
    let mut run: Value = process("grep CapEff /proc/self/status; stty size; exit 3");
    run["terminal"] = json!(true);
    if without_capabilities {
        run.as_object_mut().unwrap().remove("capabilities");
    }
    pod.try_exec(container, "exec-1", run).await.unwrap();
    let mut request = TtyWinResizeRequest::new();
    (request.container_id, request.exec_id) = (container.into(), "exec-1".into());
    (request.row, request.column) = (40, 132);
    pod.client.tty_win_resize(request).await.unwrap();
    let output = String::from_utf8(pod.output(container, "exec-1").await).unwrap();
    assert_eq!(pod.wait(container, "exec-1").await, 3);
    // The container's own capabilities, sent or not: chown, kill, setgid, setuid, net_raw, sys_chroot.
    assert!(output.contains("00000000000420e1"), "{output}");
}

async fn update(pod: &Pod, container: &str) {
    let mut request = UpdateContainerRequest::new();
    request.container_id = container.into();
    let resources = request.resources.mut_or_insert_default();
    resources.Memory.mut_or_insert_default().Limit = 128 << 20;
    let cpu = resources.CPU.mut_or_insert_default();
    (cpu.Quota, cpu.Period) = (50_000, 100_000);
    pod.client.update_container(request).await.unwrap();
    let (_, limits) = pod
        .exec(container, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
        .await;
    assert_eq!(limits, "134217728\n50000 100000\n");
    assert_eq!(pod.stats(container).await.memory_stats.usage.limit, 128 << 20);
}

async fn remove(client: &Client, container: &str, timeout: u32) {
    let mut request = RemoveContainerRequest::new();
    (request.container_id, request.timeout) = (container.into(), timeout);
    client.remove_container(request).await.unwrap();
}

async fn a_pod_as_the_shim_in_go_runs_it(_: Arc<Pod>) {
    let pod = Pod::bare().await.unwrap();
    let (client, shim) = (&pod.client, Shim::Go);
    shim.sandbox(client).await;
    let kills = tokio::spawn({
        let client = client.clone();
        async move { client.get_oom_event(GetOOMEventRequest::new()).await }
    });
    // The pause container is one as any, under the sandbox's id.
    pod.try_create(shim.creation(&pod, SANDBOX, "exec sleep 86400"))
        .await
        .unwrap();
    pod.start(SANDBOX).await;
    online(&pod, true, true).await;

    pod.try_create(shim.creation(&pod, "c1", LOOK)).await.unwrap();
    pod.start("c1").await;
    assert_eq!(
        followed(&pod, "c1", "c1", b"typed\n", true).await,
        (0, format!("{SEEN}typed\n"))
    );
    let mut stale = SignalProcessRequest::new();
    (stale.container_id, stale.exec_id, stale.signal) = ("c1".into(), "c1".into(), 9);
    let gone = client.signal_process(stale).await.unwrap_err();
    assert!(matches!(gone, ClientError::NotFound(_)), "{gone}");
    remove(client, "c1", 0).await;

    pod.try_create(shim.creation(&pod, "c2", "trap 'exit 7' TERM; while :; do sleep 1; done"))
        .await
        .unwrap();
    pod.start("c2").await;
    execs(&pod, "c2", false).await;
    update(&pod, "c2").await;
    let pause = PauseContainerRequest {
        container_id: "c2".into(),
        ..Default::default()
    };
    client.pause_container(pause).await.unwrap();
    let resume = ResumeContainerRequest {
        container_id: "c2".into(),
        ..Default::default()
    };
    client.resume_container(resume).await.unwrap();
    pod.signal("c2", "c2", 15).await.unwrap();
    assert_eq!(pod.wait("c2", "c2").await, 7);
    let stale = RemoveStaleVirtiofsShareMountsRequest::new();
    client.remove_stale_virtiofs_share_mounts(stale).await.unwrap();
    remove(client, "c2", 0).await;

    pod.signal(SANDBOX, "", 9).await.unwrap();
    assert_eq!(pod.wait(SANDBOX, SANDBOX).await, 137);
    remove(client, SANDBOX, 0).await;
    client.destroy_sandbox(DestroySandboxRequest::new()).await.unwrap();
    assert!(!kills.is_finished(), "somebody was killed for want of memory");
    pod.end();
}

async fn a_pod_as_runtime_rs_runs_it(_: Arc<Pod>) {
    let pod = Pod::bare().await.unwrap();
    let (client, shim) = (&pod.client, Shim::Rust);
    shim.sandbox(client).await;
    client.version().await.unwrap();
    pod.try_create(shim.creation(&pod, SANDBOX, "exec sleep 86400"))
        .await
        .unwrap();
    pod.start(SANDBOX).await;
    online(&pod, false, false).await;

    pod.try_create(shim.creation(&pod, "c1", LOOK)).await.unwrap();
    pod.start("c1").await;
    assert_eq!(
        followed(&pod, "c1", "", b"typed\n", false).await,
        (0, format!("{SEEN}typed\n"))
    );
    // Whatever is left of a container that has ended is killed; that nothing is left is no fault.
    if let Err(error) = pod.signal("c1", "", 9).await {
        assert!(matches!(error, ClientError::NotFound(_)), "{error}");
    }
    remove(client, "c1", 10).await;

    pod.try_create(shim.creation(&pod, "c2", "trap 'exit 7' TERM; while :; do sleep 1; done"))
        .await
        .unwrap();
    pod.start("c2").await;
    execs(&pod, "c2", true).await;
    update(&pod, "c2").await;
    pod.signal("c2", "", 15).await.unwrap();
    assert_eq!(pod.wait("c2", "").await, 7);
    remove(client, "c2", 10).await;

    pod.signal(SANDBOX, "", 9).await.unwrap();
    assert_eq!(pod.wait(SANDBOX, "").await, 137);
    remove(client, SANDBOX, 10).await;
    client.check(std::time::Duration::from_secs(30)).await.unwrap();
    // It never asks for the sandbox's end: it kills the machine.
    pod.end();
}
