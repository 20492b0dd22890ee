//! Files of the node: written whole or not at all, and on the disk before the next step begins.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    path::{Component, Path, PathBuf},
};

use nix::{errno::Errno, unistd::geteuid};
use sha2::{Digest, Sha256};

use super::error::{Context, Result};

/// The end of the names of files and folders that are not in their place yet, or no longer.
pub const SCRATCH: &str = ".sandpod-tmp";

/// A node's root folder, `/` unless a test says otherwise.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// The node below `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where an absolute path of the node is for this process.
    #[must_use]
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The node's own name of a path of this process.
    #[must_use]
    pub fn name(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root)
            .map_or_else(|_| path.to_owned(), |inside| Path::new("/").join(inside))
    }
}

/// The contents of a file; none when there is no such file.
///
/// # Errors
/// The kernel's.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error).at("read", path),
    }
}

/// As [`read`], for text; bytes that are no UTF-8 become question marks.
///
/// # Errors
/// The kernel's.
pub fn read_text(path: &Path) -> Result<Option<String>> {
    Ok(read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Whether an error says that there is no such file.
#[must_use]
pub fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Writes a new file and brings it to the disk.
///
/// # Errors
/// The kernel's.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    // With its mode from the beginning: who has opened a file before it is closed to him keeps it.
    let options = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .to_owned();
    let mut file = options.open(path).at("create", path)?;
    // Whatever the umask is: QEMU reads its own files as another user.
    file.set_permissions(Permissions::from_mode(mode))
        .at("set the mode of", path)?;
    file.write_all(bytes).at("write", path)?;
    file.sync_all().at("write to the disk", path)
}

/// Replaces a file in one step. It is written in `scratch`, a folder of the same file system whose files nobody reads.
///
/// # Errors
/// The kernel's.
pub fn replace(path: &Path, bytes: &[u8], scratch: &Path, mode: u32) -> Result<()> {
    let new = scratch_name(path, scratch);
    write(&new, bytes, mode)?;
    fs::rename(&new, path).at("move a new file to", path)?;
    sync_parent(path)
}

/// Where [`replace`] writes a file first.
#[must_use]
pub fn scratch_name(path: &Path, scratch: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    scratch.join(format!(".{name}{SCRATCH}"))
}

/// Points a link somewhere else in one step.
///
/// # Errors
/// The kernel's.
pub fn relink(link: &Path, target: &Path) -> Result<()> {
    let new = scratch_name(link, link.parent().unwrap_or(link));
    remove(&new)?;
    symlink(target, &new).at("create the link", &new)?;
    fs::rename(&new, link).at("move a new link to", link)?;
    sync_parent(link)
}

/// Removes a file or link; whether there was one.
///
/// # Errors
/// The kernel's.
pub fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path).map(|()| true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error).at("remove", path),
    }
}

/// Removes a folder with everything in it; whether there was one.
///
/// # Errors
/// The kernel's.
pub fn remove_tree(path: &Path) -> Result<bool> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error).at("remove", path),
    }
}

/// Removes a folder if it is there and empty; whether it was.
///
/// # Errors
/// The kernel's, but that it is not empty.
pub fn remove_empty(path: &Path) -> Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) || error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(error) => Err(error).at("remove", path),
    }
}

/// Brings a folder's names to the disk.
///
/// # Errors
/// The kernel's.
pub fn sync_folder(path: &Path) -> Result<()> {
    let folder = File::open(path).at("open", path)?;
    folder.sync_all().at("write to the disk", path)
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync_folder)
}

/// The folder and those above it that do not exist, the topmost first.
#[must_use]
pub fn missing_folders(path: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<_> = path
        .ancestors()
        .take_while(|folder| !folder.as_os_str().is_empty() && fs::symlink_metadata(folder).is_err())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

/// The nearest folder at or above a path that exists.
#[must_use]
pub fn nearest_existing(path: &Path) -> PathBuf {
    let exists = |folder: &&Path| folder.exists();
    path.ancestors().find(exists).unwrap_or(Path::new("/")).to_owned()
}

/// The folders of a node that the kernel looks into on the way to a path, as far as there are any, by the node's names;
/// the last one is the path's nearest that exists. Links are followed, and the folders on their way are among them.
///
/// # Errors
/// The kernel's; links that lead to each other.
pub fn way(host: &Host, path: &Path) -> Result<Vec<PathBuf>> {
    // As many as the kernel follows.
    let mut links = 40;
    let mut here = PathBuf::from("/");
    let mut way = vec![here.clone()];
    let mut left: Vec<OsString> = parts(path);
    while let Some(part) = left.pop() {
        if part == ".." {
            here.pop();
            continue;
        }
        let next = here.join(part);
        let place = host.at(&next);
        let found = match fs::symlink_metadata(&place) {
            Err(error) if is_absent(&error) => break,
            found => found.at("look at", &place)?,
        };
        if found.is_symlink() {
            links -= 1;
            if links == 0 {
                return Err(io::Error::from_raw_os_error(Errno::ELOOP as i32)).at("follow the link", &place);
            }
            let target = fs::read_link(&place).at("read the link", &place)?;
            if target.is_absolute() {
                here = PathBuf::from("/");
            }
            left.extend(parts(&target));
        } else {
            here = next;
            way.push(here.clone());
        }
    }
    Ok(way)
}

/// The names in a path, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    names.rev().collect()
}

/// How others than root could put something of their own into a folder, if they could.
#[must_use]
pub fn how_open(folder: &Metadata) -> Option<String> {
    const ROOT: u32 = 0;
    let by_group = folder.mode() & 0o020 != 0 && folder.gid() != ROOT;
    let user = folder.uid();
    if user != ROOT && user != geteuid().as_raw() {
        Some(format!("belongs to the user {user} instead of root"))
    } else if by_group || folder.mode() & 0o002 != 0 {
        Some("can be written by others than root".to_owned())
    } else {
        None
    }
}

/// The names in a folder, sorted; none when there is no such folder.
///
/// # Errors
/// The kernel's.
pub fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error).at("read", folder),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.at("read", folder)?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Whether a path stays below the folder that it is joined to.
#[must_use]
pub fn is_inside(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// The SHA-256 of some bytes, as hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_from_another_folder_and_nothing_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let (folder, file) = (root.path().join("read-by-all"), root.path().join("read-by-all/50-kata"));
        fs::create_dir(&folder).unwrap();
        replace(&file, b"one", root.path(), 0o644).unwrap();
        replace(&file, b"two", root.path(), 0o644).unwrap();
        assert_eq!(read(&file).unwrap().unwrap(), b"two");
        assert_eq!(names(&folder).unwrap(), ["50-kata"]);
        assert_eq!(names(root.path()).unwrap(), ["read-by-all"]);
        assert!(remove(&file).unwrap());
        assert!(!remove(&file).unwrap());
        assert_eq!(read(&file).unwrap(), None);
    }

    #[test]
    fn what_is_missing_is_told_from_the_top() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        assert_eq!(missing_folders(&path), [root.path().join("a"), path.clone()]);
        assert_eq!(nearest_existing(&path), root.path());
        fs::create_dir_all(&path).unwrap();
        assert!(missing_folders(&path).is_empty());
        assert!(!remove_empty(&root.path().join("a")).unwrap());
    }

    #[test]
    fn paths_that_leave_their_folder_are_known() {
        assert!(is_inside(Path::new("bin/qemu")));
        for path in ["", "/bin", "../bin", "bin/../..", "./bin"] {
            assert!(!is_inside(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_path_of_the_node_and_back() {
        let host = Host::new("/host");
        assert_eq!(host.at("/etc/crio"), Path::new("/host/etc/crio"));
        assert_eq!(host.name(Path::new("/host/etc/crio")), Path::new("/etc/crio"));
        assert_eq!(Host::new("/").name(Path::new("/etc")), Path::new("/etc"));
    }
}
