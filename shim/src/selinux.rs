//! The SELinux labels of what the host runs and mounts for a pod.
//!
//! A CRI gives a pod in a VM the label of a virtual machine, `container_kvm_t` with the pod's own categories, and its
//! files one that only this label may reach (`src/runtime-rs/crates/hypervisor/src/selinux.rs` of kata-containers sets
//! the first). In the guest no label means anything.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;
use vmm::VmError;

use crate::error::{Error, Result};

/// Where the kernel mounts selinuxfs.
pub const SELINUXFS: &str = "/sys/fs/selinux";

/// The labels of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels {
    /// Of QEMU and virtiofsd.
    pub process: Option<String>,
    /// Of the files that they are shown.
    pub files: Option<String>,
}

impl Labels {
    /// What the sandbox's own specification asks for.
    pub fn of(spec: &Spec) -> Labels {
        let given = |label: Option<&String>| label.filter(|label| !label.is_empty()).cloned();
        let process = spec.process().as_ref();
        let linux = spec.linux().as_ref();
        Labels {
            process: given(process.and_then(|process| process.selinux_label().as_ref())),
            files: given(linux.and_then(|linux| linux.mount_label().as_ref())),
        }
    }

    /// What of it holds: all of it where SELinux is on, enforcing or not, and nothing where it is off or the
    /// configuration says so.
    ///
    /// `selinuxfs` is [`SELINUXFS`]: without SELinux the folder is missing or empty.
    #[must_use]
    pub fn in_force(self, wanted: bool, selinuxfs: &Path) -> Labels {
        if wanted && selinuxfs.join("enforce").exists() {
            self
        } else {
            Labels::default()
        }
    }
}

/// Mounts an empty tmpfs at `folder` whose files all have `label`, where there is one.
///
/// # Errors
/// The kernel's. It refuses a label that the policy does not know.
pub fn mount_tmpfs(folder: &Path, flags: MsFlags, options: &str, label: Option<&str>) -> Result<()> {
    let mut options = options.to_owned();
    if let Some(label) = label {
        // A label has commas of its own (mount(8)).
        options += &format!(",context=\"{label}\"");
    }
    let mounted = mount(Some("sandpod"), folder, Some("tmpfs"), flags, Some(options.as_str()));
    mounted.map_err(|source| match label {
        Some(label) => Error::FilesLabel {
            path: folder.to_owned(),
            label: label.to_owned(),
            source: source.into(),
        },
        None => Error::Path {
            action: "mount",
            path: folder.to_owned(),
            source: source.into(),
        },
    })
}

/// Adds what to do to the error of a program that could not be given its label.
pub fn explained(error: VmError) -> Error {
    match error {
        VmError::Label { .. } => Error::Label(error),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io, path::PathBuf};

    const PROCESS: &str = "system_u:system_r:container_kvm_t:s0:c1,c2";

    fn labels() -> Labels {
        let spec = serde_json::from_str(include_str!("spec/samples/crio-sandbox.json")).unwrap();
        Labels::of(&spec)
    }

    #[test]
    fn a_pod_is_labelled_where_selinux_is_on_and_wanted() {
        let all = labels();
        assert_eq!(all.process.as_deref(), Some(PROCESS));
        let on = tempfile::tempdir().unwrap();
        let off = tempfile::tempdir().unwrap();
        for mode in ["0", "1"] {
            std::fs::write(on.path().join("enforce"), mode).unwrap();
            assert_eq!(all.clone().in_force(true, on.path()), all, "enforce = {mode}");
        }
        for (wanted, selinuxfs) in [
            (false, on.path()),
            (true, off.path()),
            (true, Path::new("/nowhere/selinux")),
        ] {
            assert_eq!(all.clone().in_force(wanted, selinuxfs), Labels::default());
        }
    }

    #[test]
    fn an_empty_label_is_none() {
        let mut spec: Spec = serde_json::from_str(include_str!("spec/samples/crio-sandbox.json")).unwrap();
        let process = spec.process_mut().as_mut().unwrap();
        process.set_selinux_label(Some(String::new()));
        assert_eq!(Labels::of(&spec).process, None);
    }

    #[test]
    fn a_label_that_is_refused_is_named_with_the_way_out() {
        let error = explained(VmError::Label {
            program: PathBuf::from("/usr/bin/qemu"),
            label: PROCESS.into(),
            source: io::Error::from_raw_os_error(13),
        });
        assert_eq!(
            error.to_string(),
            "cannot start /usr/bin/qemu with the SELinux label \"system_u:system_r:container_kvm_t:s0:c1,c2\": \
             Permission denied (os error 13); `disable_selinux = true` in [hypervisor.qemu] starts it without one"
        );
        let other = explained(VmError::StreamTaken);
        assert!(matches!(other, Error::Vm(VmError::StreamTaken)));
    }
}
