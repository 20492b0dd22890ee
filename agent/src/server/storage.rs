//! What the host asks to be mounted.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown},
    path::Path,
};

use agent_protocol::protocol::{
    agent::{FSGroup, Storage},
    types::FSGroupChangePolicy,
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::syncfs,
};
use walkdir::WalkDir;

use super::{
    beneath::{self, BASE},
    disk,
    error::{Doing, Error, Result},
    watchable::Watches,
};
/// The drivers that there are.
pub(super) const DRIVERS: [&str; 6] = ["blk", "ephemeral", "local", "scsi", "virtio-fs", "watchable-bind"];

/// The mount points in use.
#[derive(Debug, Default)]
pub(super) struct Storages {
    points: HashMap<String, Point>,
    watches: Watches,
    /// How many bytes a volume in memory may hold; what is asked for is often the node's memory.
    most: Option<u64>,
}

#[derive(Debug)]
struct Point {
    /// How many use it.
    users: usize,
    held: Held,
}

/// What is at a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A file system.
    Mount,
    /// One on a disk that the host may take away next.
    Disk,
    /// One in the guest's memory.
    Memory(InMemory),
    /// No mount at all.
    Folder,
    /// A copy that is kept up to date.
    Copy,
}

/// A tmpfs, or huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InMemory {
    /// Of its mount: another mount over it would lose them.
    flags: MsFlags,
    /// How many bytes were asked for.
    size: Option<u64>,
}

impl InMemory {
    fn remount(self, point: &str, data: &str) -> nix::Result<()> {
        let flags = self.flags | MsFlags::MS_REMOUNT;
        mount(Some("tmpfs"), point, Some("tmpfs"), flags, Some(data))
    }
}

impl Storages {
    /// Mounts in order; on failure what was mounted is undone. Answers what is to be removed with its user: volumes in
    /// the guest's memory are the pod's, whose next container reads what one that has ended wrote. Blocks.
    pub(super) fn add(&mut self, storages: &[Storage]) -> Result<Vec<String>> {
        let mut added = Vec::new();
        for storage in storages {
            let point = storage.mount_point.trim_end_matches('/').to_owned();
            let result = match self.points.get_mut(&point) {
                Some(found) => {
                    found.users += 1;
                    Ok(())
                }
                None => self.attach(storage, Path::new(&point)).map(|held| {
                    self.points.insert(point.clone(), Point { users: 1, held });
                }),
            };
            if let Err(error) = result {
                // The first error is the one to tell.
                let _ = self.remove(&added);
                return Err(error);
            }
            added.push(point);
        }
        let mut drivers = storages.iter().map(|storage| storage.driver.as_str());
        added.retain(|_| !matches!(drivers.next(), Some("ephemeral" | "local")));
        Ok(added)
    }

    /// Unmounts what has no user any more. Blocks.
    pub(super) fn remove(&mut self, points: &[String]) -> Result<()> {
        for point in points.iter().rev() {
            let Some(found) = self.points.get_mut(point) else {
                continue;
            };
            found.users -= 1;
            if found.users == 0 {
                let held = found.held;
                self.points.remove(point);
                self.detach(held, Path::new(point))?;
            }
        }
        Ok(())
    }

    /// Changes the options of volumes in the guest's memory: upstream's Go shim gives them all of a guest that has
    /// grown (`prepareEphemeralMounts` in `src/runtime/virtcontainers/sandbox.go` of kata-containers). Blocks.
    pub(super) fn update(&mut self, storages: &[Storage]) -> Result<()> {
        let mut updates = Vec::new();
        for storage in storages {
            let point = storage.mount_point.trim_end_matches('/');
            let held = self.points.get(point).map(|found| found.held);
            let (Some(Held::Memory(volume)), "ephemeral", "tmpfs") =
                (held, storage.driver.as_str(), storage.fstype.as_str())
            else {
                return Err(Error::Invalid(format!(
                    "{} is no tmpfs that this agent has mounted as an ephemeral storage",
                    storage.mount_point
                )));
            };
            let options: Vec<_> = storage
                .options
                .iter()
                .filter(|option| *option != "remount")
                .cloned()
                .collect();
            // The group was given when it was mounted.
            let options = Options::parse(&options)?;
            updates.push((point, volume, options.size(), options.limited(self.most).data));
        }
        for (point, volume, size, data) in updates.into_iter().filter(|(_, _, _, data)| !data.is_empty()) {
            volume
                .remount(point, &data)
                .doing(|| format!("remount {point} with {data}"))?;
            if let Some(found) = self.points.get_mut(point) {
                let size = size.or(volume.size);
                found.held = Held::Memory(InMemory { size, ..volume });
            }
        }
        Ok(())
    }

    /// Lets volumes in memory grow or shrink to what the pod may have now, up to what was asked for. Blocks.
    pub(super) fn fit(&mut self, most: u64) -> Result<()> {
        self.most = Some(most);
        for (point, found) in &self.points {
            let Held::Memory(volume) = found.held else { continue };
            let Some(wanted) = volume.size else { continue };
            match volume.remount(point, &format!("size={}", wanted.min(most))) {
                // It holds more than that already; when that goes, the next change finds it smaller.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(error) => return Err(error).doing(|| format!("resize {point}")),
            }
        }
        Ok(())
    }

    fn attach(&self, storage: &Storage, point: &Path) -> Result<Held> {
        check(storage, point)?;
        let source = Path::new(&storage.source);
        match storage.driver.as_str() {
            "virtio-fs" => mount_storage(storage, source, point, None).map(|_| Held::Mount),
            "ephemeral" => mount_storage(storage, source, point, self.most).map(Held::Memory),
            kind if disk::is_disk(kind) => {
                mount_storage(storage, &disk::wait_for(kind, &storage.source)?.path, point, None).map(|_| Held::Disk)
            }
            "local" => make_local(storage, point).map(|()| Held::Folder),
            // Its options are those of the container's mount of it.
            "watchable-bind" => self.watches.add(source, point).map(|()| Held::Copy),
            other => Err(Error::Unimplemented(format!("the storage driver {other:?}"))),
        }
    }

    fn detach(&self, held: Held, point: &Path) -> Result<()> {
        let what = || format!("unmount {}", point.display());
        match held {
            Held::Copy => return self.watches.remove(point),
            Held::Folder => return fs::remove_dir_all(point).doing(what),
            // What a detached mount has not written yet, it writes when its last user goes, which nobody waits for.
            Held::Disk => write_out(point)?,
            Held::Mount | Held::Memory(_) => {}
        }
        match umount2(point, MntFlags::MNT_DETACH) {
            // With a container go the mounts that have its name.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => drop(fs::remove_dir(point)),
            Err(error) => return Err(error).doing(what),
        }
        Ok(())
    }
}

fn write_out(point: &Path) -> Result<()> {
    let what = || format!("write out {}", point.display());
    let folder = fs::File::open(point).doing(what)?;
    syncfs(&folder).map_err(io::Error::from).doing(what)
}

fn check(storage: &Storage, point: &Path) -> Result<()> {
    if !beneath::is_ours(point) {
        let text = format!(
            "the mount point {:?} of a storage is not below {BASE}",
            storage.mount_point
        );
        return Err(Error::Invalid(text));
    }
    if let Some(option) = storage.driver_options.first() {
        return Err(Error::Unimplemented(format!(
            "the driver option {option:?} of storage {}",
            storage.driver
        )));
    }
    Ok(())
}

/// Mounts, with at most so many bytes.
fn mount_storage(storage: &Storage, source: &Path, point: &Path, most: Option<u64>) -> Result<InMemory> {
    if storage.driver == "ephemeral" && !matches!(storage.fstype.as_str(), "tmpfs" | "hugetlbfs") {
        return Err(Error::Invalid(format!(
            "an ephemeral storage of file system {:?}",
            storage.fstype
        )));
    }
    let options = Options::parse(&storage.options)?;
    // Huge pages are counted by themselves.
    let size = options.size().filter(|_| storage.fstype == "tmpfs");
    let Options { flags, data, group } = if size.is_some() { options.limited(most) } else { options };
    make_folder(point)?;
    let data = (!data.is_empty()).then_some(data.as_str());
    let what = || format!("mount {} {} on {}", storage.fstype, source.display(), point.display());
    mount(Some(source), point, Some(storage.fstype.as_str()), flags, data).doing(what)?;
    give_to(group, point)?;
    // The kubelet changes no volume that may only be read.
    if !flags.contains(MsFlags::MS_RDONLY) {
        give_all_to(storage.fs_group.as_ref(), point)?;
    }
    Ok(InMemory { flags, size })
}

/// A folder of the guest's memory that lives as long as the sandbox.
fn make_local(storage: &Storage, point: &Path) -> Result<()> {
    make_folder(point)?;
    let mut group = None;
    for option in &storage.options {
        match option.split_once('=') {
            Some(("mode", mode)) => {
                let mode = u32::from_str_radix(mode, 8).map_err(|_| bad(option))?;
                let mode = fs::Permissions::from_mode(mode & 0o7777);
                fs::set_permissions(point, mode).doing(|| format!("set the mode of {}", point.display()))?;
            }
            Some(("fsgid", id)) => group = Some(id.parse().map_err(|_| bad(option))?),
            _ => return Err(bad(option)),
        }
    }
    give_to(group, point)?;
    give_all_to(storage.fs_group.as_ref(), point)
}

/// What fsGroup adds to the modes of folders (setgid, and everything for the group) and of files (read and write).
const OF_FOLDERS: u32 = 0o2070;
const OF_FILES: u32 = 0o060;

/// A volume's group: its members may write, and what they make is the group's too.
fn give_to(group: Option<u32>, point: &Path) -> Result<()> {
    let Some(group) = group else { return Ok(()) };
    let given = || {
        chown(point, None, Some(group))?;
        let mode = fs::metadata(point)?.permissions().mode() | OF_FOLDERS;
        fs::set_permissions(point, fs::Permissions::from_mode(mode))
    };
    given().doing(|| format!("give {} to group {group}", point.display()))
}

/// The same for everything in the volume, as the kubelet does for volumes that are mounted on the node
/// (`pkg/volume/volume_linux.go` of Kubernetes): the volume itself comes last, so that `OnRootMismatch` finds out
/// whether all was done. No container has the volume yet, so nobody puts a link in a folder's place.
fn give_all_to(group: Option<&FSGroup>, point: &Path) -> Result<()> {
    let Some(group) = group else { return Ok(()) };
    let (id, policy) = (group.group_id, group.group_change_policy.enum_value_or_default());
    let given = || -> io::Result<()> {
        let whole = fs::metadata(point)?;
        if policy == FSGroupChangePolicy::OnRootMismatch && whole.gid() == id && whole.mode() & OF_FOLDERS == OF_FOLDERS
        {
            return Ok(());
        }
        for entry in WalkDir::new(point).contents_first(true) {
            let entry = entry?;
            let found = entry.metadata()?;
            lchown(entry.path(), None, Some(id))?;
            let wanted = if found.is_dir() { OF_FOLDERS } else { OF_FILES };
            if !found.is_symlink() {
                fs::set_permissions(entry.path(), fs::Permissions::from_mode(found.mode() | wanted))?;
            }
        }
        Ok(())
    };
    given().doing(|| format!("give all of {} to group {id}", point.display()))
}

fn make_folder(point: &Path) -> Result<()> {
    fs::create_dir_all(point).doing(|| format!("make {}", point.display()))
}

fn bad(option: &str) -> Error {
    Error::Invalid(format!("the storage option {option:?}"))
}

/// The options of a mount.
#[derive(Debug, PartialEq)]
pub(super) struct Options {
    pub(super) flags: MsFlags,
    /// What is left to the file system.
    pub(super) data: String,
    group: Option<u32>,
}

impl Options {
    pub(super) fn parse(options: &[String]) -> Result<Options> {
        let mut parsed = Options {
            flags: MsFlags::empty(),
            data: String::new(),
            group: None,
        };
        for option in options {
            let flag = match option.as_str() {
                // What is so anyway, and what is for the mount program of a node (mount(8)).
                "" | "defaults" | "rw" | "exec" | "suid" | "dev" | "atime" | "diratime" | "async" | "nofail"
                | "_netdev" | "auto" | "noauto" | "nouser" => MsFlags::empty(),
                comment if comment.starts_with("x-") || comment.starts_with("comment=") => MsFlags::empty(),
                "silent" => MsFlags::MS_SILENT,
                "lazytime" => MsFlags::MS_LAZYTIME,
                "ro" => MsFlags::MS_RDONLY,
                "nodev" => MsFlags::MS_NODEV,
                "noexec" => MsFlags::MS_NOEXEC,
                "nosuid" => MsFlags::MS_NOSUID,
                "noatime" => MsFlags::MS_NOATIME,
                "nodiratime" => MsFlags::MS_NODIRATIME,
                "relatime" => MsFlags::MS_RELATIME,
                "strictatime" => MsFlags::MS_STRICTATIME,
                "sync" => MsFlags::MS_SYNCHRONOUS,
                "dirsync" => MsFlags::MS_DIRSYNC,
                other => {
                    match other.strip_prefix("fsgid=") {
                        Some(id) => parsed.group = Some(id.parse().map_err(|_| bad(option))?),
                        None if parsed.data.is_empty() => parsed.data = other.to_owned(),
                        None => parsed.data = format!("{},{other}", parsed.data),
                    }
                    continue;
                }
            };
            parsed.flags |= flag;
        }
        Ok(parsed)
    }

    /// The bytes of a tmpfs, unless they are given as a part of the memory.
    fn size(&self) -> Option<u64> {
        let mut sizes = self.data.rsplit(',').filter_map(|option| option.strip_prefix("size="));
        let size = sizes.next()?;
        // As the kernel reads it (`memparse`), and writes it: in KiB.
        let number = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match size.get(number.len()..)?.to_ascii_lowercase().as_str() {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift)
    }

    /// With at most so many bytes.
    fn limited(mut self, most: Option<u64>) -> Options {
        if let (Some(size), Some(most)) = (self.size(), most)
            && size > most
        {
            // The kernel takes the last that is given.
            self.data = format!("{},size={most}", self.data);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Result<Options> {
        Options::parse(&list.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_flags_data_or_a_group() {
        let parsed = options(&["noexec", "nosuid", "nodev", "mode=1777", "size=67108864", "fsgid=7"]).unwrap();
        let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let expected = Options {
            flags,
            data: "mode=1777,size=67108864".into(),
            group: Some(7),
        };
        assert_eq!(parsed, expected);
        assert_eq!(parsed.size(), Some(64 << 20));
        let like_fstab = [
            "rw",
            "suid",
            "dev",
            "exec",
            "async",
            "nofail",
            "_netdev",
            "x-systemd.automount",
            "lazytime",
        ];
        let parsed = options(&like_fstab).unwrap();
        assert_eq!((parsed.flags, parsed.data.as_str()), (MsFlags::MS_LAZYTIME, ""));
        assert_eq!(
            options(&["fsgid=x"]).unwrap_err().to_string(),
            "the storage option \"fsgid=x\""
        );
    }

    #[test]
    fn a_volume_in_memory_has_no_more_than_the_pod() {
        for (given, most, expected) in [
            ("size=100", Some(99), "size=100,size=99"),
            ("size=100,mode=700", Some(100), "size=100,mode=700"),
            ("size=100", None, "size=100"),
            ("size=1k", Some(1023), "size=1k,size=1023"),
            ("size=1G,nr_inodes=9", Some(1 << 20), "size=1G,nr_inodes=9,size=1048576"),
            ("size=2m", Some(2 << 20), "size=2m"),
            ("size=50%", Some(99), "size=50%"),
            ("mode=700", Some(99), "mode=700"),
        ] {
            assert_eq!(options(&[given]).unwrap().limited(most).data, expected);
        }
    }

    #[test]
    fn all_of_a_volume_becomes_its_groups() {
        let folder = tempfile::tempdir().unwrap();
        let point = folder.path().join("volume");
        fs::create_dir_all(point.join("data/deep")).unwrap();
        fs::write(point.join("data/deep/file"), "").unwrap();
        fs::set_permissions(point.join("data/deep/file"), fs::Permissions::from_mode(0o4700)).unwrap();
        fs::write(folder.path().join("outside"), "").unwrap();
        std::os::unix::fs::symlink("../../outside", point.join("data/link")).unwrap();
        let look = |path: &str| {
            let found = fs::symlink_metadata(folder.path().join(path)).unwrap();
            (found.gid(), found.mode() & 0o7777)
        };
        let outside = look("outside");
        let mut group = FSGroup::new();
        (group.group_id, group.group_change_policy) = (1234, FSGroupChangePolicy::OnRootMismatch.into());
        give_all_to(Some(&group), &point).unwrap();
        assert_eq!([look("volume"), look("volume/data/deep")], [(1234, 0o2775); 2]);
        assert_eq!(look("volume/data/deep/file"), (1234, 0o4760));
        assert_eq!(look("volume/data/link").0, 1234);
        assert_eq!(look("outside"), outside);

        // Its root says that all was done, so nothing is looked at unless it is to be each time.
        fs::write(point.join("later"), "").unwrap();
        chown(point.join("later"), None, Some(0)).unwrap();
        give_all_to(Some(&group), &point).unwrap();
        assert_eq!(look("volume/later").0, 0);
        group.group_change_policy = FSGroupChangePolicy::Always.into();
        give_all_to(Some(&group), &point).unwrap();
        assert_eq!(look("volume/later").0, 1234);
    }

    #[test]
    fn nothing_is_mounted_outside_the_agents_folder_or_by_an_unknown_driver() {
        let mut storage = Storage::new();
        for (driver, point, error) in [
            (
                "local",
                "/etc",
                "the mount point \"/etc\" of a storage is not below /run/kata-containers",
            ),
            (
                "local",
                "/run/kata-containers/../x",
                "the mount point \"/run/kata-containers/../x\" of a storage is not below /run/kata-containers",
            ),
            (
                "nvdimm",
                "/run/kata-containers/x",
                "the storage driver \"nvdimm\" is not implemented by this agent",
            ),
        ] {
            storage.driver = driver.into();
            storage.mount_point = point.into();
            let refused = Storages::default().attach(&storage, Path::new(point)).unwrap_err();
            assert_eq!(refused.to_string(), error);
        }
    }
}
