//! `kata-ctl env`: what a node runs pods with, for a bug report. TOML, as Kata's own prints it, or JSON.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use config::Config;
use node_check::Finding;
use procfs::{CpuInfo, Current, Meminfo};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    check,
    error::{Error, Result, decode},
    manifest,
};

/// The node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Env {
    kata_ctl: Program,
    shim: Program,
    qemu: Program,
    virtiofsd: Program,
    /// The configuration that pods get whose handler names none; its drop-ins after it. Empty without any.
    configuration: Vec<Image>,
    guest: Guest,
    host: Host,
    /// What `kata-ctl check` finds.
    check: Vec<Finding>,
}

/// A program: where it is, and the first line of what it says of its version, or why it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Program {
    path: PathBuf,
    version: String,
}

/// A file and its SHA-256, or why it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Image {
    path: PathBuf,
    sha256: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Guest {
    kernel: Image,
    initrd: Image,
    /// What the image's recipe wrote down beside the kernel: the versions in it, the agent's sum. A guest of another
    /// make has none.
    manifest: Option<Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Host {
    kernel: String,
    distribution: String,
    processor: String,
    processors: usize,
    memory_bytes: u64,
    memory_available_bytes: u64,
}

impl Env {
    /// Looks at the node. What is missing is said in its place.
    ///
    /// # Errors
    /// A configuration that is refused; a `/proc` that cannot be read.
    pub fn of(config: &Config) -> Result<Env> {
        let hypervisor = &config.hypervisor;
        let own = std::env::current_exe().unwrap_or_else(|_| "kata-ctl".into());
        Ok(Env {
            shim: program(&own.with_file_name("containerd-shim-kata-v2")),
            kata_ctl: Program {
                path: own,
                version: format!("kata-ctl {}", env!("CARGO_PKG_VERSION")),
            },
            qemu: program(&hypervisor.path),
            virtiofsd: program(&hypervisor.virtio_fs_daemon),
            configuration: config.files()?.iter().map(|path| image(path)).collect(),
            guest: Guest {
                kernel: image(&hypervisor.kernel),
                initrd: image(&hypervisor.initrd),
                manifest: manifest(&hypervisor.kernel),
            },
            host: host()?,
            check: check::check(config),
        })
    }

    /// As TOML.
    ///
    /// # Errors
    /// A manifest that TOML cannot hold.
    pub fn toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(decode("the environment to write"))
    }
}

fn program(path: &Path) -> Program {
    Program {
        path: path.to_owned(),
        version: node_check::version_line(path).unwrap_or_else(|error| format!("cannot be started: {error}")),
    }
}

fn image(path: &Path) -> Image {
    Image {
        path: path.to_owned(),
        sha256: sum(path).unwrap_or_else(|error| format!("cannot be read: {error}")),
    }
}

fn sum(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn manifest(kernel: &Path) -> Option<Value> {
    let text = fs::read(kernel.with_file_name(manifest::FILE)).ok()?;
    let mut manifest: Value = serde_json::from_slice(&text).ok()?;
    // Hundreds of devices, and those that matter are in the log of a pod that asked for them.
    if let Some(kernel) = manifest.get_mut("kernel").and_then(Value::as_object_mut) {
        kernel.remove("pci");
    }
    Some(manifest)
}

fn host() -> Result<Host> {
    let system = |error| Error::Os {
        action: "look at the host",
        source: io::Error::other(error),
    };
    let processors = CpuInfo::current().map_err(system)?;
    let memory = Meminfo::current().map_err(system)?;
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    Ok(Host {
        kernel: node_check::text("/proc/sys/kernel/osrelease"),
        distribution: pretty.unwrap_or("unknown").trim_matches('"').to_owned(),
        processor: processors.model_name(0).unwrap_or("unknown").to_owned(),
        processors: processors.num_cores(),
        memory_bytes: memory.mem_total,
        memory_available_bytes: memory.mem_available.unwrap_or(memory.mem_free),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_anything_is_described_and_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("vmlinux");
        fs::write(&kernel, "abc").unwrap();
        let manifest = r#"{"guest": "own", "kernel": {"release": "6.12.1", "pci": ["pci:*"]}}"#;
        fs::write(folder.path().join("manifest.json"), manifest).unwrap();
        let text =
            format!("[hypervisor.qemu]\nkernel = {kernel:?}\ninitrd = \"/nowhere/initrd\"\npath = \"/nowhere/qemu\"\n");
        let env = Env::of(&Config::parse(&text, &[]).unwrap()).unwrap();
        let toml: toml::Table = env.toml().unwrap().parse().unwrap();
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(toml["guest"]["kernel"]["sha256"].as_str(), Some(abc));
        assert_eq!(toml["guest"]["manifest"]["kernel"]["release"].as_str(), Some("6.12.1"));
        assert_eq!(toml["guest"]["manifest"]["kernel"].get("pci"), None);
        let said = |value: &toml::Value| value.as_str().unwrap_or_default().to_owned();
        assert!(said(&toml["guest"]["initrd"]["sha256"]).starts_with("cannot be read: "));
        assert!(said(&toml["qemu"]["version"]).starts_with("cannot be started: "));
        assert!(toml["host"]["memory_bytes"].as_integer() > Some(0));
    }
}
