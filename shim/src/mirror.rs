//! Volumes of the kubelet whose files change under running containers: ConfigMaps, Secrets, projected and downward-API
//! volumes.
//!
//! ```text
//! kubelet: ..2026_11 ◀─ ..data ◀─ key          host's inotify            CopyFile
//!          (AtomicWriter swaps ..data)  ────────────────────▶ shim ─────────────────▶ the guest does the same in the
//! share ```
//!
//! A guest's watchers hear only of what its own kernel does: a volume that is merely shared changes without waking
//! anybody. So the share holds a copy. Its first contents are put there from here, before the guest sees it; each
//! update is made by the agent, whose kernel then tells. From then on nothing of the host's touches the copy, where the
//! guest may have put links.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs, future, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent_protocol::{
    GUEST_SHARE, KUBELET_DATA,
    client::{Client, ClientError},
    idmap::IdMaps,
    protocol::agent::CopyFileRequest,
};
use futures::StreamExt;
use inotify::{Event, EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use nix::libc;
use tokio::{
    sync::{
        OnceCell,
        mpsc::{self, UnboundedReceiver, UnboundedSender},
    },
    time::{MissedTickBehavior, interval},
};

use crate::{
    error::{Context, Error, Result},
    host,
    rootfs::Share,
    spec::{Propagation, ShareMount},
};

/// Bytes per request: as much as the shim may have to hold for each request that the guest leaves unanswered.
const PART: usize = 128 << 10;
/// The owner of files whose owner has no number in the pod, as the kernel shows it there (`overflowuid` of
/// proc_sys_kernel(5)).
const NOBODY: u32 = 65534;
/// Room for the events of one swap; when it does not suffice, the next read gets the rest.
const EVENTS: usize = 4096;
/// How often to look at a volume that cannot be watched, or whose update did not reach the guest.
const LOOK: Duration = Duration::from_secs(5);

/// The mirrored volumes of a pod: all containers of the pod see the same copy.
#[derive(Debug, Default)]
pub struct Mirrors(Mutex<Made>);

#[derive(Debug, Default)]
struct Made {
    /// By their places in the share. Each is made by the first who asks, while others make others.
    volumes: HashMap<PathBuf, Arc<OnceCell<()>>>,
    /// Copies that were begun: each is made at a place that no guest has seen.
    copies: u32,
    follower: Option<Follower>,
}

impl Mirrors {
    /// Puts a copy at the volume's place in the share, and keeps it as the volume is until the guest is gone. The
    /// second container that asks finds it there.
    pub async fn add(&self, volume: &ShareMount, share: &Share, agent: &Client) -> Result<()> {
        self.once(&volume.share_path, || self.make(volume, share, agent)).await
    }

    /// Makes the copy at a place, or waits for whoever does. When that fails, the next one tries.
    async fn once<F: Future<Output = Result<()>>>(&self, place: &Path, make: impl FnOnce() -> F) -> Result<()> {
        let one = self.made().volumes.entry(place.to_owned()).or_default().clone();
        one.get_or_try_init(make).await.map(drop)
    }

    async fn make(&self, volume: &ShareMount, share: &Share, agent: &Client) -> Result<()> {
        let (place, watches, followed) = {
            let mut made = self.made();
            made.copies += 1;
            let place = share.place_of_copy(made.copies);
            let follower = made.follower.get_or_insert_with(Follower::start);
            (place, follower.watches.clone(), follower.followed.clone())
        };
        let (volume_, share_) = (volume.clone(), share.clone());
        let published = tokio::task::spawn_blocking(move || publish(&volume_, place, &share_, watches));
        let (watch, seen, folder) = published.await.map_err(io::Error::other).action("copy a volume")??;
        let guest = Path::new(GUEST_SHARE).join(&volume.share_path);
        let mirror = Mirror {
            source: volume.source.clone(),
            guest: guest.clone(),
            maps: volume.maps.clone(),
            agent: agent.clone(),
            seen,
        };
        let behind = watch.is_none();
        // It has ended only if the guest has.
        let _ = followed.send(Followed { watch, mirror, behind });
        // Changes nothing, but the agent looks: the guest mounts a part of the share where somebody first looks at it,
        // and only who looks at the agent's own mount hears of what the agent does.
        Ok(folder.send(&guest, agent).await?)
    }

    /// Follows no volume any more: the guest has ended.
    pub fn stop(&self) {
        self.made().follower = None;
    }

    /// A lock whose holder panicked is still good: every critical section is a few steps that do not fail.
    fn made(&self) -> MutexGuard<'_, Made> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that keeps the copies as their volumes are. One inotify instance is enough for all of them; a user has but
/// a few (`fs.inotify.max_user_instances`, 128 by default), which the kubelet, systemd and all shims share.
#[derive(Debug)]
struct Follower {
    /// None when there was no instance left.
    watches: Option<Watches>,
    followed: UnboundedSender<Followed>,
}

/// A mirror, and how its changes are noticed.
struct Followed {
    watch: Option<WatchDescriptor>,
    mirror: Mirror,
    /// Nobody will tell of what it lacks: it is to be looked at from time to time.
    behind: bool,
}

impl Follower {
    fn start() -> Follower {
        let (followed, added) = mpsc::unbounded_channel();
        let watching = Inotify::init().and_then(|inotify| {
            let watches = inotify.watches();
            Ok((watches, inotify.into_event_stream([0; EVENTS])?))
        });
        let (watches, changes) = match watching {
            Ok((watches, changes)) => (Some(watches), Some(changes)),
            Err(error) => {
                tracing::warn!(%error, "the kubelet's volumes are looked at every {LOOK:?}, as they cannot be watched");
                (None, None)
            }
        };
        tokio::spawn(follow(changes, added));
        Follower { watches, followed }
    }
}

/// Which volumes are to be looked at.
enum Due {
    Of(WatchDescriptor),
    Behind,
    All,
}

async fn follow(mut changes: Option<EventStream<[u8; EVENTS]>>, mut added: UnboundedReceiver<Followed>) {
    let mut all: Vec<Followed> = Vec::new();
    // Changes of volumes that are about to be added.
    let mut early = HashSet::new();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let change = async {
            match &mut changes {
                Some(changes) => changes.next().await,
                None => future::pending().await,
            }
        };
        let due = tokio::select! {
            new = added.recv() => {
                let Some(new) = new else { return };
                let missed = new.watch.clone().filter(|watch| early.remove(watch));
                all.push(new);
                match missed {
                    Some(watch) => Due::Of(watch),
                    None => continue,
                }
            }
            Some(change) = change => match change {
                Ok(Event { wd, mask, .. }) if !mask.contains(EventMask::Q_OVERFLOW) => Due::Of(wd),
                // Nobody knows what was not told.
                _ => Due::All,
            },
            _ = look.tick(), if all.iter().any(|one| one.behind) => Due::Behind,
        };
        if let Due::Of(watch) = &due
            && all.iter().all(|one| one.watch.as_ref() != Some(watch))
        {
            early.insert(watch.clone());
        }
        for one in &mut all {
            let is_due = match &due {
                Due::Of(watch) => one.watch.as_ref() == Some(watch),
                Due::Behind => one.behind,
                Due::All => true,
            };
            if !is_due {
                continue;
            }
            match one.mirror.update().await {
                Ok(()) => one.behind = one.watch.is_none(),
                // With the guest ends what can be told to it.
                Err(Error::Agent(ClientError::Gone)) => return,
                Err(error) => {
                    let volume = one.mirror.source.display();
                    tracing::warn!(%error, %volume, "an update did not reach the guest, and is tried again");
                    one.behind = true;
                }
            }
        }
    }
}

/// Copies a volume and puts the copy into the share. Blocks.
fn publish(
    volume: &ShareMount,
    place: PathBuf,
    share: &Share,
    watches: Option<Watches>,
) -> Result<(Option<WatchDescriptor>, Seen, Item)> {
    let source = &volume.source;
    // First the watch, then the look: what changes in between is an event.
    let looked = host::there(|| -> Result<_> {
        let watch = watch(source, watches).at("watch", source)?;
        let (seen, items) = look(source, volume.maps.as_ref()).at("copy", source)?;
        Ok((watch, seen, items))
    })?;
    let (watch, seen, items) = looked?;
    fs::create_dir_all(&place).at("create", &place)?;
    make(&items, &place).at("copy", source)?;
    let folder = Item::of(&place, Path::new(&seen.data), None).at("look at the copy of", source)?;
    share.add_copy(&ShareMount {
        source: place,
        readonly: false, // the agent writes to it
        recursive: false,
        propagation: Propagation::Private,
        maps: None, // the files of the copy have the IDs of the guest
        ..volume.clone()
    })?;
    Ok((watch, seen, folder))
}

/// `None` when it cannot be watched, for want of what watching takes.
fn watch(volume: &Path, watches: Option<Watches>) -> io::Result<Option<WatchDescriptor>> {
    let what = WatchMask::MOVED_TO | WatchMask::CREATE | WatchMask::ONLYDIR;
    match watches.map(|mut watches| watches.add(volume, what)) {
        // `fs.inotify.max_user_watches`
        Some(Err(error)) if error.raw_os_error() == Some(libc::ENOSPC) => {
            tracing::warn!(%error, volume = %volume.display(), "a volume is looked at every {LOOK:?} instead of watched");
            Ok(None)
        }
        watched => watched.transpose(),
    }
}

/// What a volume's folder holds beside the files themselves.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Where `..data` leads.
    data: OsString,
    /// The links to the files, by which containers know them.
    links: HashSet<OsString>,
}

impl Seen {
    fn of(volume: &Path) -> io::Result<Seen> {
        let data = fs::read_link(volume.join(KUBELET_DATA))?.into_os_string();
        let mut links = HashSet::new();
        for entry in fs::read_dir(volume)? {
            let entry = entry?;
            // Also a link that the kubelet is about to rename is none of a container's business. Nor is one that it is
            // about to remove since its file is gone: it has to be made again if its file comes back.
            let is_links = !entry.file_name().as_bytes().starts_with(KUBELET_DATA.as_bytes());
            if is_links && entry.file_type()?.is_symlink() && is_there(&volume.join(&data).join(entry.file_name()))? {
                links.insert(entry.file_name());
            }
        }
        Ok(Seen { data, links })
    }

    /// What has to be made, in this order, where everything was as in `before`.
    fn since(&self, before: &Seen, volume: &Path, maps: Option<&IdMaps>) -> io::Result<Vec<Item>> {
        let mut items = Vec::new();
        if self.data != before.data {
            collect(volume, Path::new(&self.data), maps, &mut items)?;
            items.push(Item::of(volume, Path::new(KUBELET_DATA), maps)?);
        }
        for link in self.links.difference(&before.links) {
            items.push(Item::of(volume, Path::new(link), maps)?);
        }
        Ok(items)
    }
}

/// The name is looked up in the folder that `..data` leads to: through the links of a volume that everybody may write
/// to Linux lets nobody pass but their owner (`fs.protected_symlinks`), and those of a pod with `fsGroup` or a user are
/// not root's.
fn is_there(file: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(file) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A folder, link or file of a volume, with the owners that the guest knows it by.
struct Item {
    path: PathBuf,
    mode: u32,
    uid: u32,
    gid: u32,
    content: Content,
}

enum Content {
    Folder,
    Link(OsString),
    File(Vec<u8>),
}

impl Item {
    fn of(volume: &Path, path: &Path, maps: Option<&IdMaps>) -> io::Result<Item> {
        let full = volume.join(path);
        let meta = fs::symlink_metadata(&full)?;
        let content = if meta.is_dir() {
            Content::Folder
        } else if meta.is_symlink() {
            Content::Link(fs::read_link(&full)?.into_os_string())
        } else {
            Content::File(fs::read(&full)?)
        };
        let mode = meta.mode();
        let (uid, gid) = match maps {
            None => (meta.uid(), meta.gid()),
            Some(maps) => (
                maps.user(meta.uid()).unwrap_or(NOBODY),
                maps.group(meta.gid()).unwrap_or(NOBODY),
            ),
        };
        Ok(Item {
            path: path.to_owned(),
            mode,
            uid,
            gid,
            content,
        })
    }

    /// Makes it on the host.
    fn make(&self, target: &Path) -> io::Result<()> {
        let path = target.join(&self.path);
        match &self.content {
            Content::Folder => fs::create_dir_all(&path)?,
            Content::Link(to) => symlink(to, &path)?,
            Content::File(data) => fs::write(&path, data)?,
        }
        lchown(&path, Some(self.uid), Some(self.gid))?;
        match self.content {
            Content::Link(_) => Ok(()),
            Content::Folder | Content::File(_) => {
                fs::set_permissions(&path, fs::Permissions::from_mode(self.mode & 0o7777))
            }
        }
    }

    /// Has the guest make it.
    async fn send(&self, guest: &Path, agent: &Client) -> std::result::Result<(), ClientError> {
        let data = match &self.content {
            Content::Folder => &[],
            Content::Link(to) => to.as_bytes(),
            Content::File(data) => data,
        };
        let parts = data
            .chunks(PART)
            .enumerate()
            .map(|(number, part)| (number * PART, part));
        let empty = data.is_empty().then_some((0, data));
        for (offset, part) in parts.chain(empty) {
            let mut request = CopyFileRequest::new();
            request.path = guest.join(&self.path).to_string_lossy().into_owned();
            request.file_size = data.len() as i64;
            request.file_mode = self.mode;
            request.dir_mode = 0o755;
            (request.uid, request.gid) = (self.uid.cast_signed(), self.gid.cast_signed());
            request.offset = offset as i64;
            request.data = part.to_vec();
            agent.copy_file(request).await?;
        }
        Ok(())
    }
}

/// A folder with everything in it.
fn collect(volume: &Path, path: &Path, maps: Option<&IdMaps>, items: &mut Vec<Item>) -> io::Result<()> {
    let item = Item::of(volume, path, maps)?;
    let is_folder = matches!(item.content, Content::Folder);
    items.push(item);
    if is_folder {
        for entry in fs::read_dir(volume.join(path))? {
            collect(volume, &path.join(entry?.file_name()), maps, items)?;
        }
    }
    Ok(())
}

/// The volume's folder and everything in it, in the order in which it is to be made.
fn look(volume: &Path, maps: Option<&IdMaps>) -> io::Result<(Seen, Vec<Item>)> {
    loop {
        let seen = Seen::of(volume)?;
        let mut items = vec![Item::of(volume, Path::new(""), maps)?];
        match seen.since(&Seen::default(), volume, maps) {
            // The kubelet has just replaced these files.
            Err(error) if error.kind() == io::ErrorKind::NotFound && Seen::of(volume)? != seen => continue,
            all => items.append(&mut all?),
        }
        return Ok((seen, items));
    }
}

fn make(items: &[Item], target: &Path) -> io::Result<()> {
    items.iter().try_for_each(|item| item.make(target))
}

/// One volume and its copy.
struct Mirror {
    source: PathBuf,
    guest: PathBuf,
    maps: Option<IdMaps>,
    agent: Client,
    seen: Seen,
}

impl Mirror {
    async fn update(&mut self) -> Result<()> {
        let source = &self.source;
        let (now, items) = host::there(|| -> Result<_> {
            let now = Seen::of(source).at("look at", source)?;
            let items = now.since(&self.seen, source, self.maps.as_ref());
            Ok((now, items))
        })??;
        // When its files are gone already, the kubelet has made the next swap, and its event comes.
        let items = match items {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            items => items.at("read", source)?,
        };
        for item in items {
            item.send(&self.guest, &self.agent).await?;
        }
        self.seen = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a volume as the kubelet does.
    fn swap(volume: &Path, version: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(volume.join(version)).unwrap();
        for (name, text) in files {
            fs::write(volume.join(version).join(name), text).unwrap();
        }
        symlink(version, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join(KUBELET_DATA)).unwrap();
        for (name, _) in files {
            let _there_already = symlink(Path::new(KUBELET_DATA).join(name), volume.join(name));
        }
    }

    #[test]
    fn the_copy_is_as_the_volume_and_an_update_is_what_is_new() {
        let folder = tempfile::tempdir().unwrap();
        let (volume, target) = (folder.path().join("volume"), folder.path().join("copy"));
        swap(&volume, "..1", &[("a", "one")]);
        fs::set_permissions(volume.join("..1/a"), fs::Permissions::from_mode(0o440)).unwrap();
        let (before, items) = look(&volume, None).unwrap();
        fs::create_dir(&target).unwrap();
        make(&items, &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "one");
        assert_eq!(fs::read_link(target.join(KUBELET_DATA)).unwrap(), Path::new("..1"));
        assert_eq!(fs::metadata(target.join("a")).unwrap().mode() & 0o7777, 0o440);

        swap(&volume, "..2", &[("a", "two"), ("b", "new")]);
        let now = Seen::of(&volume).unwrap();
        let items = now.since(&before, &volume, None).unwrap();
        let paths: Vec<_> = items.iter().map(|item| item.path.to_str().unwrap()).collect();
        assert_eq!((paths[0], &paths[3..]), ("..2", &["..data", "b"][..]));
        assert!(now.since(&now, &volume, None).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_comes_back_is_new_though_its_link_was_there_when_it_had_gone() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path();
        swap(volume, "..1", &[("a", "one"), ("b", "one")]);
        // The kubelet removes the link only after the swap, which is what wakes the shim.
        swap(volume, "..2", &[("a", "two")]);
        let without = Seen::of(volume).unwrap();
        assert!(volume.join("b").is_symlink());
        swap(volume, "..3", &[("a", "three"), ("b", "three")]);
        let items = Seen::of(volume).unwrap().since(&without, volume, None).unwrap();
        assert_eq!(items.last().unwrap().path, Path::new("b"));
    }

    #[tokio::test]
    async fn a_volume_that_is_slow_to_copy_holds_up_no_other() {
        let mirrors = Mirrors::default();
        let mut slow = Box::pin(mirrors.once(Path::new("slow"), future::pending));
        assert!(futures::poll!(&mut slow).is_pending());
        mirrors.once(Path::new("other"), async || Ok(())).await.unwrap();
        // Who wants the slow one waits for the copy that was begun.
        let made_twice = async || -> Result<()> { unreachable!() };
        let mut second = Box::pin(mirrors.once(Path::new("slow"), made_twice));
        assert!(futures::poll!(&mut second).is_pending());
        mirrors
            .once(Path::new("other"), async || unreachable!("a second copy"))
            .await
            .unwrap();
    }
}
