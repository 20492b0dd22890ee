//! The installer's own folder below `/run`: what one run needs and the next one does not.
//!
//! Only root may create files in `/run` itself. Folders such as `/run/lock` are open to every user of some nodes, who
//! could create there what the installer is about to create, or lock it.

use std::{
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{
    error::{Context, InstallError, Result},
    files::{self, Host},
};

const PATH: &str = "/run/sandpod";

/// What the names of scratch folders begin with.
const SCRATCH: &str = "scratch-";

/// The folder; it goes with this value if nothing is in it.
#[derive(Debug)]
pub struct RuntimeFolder {
    path: PathBuf,
}

impl RuntimeFolder {
    /// Makes the folder, or takes the one that is there if only the user of this process can write to it.
    ///
    /// # Errors
    /// Something else is in its place.
    pub fn make(host: &Host) -> Result<Self> {
        let path = host.at(PATH);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => refuse_unsafe(&path)?,
            Err(error) => return Err(error).at("create", &path),
        }
        Ok(Self { path })
    }

    /// Where it is, for this process.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a folder in it whose name nobody knows before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn scratch(&self) -> Result<TempDir> {
        let named = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(&self.path);
        named.at("create a folder in", &self.path)
    }

    /// Removes the scratch folders that runs that were killed have left. Whether there were any.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sweep(&self) -> Result<bool> {
        let mut swept = false;
        for name in files::names(&self.path)?
            .iter()
            .filter(|name| name.starts_with(SCRATCH))
        {
            swept |= files::remove_tree(&self.path.join(name))?;
        }
        Ok(swept)
    }
}

impl Drop for RuntimeFolder {
    fn drop(&mut self) {
        // Another installer may have something in it; the last one removes it.
        drop(fs::remove_dir(&self.path));
    }
}

/// Refuses what others could change, or have made.
fn refuse_unsafe(path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        // Another installer has removed it meanwhile; who wants to create a file in it will see.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).at("look at", path),
    };
    let how = match found.is_dir() {
        true => files::how_open(&found),
        false => Some("is not a folder".to_owned()),
    };
    how.map_or(Ok(()), |how| Err(InstallError::UnsafeFolder { path: PATH.into(), how }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use nix::unistd::geteuid;

    use super::*;

    struct Node {
        root: TempDir,
        host: Host,
    }

    impl Node {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("run")).unwrap();
            Self {
                host: Host::new(root.path()),
                root,
            }
        }

        fn refusal(&self) -> String {
            RuntimeFolder::make(&self.host).unwrap_err().to_string()
        }

        fn left(&self) -> Vec<String> {
            files::names(&self.root.path().join("run")).unwrap()
        }
    }

    #[test]
    fn the_folder_is_the_users_own_and_goes_when_it_is_empty() {
        let node = Node::new();
        let folder = RuntimeFolder::make(&node.host).unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().mode() & 0o777, 0o700);
        let beside = RuntimeFolder::make(&node.host).unwrap();
        let scratch = beside.scratch().unwrap();
        drop(folder);
        assert_eq!(node.left(), ["sandpod"]);
        scratch.close().unwrap();
        drop(beside);
        assert!(node.left().is_empty());
    }

    #[test]
    fn what_is_not_the_users_own_folder_is_refused_and_stays() {
        let node = Node::new();
        let (place, elsewhere) = (node.host.at(PATH), node.root.path().join("elsewhere"));
        let refused = |how: &str| assert_eq!(node.refusal(), format!("/run/sandpod {how}: remove it and try again"));
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, &place).unwrap();
        refused("is not a folder");
        fs::remove_file(&place).unwrap();
        fs::write(&place, "").unwrap();
        refused("is not a folder");
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o1777)).unwrap();
        refused("can be written by others than root");
        // Only root can give something away.
        if geteuid().is_root() {
            fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).unwrap();
            chown(&place, Some(65534), None).unwrap();
            refused("belongs to the user 65534 instead of root");
        }
        assert_eq!(node.left(), ["sandpod"]);
        assert!(files::names(&elsewhere).unwrap().is_empty());
    }

    #[test]
    fn what_a_death_left_is_swept() {
        let node = Node::new();
        let folder = RuntimeFolder::make(&node.host).unwrap();
        let killed = folder.scratch().unwrap().keep();
        fs::write(killed.join("main"), "").unwrap();
        assert!(folder.sweep().unwrap());
        assert!(!folder.sweep().unwrap());
        drop(folder);
        assert!(node.left().is_empty());
    }
}
