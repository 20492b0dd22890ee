//! The pod in the guest, and verbs for what a host does with it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use agent_protocol::{
    client::{Client, ClientError, LONGEST_READ},
    oci,
    protocol::agent::*,
};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

use super::{
    boot::{Machine, TAG},
    watcher,
};

/// Where the guest finds the share.
pub const SHARE: &str = "/run/kata-containers/shared/containers";
/// The pod's `/dev/shm`.
pub const SHM: &str = "/run/kata-containers/sandbox/shm";
/// For the boot; it takes 1 to 2 s with emulation.
const PATIENCE: Duration = Duration::from_secs(300);
const APPLETS: &str = "awk cat chmod cut dd df echo env false grep head hostname id ip kill ls mkdir mount ping ps pwd readlink \
     rm seq sh sleep sort stat stty sync tail tee test timeout touch tr true tty uname wc yes";

/// A booted guest with a sandbox.
pub struct Pod {
    machine: Machine,
    pub client: Client,
    /// What it said of itself.
    pub details: GuestDetailsResponse,
    /// From QEMU's start to the first answer.
    pub answered: Duration,
}

impl Pod {
    /// Boots the guest and makes the sandbox, whose containers have the guest's hooks of a folder, if one is named.
    pub async fn boot(hooks: &str) -> Result<std::sync::Arc<Pod>, String> {
        let began = Instant::now();
        let (machine, stream) = Machine::start()?;
        let pod = Pod::set_up(&machine, stream, began, hooks).await;
        match pod {
            Ok((client, details, answered)) => Ok(std::sync::Arc::new(Pod {
                machine,
                client,
                details,
                answered,
            })),
            Err(error) => Err(format!("{error}\n{}", machine.console())),
        }
    }

    /// Boots the guest, and makes nothing in it: the agent answers.
    pub async fn bare() -> Result<Pod, String> {
        let began = Instant::now();
        let (machine, stream) = Machine::start()?;
        let client = Client::new(stream).with_deadline(PATIENCE);
        match client.check(PATIENCE).await {
            Ok(()) => Ok(Pod {
                machine,
                client,
                details: GuestDetailsResponse::new(),
                answered: began.elapsed(),
            }),
            Err(error) => Err(format!("{error}\n{}", machine.console())),
        }
    }

    async fn set_up(
        machine: &Machine,
        stream: tokio::net::UnixStream,
        began: Instant,
        hooks: &str,
    ) -> Result<(Client, GuestDetailsResponse, Duration), ClientError> {
        let client = Client::new(stream).with_deadline(PATIENCE);
        client.check(PATIENCE).await?;
        let answered = began.elapsed();
        let mut request = GuestDetailsRequest::new();
        (request.mem_block_size, request.mem_hotplug_probe) = (true, true);
        let details = client.get_guest_details(request).await?;
        let mut request = CreateSandboxRequest::new();
        request.sandbox_id = "pod".into();
        request.guest_hook_path = hooks.into();
        request.hostname = "pod-host".into();
        request.dns = vec!["nameserver 10.96.0.10".into()];
        request.storages = vec![
            storage("virtio-fs", TAG, "virtiofs", &["nodev"], SHARE),
            storage(
                "ephemeral",
                "shm",
                "tmpfs",
                &["noexec", "nosuid", "nodev", "mode=1777", "size=8388608"],
                SHM,
            ),
        ];
        client.create_sandbox(request).await?;
        root_file_system(&machine.share().join("rootfs")).expect("a root file system");
        Ok((client, details, answered))
    }

    /// Ends the machine.
    pub fn end(&self) {
        self.machine.end();
    }

    /// What the guest's console says.
    pub fn console(&self) -> String {
        self.machine.console()
    }

    /// Waits until the guest's console has said something.
    pub async fn await_console(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.console().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} on the {}", self.console());
            tokio::task::yield_now().await;
        }
    }

    /// The host's side of the share.
    pub fn share(&self) -> std::path::PathBuf {
        self.machine.share()
    }

    /// Plugs a second processor.
    pub fn plug_processor(&self) {
        self.machine.plug_processor().expect("a processor");
    }

    /// Creates a container that runs a shell script.
    pub async fn create(&self, id: &str, script: &str) {
        self.try_create(create(id, base(script))).await.expect("a container");
    }

    /// Creates a container as the request says.
    pub async fn try_create(&self, request: CreateContainerRequest) -> Result<(), ClientError> {
        self.client.create_container(request).await
    }

    /// Starts a created container.
    pub async fn start(&self, id: &str) {
        let mut request = StartContainerRequest::new();
        request.container_id = id.into();
        self.client.start_container(request).await.expect("a start");
    }

    /// Creates and starts a container that runs a shell script.
    pub async fn run(&self, id: &str, script: &str) {
        self.create(id, script).await;
        self.start(id).await;
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) {
        let mut request = RemoveContainerRequest::new();
        (request.container_id, request.timeout) = (id.into(), 20);
        self.client.remove_container(request).await.expect("a removal");
    }

    /// Starts a process in a container.
    pub async fn try_exec(&self, id: &str, exec: &str, process: Value) -> Result<(), ClientError> {
        let process: Process = serde_json::from_value(process).expect("a process");
        let mut request = ExecProcessRequest::new();
        (request.container_id, request.exec_id) = (id.into(), exec.into());
        request.process = Some(oci::process_to_wire(&process)).into();
        self.client.exec_process(request).await
    }

    /// Runs a shell script in a container to its end: its exit code and output.
    pub async fn exec(&self, id: &str, script: &str) -> (i32, String) {
        self.try_exec(id, "x", process(script)).await.expect("an exec");
        let output = self.output(id, "x").await;
        (self.wait(id, "x").await, String::from_utf8(output).expect("text"))
    }

    /// Waits for a process.
    pub async fn try_wait(&self, id: &str, exec: &str) -> Result<i32, ClientError> {
        let mut request = WaitProcessRequest::new();
        (request.container_id, request.exec_id) = (id.into(), exec.into());
        self.client.wait_process(request).await.map(|response| response.status)
    }

    /// Waits for a process that is there.
    pub async fn wait(&self, id: &str, exec: &str) -> i32 {
        self.try_wait(id, exec).await.expect("a process")
    }

    /// Signals a process.
    pub async fn signal(&self, id: &str, exec: &str, signal: i32) -> Result<(), ClientError> {
        let mut request = SignalProcessRequest::new();
        (request.container_id, request.exec_id, request.signal) = (id.into(), exec.into(), signal as u32);
        self.client.signal_process(request).await
    }

    /// One read from standard output.
    pub async fn read(&self, id: &str, exec: &str, most: u32) -> Vec<u8> {
        let mut request = ReadStreamRequest::new();
        (request.container_id, request.exec_id, request.len) = (id.into(), exec.into(), most);
        self.client.read_stdout(request).await.expect("output").data
    }

    /// Standard output to its end.
    pub async fn output(&self, id: &str, exec: &str) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let data = self.read(id, exec, LONGEST_READ).await;
            if data.is_empty() {
                return all;
            }
            all.extend(data);
        }
    }

    /// Reads standard output until it contains a text.
    pub async fn read_until(&self, id: &str, exec: &str, text: &str) -> String {
        let mut all = String::new();
        while !all.contains(text) {
            let data = self.read(id, exec, 1 << 16).await;
            assert!(!data.is_empty(), "the output ended with {all:?}, without {text:?}");
            all += &String::from_utf8(data).expect("text");
        }
        all
    }

    /// Standard error to its end.
    pub async fn errors(&self, id: &str, exec: &str) -> String {
        let mut all = String::new();
        loop {
            let mut request = ReadStreamRequest::new();
            (request.container_id, request.exec_id, request.len) = (id.into(), exec.into(), 4096);
            let data = self.client.read_stderr(request).await.expect("output").data;
            if data.is_empty() {
                return all;
            }
            all += &String::from_utf8(data).expect("text");
        }
    }

    /// Writes all of it to standard input; none is its end.
    pub async fn write(&self, id: &str, exec: &str, mut data: &[u8]) {
        loop {
            let mut request = WriteStreamRequest::new();
            (request.container_id, request.exec_id, request.data) = (id.into(), exec.into(), data.to_vec());
            let taken = self.client.write_stdin(request).await.expect("a reader").len as usize;
            data = &data[taken..];
            if data.is_empty() {
                return;
            }
        }
    }

    /// A container's statistics.
    pub async fn stats(&self, id: &str) -> CgroupStats {
        let mut request = StatsContainerRequest::new();
        request.container_id = id.into();
        self.client
            .stats_container(request)
            .await
            .expect("statistics")
            .cgroup_stats
            .unwrap()
    }
}

/// The request to create a container.
pub fn create(id: &str, spec: Value) -> CreateContainerRequest {
    let mut spec: Spec = serde_json::from_value(spec).expect("a specification");
    let mut linux = spec.linux().clone().unwrap();
    linux.set_cgroups_path(Some(format!("/kata/{id}").into()));
    spec.set_linux(Some(linux));
    let mut request = CreateContainerRequest::new();
    (request.container_id, request.exec_id) = (id.into(), id.into());
    request.OCI = Some(oci::spec_to_wire(&spec)).into();
    request
}

/// A specification as the shim sends it.
pub fn base(script: &str) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": { "path": format!("{SHARE}/rootfs") },
        "hostname": "ignored",
        "process": process(script),
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev/shm", "type": "bind", "source": SHM, "options": ["rbind"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
        ],
        "linux": {
            "namespaces": [{ "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] }
        }
    })
}

/// A process that runs a shell script.
pub fn process(script: &str) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_RAW",
        "CAP_SYS_CHROOT"
    ]);
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": { "bounding": caps, "effective": caps, "permitted": caps }
    })
}

pub fn storage(driver: &str, source: &str, fstype: &str, options: &[&str], mount_point: &str) -> Storage {
    let mut storage = Storage::new();
    (storage.driver, storage.source, storage.fstype) = (driver.into(), source.into(), fstype.into());
    storage.options = options.iter().map(|option| (*option).to_owned()).collect();
    storage.mount_point = mount_point.into();
    storage
}

/// Fills a folder with what a container needs.
pub fn root_file_system(root: &Path) -> std::io::Result<()> {
    for folder in ["bin", "etc", "tmp", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for applet in APPLETS.split_whitespace() {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    watcher::install(&root.join("bin"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
}
