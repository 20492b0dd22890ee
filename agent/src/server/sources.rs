//! The sources of a container's binds. Who may write to a volume can rename what is in it, or put a symbolic link in its
//! place. So a source is looked up once, without following links, and what was found there is mounted where only the
//! agent can reach it: the container is made from that mount.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use agent_protocol::{GUEST_MEMORY, GUEST_SHARE, GUEST_VOLUMES};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag},
    mount::{MntFlags, umount2},
    sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat},
    unistd::{Gid, Uid, fchown},
};
use oci_spec::runtime::Spec;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{
    beneath::{self, BASE, is_ours, open_at},
    copy_up, devices,
    error::{Doing, Error, Result},
};
use crate::engine::is_bind;

/// Where sources are mounted while a container is made; each container has a folder there.
const PINNED: &str = "/run/kata-containers/pinned";

/// What is of a mount, and not of the file system.
const PER_MOUNT: [&str; 7] = ["ro", "nodev", "noexec", "nosuid", "noatime", "nodiratime", "relatime"];

/// The sources of one container, mounted until this is dropped.
#[derive(Debug)]
pub(super) struct Pinned {
    folder: PathBuf,
    places: Vec<PathBuf>,
}

impl Pinned {
    /// Looks up the sources of all binds that the host has named, and puts in their place in the specification where
    /// they are mounted now. Folders that a bind wants of a volume in the guest's memory (`subPath`) are made. Blocks.
    pub(super) fn new(container: &str, spec: &mut Spec) -> Result<Pinned> {
        let mut pinned = Pinned {
            folder: Path::new(PINNED).join(container),
            places: Vec::new(),
        };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        if mounts.iter().any(devices::is_guests_dev) {
            devices::mounts_in_dev(&mut mounts);
        }
        for mount in mounts.iter_mut().filter(|mount| devices::is_guests_dev(mount)) {
            let (layer, place) = (pinned.folder("layer")?, pinned.folder("dev")?);
            devices::mount_for(spec, &layer, &place)?;
            mount.set_source(Some(place));
        }
        let root = spec.root().as_ref().map(|root| root.path().clone());
        for mount in mounts.iter_mut().filter(|mount| copy_up::is_asked(mount)) {
            let place = pinned.folder(&format!("tmpfs{}", pinned.places.len()))?;
            copy_up::mount_on(&place, root.as_deref().unwrap_or(Path::new("")), mount)?;
            let is_kept = |option: &&String| PER_MOUNT.contains(&option.as_str());
            let options = mount.options().iter().flatten().filter(is_kept).cloned();
            let options = options.chain(["bind".to_owned()]).collect();
            mount
                .set_typ(Some("bind".into()))
                .set_source(Some(place))
                .set_options(Some(options));
        }
        for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
            let Some(source) = mount.source().clone().filter(|source| is_ours(source)) else {
                continue;
            };
            mount.set_source(Some(pinned.add(&source)?));
        }
        spec.set_mounts(Some(mounts));
        Ok(pinned)
    }

    /// A folder to mount something on.
    fn folder(&mut self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder).doing(|| format!("make {}", folder.display()))?;
        self.places.push(folder.clone());
        Ok(folder)
    }

    fn add(&mut self, source: &Path) -> Result<PathBuf> {
        let what = || format!("use {}", source.display());
        let found = look_up(source).map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ELOOP) => Error::Invalid(format!(
                "{} leads over a symbolic link, which a container may have put there: name the folder or file itself",
                source.display()
            )),
            _ => Error::Io(what(), error),
        })?;
        let place = self.folder.join(self.places.len().to_string());
        let mounted = || -> io::Result<()> {
            fs::create_dir_all(&self.folder)?;
            if SFlag::from_bits_truncate(fstat(&found)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
                fs::create_dir(&place)?;
            } else {
                fs::File::create(&place)?;
            }
            let copy = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE
                | OpenTreeFlags::AT_EMPTY_PATH;
            let copy = open_tree(&found, "", copy)?;
            move_mount(copy, "", AT_FDCWD, &place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            Ok(())
        };
        let mounted = mounted();
        // What was made of it is taken away with the others.
        self.places.push(place.clone());
        mounted.doing(what)?;
        Ok(place)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // What cannot be taken away now goes with the guest.
        for place in &self.places {
            let _ = umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = fs::remove_dir(place).or_else(|_| fs::remove_file(place));
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

fn look_up(source: &Path) -> io::Result<OwnedFd> {
    if let Ok(wanted) = source.strip_prefix(GUEST_MEMORY) {
        make_folders(beneath::open(Path::new(GUEST_MEMORY), OFlag::O_PATH)?, wanted)?;
    }
    let base = nix::fcntl::open(BASE, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let below = source.strip_prefix(BASE).map_err(|_| Errno::EXDEV)?;
    // Where the host has mounted something in the share, the guest's kernel does so when somebody looks into the
    // folder, which O_PATH alone does not.
    match open_at(&base, below, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => open_at(&base, below, OFlag::O_PATH),
        found => found,
    }
}

/// Makes the missing folders of a path, as the kubelet does on the host: with the owners and permissions of the folder
/// above.
fn make_folders(mut above: OwnedFd, path: &Path) -> io::Result<()> {
    for name in path.iter().map(Path::new) {
        above = match open_at(&above, name, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&above, name, Mode::S_IRWXU)?;
                let made = open_at(&above, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
                let like = fstat(&above)?;
                fchown(
                    &made,
                    Some(Uid::from_raw(like.st_uid)),
                    Some(Gid::from_raw(like.st_gid)),
                )?;
                fchmod(&made, Mode::from_bits_truncate(like.st_mode))?;
                made
            }
            // A file, which can only be the last.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(()),
            found => found?,
        };
    }
    Ok(())
}

/// The places in the share that containers of the pod have in common, [`GUEST_VOLUMES`], and how many containers use
/// each. The guest has one file system for such a place as long as the agent has it mounted: its sockets, pipes, locks
/// and watches are the same for all containers.
#[derive(Debug, Default)]
pub(super) struct Volumes(HashMap<PathBuf, usize>);

impl Volumes {
    /// Which of them the binds of a container are in, by their paths in the share.
    pub(super) fn of(spec: &Spec) -> HashSet<PathBuf> {
        let sources = spec
            .mounts()
            .iter()
            .flatten()
            .filter_map(|mount| mount.source().as_ref());
        let below = sources.filter_map(|source| source.strip_prefix(GUEST_SHARE).ok());
        below
            .filter(|below| below.starts_with(GUEST_VOLUMES))
            .map(|below| below.iter().take(2).collect())
            .collect()
    }

    /// A container begins to use some.
    pub(super) fn take(&mut self, used: &HashSet<PathBuf>) {
        for volume in used {
            *self.0.entry(volume.clone()).or_default() += 1;
        }
    }

    /// A container uses them no more; answers which of them nobody uses now.
    pub(super) fn leave(&mut self, used: &HashSet<PathBuf>) -> Vec<PathBuf> {
        let mut unused = Vec::new();
        for volume in used {
            let Some(users) = self.0.get_mut(volume) else { continue };
            *users -= 1;
            if *users == 0 {
                self.0.remove(volume);
                unused.push(volume.clone());
            }
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use serde_json::json;

    use super::*;

    fn spec(sources: &[&str]) -> Spec {
        let mount = |source: &&str| json!({ "destination": "/x", "type": "bind", "source": source });
        let mounts: Vec<_> = sources.iter().map(mount).collect();
        serde_json::from_value(json!({ "ociVersion": "1.2.0", "mounts": mounts })).unwrap()
    }

    #[test]
    fn a_volume_is_left_by_the_last_of_its_containers() {
        let share = |below: &str| format!("{GUEST_SHARE}/{below}");
        let whole = spec(&[&share("volumes/0"), &share("c1/mounts/1-x"), "/dev/shm"]);
        let part = spec(&[&share("volumes/0/a/b"), &share("volumes/1")]);
        let (first, second) = (Volumes::of(&whole), Volumes::of(&part));
        assert_eq!(first, HashSet::from(["volumes/0".into()]));
        let mut volumes = Volumes::default();
        volumes.take(&first);
        volumes.take(&second);
        assert_eq!(volumes.leave(&second), [PathBuf::from("volumes/1")]);
        assert_eq!(volumes.leave(&first), [PathBuf::from("volumes/0")]);
        assert!(volumes.leave(&first).is_empty());
    }

    #[test]
    fn missing_folders_are_as_the_one_above_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (volume, other) = (folder.path().join("volume"), folder.path().join("other"));
        for path in [&volume, &other] {
            fs::create_dir(path).unwrap();
        }
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770)).unwrap();
        symlink(&other, volume.join("link")).unwrap();
        fs::write(volume.join("file"), "").unwrap();
        let make = |path: &str| make_folders(fs::File::open(&volume).unwrap().into(), Path::new(path));
        make("a/b").unwrap();
        make("a/b").unwrap();
        make("file").unwrap();
        assert_eq!(fs::metadata(volume.join("a/b")).unwrap().mode() & 0o7777, 0o2770);
        assert_eq!(make("link/c").unwrap_err().raw_os_error(), Some(Errno::ELOOP as i32));
        assert_eq!(fs::read_dir(other).unwrap().count(), 0);
    }
}
