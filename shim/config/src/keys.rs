//! The table of every key of Kata's `configuration.toml` and what Sandpod makes of it.
//!
//! Sources: `configuration-qemu-runtime-rs.toml.in`, `configuration-qemu.toml.in` and `kata-types/src/annotations`
//! of kata-containers. A key that is not here is refused with the name of its nearest neighbour.

use super::ConfigError;
use toml::{Table, Value};

/// What a key's value looks like: needed to type the value of an annotation, which is always a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Integer,
    /// An integer or a float (`default_vcpus`).
    Number,
    Text,
    List,
}

/// What Sandpod does with a key that somebody set.
#[derive(Debug, Clone, Copy)]
pub(super) enum Treatment {
    /// It becomes a field of [`super::Config`].
    Honoured(Kind),
    /// It speaks of something that does not exist here; the sentence goes to the report.
    NoEffect(&'static str),
    /// Only these values describe what Sandpod does; any other is refused with the sentence.
    Only(&'static [Literal], &'static str),
}

/// A value that [`Treatment::Only`] accepts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Literal {
    Flag(bool),
    Int(i64),
    Text(&'static str),
    EmptyList,
}

impl Literal {
    fn matches(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Flag(a), Value::Boolean(b)) => a == *b,
            (Self::Int(a), Value::Integer(b)) => a == *b,
            (Self::Text(a), Value::String(b)) => a == b,
            (Self::EmptyList, Value::Array(list)) => list.is_empty(),
            _ => false,
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Flag(_) => Bool,
            Self::Int(_) => Integer,
            Self::Text(_) => Text,
            Self::EmptyList => List,
        }
    }
}

impl Treatment {
    /// The kind of value the key takes.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Honoured(kind) => kind,
            Self::NoEffect(_) => Text,
            Self::Only(literals, _) => literals.first().map_or(Text, |literal| literal.kind()),
        }
    }
}

use Kind::{Bool, Integer, List, Number, Text};
use Literal::{EmptyList, Flag, Int, Text as Str};
use Treatment::{Honoured, NoEffect, Only};

const OFF: &[Literal] = &[Flag(false)];
const ON: &[Literal] = &[Flag(true)];
const ZERO: &[Literal] = &[Int(0)];
const EMPTY: &[Literal] = &[Str("")];
const NONE: &[Literal] = &[EmptyList];

pub(super) const NO_IMAGE: &str = "the guest's root is the initrd, there is no disk image";
const NO_BLOCK: &str =
    "a block volume is plugged as it is, behind a virtio-scsi controller, and no root file system is one";
const COLD_PLUG: &str = "a device of the host is there from the VM's start, by `cold_plug_vfio`, or not at all";
const OWN_PORT: &str = "each device of the host has a root port of its own";
const NO_IOMMU: &str = "the guest has no IOMMU";
const NO_TRACING: &str = "there is no trace exporter; `kata-ctl` shows the recorded start times";
const NO_TEE: &str = "confidential guests are not supported";
const NO_RATE: &str = "network rates are not limited by the VM; use the CNI bandwidth plugin";
const NO_VHOST_USER: &str = "no vhost-user store is searched for devices";
const NO_DUMP: &str = "a guest that crashes is not dumped";
const NO_TEMPLATE: &str = "VMs are started cold, not from a template";
const NO_MEM_AGENT: &str = "there is no memory agent in the guest; free pages are always reported to the host";
const ALWAYS_UNPRIVILEGED: &str = "QEMU always runs as an unprivileged user";
const STATIC_OVERHEAD: &str =
    "the VM has default_memory plus the containers' limits; the host's share is the RuntimeClass overhead";

/// Sections of the file, in the dotted form used below.
pub(super) const SECTIONS: &[&str] = &[
    "hypervisor",
    "hypervisor.qemu",
    "hypervisor.qemu.factory",
    "factory",
    "agent",
    "agent.kata",
    "agent.kata.mem_agent",
    "runtime",
];

/// Every key: dotted name and treatment.
pub(super) const KEYS: &[(&str, Treatment)] = &[
    // Sandpod's one addition.
    ("hypervisor.qemu.accelerator", Honoured(Text)),
    // The VM: programs, kernel, sizes.
    ("hypervisor.qemu.path", Honoured(Text)),
    ("hypervisor.qemu.valid_hypervisor_paths", Honoured(List)),
    ("hypervisor.qemu.kernel", Honoured(Text)),
    ("hypervisor.qemu.initrd", Honoured(Text)),
    ("hypervisor.qemu.kernel_params", Honoured(Text)),
    ("hypervisor.qemu.guest_hook_path", Honoured(Text)),
    ("hypervisor.qemu.enable_annotations", Honoured(List)),
    ("hypervisor.qemu.default_vcpus", Honoured(Number)),
    ("hypervisor.qemu.default_maxvcpus", Honoured(Integer)),
    ("hypervisor.qemu.default_memory", Honoured(Integer)),
    ("hypervisor.qemu.default_maxmemory", Honoured(Integer)),
    ("hypervisor.qemu.memory_slots", Honoured(Integer)),
    ("hypervisor.qemu.enable_virtio_mem", Honoured(Bool)),
    ("hypervisor.qemu.virtio_fs_daemon", Honoured(Text)),
    ("hypervisor.qemu.valid_virtio_fs_daemon_paths", Honoured(List)),
    ("hypervisor.qemu.virtio_fs_queue_size", Honoured(Integer)),
    ("hypervisor.qemu.virtio_fs_extra_args", Honoured(List)),
    ("hypervisor.qemu.virtio_fs_cache", Honoured(Text)),
    ("hypervisor.qemu.cpu_features", Honoured(Text)),
    ("hypervisor.qemu.seccomp_sandbox", Honoured(Text)),
    ("hypervisor.qemu.disable_vhost_net", Honoured(Bool)),
    ("hypervisor.qemu.disable_selinux", Honoured(Bool)),
    ("hypervisor.qemu.enable_debug", Honoured(Bool)),
    // One machine, one firmware, one root.
    ("hypervisor.qemu.image", NoEffect(NO_IMAGE)),
    ("hypervisor.qemu.rootfs_type", NoEffect(NO_IMAGE)),
    ("hypervisor.qemu.vm_rootfs_driver", NoEffect(NO_IMAGE)),
    ("hypervisor.qemu.disable_image_nvdimm", NoEffect(NO_IMAGE)),
    ("hypervisor.qemu.kernel_verity_params", Only(EMPTY, NO_IMAGE)),
    (
        "hypervisor.qemu.machine_type",
        Only(&[Str("q35"), Str("")], "the only machine is q35"),
    ),
    (
        "hypervisor.qemu.machine_accelerators",
        Only(EMPTY, "no machine option can be added"),
    ),
    (
        "hypervisor.qemu.firmware",
        Only(EMPTY, "the kernel is booted through QEMU's own SeaBIOS"),
    ),
    (
        "hypervisor.qemu.firmware_volume",
        Only(EMPTY, "the kernel is booted through QEMU's own SeaBIOS"),
    ),
    (
        "hypervisor.qemu.pflashes",
        Only(NONE, "the kernel is booted through QEMU's own SeaBIOS"),
    ),
    ("hypervisor.qemu.rootless", NoEffect(ALWAYS_UNPRIVILEGED)),
    (
        "hypervisor.qemu.use_legacy_serial",
        Only(OFF, "the guest's console is not configurable"),
    ),
    (
        "hypervisor.qemu.disable_nesting_checks",
        NoEffect("virtio devices are always modern ones"),
    ),
    (
        "hypervisor.qemu.extra_monitor_socket",
        Only(&[Str(""), Flag(false)], "QEMU's monitor has one owner, the shim"),
    ),
    (
        "hypervisor.qemu.disable_guest_selinux",
        Only(ON, "the guest has no SELinux"),
    ),
    (
        "hypervisor.qemu.entropy_source",
        Only(
            &[Str("/dev/urandom"), Str("")],
            "the guest's entropy comes from /dev/urandom",
        ),
    ),
    (
        "hypervisor.qemu.valid_entropy_sources",
        NoEffect("the guest's entropy comes from /dev/urandom"),
    ),
    // Sizing.
    ("hypervisor.qemu.overhead_vcpus", NoEffect(STATIC_OVERHEAD)),
    ("hypervisor.qemu.overhead_memory", NoEffect(STATIC_OVERHEAD)),
    (
        "hypervisor.qemu.memory_offset",
        Only(ZERO, "no memory is set aside above the guest's"),
    ),
    (
        "hypervisor.qemu.reclaim_guest_freed_memory",
        NoEffect("free pages are always reported to the host"),
    ),
    (
        "hypervisor.qemu.enable_mem_prealloc",
        Only(OFF, "the guest's memory is taken when it is used"),
    ),
    (
        "hypervisor.qemu.enable_hugepages",
        Only(OFF, "the guest's memory is not backed by huge pages"),
    ),
    (
        "hypervisor.qemu.hugepage_type",
        Only(EMPTY, "the guest's memory is not backed by huge pages"),
    ),
    ("hypervisor.qemu.enable_numa", Only(OFF, "the guest has one NUMA node")),
    (
        "hypervisor.qemu.numa_mapping",
        Only(NONE, "the guest has one NUMA node"),
    ),
    (
        "hypervisor.qemu.file_mem_backend",
        Only(EMPTY, "the guest's memory is a memfd"),
    ),
    (
        "hypervisor.qemu.valid_file_mem_backends",
        NoEffect("the guest's memory is a memfd"),
    ),
    ("hypervisor.qemu.enable_guest_swap", Only(OFF, "the guest has no swap")),
    // Files.
    (
        "hypervisor.qemu.shared_fs",
        Only(&[Str("virtio-fs")], "files reach the guest through virtio-fs only"),
    ),
    (
        "hypervisor.qemu.virtio_fs_cache_size",
        Only(ZERO, "there is no DAX window"),
    ),
    (
        "hypervisor.qemu.msize_9p",
        NoEffect("files reach the guest through virtio-fs only"),
    ),
    // Block devices.
    ("hypervisor.qemu.disable_block_device_use", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_driver", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_aio", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_cache_set", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_cache_direct", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_cache_noflush", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_logical_sector_size", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.block_device_physical_sector_size", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.enable_iothreads", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.indep_iothreads", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.queue_size", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.num_queues", NoEffect(NO_BLOCK)),
    ("hypervisor.qemu.enable_vhost_user_store", Only(OFF, NO_VHOST_USER)),
    ("hypervisor.qemu.vhost_user_store_path", NoEffect(NO_VHOST_USER)),
    ("hypervisor.qemu.valid_vhost_user_store_paths", NoEffect(NO_VHOST_USER)),
    (
        "hypervisor.qemu.vhost_user_reconnect_timeout_sec",
        NoEffect(NO_VHOST_USER),
    ),
    // Host devices.
    (
        "hypervisor.qemu.default_bridges",
        NoEffect("hot-plug uses PCIe root ports, there is no PCI bridge"),
    ),
    ("hypervisor.qemu.cold_plug_vfio", Honoured(Text)),
    (
        "hypervisor.qemu.hot_plug_vfio",
        Only(&[Str("no-port"), Str("")], COLD_PLUG),
    ),
    ("hypervisor.qemu.hotplug_vfio_on_root_bus", Only(OFF, COLD_PLUG)),
    ("hypervisor.qemu.pcie_root_port", NoEffect(OWN_PORT)),
    ("hypervisor.qemu.pcie_switch_port", NoEffect(OWN_PORT)),
    ("hypervisor.qemu.enable_iommu", Only(OFF, NO_IOMMU)),
    ("hypervisor.qemu.enable_iommu_platform", Only(OFF, NO_IOMMU)),
    // Network.
    (
        "hypervisor.qemu.network_queues",
        Only(&[Int(1), Int(0)], "a network device has one pair of queues"),
    ),
    ("hypervisor.qemu.rx_rate_limiter_max_rate", Only(ZERO, NO_RATE)),
    ("hypervisor.qemu.tx_rate_limiter_max_rate", Only(ZERO, NO_RATE)),
    // Confidential computing, dumps, templates.
    ("hypervisor.qemu.confidential_guest", Only(OFF, NO_TEE)),
    ("hypervisor.qemu.sev_snp_guest", Only(OFF, NO_TEE)),
    ("hypervisor.qemu.initdata", Only(EMPTY, NO_TEE)),
    (
        "hypervisor.qemu.tdx_quote_generation_service_socket_port",
        NoEffect(NO_TEE),
    ),
    ("hypervisor.qemu.guest_memory_dump_path", Only(EMPTY, NO_DUMP)),
    ("hypervisor.qemu.guest_memory_dump_paging", NoEffect(NO_DUMP)),
    ("hypervisor.qemu.factory.enable_template", Only(OFF, NO_TEMPLATE)),
    ("hypervisor.qemu.factory.template_path", NoEffect(NO_TEMPLATE)),
    ("factory.enable_template", Only(OFF, NO_TEMPLATE)),
    ("factory.template_path", NoEffect(NO_TEMPLATE)),
    ("factory.vm_cache_number", Only(ZERO, NO_TEMPLATE)),
    ("factory.vm_cache_endpoint", NoEffect(NO_TEMPLATE)),
    // The agent.
    ("agent.kata.enable_debug", Honoured(Bool)),
    ("agent.kata.kernel_modules", Honoured(List)),
    ("agent.kata.dial_timeout", Honoured(Integer)),
    ("agent.kata.dial_timeout_ms", Honoured(Integer)),
    ("agent.kata.reconnect_timeout_ms", Honoured(Integer)),
    ("agent.kata.create_container_timeout", Honoured(Integer)),
    ("agent.kata.debug_console_enabled", Honoured(Bool)),
    ("agent.kata.enable_tracing", Only(OFF, NO_TRACING)),
    (
        "agent.kata.container_pipe_size",
        Only(ZERO, "pipes have the kernel's size"),
    ),
    ("agent.kata.cdh_api_timeout_ms", NoEffect(NO_TEE)),
    ("agent.kata.mem_agent.mem_agent_enable", Only(OFF, NO_MEM_AGENT)),
    ("agent.kata.mem_agent.memcg_disable", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.memcg_swap", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.memcg_swappiness_max", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.memcg_period_secs", NoEffect(NO_MEM_AGENT)),
    (
        "agent.kata.mem_agent.memcg_period_psi_percent_limit",
        NoEffect(NO_MEM_AGENT),
    ),
    (
        "agent.kata.mem_agent.memcg_eviction_psi_percent_limit",
        NoEffect(NO_MEM_AGENT),
    ),
    (
        "agent.kata.mem_agent.memcg_eviction_run_aging_count_min",
        NoEffect(NO_MEM_AGENT),
    ),
    ("agent.kata.mem_agent.compact_disable", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.compact_period_secs", NoEffect(NO_MEM_AGENT)),
    (
        "agent.kata.mem_agent.compact_period_psi_percent_limit",
        NoEffect(NO_MEM_AGENT),
    ),
    ("agent.kata.mem_agent.compact_psi_percent_limit", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.compact_sec_max", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.compact_order", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.compact_threshold", NoEffect(NO_MEM_AGENT)),
    ("agent.kata.mem_agent.compact_force_times", NoEffect(NO_MEM_AGENT)),
    // The shim.
    ("runtime.enable_debug", Honoured(Bool)),
    ("runtime.internetworking_model", Honoured(Text)),
    ("runtime.disable_guest_seccomp", Honoured(Bool)),
    ("runtime.static_sandbox_resource_mgmt", Honoured(Bool)),
    ("runtime.create_container_timeout", Honoured(Integer)),
    (
        "runtime.name",
        Only(&[Str("virt_container")], "the only kind of runtime is virt_container"),
    ),
    (
        "runtime.hypervisor_name",
        Only(&[Str("qemu")], "the only hypervisor is qemu"),
    ),
    (
        "runtime.agent_name",
        Only(&[Str("kata")], "the only agent protocol is kata"),
    ),
    (
        "runtime.sandbox_cgroup_only",
        Only(ON, "the shim, QEMU and virtiofsd always sit in the pod's cgroup"),
    ),
    ("runtime.enable_vcpus_pinning", Only(OFF, "vCPU threads are not pinned")),
    ("runtime.enable_tracing", Only(OFF, NO_TRACING)),
    ("runtime.jaeger_endpoint", NoEffect(NO_TRACING)),
    ("runtime.jaeger_user", NoEffect(NO_TRACING)),
    ("runtime.jaeger_password", NoEffect(NO_TRACING)),
    (
        "runtime.disable_new_netns",
        Only(OFF, "a VM never runs in the host's network namespace"),
    ),
    (
        "runtime.sandbox_bind_mounts",
        Only(NONE, "no host path is shared that the pod does not ask for"),
    ),
    (
        "runtime.shared_mounts",
        Only(NONE, "containers share files by volumes only"),
    ),
    (
        "runtime.vfio_mode",
        Only(
            &[Str("guest-kernel"), Str("")],
            "a device of the host is the guest's kernel's, and no container's own",
        ),
    ),
    (
        "runtime.pod_resource_api_sock",
        Only(
            EMPTY,
            "the kubelet is not asked which devices a pod has; name them by `cdi.k8s.io/` annotations",
        ),
    ),
    (
        "runtime.emptydir_mode",
        Only(
            &[Str("shared-fs")],
            "a disk emptyDir stays on the host and is shared through virtio-fs",
        ),
    ),
    ("runtime.guest_selinux_label", Only(EMPTY, "the guest has no SELinux")),
    ("runtime.experimental", Only(NONE, "there are no experimental features")),
    ("runtime.enable_pprof", Only(OFF, "there is no profiling endpoint")),
    ("runtime.keep_abnormal", Only(OFF, "a VM is never left behind")),
    (
        "runtime.use_passfd_io",
        Only(OFF, "stdio travels over the agent's one connection"),
    ),
    (
        "runtime.passfd_listener_port",
        NoEffect("stdio travels over the agent's one connection"),
    ),
    (
        "runtime.dan_conf",
        Only(
            &[Str("/run/kata-containers/dans"), Str("")],
            "directly attached network devices are not supported",
        ),
    ),
];

/// The treatment of the key with dotted name `name`.
pub(super) fn treatment(name: &str) -> Option<Treatment> {
    KEYS.iter()
        .find(|(key, _)| *key == name)
        .map(|(_, treatment)| *treatment)
}

/// The table as the documentation shows it.
#[cfg(test)]
pub(super) fn table(defaults: &Table) -> String {
    let mut text = String::from("| key | what becomes of it | default, or why |\n|---|---|---|\n");
    for (key, treatment) in KEYS {
        let (fate, why) = match treatment {
            Honoured(_) => {
                let default = super::at(defaults, key).map_or_else(|| "unset".into(), |value| format!("`{value}`"));
                ("honoured".to_owned(), default)
            }
            NoEffect(reason) => ("no effect".to_owned(), (*reason).to_owned()),
            Only(literals, reason) => {
                let values: Vec<_> = literals.iter().map(|literal| format!("`{literal}`")).collect();
                (format!("only {}", values.join(" or ")), (*reason).to_owned())
            }
        };
        text += &format!("| `{key}` | {fate} | {why} |\n");
    }
    text
}

#[cfg(test)]
impl std::fmt::Display for Literal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Int(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::EmptyList => write!(f, "[]"),
        }
    }
}

/// The known name that is spelled most like `name`.
pub(super) fn nearest(name: &str) -> &'static str {
    let known = KEYS.iter().map(|(key, _)| *key).chain(SECTIONS.iter().copied());
    known
        .min_by_key(|key| strsim::levenshtein(key, name))
        .unwrap_or_default()
}

/// Holds every key of `table` against the table above.
///
/// # Errors
/// An unknown key, or a value that asks for something Sandpod does not do.
pub(super) fn check(table: &Table, prefix: &str, report: &mut Vec<String>) -> Result<(), ConfigError> {
    for (key, value) in table {
        let name = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        if let Value::Table(inner) = value
            && SECTIONS.contains(&name.as_str())
        {
            check(inner, &name, report)?;
            continue;
        }
        match treatment(&name) {
            None => {
                return Err(ConfigError::UnknownKey {
                    nearest: nearest(&name),
                    key: name,
                });
            }
            Some(Honoured(_)) => {}
            Some(NoEffect(reason)) => report.push(format!("`{name}` has no effect: {reason}.")),
            Some(Only(literals, reason)) => {
                if !literals.iter().any(|literal| literal.matches(value)) {
                    return Err(ConfigError::Unsupported {
                        key: name,
                        value: value.to_string(),
                        reason,
                    });
                }
            }
        }
    }
    Ok(())
}
