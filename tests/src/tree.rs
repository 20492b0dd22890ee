//! Trees of files: what is in them, and what has changed.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::failure::{Result, Trying, claim};

/// What is in some folders: for each path its kind, its mode, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, String>);

impl Tree {
    /// Looks at folders and everything in them; one that is not there is as good as empty.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(folders: &[PathBuf]) -> Result<Tree> {
        let mut tree = Tree(BTreeMap::new());
        for folder in folders {
            tree.walk(folder, Path::new(""))
                .trying(format!("looking at {}", folder.display()))?;
        }
        Ok(tree)
    }

    fn walk(&mut self, root: &Path, inside: &Path) -> io::Result<()> {
        let path = root.join(inside);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mode = metadata.permissions().mode();
        let holds = if metadata.is_symlink() {
            format!("-> {}", fs::read_link(&path)?.display())
        } else if metadata.is_file() {
            let digest = Sha256::digest(fs::read(&path)?);
            digest.iter().map(|byte| format!("{byte:02x}")).collect()
        } else {
            String::new()
        };
        self.0.insert(path.clone(), format!("{mode:o} {holds}"));
        if metadata.is_dir() {
            for entry in fs::read_dir(&path)? {
                self.walk(root, &inside.join(entry?.file_name()))?;
            }
        }
        Ok(())
    }

    /// Fails unless this is what was there before, with each path that is not.
    ///
    /// # Errors
    /// A claim with every path that was added, changed or removed.
    pub fn same_as(&self, before: &Tree) -> Result {
        let added = self.0.iter().filter(|(path, what)| before.0.get(*path) != Some(what));
        let gone = before.0.keys().filter(|path| !self.0.contains_key(*path));
        let changes: Vec<_> = added
            .map(|(path, what)| format!("{} is {what}", path.display()))
            .chain(gone.map(|path| format!("{} is gone", path.display())))
            .collect();
        claim(
            changes.is_empty(),
            format!("the node is not as it was: {}", changes.join(", ")),
        )
    }
}
