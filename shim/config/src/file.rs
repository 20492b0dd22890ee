//! The honoured keys as they stand in the file, and their way into the public types.

use super::virtiofsd_args::{self, Whose};
use super::{Accelerator, Agent, Cache, ConfigError, Hypervisor, KernelModule, NetworkModel, Runtime};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use toml::Table;

/// The least memory, MiB, that a guest is started with.
const LEAST_MEMORY_MIB: u64 = 128;
/// virtiofsd's own limit.
const MOST_QUEUE_SIZE: u16 = 1024;

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct File {
    hypervisor: Hypervisors,
    agent: Agents,
    runtime: RuntimeKeys,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Hypervisors {
    qemu: Qemu,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Agents {
    kata: Kata,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
struct Qemu {
    path: PathBuf,
    valid_hypervisor_paths: Vec<String>,
    accelerator: String,
    kernel: PathBuf,
    initrd: PathBuf,
    kernel_params: String,
    guest_hook_path: String,
    default_vcpus: Number,
    default_maxvcpus: u32,
    default_memory: u64,
    default_maxmemory: u64,
    memory_slots: u32,
    enable_virtio_mem: bool,
    virtio_fs_daemon: PathBuf,
    valid_virtio_fs_daemon_paths: Vec<String>,
    virtio_fs_cache: String,
    virtio_fs_queue_size: u16,
    virtio_fs_extra_args: Vec<String>,
    cpu_features: String,
    seccomp_sandbox: String,
    disable_vhost_net: bool,
    cold_plug_vfio: String,
    disable_selinux: bool,
    enable_debug: bool,
    enable_annotations: Vec<String>,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            path: "/usr/bin/qemu-system-x86_64".into(),
            valid_hypervisor_paths: Vec::new(),
            accelerator: "kvm".into(),
            kernel: "/opt/sandpod/current/vmlinux".into(),
            initrd: "/opt/sandpod/current/initrd".into(),
            kernel_params: String::new(),
            guest_hook_path: String::new(),
            default_vcpus: Number::Integer(1),
            default_maxvcpus: 0,
            default_memory: 2048,
            default_maxmemory: 0,
            memory_slots: 10,
            enable_virtio_mem: true,
            virtio_fs_daemon: "/opt/sandpod/current/virtiofsd".into(),
            valid_virtio_fs_daemon_paths: Vec::new(),
            virtio_fs_cache: "auto".into(),
            virtio_fs_queue_size: 1024,
            virtio_fs_extra_args: Vec::new(),
            cpu_features: "pmu=off,vmx=off,svm=off".into(),
            seccomp_sandbox: "on".into(),
            disable_vhost_net: false,
            cold_plug_vfio: "no-port".into(),
            disable_selinux: false,
            enable_debug: false,
            // Of those that kata's runtime-rs enables, the ones that only say how large a VM is: who writes the
            // parameters of a kernel is root in its guest.
            enable_annotations: ["default_vcpus", "default_memory"].map(String::from).to_vec(),
        }
    }
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct Kata {
    enable_debug: bool,
    debug_console_enabled: bool,
    kernel_modules: Vec<String>,
    dial_timeout: Option<u64>,
    // Known so that its type is checked; one attempt's timeout means nothing to a guest that dials the host.
    #[serde(rename = "dial_timeout_ms")]
    _dial_timeout_ms: Option<u64>,
    reconnect_timeout_ms: Option<u64>,
    create_container_timeout: Option<u64>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
struct RuntimeKeys {
    enable_debug: bool,
    internetworking_model: String,
    disable_guest_seccomp: bool,
    static_sandbox_resource_mgmt: bool,
    create_container_timeout: Option<u64>,
}

impl Default for RuntimeKeys {
    fn default() -> Self {
        Self {
            enable_debug: false,
            internetworking_model: "tcfilter".into(),
            disable_guest_seccomp: false,
            static_sandbox_resource_mgmt: false,
            create_container_timeout: None,
        }
    }
}

/// The honoured keys that have a default, with it.
pub(super) fn defaults() -> Table {
    // Strings, numbers, booleans and lists of them: nothing that TOML could not say.
    Table::try_from(File::default()).unwrap_or_default()
}

/// `default_vcpus` may be whole or not.
#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum Number {
    Integer(i64),
    Float(f64),
}

impl File {
    pub(super) fn into_parts(self) -> Result<(Hypervisor, Agent, Runtime), ConfigError> {
        let runtime_timeout = self.runtime.create_container_timeout;
        Ok((
            self.hypervisor.qemu.into_hypervisor()?,
            self.agent.kata.into_agent(runtime_timeout)?,
            self.runtime.into_runtime()?,
        ))
    }
}

impl Qemu {
    fn into_hypervisor(self) -> Result<Hypervisor, ConfigError> {
        let accelerator = match self.accelerator.as_str() {
            "kvm" => Accelerator::Kvm,
            "tcg" => Accelerator::Tcg,
            other => {
                return Err(invalid(
                    "hypervisor.qemu.accelerator",
                    format!("is `{other}`, not `kvm` or `tcg`"),
                ));
            }
        };
        let virtio_fs_cache = match self.virtio_fs_cache.as_str() {
            "auto" => Cache::Auto,
            "always" => Cache::Always,
            "metadata" => Cache::Metadata,
            "never" => Cache::Never,
            other => {
                let problem = format!("is `{other}`, not `auto`, `always`, `metadata` or `never`");
                return Err(invalid("hypervisor.qemu.virtio_fs_cache", problem));
            }
        };
        if !self.virtio_fs_queue_size.is_power_of_two() || self.virtio_fs_queue_size > MOST_QUEUE_SIZE {
            let problem = format!(
                "is {}, not a power of two up to {MOST_QUEUE_SIZE}",
                self.virtio_fs_queue_size
            );
            return Err(invalid("hypervisor.qemu.virtio_fs_queue_size", problem));
        }
        if let Some(arg) = virtiofsd_args::first_refused(&self.virtio_fs_extra_args, Whose::Node) {
            let problem = format!("holds `{arg}`, which is none of the arguments that may be added");
            return Err(invalid("hypervisor.qemu.virtio_fs_extra_args", problem));
        }
        Ok(Hypervisor {
            path: absolute("hypervisor.qemu.path", self.path)?,
            valid_paths: self.valid_hypervisor_paths,
            accelerator,
            kernel: absolute("hypervisor.qemu.kernel", self.kernel)?,
            initrd: absolute("hypervisor.qemu.initrd", self.initrd)?,
            guest_hook_path: self.guest_hook_path,
            kernel_params: self.kernel_params.split_whitespace().map(String::from).collect(),
            default_milli_vcpus: milli_vcpus(&self.default_vcpus)?,
            max_vcpus: (self.default_maxvcpus != 0).then_some(self.default_maxvcpus),
            default_memory_mib: default_memory(self.default_memory)?,
            max_memory_mib: (self.default_maxmemory != 0).then_some(self.default_maxmemory),
            memory_slots: self.memory_slots,
            virtio_mem: self.enable_virtio_mem,
            virtio_fs_daemon: absolute("hypervisor.qemu.virtio_fs_daemon", self.virtio_fs_daemon)?,
            valid_virtio_fs_daemon_paths: self.valid_virtio_fs_daemon_paths,
            virtio_fs_cache,
            virtio_fs_queue_size: self.virtio_fs_queue_size,
            virtio_fs_extra_args: self.virtio_fs_extra_args,
            nested: nested(&self.cpu_features)?,
            seccomp_sandbox: !matches!(self.seccomp_sandbox.as_str(), "" | "off"),
            vhost_net: !self.disable_vhost_net,
            cold_plug_vfio: cold_plug(&self.cold_plug_vfio)?,
            selinux: !self.disable_selinux,
            debug: self.enable_debug,
            enable_annotations: annotation_patterns(self.enable_annotations)?,
        })
    }
}

impl Kata {
    fn into_agent(self, runtime_timeout: Option<u64>) -> Result<Agent, ConfigError> {
        let mut kernel_modules = Vec::new();
        for line in &self.kernel_modules {
            let mut words = line.split_whitespace().map(String::from);
            let Some(name) = words.next() else {
                return Err(invalid("agent.kata.kernel_modules", "holds an empty name".into()));
            };
            kernel_modules.push(KernelModule {
                name,
                parameters: words.collect(),
            });
        }
        let connect_timeout = match (self.reconnect_timeout_ms, self.dial_timeout) {
            (Some(ms), _) => Duration::from_millis(ms),
            (None, Some(seconds)) => Duration::from_secs(seconds),
            // Half of what the kubelet waits for a pod. A node under load boots its guests slowly, and a guest that
            // dies is not waited for.
            (None, None) => Duration::from_secs(120),
        };
        let timeout = self.create_container_timeout.or(runtime_timeout).unwrap_or(60);
        if timeout == 0 {
            return Err(invalid(
                "agent.kata.create_container_timeout",
                "is 0; it is a time in seconds".into(),
            ));
        }
        Ok(Agent {
            debug: self.enable_debug,
            debug_console: self.debug_console_enabled,
            kernel_modules,
            connect_timeout,
            create_container_timeout: Duration::from_secs(timeout),
        })
    }
}

impl RuntimeKeys {
    fn into_runtime(self) -> Result<Runtime, ConfigError> {
        let network = match self.internetworking_model.as_str() {
            "tcfilter" => NetworkModel::TcFilter,
            "none" => NetworkModel::None,
            other => {
                let problem = format!("is `{other}`; the models are `tcfilter` and `none`");
                return Err(invalid("runtime.internetworking_model", problem));
            }
        };
        Ok(Runtime {
            debug: self.enable_debug,
            network,
            disable_guest_seccomp: self.disable_guest_seccomp,
            static_sizing: self.static_sandbox_resource_mgmt,
        })
    }
}

fn invalid(key: &'static str, problem: String) -> ConfigError {
    ConfigError::Invalid { key, problem }
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err(invalid(key, format!("is `{}`, not an absolute path", path.display())))
}

/// Whether the guest's CPU has the host's virtualization. Nothing else of it can be chosen; what is not named stays
/// off.
fn nested(features: &str) -> Result<bool, ConfigError> {
    let mut nested = false;
    for feature in features.split(',').map(str::trim).filter(|feature| !feature.is_empty()) {
        match feature {
            "vmx=on" | "svm=on" => nested = true,
            "pmu=off" | "vmx=off" | "svm=off" => {}
            other => {
                let problem = format!(
                    "holds `{other}`; beside `pmu=off` it may hold `vmx=on` or `svm=on`, with which a guest can run \
                     virtual machines itself"
                );
                return Err(invalid("hypervisor.qemu.cpu_features", problem));
            }
        }
    }
    Ok(nested)
}

/// Whether devices get ports.
fn cold_plug(port: &str) -> Result<bool, ConfigError> {
    match port {
        "" | "no-port" => Ok(false),
        "root-port" => Ok(true),
        other => {
            let problem = format!("is `{other}`, not `no-port` or `root-port`: each device has a root port of its own");
            Err(invalid("hypervisor.qemu.cold_plug_vfio", problem))
        }
    }
}

/// Zero or absent: Kata's and our 2048 MiB.
fn default_memory(mib: u64) -> Result<u64, ConfigError> {
    match mib {
        0 => Ok(2048),
        1..LEAST_MEMORY_MIB => Err(invalid(
            "hypervisor.qemu.default_memory",
            format!("is {mib} MiB; a guest needs {LEAST_MEMORY_MIB}"),
        )),
        _ => Ok(mib),
    }
}

/// Zero means one, a negative number all of the host's.
fn milli_vcpus(number: &Number) -> Result<Option<u64>, ConfigError> {
    let vcpus = match *number {
        #[expect(clippy::cast_precision_loss, reason = "no machine has 2^53 CPUs")]
        Number::Integer(n) => n as f64,
        Number::Float(n) => n,
    };
    if !vcpus.is_finite() || vcpus > 65536.0 {
        return Err(invalid(
            "hypervisor.qemu.default_vcpus",
            format!("is {vcpus}, which is no number of CPUs"),
        ));
    }
    if vcpus < 0.0 {
        return Ok(None);
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 65536 CPUs"
    )]
    let milli = (vcpus * 1000.0).ceil() as u64;
    Ok(Some(if milli == 0 { 1000 } else { milli }))
}

/// Kata takes regular expressions; names and `.*` are what people write, and all that is understood here.
fn annotation_patterns(patterns: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    for pattern in &patterns {
        if !pattern.replace(".*", "").chars().all(plain) {
            let problem = format!("holds `{pattern}`; a pattern is made of names and `.*`");
            return Err(invalid("hypervisor.qemu.enable_annotations", problem));
        }
    }
    Ok(patterns)
}
