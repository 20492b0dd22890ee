//! Trees of files: what is in them, and what has changed.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::failure::{Result, Trying, claim};

/// What is in some folders: for each path its kind, its mode, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, String>);

/// What is said of a file below a root, both by their metadata.
type Stamp<'s> = dyn Fn(&fs::Metadata, &fs::Metadata) -> Option<String> + 's;

impl Tree {
    /// Looks at folders and everything in them; one that is not there is as good as empty.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(folders: &[PathBuf]) -> Result<Tree> {
        Tree::seen(folders, &|_, _| Some(String::new()))
    }

    /// The same with everything of an inode that tells of a change: its owner, its number, how many names it has, when
    /// its contents and when it was changed last. What is mounted below a folder is left out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stamped(folders: &[PathBuf]) -> Result<Tree> {
        let stamp = |root: &fs::Metadata, found: &fs::Metadata| {
            let owner = (found.uid(), found.gid());
            let inode = (found.ino(), found.nlink(), found.rdev());
            let times = (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec());
            (found.dev() == root.dev()).then(|| format!(" {owner:?} {inode:?} {times:?}"))
        };
        Tree::seen(folders, &stamp)
    }

    /// `stamp` says more of what is found, or that it is left out.
    fn seen(folders: &[PathBuf], stamp: &Stamp<'_>) -> Result<Tree> {
        let mut tree = Tree(BTreeMap::new());
        for folder in folders {
            let walked = match fs::symlink_metadata(folder) {
                Ok(root) => tree.walk(&root, folder, stamp),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            };
            walked.trying(format!("looking at {}", folder.display()))?;
        }
        Ok(tree)
    }

    fn walk(&mut self, root: &fs::Metadata, path: &Path, stamp: &Stamp<'_>) -> io::Result<()> {
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(stamped) = stamp(root, &metadata) else {
            return Ok(());
        };
        let mode = metadata.permissions().mode();
        let holds = if metadata.is_symlink() {
            format!("-> {}", fs::read_link(path)?.display())
        } else if metadata.is_file() {
            let digest = Sha256::digest(fs::read(path)?);
            digest.iter().map(|byte| format!("{byte:02x}")).collect()
        } else {
            String::new()
        };
        self.0.insert(path.into(), format!("{mode:o} {holds}{stamped}"));
        if metadata.is_dir() {
            for entry in fs::read_dir(path)? {
                self.walk(root, &entry?.path(), stamp)?;
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
