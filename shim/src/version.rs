//! Keeps the installed version that this shim runs from: its installer removes no version whose lock somebody shares.

use std::{
    fs::{File, TryLockError},
    path::Path,
};

use crate::error::{Context, Error, Result};

/// Beside the folder of a version's programs (`PREFIX/versions/<version>/bin`); made by the installer, which locks it
/// alone before it removes the version. Only root may open it: who may open a file may lock it.
const LOCK: &str = ".lock";

/// Shares the lock of the version that this program belongs to, until the returned file is closed. None where the
/// program was not put by the installer.
///
/// # Errors
/// The version is being removed.
pub fn hold() -> Result<Option<File>> {
    let program = std::env::current_exe().action("find this program")?;
    hold_of(&program)
}

fn hold_of(program: &Path) -> Result<Option<File>> {
    let Some(version) = program.parent().and_then(Path::parent) else {
        return Ok(None);
    };
    let path = version.join(LOCK);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("open", path),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let version = version.display();
            Err(Error::Precondition(format!(
                "{version} is being removed from this node"
            )))
        }
        Err(TryLockError::Error(error)) => Err(error).at("lock", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_shims_share_a_version_and_none_starts_from_one_that_is_going() {
        let version = tempfile::tempdir().unwrap();
        let program = version.path().join("bin/containerd-shim-kata-v2");
        assert!(hold_of(&program).unwrap().is_none());
        let installer = File::create(version.path().join(LOCK)).unwrap();
        let shims = [hold_of(&program).unwrap().unwrap(), hold_of(&program).unwrap().unwrap()];
        assert!(matches!(installer.try_lock(), Err(TryLockError::WouldBlock)));
        drop(shims);
        installer.try_lock().unwrap();
        let error = hold_of(&program).unwrap_err().to_string();
        assert!(error.ends_with("is being removed from this node"), "{error}");
    }
}
