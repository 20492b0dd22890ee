//! The sandbox's share: one tmpfs in the shim's own mount namespace, onto which root file systems and volumes are
//! mounted.
//!
//! ```text
//! host ──▶ staging ──made ready, then moved──▶ share ──propagates──▶ export ──virtiofsd──▶ guest
//!          (private)                           (ours to write)        (read-only, but for what is mounted on it)
//! ```
//!
//! The guest is root in what it is shown: could it write there, it would put a symbolic link where the shim is about to
//! make a file. So it sees the share's own folders read-only. Because the share is a tmpfs that only the shim's mount
//! namespace holds, everything in it vanishes with the shim, and nothing on the host is ever removed through it.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use agent_protocol::idmap::IdMaps;
use containerd_shim_protos::api::Mount;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::{FsFlags, statvfs},
};

use crate::{
    error::{Context, Error, Result},
    host::{self, Tree},
    mountinfo, selinux,
    spec::{Propagation, ShareMount},
    sys,
    undo::dir_of,
    volumes::{Access, Origin, Place, Placed, Places},
};

const NONE: Option<&str> = None;
/// mount(2) takes one page of options; of a longer list the kernel would cut off the end, layers' names included.
const PAGE: usize = 4096;
/// What fails where IDs cannot be mapped.
const MAPPING: &str = "map the IDs (`hostUsers: false` needs a file system that can) of";

/// The share of one sandbox.
#[derive(Debug, Clone)]
pub struct Share {
    root: PathBuf,
    export: PathBuf,
    staging: PathBuf,
    places: Arc<Mutex<Places>>,
    /// virtiofsd.
    server: Arc<OnceLock<u32>>,
}

impl Share {
    /// Where a sandbox's share is mounted on the host.
    pub fn path_of(sandbox: &str) -> PathBuf {
        dir_of(sandbox).join("shared")
    }

    /// Where virtiofsd finds it, read-only.
    pub fn export_of(sandbox: &str) -> PathBuf {
        dir_of(sandbox).join("exported")
    }

    /// Where a sandbox's volumes are made ready.
    pub fn staging_of(sandbox: &str) -> PathBuf {
        dir_of(sandbox).join("staging")
    }

    /// Mounts the empty share. It is a shared mount, so that what is mounted onto it later reaches virtiofsd's
    /// own mount namespace; what is made ready first is private, and reaches nobody. `label` is that of the pod's
    /// files, where SELinux is on.
    pub fn mount(sandbox: &str, label: Option<&str>) -> Result<Share> {
        let share = Share {
            root: Self::path_of(sandbox),
            export: Self::export_of(sandbox),
            staging: Self::staging_of(sandbox),
            places: Arc::default(),
            server: Arc::default(),
        };
        for (path, propagation) in [(&share.root, MsFlags::MS_SHARED), (&share.staging, MsFlags::MS_PRIVATE)] {
            fs::create_dir_all(path).at("create", path)?;
            selinux::mount_tmpfs(path, MsFlags::MS_NODEV, "mode=0755,size=64m,nr_inodes=64k", label)?;
            mount(NONE, path, NONE, propagation, NONE).at("set the propagation of", path)?;
        }
        fs::create_dir_all(&share.export).at("create", &share.export)?;
        let bind = MsFlags::MS_BIND;
        mount(Some(&share.root), &share.export, NONE, bind, NONE).at("bind", &share.root)?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
        mount(NONE, &share.export, NONE, flags, NONE).at("make read-only", &share.export)?;
        Ok(share)
    }

    /// What the guest is to see, on the host.
    pub fn export(&self) -> &Path {
        &self.export
    }

    /// Where the copy of this number is made of a volume, out of the guest's sight.
    pub fn place_of_copy(&self, number: u32) -> PathBuf {
        self.staging.join("copies").join(number.to_string())
    }

    /// Mounts a container's root file system at `<cid>/rootfs`: what containerd's snapshotter asks for, or the
    /// directory that CRI-O has mounted already.
    pub fn add_rootfs(&self, container: &str, mounts: &[Mount], mounted: &Path) -> Result<()> {
        let target = self.root.join(container).join("rootfs");
        let staged = self.staging.join("roots").join(container);
        fs::create_dir_all(&target).at("create", &target)?;
        if mounts.is_empty() {
            fs::create_dir_all(&staged).at("create", &staged)?;
            let tree = Tree::of_host("use the root file system", mounted, true)?;
            attach(&tree, &staged, Propagation::Private)?;
            return move_to_its_place(&staged, &target, true);
        }
        let layers = self.staging.join("layers").join(container);
        let mut mounts = mounts.iter();
        mounts.try_for_each(|asked| mount_as_asked(asked, &target, &staged, &layers))
    }

    /// virtiofsd serves it, with mounts of its own.
    pub fn served_by(&self, virtiofsd: u32) {
        self.server.get_or_init(|| virtiofsd);
    }

    /// Mounts a volume of the host in the share for a container, unless it is there. A container finds its volume as a
    /// part of another's only if `in_parts`: the guest's agent must not follow what a container puts in the way.
    pub fn add_volume(&self, container: &str, volume: &ShareMount, in_parts: bool) -> Result<Placed> {
        let find = |path: &Path| -> Result<(Tree, Origin)> {
            // First the tree: it mounts what is mounted on demand.
            let tree = Tree::of_host("use the volume", path, volume.recursive)?;
            let origin = host::there(|| Origin::of(path, volume.recursive))?;
            Ok((tree, origin.at("look at the volume", path)?))
        };
        let (mut tree, origin) = find(&volume.source)?;
        let (mut shown, mut access) = (origin.clone(), volume.access());
        match &volume.whole {
            Some(whole) if *whole == volume.source => access = Access::All,
            Some(whole) if in_parts => {
                let (whole, of_whole) = find(whole)?;
                if origin.part_of(&of_whole).is_some() {
                    (tree, shown, access) = (whole, of_whole, Access::All);
                }
            }
            _ => {}
        }
        if let Some(placed) = self.join(container, volume, &origin, access, in_parts)? {
            return Ok(placed);
        }
        let path = self.places().new_path();
        let fixed = self.publish(&tree, volume, &path, access)?;
        self.places().push(Place::new(path, shown, volume, access, fixed));
        let placed = self.join(container, volume, &origin, access, in_parts)?;
        // Another container may have been quicker; what nobody uses goes with the first to leave.
        placed.ok_or_else(|| Error::Precondition(format!("{} changes while it is mounted", volume.source.display())))
    }

    /// Gives a container the place where its volume shows already.
    fn join(
        &self,
        container: &str,
        volume: &ShareMount,
        origin: &Origin,
        access: Access,
        in_parts: bool,
    ) -> Result<Option<Placed>> {
        let mut places = self.places();
        let Some((place, mut placed)) = places.find(origin, volume, in_parts) else {
            return Ok(None);
        };
        let points: Vec<_> = place.to_open(access).map(|point| place.path.join(point)).collect();
        if !points.is_empty() {
            self.open(&points)?;
        }
        place.take(container, access);
        if volume.access() == Access::Below {
            let there = self.root.join(&placed.path);
            let points = mounts_below(&there)?;
            let below = points.iter().filter_map(|point| point.strip_prefix(&there).ok());
            placed.writable = below
                .filter(|point| *point != Path::new(""))
                .map(Path::to_owned)
                .collect();
        }
        Ok(Some(placed))
    }

    /// Makes writable what was read-only: virtiofsd's mounts, which do not hear of a change of ours.
    fn open(&self, points: &[PathBuf]) -> Result<()> {
        let server = self.server.get().copied().unwrap_or_default();
        let children = PathBuf::from(format!("/proc/{server}/task/{server}/children"));
        // Its child serves.
        let children = fs::read_to_string(&children).at("read", &children)?;
        let serving = children.split_whitespace().next().unwrap_or_default();
        let namespace = PathBuf::from(format!("/proc/{serving}/ns/mnt"));
        let namespace = File::open(&namespace).at("open", &namespace)?;
        host::within(&namespace, || {
            points.iter().try_for_each(|point| {
                let point = Path::new("/").join(point);
                remount(&point, MsFlags::empty()).at("make writable", &point)
            })
        })?
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts a copy of a volume, made at [`Share::place_of_copy`], at the volume's place in the share.
    pub fn add_copy(&self, volume: &ShareMount) -> Result<()> {
        let tree = Tree::of_own("use the copy of a volume", &volume.source, volume.recursive)?;
        self.publish(&tree, volume, &volume.share_path, Access::All).map(drop)
    }

    /// It is made ready elsewhere and moved to its place: virtiofsd gets it as it is then, and hears of no change of
    /// its flags. Returns what was made read-only, relative to the place.
    fn publish(&self, tree: &Tree, volume: &ShareMount, place: &Path, access: Access) -> Result<Vec<PathBuf>> {
        let target = self.root.join(place);
        let staged = self.staging.join(place);
        for path in [&staged, &target] {
            let parent = path.parent().unwrap_or(&self.root);
            fs::create_dir_all(parent).at("create", parent)?;
            if tree.is_dir {
                fs::create_dir_all(path).at("create", path)?;
            } else {
                File::create(path).at("create", path)?;
            }
        }
        if let Some(maps) = &volume.maps {
            let users = user_namespace(maps)?;
            sys::map_ids(&tree.mount, volume.recursive, &users).at(MAPPING, &volume.source)?;
        }
        attach(tree, &staged, volume.propagation)?;
        let mut fixed = Vec::new();
        for point in mounts_below(&staged)? {
            let Ok(below) = point.strip_prefix(&staged) else {
                continue;
            };
            if access == Access::None || (access == Access::Below && below == Path::new("")) {
                remount(&point, MsFlags::MS_RDONLY).at("make read-only the bind of", &volume.source)?;
                fixed.push(below.to_owned());
            }
        }
        move_to_its_place(&staged, &target, tree.is_dir)?;
        Ok(fixed)
    }

    /// Lets go of everything of a container, so that its owner can unmount and remove it.
    pub fn remove(&self, container: &str) -> Result<()> {
        let unused = self.places().leave(container);
        let removed = unused.iter().map(PathBuf::as_path).chain([Path::new(container)]);
        let removed: Vec<_> = removed.map(|path| clear(&self.root.join(path))).collect();
        removed.into_iter().collect()
    }
}

/// Unmounts what is mounted at or below a path, and removes it.
fn clear(path: &Path) -> Result<()> {
    for mounted in mounts_below(path)?.into_iter().rev() {
        detach(&mounted)?;
    }
    if let Some(kept) = mounts_below(path)?.first() {
        return Err(Error::Precondition(format!("{} is still mounted", kept.display())));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).at("remove", path),
        Ok(_) => fs::remove_file(path).at("remove", path),
        Err(_) => Ok(()),
    }
}

/// Sets flags of a mount. It becomes writable unless they say otherwise; its other flags stay.
fn remount(point: &Path, flags: MsFlags) -> nix::Result<()> {
    const KEPT: &[(FsFlags, MsFlags)] = &[
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let has = statvfs(point)?.flags();
    let kept = KEPT
        .iter()
        .filter(|(flag, _)| has.contains(*flag))
        .map(|(_, flag)| *flag);
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags | kept.collect();
    mount(NONE, point, NONE, flags, NONE)
}

/// Detaches a mount; fine when there is none.
pub fn detach(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(e).at("unmount", path),
    }
}

/// Mount points at and below `dir`, parents first. `remove` must see none before it removes a directory: a bind mount
/// that stayed would lose its contents.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = mountinfo::mounts().at("read", "/proc/self/mountinfo")?;
    let points = mounts.into_iter().map(|mount| mount.point);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// Mounts a tree where nobody sees it. At once it stops being a peer of its original: what is unmounted here stays
/// mounted on the host. No device file in it can be opened here: a guest makes such files for its own kernel only.
fn attach(tree: &Tree, staged: &Path, propagation: Propagation) -> Result<()> {
    match sys::forbid_devices(&tree.mount) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOSYS) => {
            tracing::info!(place = %staged.display(), "this kernel cannot forbid devices in a tree of mounts");
        }
        forbidden => forbidden.at("forbid devices in", staged)?,
    }
    sys::mount_copy(&tree.mount, staged).at("mount", staged)?;
    let propagation = match propagation {
        Propagation::Private => MsFlags::MS_PRIVATE,
        Propagation::Slave => MsFlags::MS_SLAVE,
    };
    mount(NONE, staged, NONE, propagation | MsFlags::MS_REC, NONE).at("detach from the host's the mount of", staged)
}

fn move_to_its_place(staged: &Path, target: &Path, is_dir: bool) -> Result<()> {
    mount(Some(staged), target, NONE, MsFlags::MS_MOVE, NONE).at("move to its place", target)?;
    if is_dir {
        fs::remove_dir(staged)
    } else {
        fs::remove_file(staged)
    }
    .at("remove", staged)
}

/// No device file in it can be opened on the host. `staged` is a place where a folder is made ready that is bound,
/// `layers` one for the layers of an image whose IDs are mapped.
fn mount_as_asked(asked: &Mount, target: &Path, staged: &Path, layers: &Path) -> Result<()> {
    let (maps, options) = take_maps(&asked.options)?;
    let (flags, data) = parse_options(&options);
    let flags = flags | MsFlags::MS_NODEV;
    let bound = flags.contains(MsFlags::MS_BIND);
    let place = if bound { staged } else { target };
    fs::create_dir_all(place).at("create", place)?;
    let users = maps.as_ref().map(user_namespace).transpose()?;
    let data = match &users {
        Some(users) => map_layers(&data, users, layers)?,
        None => data,
    };
    let (folder, data) = match data.len() {
        PAGE.. => {
            let (folder, data) = from_their_folder(&data);
            (Some(folder), data)
        }
        _ => (None, data),
    };
    if data.len() >= PAGE {
        return Err(Error::Invalid(format!(
            "rootfs options of {} bytes do not fit mount(2); squash the image to fewer layers",
            data.len()
        )));
    }
    let kind = (!bound).then_some(asked.type_.as_str());
    let mount_it = || {
        mount(Some(asked.source.as_str()), place, kind, flags, Some(data.as_str()))
            .at("mount the root file system on", place)
    };
    match folder {
        Some(folder) => host::in_folder(&folder, mount_it)??,
        None => mount_it()?,
    }
    if users.is_some() {
        // The overlay has its own copies of the layers' mounts.
        for layer in mounts_below(layers)?.iter().rev() {
            detach(layer)?;
        }
    }
    if !bound {
        return Ok(());
    }
    // A bind takes no flags but by this second call.
    let asked = flags & (MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
    remount(place, asked).at("set the flags of", place)?;
    if let Some(users) = users {
        let mapped = mapped_copy(place, &users)?;
        detach(place)?;
        sys::mount_copy(&mapped, place).at("mount the root file system on", place)?;
    }
    move_to_its_place(place, target, true)
}

/// An overlay's options with its layers by their names in the folder that they have in common, and that folder: so an
/// image may have as many layers as the kernel takes, as with containerd (`core/mount/mount_linux.go`).
fn from_their_folder(data: &str) -> (PathBuf, String) {
    let layers = data.split(',').find_map(|option| option.strip_prefix("lowerdir="));
    let layers: Vec<_> = layers.unwrap_or_default().split(':').map(Path::new).collect();
    let first = layers.first().copied().unwrap_or(Path::new("/"));
    let has_all = |folder: &&Path| layers.iter().all(|layer| layer.starts_with(folder) && layer != folder);
    let folder = first.ancestors().find(has_all).unwrap_or(Path::new("/"));
    let short = |option: &str| match option.strip_prefix("lowerdir=") {
        Some(_) => {
            let names = layers.iter().map(|layer| layer.strip_prefix(folder).unwrap_or(layer));
            let names: Vec<_> = names.map(|name| name.display().to_string()).collect();
            format!("lowerdir={}", names.join(":"))
        }
        None => option.to_owned(),
    };
    let options: Vec<_> = data.split(',').map(short).collect();
    (folder.to_owned(), options.join(","))
}

/// The mapping that containerd's snapshotter asks for, by the options `uidmap` and `gidmap`
/// (`core/mount/mount_linux.go` of containerd), and the other options.
fn take_maps(options: &[String]) -> Result<(Option<IdMaps>, Vec<String>)> {
    let find = |key: &str| options.iter().find_map(|option| option.strip_prefix(key));
    let maps = match (find("uidmap="), find("gidmap=")) {
        (None, None) => None,
        (users, groups) => {
            let maps = IdMaps::parse(users.unwrap_or_default(), groups.unwrap_or_default());
            Some(maps.map_err(|error| Error::Invalid(format!("the root file system: {error}")))?)
        }
    };
    let others = options
        .iter()
        .filter(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="));
    Ok((maps, others.cloned().collect()))
}

/// Puts copies of an overlay's layers into `place`, with their IDs mapped, and names them in its options. The layer
/// that is written to is the container's own, whose files are made with the mapped IDs.
fn map_layers(data: &str, users: &OwnedFd, place: &Path) -> Result<String> {
    let mut mapped = Vec::new();
    for option in data.split(',') {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            mapped.push(option.to_owned());
            continue;
        };
        let mut copies = Vec::new();
        for (number, layer) in layers.split(':').enumerate() {
            let copy = place.join(number.to_string());
            fs::create_dir_all(&copy).at("create", &copy)?;
            let tree = mapped_copy(Path::new(layer), users)?;
            sys::mount_copy(&tree, &copy).at("mount", &copy)?;
            copies.push(copy.display().to_string());
        }
        mapped.push(format!("lowerdir={}", copies.join(":")));
    }
    Ok(mapped.join(","))
}

/// A copy of a mount of the shim's own namespace, with its IDs mapped.
fn mapped_copy(mount: &Path, users: &OwnedFd) -> Result<OwnedFd> {
    let tree = sys::open_tree(mount, false).at("copy the mount", mount)?;
    sys::map_ids(&tree, false, users).at(MAPPING, mount)?;
    Ok(tree)
}

fn user_namespace(maps: &IdMaps) -> Result<OwnedFd> {
    sys::user_namespace(&maps.clone().with_server()).action("make a user namespace for the IDs of the pod's files")
}

/// Splits fstab-style options into mount(2)'s flags and its data.
fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" => {}
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshotter_options_become_flags_and_data() {
        let options = ["rbind", "ro", "workdir=/w", "lowerdir=/a:/b"].map(str::to_owned);
        let (flags, data) = parse_options(&options);
        assert_eq!(flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(data, "workdir=/w,lowerdir=/a:/b");
    }

    #[test]
    fn many_layers_have_short_names() {
        let data = "index=off,workdir=/s/9/work,lowerdir=/s/12/fs:/s/3/fs:/s/4/fs";
        let short = "index=off,workdir=/s/9/work,lowerdir=12/fs:3/fs:4/fs";
        assert_eq!(from_their_folder(data), (PathBuf::from("/s"), short.to_owned()));
        let apart = "lowerdir=/a/fs:/b/fs";
        assert_eq!(from_their_folder(apart), ("/".into(), "lowerdir=a/fs:b/fs".to_owned()));
    }

    #[test]
    fn the_snapshotters_mapping_is_no_option_of_the_mount() {
        let options = [
            "index=off",
            "uidmap=0:100000:65536",
            "gidmap=0:200000:65536",
            "lowerdir=/a",
        ]
        .map(str::to_owned);
        let (maps, others) = take_maps(&options).unwrap();
        assert_eq!(maps, Some(IdMaps::parse("0:100000:65536", "0:200000:65536").unwrap()));
        assert_eq!(others, ["index=off", "lowerdir=/a"]);
        let error = take_maps(&options[..2]).unwrap_err().to_string();
        assert!(error.starts_with("the root file system: "), "{error}");
    }
}
