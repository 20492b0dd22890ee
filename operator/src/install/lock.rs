//! Locks: one installer at a time on a node, and no version removed that a shim runs from.

use std::{
    fs::{File, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    error::{Context, InstallError, Result},
    files::{self, Host},
};

/// Where installers meet.
const NODE: &str = "/run/lock/sandpod.lock";

/// Held by the one installer that is at work on a node. Its file goes with it.
#[derive(Debug)]
pub struct NodeLock {
    path: PathBuf,
    made: Vec<PathBuf>,
    _file: File,
}

impl NodeLock {
    /// Takes it.
    ///
    /// # Errors
    /// Another installer has it.
    pub fn take(host: &Host) -> Result<Self> {
        let path = host.at(NODE);
        let folder = path.parent().unwrap_or(&path).to_owned();
        let made = files::missing_folders(&folder);
        std::fs::create_dir_all(&folder).at("create", &folder)?;
        let options = File::options().write(true).create(true).truncate(false).to_owned();
        loop {
            let file = options.open(&path).at("open", &path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(InstallError::Busy),
                Err(TryLockError::Error(error)) => return Err(error).at("lock", &path),
            }
            // The one before us may have removed the file after we had opened it; then nobody else would meet us there.
            let ours = file.metadata().at("look at", &path)?.ino();
            if std::fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == ours) {
                return Ok(Self {
                    path,
                    made,
                    _file: file,
                });
            }
        }
    }
}

impl Drop for NodeLock {
    fn drop(&mut self) {
        // What cannot be removed does no harm: the next installer takes the same file.
        drop(std::fs::remove_file(&self.path));
        for folder in self.made.iter().rev() {
            drop(std::fs::remove_dir(folder));
        }
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
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Some(Self { _lock: None })),
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
    use super::*;

    #[test]
    fn two_installers_meet_and_the_second_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        let first = NodeLock::take(&host).unwrap();
        assert!(matches!(NodeLock::take(&host), Err(InstallError::Busy)));
        drop(first);
        drop(NodeLock::take(&host).unwrap());
        assert!(files::names(root.path()).unwrap().is_empty());
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
