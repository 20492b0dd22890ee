//! Labels for what is installed, on nodes with SELinux.
//!
//! The types are those that container-selinux and the reference policy give to such files of a distribution, so the
//! same domains may run and read them. A policy may lack a type, and a file system may have no labels: an enforcing
//! kernel would then keep the CRI from the shim, so the install is refused; a permissive one only reports, so a warning
//! is enough.

use std::{
    ffi::CString,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{
    error::{InstallError, Result},
    files::Host,
    sys,
};

/// Where the kernel has SELinux's files (its mode in `enforce`), if it is enabled.
const FOLDER: &str = "/sys/fs/selinux";

/// What SELinux does on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// There is none.
    Off,
    /// It reports what it would refuse.
    Permissive,
    /// It refuses.
    Enforcing,
}

impl Mode {
    /// The node's.
    #[must_use]
    pub fn of(host: &Host) -> Self {
        match fs::read_to_string(host.at(FOLDER).join("enforce")) {
            Ok(text) if text.trim() == "0" => Self::Permissive,
            Ok(_) => Self::Enforcing,
            Err(_) => Self::Off,
        }
    }
}

/// The label of a file or folder of a version, by its path below the version's folder.
#[must_use]
pub fn label(path: &Path) -> &'static str {
    match path.to_str().unwrap_or_default() {
        "bin/containerd-shim-kata-v2" => "system_u:object_r:container_runtime_exec_t:s0",
        "bin/qemu-system-x86_64" => "system_u:object_r:qemu_exec_t:s0",
        "lib/ld-linux-x86-64.so.2" => "system_u:object_r:ld_so_t:s0",
        "virtiofsd" => "system_u:object_r:bin_t:s0",
        path if path.starts_with("bin") => "system_u:object_r:bin_t:s0",
        path if path.starts_with("lib") => "system_u:object_r:lib_t:s0",
        _ => "system_u:object_r:usr_t:s0",
    }
}

/// Labels the files and folders below `version`, which are named relative to it. Returns a warning where a permissive
/// kernel refuses one.
///
/// # Errors
/// An enforcing kernel refuses one.
pub fn relabel(mode: Mode, version: &Path, paths: &[PathBuf]) -> Result<Option<String>> {
    let mut refused = None;
    if mode == Mode::Off {
        return Ok(refused);
    }
    for path in paths {
        let (place, label) = (version.join(path), label(path));
        match (set(&place, label), mode) {
            (Ok(()), _) => {}
            (Err(error), Mode::Permissive) => {
                refused = Some(format!("{} has no SELinux label {label}: {error}", place.display()));
            }
            (Err(source), _) => {
                return Err(InstallError::Label {
                    path: place,
                    label,
                    source,
                });
            }
        }
    }
    Ok(refused)
}

fn set(path: &Path, label: &str) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // The kernel's own tools write the final NUL too.
    let value = CString::new(label)?;
    sys::set_attribute(&path, c"security.selinux", value.as_bytes_with_nul())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read_from_the_kernels_file() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        assert_eq!(Mode::of(&host), Mode::Off);
        fs::create_dir_all(host.at(FOLDER)).unwrap();
        for (text, mode) in [("0", Mode::Permissive), ("1", Mode::Enforcing)] {
            fs::write(host.at(FOLDER).join("enforce"), text).unwrap();
            assert_eq!(Mode::of(&host), mode);
        }
    }

    #[test]
    fn each_kind_of_file_has_its_type() {
        let kind = |path: &str| label(Path::new(path)).split(':').nth(2).unwrap_or_default().to_owned();
        assert_eq!(kind("bin/containerd-shim-kata-v2"), "container_runtime_exec_t");
        assert_eq!(kind("bin/qemu-system-x86_64"), "qemu_exec_t");
        assert_eq!(kind("bin/kata-ctl"), "bin_t");
        assert_eq!(kind("lib/libc.so.6"), "lib_t");
        assert_eq!(kind("vmlinux"), "usr_t");
        assert_eq!(kind("share/qemu"), "usr_t");
    }

    #[test]
    fn a_label_that_is_refused_stops_only_an_enforcing_node() {
        // No file system has labels for what is not there.
        let (folder, paths) = (Path::new("/nowhere"), [PathBuf::from("vmlinux")]);
        assert_eq!(relabel(Mode::Off, folder, &paths).unwrap(), None);
        let warning = relabel(Mode::Permissive, folder, &paths).unwrap().unwrap();
        assert!(
            warning.starts_with("/nowhere/vmlinux has no SELinux label"),
            "{warning}"
        );
        let error = relabel(Mode::Enforcing, folder, &paths).unwrap_err().to_string();
        assert!(
            error.starts_with("SELinux is enforcing and /nowhere/vmlinux"),
            "{error}"
        );
    }
}
