//! Locks: one installer at a time on a node, and no version removed that a shim runs from.

use std::{
    fs::{self, File, TryLockError},
    io::ErrorKind,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::libc::O_NOFOLLOW;

use super::{
    error::{Context, InstallError, Result},
    files::Host,
    runtime_folder::RuntimeFolder,
};

/// Where installers meet, in the installer's own folder.
const NODE: &str = "lock";

/// Held by the one installer that is at work on a node. Its file goes with it, and then the folder.
#[derive(Debug)]
pub struct NodeLock {
    path: PathBuf,
    _file: File,
    /// Where this installer may keep what it needs only until it ends.
    pub folder: RuntimeFolder,
}

impl NodeLock {
    /// Takes it.
    ///
    /// # Errors
    /// Another installer has it.
    pub fn take(host: &Host) -> Result<Self> {
        let mut options = File::options();
        options.write(true).create(true).mode(0o600).custom_flags(O_NOFOLLOW);
        loop {
            let folder = RuntimeFolder::make(host)?;
            let path = folder.path().join(NODE);
            let file = match options.open(&path) {
                Ok(file) => file,
                // The one before us has removed the folder after we had looked at it.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("open", &path),
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(InstallError::Busy),
                Err(TryLockError::Error(error)) => return Err(error).at("lock", &path),
            }
            // The one before us may have removed the file after we had opened it; then nobody else would meet us there.
            let ours = file.metadata().at("look at", &path)?.ino();
            if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.ino() == ours) {
                return Ok(Self {
                    path,
                    _file: file,
                    folder,
                });
            }
        }
    }
}

impl Drop for NodeLock {
    fn drop(&mut self) {
        // What cannot be removed does no harm: the next installer takes the same file.
        drop(fs::remove_file(&self.path));
    }
}

/// Proof that no shim runs from a version; none may start to while it is held.
#[derive(Debug)]
pub struct Unused {
    _lock: Option<File>,
}

impl Unused {
    /// Looks whether a shim runs from the version in a folder: each holds a shared lock of its `.lock` for its life.
    /// None when one does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn prove(version: &Path) -> Result<Option<Self>> {
        let path = version.join(LOCK);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(Self { _lock: None })),
            Err(error) => return Err(error).at("open", &path),
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _lock: Some(file) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).at("lock", &path),
        }
    }
}

/// The name of a version's lock; `shim` takes it under the same name.
pub const LOCK: &str = ".lock";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::files;

    fn node() -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("run")).unwrap();
        let host = Host::new(root.path());
        (root, host)
    }

    #[test]
    fn two_installers_meet_and_the_second_is_refused() {
        let (_root, host) = node();
        let first = NodeLock::take(&host).unwrap();
        assert!(matches!(NodeLock::take(&host), Err(InstallError::Busy)));
        drop(first);
        drop(NodeLock::take(&host).unwrap());
        assert!(files::names(&host.at("/run")).unwrap().is_empty());
    }

    #[test]
    fn a_link_in_the_place_of_the_lock_is_not_followed() {
        let (root, host) = node();
        let (folder, target) = (RuntimeFolder::make(&host).unwrap(), root.path().join("target"));
        symlink(&target, folder.path().join(NODE)).unwrap();
        let refusal = NodeLock::take(&host).unwrap_err().to_string();
        assert!(refusal.contains("Too many levels of symbolic links"), "{refusal}");
        assert!(!target.exists());
    }

    #[test]
    fn what_other_users_do_in_the_folder_for_everybodys_locks_is_nothing_to_us() {
        let (_root, host) = node();
        fs::create_dir(host.at("/run/lock")).unwrap();
        let theirs = File::create(host.at("/run/lock/sandpod.lock")).unwrap();
        theirs.lock().unwrap();
        drop(NodeLock::take(&host).unwrap());
    }

    #[test]
    fn a_version_is_in_use_while_somebody_shares_its_lock() {
        let version = tempfile::tempdir().unwrap();
        assert!(Unused::prove(version.path()).unwrap().is_some());
        let shim = File::create(version.path().join(LOCK)).unwrap();
        shim.lock_shared().unwrap();
        assert!(Unused::prove(version.path()).unwrap().is_none());
        drop(shim);
        let proof = Unused::prove(version.path()).unwrap();
        let late = File::open(version.path().join(LOCK)).unwrap();
        assert!(late.try_lock_shared().is_err());
        drop(proof);
        late.try_lock_shared().unwrap();
    }
}
