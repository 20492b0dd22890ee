//! Whether a node can run our pods, and if not, what is missing and what to do about it.

use std::{
    fmt,
    fs::{self, File},
    io,
    path::Path,
    process::Command,
};

use config::{Accelerator, Config, NetworkModel};
use serde::Serialize;
use vmm_host::{VHOST_NET, VHOST_VSOCK, kvm_ready_below, open_device};

/// The first kernel with everything that the shim asks of the host (`waitid` for a pidfd).
const OLDEST_KERNEL: (u32, u32) = (5, 4);
/// The oldest QEMU that the tests run with.
const OLDEST_QEMU: (u32, u32) = (7, 2);
/// The oldest virtiofsd that the tests run with.
const OLDEST_VIRTIOFSD: (u32, u32) = (1, 14);

/// How a part of the node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Pods run without it, slower.
    Slower,
    /// Pods do not run without it.
    Missing,
}

/// One part of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub part: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// A sentence: what is there, or what to do.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Slower => "slower",
            Verdict::Missing => "MISSING",
        };
        write!(out, "{verdict:<8} {:<12} {}", self.part, self.detail)
    }
}

/// Looks at what the node whose root folder is at `root` has to have before anything is installed on it: its kernel and
/// devices. Changes nothing.
pub fn node(root: &Path, config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        kernel(&text("/proc/sys/kernel/osrelease")),
        accelerator(root, config.hypervisor.accelerator),
    ];
    if config.runtime.network == NetworkModel::TcFilter {
        findings.push(device(
            root,
            "/dev/net/tun",
            Verdict::Missing,
            "load the kernel module tun",
        ));
    }
    let vsock = "load the kernel module vhost_vsock; without it the agent is reached over virtio-serial";
    findings.push(device(root, VHOST_VSOCK, Verdict::Slower, vsock));
    if config.hypervisor.vhost_net {
        let net = "load the kernel module vhost_net; without it QEMU itself carries the pods' packets";
        findings.push(device(root, VHOST_NET, Verdict::Slower, net));
    }
    findings.push(iommu(root));
    findings
}

fn finding(part: &'static str, verdict: Verdict, detail: impl Into<String>) -> Finding {
    Finding {
        part,
        verdict,
        detail: detail.into(),
    }
}

/// A small file of the kernel's; empty when there is none.
pub fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn kernel(release: &str) -> Finding {
    match version(release) {
        Some(found) if found >= OLDEST_KERNEL => finding("host kernel", Verdict::Ok, release),
        _ => {
            let (major, minor) = OLDEST_KERNEL;
            let detail = format!("{release:?} is older than {major}.{minor}; update the node");
            finding("host kernel", Verdict::Missing, detail)
        }
    }
}

fn accelerator(root: &Path, accelerator: Accelerator) -> Finding {
    match accelerator {
        Accelerator::Tcg => finding(
            "KVM",
            Verdict::Slower,
            "not asked for: `accelerator = \"tcg\"` emulates every guest",
        ),
        Accelerator::Kvm => match kvm_ready_below(root) {
            Ok(()) => finding("KVM", Verdict::Ok, "/dev/kvm has all capabilities that QEMU needs"),
            Err(error) => finding("KVM", Verdict::Missing, error.to_string()),
        },
    }
}

/// Pods run without one; those that ask for a device of the host do not.
fn iommu(root: &Path) -> Finding {
    let detail = match iommu_groups(root) {
        Ok(0) => "none: no device of the host can be given to a pod (`cold_plug_vfio`)".to_owned(),
        Ok(groups) => format!("{groups} groups of devices, which `cold_plug_vfio` can give to pods"),
        Err(error) => format!("its groups cannot be read: {error}"),
    };
    finding("IOMMU", Verdict::Ok, detail)
}

/// How many IOMMU groups the node has.
///
/// # Errors
/// The folder is there and cannot be read.
pub fn iommu_groups(root: &Path) -> io::Result<usize> {
    match fs::read_dir(root.join("sys/kernel/iommu_groups")) {
        Ok(groups) => Ok(groups.count()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Looks at the programs and files that this configuration names. Changes nothing.
pub fn programs(config: &Config) -> Vec<Finding> {
    let hypervisor = &config.hypervisor;
    vec![
        program("QEMU", &hypervisor.path, OLDEST_QEMU, "path"),
        program(
            "virtiofsd",
            &hypervisor.virtio_fs_daemon,
            OLDEST_VIRTIOFSD,
            "virtio_fs_daemon",
        ),
        file("guest kernel", &hypervisor.kernel, "kernel"),
        file("initrd", &hypervisor.initrd, "initrd"),
    ]
}

/// The first line of what a program says of its version.
///
/// # Errors
/// It cannot be started.
pub fn version_line(program: &Path) -> io::Result<String> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// A program of the configuration: it has to start, and to be new enough.
fn program(part: &'static str, path: &Path, oldest: (u32, u32), key: &str) -> Finding {
    let first = match version_line(path) {
        Ok(first) => first,
        Err(error) => {
            let detail = format!(
                "{} cannot be started: {error}; install it, or set `{key}`",
                path.display()
            );
            return finding(part, Verdict::Missing, detail);
        }
    };
    match version(&first) {
        Some(found) if found >= oldest => finding(part, Verdict::Ok, format!("{first} ({})", path.display())),
        _ => {
            let (major, minor) = oldest;
            let detail = format!(
                "{} says {first:?}; version {major}.{minor} or later is needed; install it, or set `{key}`",
                path.display()
            );
            finding(part, Verdict::Missing, detail)
        }
    }
}

fn file(part: &'static str, path: &Path, key: &str) -> Finding {
    match File::open(path) {
        Ok(_) => finding(part, Verdict::Ok, path.display().to_string()),
        Err(error) => {
            let detail = format!(
                "{} cannot be opened: {error}; install it, or set `{key}`",
                path.display()
            );
            finding(part, Verdict::Missing, detail)
        }
    }
}

/// Opens the device as a pod's start does. One that is there and does not open fails the pod, whatever it is for.
fn device(root: &Path, path: &'static str, without: Verdict, remedy: &str) -> Finding {
    match open_device(&root.join(path.trim_start_matches('/'))) {
        Ok(Some(_)) => finding(path, Verdict::Ok, "opens"),
        Ok(None) => finding(path, without, format!("not there, or without its driver; {remedy}")),
        Err(error) => finding(path, Verdict::Missing, format!("it cannot be opened: {error}")),
    }
}

/// The first `major.minor` in a text.
fn version(text: &str) -> Option<(u32, u32)> {
    text.split(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .find_map(|word| {
            let mut numbers = word.split('.');
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        assert_eq!(
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)"),
            Some((7, 2))
        );
        assert_eq!(version("virtiofsd 1.14.0"), Some((1, 14)));
        assert_eq!(version("5.14.0-427.el9.x86_64"), Some((5, 14)));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let absent = program("QEMU", Path::new("/nowhere/qemu"), OLDEST_QEMU, "path");
        assert_eq!(absent.verdict, Verdict::Missing);
        assert!(
            absent.detail.ends_with("; install it, or set `path`"),
            "{}",
            absent.detail
        );
        let old = kernel("4.18.0-553.el8.x86_64");
        let line = "MISSING  host kernel  \"4.18.0-553.el8.x86_64\" is older than 5.4; update the node";
        assert_eq!(old.to_string(), line);
        let none = device(
            Path::new("/"),
            "/dev/no-such-device",
            Verdict::Slower,
            "load the module",
        );
        assert_eq!(none.verdict, Verdict::Slower);
        assert!(none.detail.ends_with("; load the module"));
    }

    #[test]
    fn a_device_is_judged_by_what_a_pod_makes_of_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("dev")).unwrap();
        let place = root.path().join("dev/vhost-net");
        let look = || device(root.path(), VHOST_NET, Verdict::Slower, "load the module");
        // A file that kmod has made for a module that is not loaded: no driver has this minor number.
        let driverless = nix::sys::stat::makedev(10, 4095);
        let mode = nix::sys::stat::Mode::S_IRUSR;
        nix::sys::stat::mknod(&place, nix::sys::stat::SFlag::S_IFCHR, mode, driverless).unwrap();
        assert_eq!(
            look().to_string(),
            "slower   /dev/vhost-net not there, or without its driver; load the module"
        );
        fs::remove_file(&place).unwrap();
        std::os::unix::fs::symlink(&place, &place).unwrap();
        assert_eq!(look().verdict, Verdict::Missing);
        fs::remove_file(&place).unwrap();
        fs::write(&place, "").unwrap();
        assert_eq!(look().verdict, Verdict::Ok);
    }

    #[test]
    fn an_iommu_is_told_of_and_not_missed() {
        let root = tempfile::tempdir().unwrap();
        let none = iommu(root.path());
        assert_eq!(none.verdict, Verdict::Ok);
        assert!(none.detail.starts_with("none: "), "{}", none.detail);
        for group in ["0", "1"] {
            fs::create_dir_all(root.path().join("sys/kernel/iommu_groups").join(group)).unwrap();
        }
        let two = iommu(root.path());
        assert!(two.detail.starts_with("2 groups"), "{}", two.detail);
    }

    #[test]
    fn another_program_is_not_taken_for_qemu() {
        let other = program("QEMU", Path::new("/bin/true"), (99, 0), "path");
        assert_eq!(other.verdict, Verdict::Missing);
    }
}
