//! Volumes that are kept equal to a folder of the share, so that a container's inotify sees their updates: a file
//! server tells the guest nothing of what the host changes.
//!
//! ```text
//! share: source ──looked at every 2 s──▶ files, `..data` swapped, links, what is gone──▶ tmpfs: watchable/<name> ──bind──▶ container
//! ```
//!
//! The contract, a storage `watchable-bind` whose mount point is in a folder `watchable`, is that of
//! `src/agent/src/watcher.rs` of kata-containers. The folder gets a tmpfs, as the share may be read-only to the guest.
//! How a file, a link or the swap of `..data` comes into being is `copy`'s.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent_protocol::KUBELET_DATA;
use nix::{
    errno::Errno,
    fcntl::{OFlag, readlinkat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::fstat,
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};

use super::{
    beneath,
    copy::{FOLDER, Target, mode, path_of},
    error::{Doing, Error, Result},
};
/// How often all sources are looked at: as often as upstream's agent does.
const EVERY: Duration = Duration::from_secs(2);
/// The folder of the copies.
const WATCHABLE: &str = "watchable";
/// A volume with more than this is not copied: a ConfigMap or a Secret has at most 1 MiB, and a projected volume a
/// handful of them.
const MOST_ENTRIES: usize = 2048;
const MOST_BYTES: u64 = 8 << 20;
const DEEPEST: usize = 16;
/// A source that changes while it is copied for the first time is tried again: the kubelet's update is over in
/// milliseconds, and what the guest remembers of the share's names in a second.
const ATTEMPTS: u32 = 4;
const RETRY: Duration = Duration::from_millis(500);

/// The volumes that are followed, by their mount points.
#[derive(Debug, Default)]
pub(super) struct Watches(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    volumes: HashMap<PathBuf, Volume>,
    /// There is a task that looks at them.
    polled: bool,
}

impl Watches {
    /// Makes a copy of the source at the mount point and follows it; what is no folder, or is too large, is bound there
    /// as it is. Must be called where the runtime is known. Blocks.
    pub(super) fn add(&self, source: &Path, point: &Path) -> Result<()> {
        if !beneath::is_ours(source) {
            return Err(Error::Invalid(format!(
                "the source {} of a watchable volume is not below {}",
                source.display(),
                beneath::BASE
            )));
        }
        let what = || format!("copy {} to {}", source.display(), point.display());
        make_room(point)?;
        let mut volume = Volume::new(source.to_owned(), point.to_owned());
        let mut attempt = 1;
        loop {
            match volume.update() {
                Ok(Outcome::Copied) => break,
                Ok(Outcome::Refused(reason)) => {
                    eprintln!("kata-agent: {} {reason}, so its updates wake nobody", source.display());
                    return volume.bind().doing(what);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(RETRY);
                }
                Err(error) => {
                    // The first error is the one to tell.
                    let _ = clear(point);
                    return Err(error).doing(what);
                }
            }
        }
        let mut table = self.table();
        table.volumes.insert(point.to_owned(), volume);
        if !table.polled {
            table.polled = true;
            tokio::spawn(poll(Arc::clone(&self.0)));
        }
        Ok(())
    }

    /// Stops following and removes what is at the mount point. Blocks.
    pub(super) fn remove(&self, point: &Path) -> Result<()> {
        // Held until the folder is gone, so that no look at the source makes it again.
        let mut table = self.table();
        table.volumes.remove(point);
        clear(point).doing(|| format!("remove the copy {}", point.display()))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.0)
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at all sources again and again, as long as there is one.
async fn poll(table: Arc<Mutex<Table>>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let all = Arc::clone(&table);
        // After a panic the next look may fare better.
        if let Ok(false) = tokio::task::spawn_blocking(move || look(&all)).await {
            return;
        }
    }
}

/// Looks at all sources once; whether there are any.
fn look(table: &Mutex<Table>) -> bool {
    let mut table = lock(table);
    table.polled = !table.volumes.is_empty();
    for volume in table.volumes.values_mut() {
        let complaint = match volume.update() {
            Ok(Outcome::Copied) => None,
            Ok(Outcome::Refused(reason)) => Some(reason.to_owned()),
            Err(error) => Some(format!("cannot be copied: {error}")),
        };
        if let Some(text) = complaint.as_ref().filter(|_| !volume.complained) {
            eprintln!(
                "kata-agent: {} {text}; its copy stays as it was",
                volume.source.display()
            );
        }
        volume.complained = complaint.is_some();
    }
    table.polled
}

/// Has a tmpfs at the folder of the copies.
fn make_room(point: &Path) -> Result<()> {
    let folder = point
        .parent()
        .filter(|folder| folder.file_name() == Some(OsStr::new(WATCHABLE)));
    let folder = folder.ok_or_else(|| {
        let text = format!(
            "the mount point {} of a watchable volume is in no folder {WATCHABLE:?}",
            point.display()
        );
        Error::Invalid(text)
    })?;
    let what = || format!("mount a tmpfs on {}", folder.display());
    if !folder.is_dir() {
        fs::create_dir_all(folder).doing(what)?;
    }
    let found = beneath::open(folder, FOLDER)
        .and_then(|open| Ok(fstatfs(&open)?))
        .doing(what)?;
    if found.filesystem_type() == TMPFS_MAGIC {
        return Ok(());
    }
    // Programs may be run from a ConfigMap.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some("mode=755")).doing(what)
}

/// Removes a copy, or what is bound in its place, and with the last one the tmpfs.
fn clear(point: &Path) -> io::Result<()> {
    match umount2(point, MntFlags::MNT_DETACH) {
        // A copy is no mount, and of a bound one the container's end may have taken care.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let removed = match fs::symlink_metadata(point) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(point),
        Ok(_) => fs::remove_file(point),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let Some(folder) = point.parent() else { return Ok(()) };
    if fs::read_dir(folder)?.next().is_none() {
        // Without a share the folder is on the agent's own tmpfs, and no mount.
        let _ = umount2(folder, MntFlags::MNT_DETACH);
    }
    Ok(())
}

/// What came of an update.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Copied,
    /// It is not to be copied; why completes "the source …".
    Refused(&'static str),
}

/// A folder of the share and its copy.
#[derive(Debug)]
struct Volume {
    source: PathBuf,
    point: PathBuf,
    /// What the copy has.
    copied: Tree,
    /// As of the last copy.
    glance: Option<Glance>,
    /// That it cannot be copied was told.
    complained: bool,
}

/// What tells whether a volume of the kubelet has changed: each update swaps [`KUBELET_DATA`] in the volume's folder.
#[derive(Debug, PartialEq, Eq)]
struct Glance {
    data: OsString,
    changed: (i64, i64),
}

impl Glance {
    /// `None` if nobody updates the folder so.
    fn at(source: &OwnedFd) -> io::Result<Option<Glance>> {
        let data = match readlinkat(source, KUBELET_DATA) {
            Ok(data) => data,
            Err(Errno::ENOENT | Errno::EINVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let found = fstat(source)?;
        let changed = (found.st_mtime, found.st_mtime_nsec);
        Ok(Some(Glance { data, changed }))
    }
}

impl Volume {
    fn new(source: PathBuf, point: PathBuf) -> Volume {
        Volume {
            source,
            point,
            copied: Tree::new(),
            glance: None,
            complained: false,
        }
    }

    /// Makes the copy what the source is. A source that changes meanwhile may give NotFound; the copy is then what it
    /// was, or in part what it will be, and never with a `..data` that leads nowhere.
    fn update(&mut self) -> io::Result<Outcome> {
        let source = match beneath::open(&self.source, FOLDER) {
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Ok(Outcome::Refused("is no folder"));
            }
            opened => opened?,
        };
        let target = self.point.parent().ok_or(Errno::ENOENT)?;
        let target = beneath::open(target, FOLDER)?;
        let name = self.point.file_name().unwrap_or_default().to_owned();
        self.update_at(&source, &Copy { target, name })
    }

    fn update_at(&mut self, source: &OwnedFd, copy: &Copy) -> io::Result<Outcome> {
        // Before the rest is read, so that what changes meanwhile is seen the next time.
        let glance = Glance::at(source)?;
        if glance.is_some() && glance == self.glance {
            return Ok(Outcome::Copied);
        }
        let Some(tree) = list(source)? else {
            return Ok(Outcome::Refused("is too large to be copied"));
        };
        if tree != self.copied {
            copy.become_(source, &self.copied, &tree)?;
        }
        (self.copied, self.glance) = (tree, glance);
        Ok(Outcome::Copied)
    }

    fn bind(&self) -> io::Result<()> {
        let source = beneath::open(&self.source, OFlag::O_PATH)?;
        match fstat(&source)?.st_mode & libc::S_IFMT {
            libc::S_IFDIR => fs::create_dir_all(&self.point)?,
            _ => fs::write(&self.point, "")?,
        }
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        Ok(mount(
            Some(&path_of(&source)),
            &self.point,
            None::<&str>,
            flags,
            None::<&str>,
        )?)
    }
}

/// The entries of a folder by their paths in it; the folder itself has an empty one. A folder comes before what is in
/// it.
type Tree = BTreeMap<PathBuf, Entry>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    /// Mode, user and group.
    owner: (u32, u32, u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Folder,
    /// Its size, and when it was written to and when it came to its place.
    File {
        size: u64,
        stamps: [(i64, i64); 2],
    },
    Link(OsString),
}

/// Lists a folder with all that is in it but devices, pipes and sockets; `None` if that is more than is copied.
fn list(source: &OwnedFd) -> io::Result<Option<Tree>> {
    let mut listing = Listing {
        tree: Tree::new(),
        bytes: 0,
    };
    let root = fs::metadata(path_of(source))?;
    listing.tree.insert(PathBuf::new(), Entry::of(&root, Kind::Folder));
    Ok(listing.add(source, Path::new(""), 1)?.then_some(listing.tree))
}

struct Listing {
    tree: Tree,
    bytes: u64,
}

impl Listing {
    /// Whether all of it is listed. The names are the guest kernel's, and links are not followed.
    fn add(&mut self, folder: &OwnedFd, below: &Path, depth: usize) -> io::Result<bool> {
        for entry in fs::read_dir(path_of(folder))? {
            let entry = entry?;
            let found = entry.metadata()?;
            let kind = if found.is_dir() {
                Kind::Folder
            } else if found.is_file() {
                self.bytes += found.size();
                Kind::file(&found)
            } else if found.file_type().is_symlink() {
                Kind::Link(fs::read_link(entry.path())?.into_os_string())
            } else {
                continue;
            };
            let is_folder = kind == Kind::Folder;
            let path = below.join(entry.file_name());
            self.tree.insert(path.clone(), Entry::of(&found, kind));
            if self.tree.len() > MOST_ENTRIES || self.bytes > MOST_BYTES || depth > DEEPEST {
                return Ok(false);
            }
            if is_folder {
                let inner = beneath::open_at(folder, Path::new(&entry.file_name()), FOLDER)?;
                if !self.add(&inner, &path, depth + 1)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

impl Entry {
    fn of(found: &fs::Metadata, kind: Kind) -> Entry {
        Entry {
            kind,
            owner: (found.mode(), found.uid(), found.gid()),
        }
    }
}

impl Kind {
    fn file(found: &fs::Metadata) -> Kind {
        Kind::File {
            size: found.size(),
            stamps: [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())],
        }
    }

    fn same_as(&self, other: &Kind) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// Where a copy is: the folder that it is in, and its name there.
#[derive(Debug)]
struct Copy {
    target: OwnedFd,
    name: OsString,
}

impl Copy {
    /// Does what leads from the one tree to the other: first new files, then the swap that shows them, last what is
    /// gone.
    fn become_(&self, source: &OwnedFd, before: &Tree, after: &Tree) -> io::Result<()> {
        let replaced =
            |(path, entry): &(&PathBuf, &Entry)| after.get(*path).is_some_and(|new| !new.kind.same_as(&entry.kind));
        for (path, _) in before.iter().filter(replaced) {
            self.remove(path)?;
        }
        let changed = || after.iter().filter(|(path, entry)| before.get(*path) != Some(*entry));
        for (path, entry) in changed() {
            match &entry.kind {
                Kind::Folder => self.target(path, entry)?.make_folder(mode(entry.owner.0))?,
                Kind::File { .. } => {
                    let data = read(source, path)?;
                    self.target(path, entry)?.write(0, &data, Some(mode(entry.owner.0)))?;
                }
                Kind::Link(_) => {}
            }
        }
        let data = Path::new(KUBELET_DATA);
        let (swap, links): (Vec<_>, Vec<_>) = changed().partition(|(path, _)| *path == data);
        for (path, entry) in swap.into_iter().chain(links) {
            let Kind::Link(to) = &entry.kind else { continue };
            // The folder that the source's link leads to by now may have come after the list was made.
            if path == data && !leads_into(after, to) {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.target(path, entry)?.link(to)?;
        }
        let gone = before.keys().rev().filter(|path| !after.contains_key(*path));
        gone.into_iter().try_for_each(|path| self.remove(path))
    }

    fn target(&self, path: &Path, entry: &Entry) -> io::Result<Target> {
        let path = self.path(path);
        let above = path.parent().unwrap_or(Path::new(""));
        Ok(Target {
            parent: beneath::open_at(&self.target, above, FOLDER)?,
            name: path.file_name().unwrap_or_default().to_owned(),
            user: Some(entry.owner.1),
            group: Some(entry.owner.2),
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let path = self.path(path);
        let removed =
            beneath::open_at(&self.target, path.parent().unwrap_or(Path::new("")), FOLDER).and_then(|above| {
                let found = path_of(&above).join(path.file_name().unwrap_or_default());
                match fs::symlink_metadata(&found)?.is_dir() {
                    true => fs::remove_dir_all(found),
                    false => fs::remove_file(found),
                }
            });
        // It may have gone with the swap, or with its folder, in whose place there may be a file or a link by now.
        let gone = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP].map(|error| Some(error as i32));
        match removed {
            Err(error) if gone.contains(&error.raw_os_error()) => Ok(()),
            other => other,
        }
    }

    fn path(&self, below: &Path) -> PathBuf {
        Path::new(&self.name).join(below)
    }
}

/// Whether a link leads to something of the tree, by a path that begins there. Whatever leads elsewhere is the host's
/// business.
fn leads_into(tree: &Tree, to: &OsStr) -> bool {
    match Path::new(to).components().next() {
        Some(Component::Normal(first)) => tree.contains_key(Path::new(first)),
        _ => true,
    }
}

/// Reads a file of the source, which may have become another, or something else, since it was listed.
fn read(source: &OwnedFd, path: &Path) -> io::Result<Vec<u8>> {
    let file = File::from(beneath::open_at(source, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut data = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut data)?;
    Ok(data)
}

#[cfg(test)]
#[path = "watchable_tests.rs"]
mod tests;
