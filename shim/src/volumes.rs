//! Which volumes of a pod's containers are the same, and so have one place in the share.
//!
//! Each place is a file system of its own in the guest, and a file has one socket, pipe, lock or watch in each of them.
//! Containers that share a volume share these only if it has one place, whatever paths of the host lead to it, and
//! whether they see all of it or a part (`subPath`).

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use agent_protocol::{GUEST_VOLUMES, idmap::IdMaps};
use nix::libc;

use crate::{
    mountinfo::{self, Mount},
    spec::{Propagation, ShareMount},
};

/// Options of a mount that hold for whoever uses it.
const LASTING: &[&str] = &["ro", "nosuid", "nodev", "noexec", "idmapped"];

/// A file or folder of the host and what is mounted below it, whatever path leads there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    found: Found,
    /// What is mounted below it, by paths relative to it.
    below: BTreeMap<PathBuf, Found>,
}

/// What is found at a mount point.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// `major:minor` of the file system.
    device: String,
    /// Where in the file system.
    path: PathBuf,
    /// Those of [`LASTING`] that its mount has.
    options: Vec<&'static str>,
}

impl Found {
    fn of(mount: &Mount, below: &Path) -> Found {
        let has = |option: &&&str| mount.options.iter().any(|other| other == **option);
        Found {
            device: mount.device.clone(),
            path: mount.root.iter().chain(below).collect(),
            options: LASTING.iter().filter(has).copied().collect(),
        }
    }
}

impl Origin {
    /// What `path` leads to in the calling thread's mount namespace; with what is mounted below it if `recursive`.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(path: &Path, recursive: bool) -> io::Result<Origin> {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        let number = opened.as_raw_fd();
        let about = fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}"))?;
        let id = about.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let id = id.and_then(|id| id.trim().parse().ok()).unwrap_or_default();
        let path = fs::read_link(format!("/proc/thread-self/fd/{number}"))?;
        Origin::among(&mountinfo::mounts_of_thread()?, id, &path, recursive)
            .ok_or_else(|| io::Error::other("its mount is not in /proc/thread-self/mountinfo"))
    }

    fn among(mounts: &[Mount], id: u64, path: &Path, recursive: bool) -> Option<Origin> {
        let mount = mounts.iter().find(|mount| mount.id == id)?;
        let mut below = BTreeMap::new();
        for other in mounts.iter().filter(|_| recursive) {
            match other.point.strip_prefix(path) {
                // Of several at one point the last one shows.
                Ok(point) if point != Path::new("") => below.insert(point.to_owned(), Found::of(other, Path::new(""))),
                _ => None,
            };
        }
        Some(Origin {
            found: Found::of(mount, path.strip_prefix(&mount.point).ok()?),
            below,
        })
    }

    /// Where in `whole` this is, if all of it shows there as it does here.
    pub fn part_of(&self, whole: &Origin) -> Option<PathBuf> {
        let same = self.found.device == whole.found.device && self.found.options == whole.found.options;
        let part = self.found.path.strip_prefix(&whole.found.path).ok().filter(|_| same)?;
        if whole.below.keys().any(|point| part.starts_with(point)) {
            return None;
        }
        let below = whole.below.iter();
        let below = below.filter_map(|(point, found)| Some((point.strip_prefix(part).ok()?, found)));
        let here = self.below.iter().map(|(point, found)| (point.as_path(), found));
        here.eq(below).then(|| part.to_owned())
    }

    /// The options that hold for whoever uses it, the IDs' mapping aside: in the guest they are as they are here.
    fn options(&self) -> impl Iterator<Item = &'static str> {
        let kept = self.found.options.iter().copied();
        kept.filter(|option| *option != "idmapped")
    }
}

/// What of a volume may be written to; each allows more than the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Nothing (`rro`).
    None,
    /// What is mounted below it (`ro`).
    Below,
    /// All.
    All,
}

/// How a volume is mounted; one that is mounted otherwise has another place.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Manner {
    recursive: bool,
    propagation: Propagation,
    maps: Option<IdMaps>,
}

impl Manner {
    fn of(volume: &ShareMount) -> Manner {
        Manner {
            recursive: volume.recursive,
            propagation: volume.propagation,
            maps: volume.maps.clone(),
        }
    }
}

/// A place in the share, and who uses it.
#[derive(Debug)]
pub struct Place {
    /// In the share.
    pub path: PathBuf,
    origin: Origin,
    manner: Manner,
    access: Access,
    /// What was made read-only in it, by paths relative to it.
    fixed: Vec<PathBuf>,
    users: HashSet<String>,
}

impl Place {
    /// One that nobody uses yet. `fixed` is what was made read-only in it, relative to it.
    pub fn new(path: PathBuf, origin: Origin, volume: &ShareMount, access: Access, fixed: Vec<PathBuf>) -> Place {
        Place {
            path,
            origin,
            manner: Manner::of(volume),
            access,
            fixed,
            users: HashSet::new(),
        }
    }

    /// What has to become writable before somebody may have this access, relative to the place.
    pub fn to_open(&self, access: Access) -> impl Iterator<Item = &Path> {
        let opened = move |point: &&Path| match access {
            Access::None => false,
            Access::Below => **point != *Path::new(""),
            Access::All => true,
        };
        let wanted = access > self.access;
        let fixed = self.fixed.iter().map(PathBuf::as_path);
        fixed.filter(move |point| wanted && opened(point))
    }

    /// `container` uses it, and has this access from now on.
    pub fn take(&mut self, container: &str, access: Access) {
        self.users.insert(container.to_owned());
        self.access = self.access.max(access);
    }
}

/// Where a container finds its volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// In the share.
    pub path: PathBuf,
    /// What the mount in the container has to have besides what it asks for.
    pub options: Vec<&'static str>,
    /// Its parts, relative to it, that may be written to though it is read-only: a guest's kernel mounts them by
    /// itself, and takes them for read-only as well.
    pub writable: Vec<PathBuf>,
}

/// All places of a pod.
#[derive(Debug, Default)]
pub struct Places {
    made: u32,
    places: Vec<Place>,
}

impl Places {
    /// The path of a place to come.
    pub fn new_path(&mut self) -> PathBuf {
        self.made += 1;
        Path::new(GUEST_VOLUMES).join((self.made - 1).to_string())
    }

    /// Adds a place that was made.
    pub fn push(&mut self, place: Place) {
        self.places.push(place);
    }

    /// The place where a volume shows, and where in it; only a place that shows nothing else, unless `in_parts`.
    pub fn find(&mut self, origin: &Origin, volume: &ShareMount, in_parts: bool) -> Option<(&mut Place, Placed)> {
        let manner = Manner::of(volume);
        self.places.iter_mut().find_map(|place| {
            let part = origin.part_of(&place.origin).filter(|_| place.manner == manner)?;
            if !in_parts && part != Path::new("") {
                return None;
            }
            let placed = Placed {
                path: place.path.iter().chain(&part).collect(),
                options: origin.options().collect(),
                writable: Vec::new(),
            };
            Some((place, placed))
        })
    }

    /// Takes out the places that nobody uses; `container` uses none any more.
    pub fn leave(&mut self, container: &str) -> Vec<PathBuf> {
        for place in &mut self.places {
            place.users.remove(container);
        }
        let unused = self.places.extract_if(.., |place| place.users.is_empty());
        unused.map(|place| place.path).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts() -> Vec<Mount> {
        let mount = |id, device: &str, root: &str, point: &str, options: &str| Mount {
            id,
            device: device.into(),
            root: root.into(),
            point: point.into(),
            options: options.split(',').map(str::to_owned).collect(),
            follows: false,
            kind: "ext4".into(),
            super_options: Vec::new(),
        };
        vec![
            mount(1, "8:1", "/", "/", "rw,relatime"),
            mount(2, "8:2", "/", "/data", "rw,noexec"),
            mount(3, "8:3", "/", "/data/a/inner", "rw"),
            mount(4, "8:2", "/a/b", "/subpaths/0", "rw,noexec"),
            mount(5, "8:2", "/a/b", "/subpaths/1", "ro,noexec"),
            mount(6, "8:2", "/a/inner", "/subpaths/2", "rw,noexec"),
        ]
    }

    fn origin(id: u64, path: &str) -> Origin {
        Origin::among(&mounts(), id, Path::new(path), true).unwrap()
    }

    #[test]
    fn a_part_is_found_by_whatever_path_it_is_reached() {
        let whole = origin(2, "/data/a");
        for (id, path, part) in [
            (2, "/data/a", Some("")),
            (2, "/data/a/b/c", Some("b/c")),
            (4, "/subpaths/0", Some("b")),
            (5, "/subpaths/1", None), // may not be written to
            (6, "/subpaths/2", None), // covered by what is mounted in the whole
            (3, "/data/a/inner", None),
            (2, "/data", None),
            (1, "/a", None),
        ] {
            assert_eq!(origin(id, path).part_of(&whole), part.map(PathBuf::from), "{path}");
        }
        assert_eq!(origin(2, "/data/a").part_of(&origin(2, "/data")), Some("a".into()));
        let alone = Origin::among(&mounts(), 2, Path::new("/data/a"), false).unwrap();
        assert_eq!(alone.part_of(&whole), None);
    }

    fn volume(readonly: bool) -> ShareMount {
        ShareMount {
            source: "/data/a".into(),
            whole: None,
            share_path: "c/mounts/0".into(),
            destination: "/x".into(),
            readonly,
            readonly_below: false,
            recursive: true,
            propagation: Propagation::Private,
            updates: false,
            maps: None,
        }
    }

    #[test]
    fn a_place_is_every_containers_and_goes_with_the_last() {
        let mut places = Places::default();
        let whole = origin(2, "/data/a");
        assert!(places.find(&whole, &volume(true), true).is_none());
        let path = places.new_path();
        let fixed = vec![PathBuf::new(), "inner".into()];
        places.push(Place::new(path, whole.clone(), &volume(true), Access::None, fixed));
        let (place, placed) = places.find(&origin(4, "/subpaths/0"), &volume(false), true).unwrap();
        assert_eq!((placed.path, placed.options), ("volumes/0/b".into(), vec!["noexec"]));
        assert_eq!(place.to_open(Access::Below).collect::<Vec<_>>(), [Path::new("inner")]);
        assert_eq!(place.to_open(Access::All).count(), 2);
        place.take("c1", Access::All);
        assert_eq!(place.to_open(Access::All).count(), 0);
        let place = places.find(&whole, &volume(false), false).unwrap().0;
        place.take("c2", Access::Below);
        assert!(places.find(&origin(4, "/subpaths/0"), &volume(false), false).is_none());
        let following = ShareMount {
            propagation: Propagation::Slave,
            ..volume(false)
        };
        assert!(places.find(&whole, &following, true).is_none());
        assert!(places.leave("c1").is_empty());
        assert_eq!(places.leave("c2"), [PathBuf::from("volumes/0")]);
        assert_eq!(places.new_path(), Path::new("volumes/1"));
    }

    #[test]
    fn what_the_kernel_tells_of_a_file_leads_to_its_mount() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("part")).unwrap();
        let whole = Origin::of(folder.path(), true).unwrap();
        let part = Origin::of(&folder.path().join("part/../part"), true).unwrap();
        assert_eq!(part.part_of(&whole), Some("part".into()));
        assert!(Origin::of(&folder.path().join("nothing"), true).is_err());
    }
}
