//! Kata's `configuration.toml`: the same keys, parsed into types once.
//!
//! Each key is honoured, accepted as having nothing to do with Sandpod (the [`Config::report`] says why), or refused by
//! name when it is set to something Sandpod does not do. An absent key takes Sandpod's default. A file
//! and its drop-ins (`config.d/*.toml` beside it, in name order) and a pod's annotations are merged as TOML tables
//! first, so that each of them may set a single key. A file with the key [`EXTENDS`] is laid over another one.

mod annotations;
mod file;
mod keys;
mod virtiofsd_args;

use file::File;
use keys::Treatment;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::{Table, Value};

/// Where a configuration file is looked for when nobody names one; the first that exists is read.
pub const SEARCH_PATHS: &[&str] = &[
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/opt/sandpod/current/configuration.toml",
];

/// The key, above all sections, of a file that is laid over another one and its drop-ins: the other one's absolute path.
/// A handler with a few settings of its own has such a file.
pub const EXTENDS: &str = "extends";
/// So many files may be laid one over the other: that of a handler, an administrator's, and the one that is installed.
const CHAIN: usize = 3;

/// Names a configuration file in the shim's environment.
pub const FILE_VARIABLE: &str = "KATA_CONF_FILE";

/// Everything the node's administrator, and within limits the pod, decides about a sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[hypervisor.qemu]`
    pub hypervisor: Hypervisor,
    /// `[agent.kata]`
    pub agent: Agent,
    /// `[runtime]`
    pub runtime: Runtime,
    /// One sentence for each key that was set and has no effect, with the reason. For the log.
    pub report: Vec<String>,
    /// The file this came from; `None` for the built-in defaults.
    pub origin: Option<PathBuf>,
    tables: Table,
}

/// `[hypervisor.qemu]`
#[derive(Debug, Clone, PartialEq)]
pub struct Hypervisor {
    /// `path`: QEMU.
    pub path: PathBuf,
    /// `valid_hypervisor_paths`: patterns of what a pod's annotation may put in `path`.
    pub valid_paths: Vec<String>,
    /// `accelerator`: Sandpod's own key. KVM unless the file says otherwise.
    pub accelerator: Accelerator,
    /// `kernel`: an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// `initrd`
    pub initrd: PathBuf,
    /// `kernel_params`: words appended to the kernel command line.
    pub kernel_params: Vec<String>,
    /// `guest_hook_path`: the guest's own folder of its hooks; empty for none.
    pub guest_hook_path: String,
    /// `default_vcpus` in thousandths of a CPU; `None` (a negative value in the file) means all of the host's.
    pub default_milli_vcpus: Option<u64>,
    /// `default_maxvcpus`; `None` (zero in the file) means as many as the host has.
    pub max_vcpus: Option<u32>,
    /// `default_memory`, MiB: the guest's size before any container asks for more.
    pub default_memory_mib: u64,
    /// `default_maxmemory`, MiB; `None` (zero in the file) means the host's RAM.
    pub max_memory_mib: Option<u64>,
    /// `memory_slots`: the most DIMMs that can be plugged when virtio-mem is off.
    pub memory_slots: u32,
    /// `enable_virtio_mem`: grow by virtio-mem (true) or by DIMMs.
    pub virtio_mem: bool,
    /// `virtio_fs_daemon`: virtiofsd.
    pub virtio_fs_daemon: PathBuf,
    /// `valid_virtio_fs_daemon_paths`: patterns of what an annotation may put in `virtio_fs_daemon`.
    pub valid_virtio_fs_daemon_paths: Vec<String>,
    /// `virtio_fs_cache`
    pub virtio_fs_cache: Cache,
    /// `virtio_fs_queue_size`: entries, a power of two up to 1024.
    pub virtio_fs_queue_size: u16,
    /// `virtio_fs_extra_args`
    pub virtio_fs_extra_args: Vec<String>,
    /// `cpu_features` has `vmx=on` or `svm=on`: a guest under KVM can run virtual machines itself.
    pub nested: bool,
    /// `seccomp_sandbox` is not empty or `off`: QEMU confines itself.
    pub seccomp_sandbox: bool,
    /// The opposite of `disable_vhost_net`: use vhost-net where the host has it.
    pub vhost_net: bool,
    /// `cold_plug_vfio` is `root-port`: a pod's VM has the host's devices that its sandbox asks for.
    pub cold_plug_vfio: bool,
    /// The opposite of `disable_selinux`: QEMU and virtiofsd get the pod's label where the host has SELinux.
    pub selinux: bool,
    /// `enable_debug`
    pub debug: bool,
    /// `enable_annotations`: patterns of the hypervisor keys a pod may set.
    pub enable_annotations: Vec<String>,
}

/// `[agent.kata]`
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// `enable_debug`
    pub debug: bool,
    /// `debug_console_enabled`: the node's administrator may have a shell in the guest (`kata-ctl exec`).
    pub debug_console: bool,
    /// `kernel_modules`: what the guest loads before the first container.
    pub kernel_modules: Vec<KernelModule>,
    /// `reconnect_timeout_ms`, or `dial_timeout` (seconds): how long to wait for an agent that has to be dialled.
    pub connect_timeout: Duration,
    /// `create_container_timeout`, from here or from `[runtime]`.
    pub create_container_timeout: Duration,
}

/// A kernel module of the guest, written `name param=value ...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelModule {
    /// As `modprobe` knows it.
    pub name: String,
    /// `key=value` words.
    pub parameters: Vec<String>,
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    /// `enable_debug`
    pub debug: bool,
    /// `internetworking_model`
    pub network: NetworkModel,
    /// `disable_guest_seccomp`: false by default, so a container's filter holds in the guest.
    pub disable_guest_seccomp: bool,
    /// `static_sandbox_resource_mgmt`: size the VM once, at boot, from the pod's annotations.
    pub static_sizing: bool,
}

/// `accelerator`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// Emulation, some ten times slower.
    Tcg,
}

/// `virtio_fs_cache`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Trust metadata for a second.
    Auto,
    /// Trust everything: nobody else may write.
    Always,
    /// Cache metadata, never data.
    Metadata,
    /// Cache nothing.
    Never,
}

impl Cache {
    /// virtiofsd's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Metadata => "metadata",
            Self::Never => "never",
        }
    }
}

/// `internetworking_model`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkModel {
    /// Taps, and a redirect by `tc` each way.
    TcFilter,
    /// The guest has only its loopback.
    None,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file that was named, or a drop-in, cannot be read.
    #[error("cannot read configuration {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("configuration {path} is not TOML: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        message: String,
    },
    /// No such key.
    #[error("unknown configuration key `{key}`; the nearest known one is `{nearest}`")]
    UnknownKey {
        /// Dotted name.
        key: String,
        /// Dotted name.
        nearest: &'static str,
    },
    /// A known key asks for what Sandpod does not do.
    #[error("configuration key `{key}` = {value} is not supported: {reason}")]
    Unsupported {
        /// Dotted name.
        key: String,
        /// The value, as TOML.
        value: String,
        /// What Sandpod does instead.
        reason: &'static str,
    },
    /// A value of the wrong type.
    #[error("a configuration key has a value of the wrong type: {0}")]
    Type(String),
    /// A value that cannot be right.
    #[error("configuration key `{key}` {problem}")]
    Invalid {
        /// Dotted name.
        key: &'static str,
        /// Continues the sentence.
        problem: String,
    },
    /// An annotation that the administrator has not allowed.
    #[error(
        "annotation `{annotation}` is not enabled on this node: \
         `enable_annotations` of [hypervisor.qemu] does not list `{key}`"
    )]
    NotEnabled {
        /// The annotation's full key.
        annotation: String,
        /// Its last part.
        key: String,
    },
    /// An annotation no pod may use.
    #[error("annotation `{annotation}` is not supported: {reason}")]
    Annotation {
        /// The annotation's full key.
        annotation: String,
        /// Why.
        reason: String,
    },
}

impl Config {
    /// Reads `path` and its drop-ins; without one, the file in [`FILE_VARIABLE`], else the first of [`SEARCH_PATHS`]
    /// that exists, else the built-in defaults.
    ///
    /// # Errors
    /// A named file that cannot be read; everything that [`Config::parse`] refuses.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path
            .map(Path::to_owned)
            .or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
        let found = named.or_else(|| SEARCH_PATHS.iter().map(PathBuf::from).find(|path| path.exists()));
        let Some(path) = found else {
            return Self::from_tables(Table::new(), None);
        };
        let mut tables = Table::new();
        for (_, table) in layers(&path)? {
            merge(&mut tables, table);
        }
        Self::from_tables(tables, Some(path))
    }

    /// Parses the text of a file and of its drop-ins, in their order.
    ///
    /// # Errors
    /// Text that is not TOML, an unknown key, a value of a wrong type, a value that is not supported.
    pub fn parse(text: &str, drop_ins: &[&str]) -> Result<Self, ConfigError> {
        let mut tables = parse_table(text, Path::new("(text)"))?;
        for text in drop_ins {
            merge(&mut tables, parse_table(text, Path::new("(drop-in)"))?);
        }
        Self::from_tables(tables, None)
    }

    /// This configuration with a pod's `io.katacontainers.config.*` annotations applied; others are not looked at.
    ///
    /// # Errors
    /// A hypervisor key that `enable_annotations` does not list, an unknown key, an unsupported value.
    pub fn with_annotations(&self, annotations: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let asked = annotations::tables(annotations, &self.hypervisor)?;
        if asked.is_empty() {
            return Ok(self.clone());
        }
        let mut tables = self.tables.clone();
        merge(&mut tables, asked);
        Self::from_tables(tables, self.origin.clone())
    }

    /// This configuration with a text laid over it.
    ///
    /// # Errors
    /// Everything that [`Config::parse`] refuses.
    pub fn with(&self, text: &str) -> Result<Self, ConfigError> {
        let mut tables = self.tables.clone();
        merge(&mut tables, parse_table(text, Path::new("(text)"))?);
        Self::from_tables(tables, self.origin.clone())
    }

    /// The files that this came from, each before those that are laid over it.
    ///
    /// # Errors
    /// One of them cannot be read any more.
    pub fn files(&self) -> Result<Vec<PathBuf>, ConfigError> {
        let layers = self.origin.as_deref().map(layers).transpose()?.unwrap_or_default();
        Ok(layers.into_iter().map(|(path, _)| path).collect())
    }

    /// What a file changes: its own path, a line for each key that differs from Sandpod's default, and one for each
    /// without effect.
    pub fn explain(&self) -> String {
        let mut lines = vec![self.origin.as_ref().map_or_else(
            || "no configuration file: all keys have their defaults".to_owned(),
            |path| format!("configuration: {}", path.display()),
        )];
        let defaults = file::defaults();
        for (key, treatment) in keys::KEYS {
            let (Treatment::Honoured(_), Some(value)) = (treatment, at(&self.tables, key)) else {
                continue;
            };
            match at(&defaults, key) {
                Some(default) if default == value => {}
                Some(default) => lines.push(format!("`{key}` = {value}, by default {default}")),
                None => lines.push(format!("`{key}` = {value}, by default unset")),
            }
        }
        lines.extend(self.report.iter().cloned());
        lines.join("\n") + "\n"
    }

    fn from_tables(tables: Table, origin: Option<PathBuf>) -> Result<Self, ConfigError> {
        let mut report = Vec::new();
        keys::check(&tables, "", &mut report)?;
        let file: File = tables.clone().try_into().map_err(|error: toml::de::Error| {
            ConfigError::Type(error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
        })?;
        let (hypervisor, agent, runtime) = file.into_parts()?;
        Ok(Self {
            hypervisor,
            agent,
            runtime,
            report,
            origin,
            tables,
        })
    }
}

/// A file, its drop-ins, and before them those of the file that it extends, of [`CHAIN`] files at most.
fn layers(path: &Path) -> Result<Vec<(PathBuf, Table)>, ConfigError> {
    let mut layers = Vec::new();
    let mut next = Some(path.to_owned());
    for _ in 0..CHAIN {
        let Some(path) = next else {
            return Ok(layers);
        };
        let mut table = parse_table(&read(&path)?, &path)?;
        next = table.remove(EXTENDS).map(|base| base_of(&base)).transpose()?;
        let drop_ins = drop_ins(&path)?;
        layers.splice(0..0, [(path, table)].into_iter().chain(drop_ins));
    }
    match next {
        None => Ok(layers),
        Some(base) => Err(ConfigError::Invalid {
            key: EXTENDS,
            problem: format!(
                "goes on from file to file as far as {}; {CHAIN} files may be laid one over the other",
                base.display()
            ),
        }),
    }
}

fn base_of(value: &Value) -> Result<PathBuf, ConfigError> {
    let path = value.as_str().map(PathBuf::from).filter(|path| path.is_absolute());
    path.ok_or_else(|| ConfigError::Invalid {
        key: EXTENDS,
        problem: format!("is {value}; it has to be the absolute path of a configuration file"),
    })
}

/// The value of a dotted key.
fn at<'t>(tables: &'t Table, key: &str) -> Option<&'t Value> {
    match key.split_once('.') {
        None => tables.get(key),
        Some((section, rest)) => at(tables.get(section)?.as_table()?, rest),
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

fn parse_table(text: &str, path: &Path) -> Result<Table, ConfigError> {
    text.parse().map_err(|error: toml::de::Error| {
        // toml's own rendering is a drawing over several lines; an error here is one sentence.
        let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
        let message = line.map_or_else(
            || error.message().to_owned(),
            |line| format!("line {line}: {}", error.message()),
        );
        ConfigError::Syntax {
            path: path.to_owned(),
            message,
        }
    })
}

/// The drop-ins of the file at `path`, in the order of their names.
fn drop_ins(path: &Path) -> Result<Vec<(PathBuf, Table)>, ConfigError> {
    let folder = path.with_file_name("config.d");
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ConfigError::Read { path: folder, source }),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|source| ConfigError::Read {
                path: folder.clone(),
                source,
            })?
            .path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    files
        .into_iter()
        .map(|path| Ok((path.clone(), parse_table(&read(&path)?, &path)?)))
        .collect()
}

/// Lays `over` on `base`: tables are merged, every other value is replaced.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(over)) => merge(inner, over),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests;
