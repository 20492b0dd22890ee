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
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use agent::idmap::IdMaps;
use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    error::{Context, Error, Result},
    host::Tree,
    mountinfo, selinux,
    spec::{Propagation, ShareMount},
    sys,
    undo::dir_of,
};

const NONE: Option<&str> = None;
/// What fails where IDs cannot be mapped.
const MAPPING: &str = "map the IDs (`hostUsers: false` needs a file system that can) of";

/// The share of one sandbox.
#[derive(Debug, Clone)]
pub struct Share {
    root: PathBuf,
    export: PathBuf,
    staging: PathBuf,
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
        fs::create_dir_all(&target).at("create", &target)?;
        if mounts.is_empty() {
            let staged = self.staging.join("roots").join(container);
            fs::create_dir_all(&staged).at("create", &staged)?;
            let tree = Tree::of_host("use the root file system", mounted, true)?;
            attach(&tree, &staged, Propagation::Private)?;
            return move_to_its_place(&tree, &staged, &target);
        }
        let layers = self.staging.join("layers").join(container);
        mounts.iter().try_for_each(|m| mount_as_asked(m, &target, &layers))
    }

    /// Mounts a volume of the host at its place in the share. Returns the parts below it, relative to it, that may be
    /// written to though it is read-only: a guest's kernel mounts them by itself, and takes them for read-only as well.
    pub fn add_volume(&self, volume: &ShareMount) -> Result<Vec<PathBuf>> {
        let tree = Tree::of_host("use the volume", &volume.source, volume.recursive)?;
        self.publish(&tree, volume)
    }

    /// Mounts a copy of a volume, made at [`Share::place_of_copy`], at the volume's place in the share.
    pub fn add_copy(&self, volume: &ShareMount) -> Result<()> {
        let tree = Tree::of_own("use the copy of a volume", &volume.source, volume.recursive)?;
        self.publish(&tree, volume).map(drop)
    }

    /// It is made ready elsewhere and moved to its place: virtiofsd gets it as it is then, and hears of no change of
    /// its flags.
    fn publish(&self, tree: &Tree, volume: &ShareMount) -> Result<Vec<PathBuf>> {
        let target = self.root.join(&volume.share_path);
        let staged = self.staging.join(&volume.share_path);
        for path in [&staged, &target] {
            let parent = path.parent().unwrap_or(&self.root);
            fs::create_dir_all(parent).at("create", parent)?;
            if tree.is_dir {
                fs::create_dir_all(path).at("create", path)?;
            } else {
                fs::File::create(path).at("create", path)?;
            }
        }
        if let Some(maps) = &volume.maps {
            let users = user_namespace(maps)?;
            sys::map_ids(&tree.mount, volume.recursive, &users).at(MAPPING, &volume.source)?;
        }
        attach(tree, &staged, volume.propagation)?;
        let points = mounts_below(&staged)?;
        let mut writable = Vec::new();
        for point in points {
            let is_below = point != staged;
            if volume.readonly && (volume.readonly_below || !is_below) {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(NONE, &point, NONE, flags, NONE).at("make read-only the bind of", &volume.source)?;
            } else if volume.readonly
                && let Ok(below) = point.strip_prefix(&staged)
            {
                writable.push(below.to_owned());
            }
        }
        move_to_its_place(tree, &staged, &target)?;
        Ok(writable)
    }

    /// Lets go of everything of a container, so that its owner can unmount and remove it.
    pub fn remove(&self, container: &str) -> Result<()> {
        let dir = self.root.join(container);
        for mounted in mounts_below(&dir)?.into_iter().rev() {
            detach(&mounted)?;
        }
        if let Some(kept) = mounts_below(&dir)?.first() {
            return Err(Error::Precondition(format!("{} is still mounted", kept.display())));
        }
        if dir.exists() {
            fs::remove_dir_all(&dir).at("remove", &dir)
        } else {
            Ok(())
        }
    }
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
/// mounted on the host.
fn attach(tree: &Tree, staged: &Path, propagation: Propagation) -> Result<()> {
    sys::mount_copy(&tree.mount, staged).at("mount", staged)?;
    let propagation = match propagation {
        Propagation::Private => MsFlags::MS_PRIVATE,
        Propagation::Slave => MsFlags::MS_SLAVE,
    };
    mount(NONE, staged, NONE, propagation | MsFlags::MS_REC, NONE).at("detach from the host's the mount of", staged)
}

fn move_to_its_place(tree: &Tree, staged: &Path, target: &Path) -> Result<()> {
    mount(Some(staged), target, NONE, MsFlags::MS_MOVE, NONE).at("move to its place", target)?;
    if tree.is_dir {
        fs::remove_dir(staged)
    } else {
        fs::remove_file(staged)
    }
    .at("remove", staged)
}

/// `layers` is a place for the layers of an image whose IDs are mapped.
fn mount_as_asked(asked: &Mount, target: &Path, layers: &Path) -> Result<()> {
    let (maps, options) = take_maps(&asked.options)?;
    let (flags, data) = parse_options(&options);
    let users = maps.as_ref().map(user_namespace).transpose()?;
    let data = match &users {
        Some(users) => map_layers(&data, users, layers)?,
        None => data,
    };
    // mount(2) takes one page of options; a longer list would be cut off by the kernel, layer names included.
    if data.len() >= 4096 {
        return Err(Error::Invalid(format!(
            "rootfs options of {} bytes do not fit mount(2); squash the image to fewer layers",
            data.len()
        )));
    }
    let kind = if flags.contains(MsFlags::MS_BIND) {
        None
    } else {
        Some(asked.type_.as_str())
    };
    mount(Some(asked.source.as_str()), target, kind, flags, Some(data.as_str()))
        .at("mount the root file system on", target)?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        mount(NONE, target, NONE, flags | MsFlags::MS_REMOUNT, NONE).at("make read-only", target)?;
    }
    let Some(users) = users else { return Ok(()) };
    // The overlay has its own copies of the layers' mounts.
    for layer in mounts_below(layers)?.iter().rev() {
        detach(layer)?;
    }
    if flags.contains(MsFlags::MS_BIND) {
        let mapped = mapped_copy(target, &users)?;
        detach(target)?;
        sys::mount_copy(&mapped, target).at("mount the root file system on", target)?;
    }
    Ok(())
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
