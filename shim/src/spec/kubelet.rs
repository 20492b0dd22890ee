//! The kubelet's volumes, told by their paths: `<root>/pods/<uid>/volumes/<plugin>/<name>`, and for a `subPath`
//! `<root>/pods/<uid>/volume-subpaths/<name>/<container>/<index>` (`pkg/kubelet/kubelet_getters.go` of Kubernetes).

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use agent_protocol::{GUEST_MEMORY, KUBELET_DATA, idmap::IdMaps, protocol::agent::Storage};

use crate::mountinfo::{self, Mount};

/// The option of the kubelet's hugetlbfs (`pkg/volume/emptydir` of Kubernetes) and of ours.
const HUGE_PAGES: &str = "pagesize=2M";

/// A volume that cannot just be shared.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Volume {
    /// The kubelet changes its files while the pod runs: a ConfigMap, a Secret, a projected or downward-API volume.
    Updated(String),
    /// An emptyDir of `medium: Memory` or `HugePages`.
    Memory(MemoryVolume),
}

/// An emptyDir of `medium: Memory` or `HugePages`: the same file system in the guest's memory for all containers of the
/// pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryVolume {
    /// The volume's name in the pod.
    pub name: String,
    /// What of it a container sees (`subPath`); empty for all.
    pub below: PathBuf,
    /// Of which pages.
    pub medium: Medium,
    /// Permissions of its root.
    pub mode: u32,
    /// Owning group of its root (`fsGroup`).
    pub gid: u32,
    /// Owner of its root, where it is not the guest's root.
    pub uid: u32,
}

/// The pages of a [`MemoryVolume`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// Ordinary ones, up to so many bytes.
    Memory(u64),
    /// Huge ones of 2 MiB, as many as the containers' limits allow.
    HugePages,
}

impl MemoryVolume {
    /// Its root in the guest.
    fn root(&self) -> PathBuf {
        Path::new(GUEST_MEMORY).join(&self.name)
    }

    /// What a container mounts of it in the guest.
    pub fn source(&self) -> PathBuf {
        self.root().join(&self.below)
    }

    /// Gives its root to those who are its owners in a pod with a user namespace.
    pub(super) fn seen_by(&mut self, maps: &IdMaps) {
        self.uid = maps.user(self.uid).unwrap_or(self.uid);
        self.gid = maps.group(self.gid).unwrap_or(self.gid);
    }

    /// What the agent mounts.
    pub fn storage(&self) -> Storage {
        let mut storage = Storage::new();
        storage.driver = "ephemeral".into();
        let (fstype, option) = match self.medium {
            Medium::Memory(size) => ("tmpfs", format!("size={size}")),
            Medium::HugePages => ("hugetlbfs", HUGE_PAGES.to_owned()),
        };
        storage.source = fstype.into();
        storage.fstype = fstype.into();
        storage.options = vec![option, format!("mode={:o}", self.mode)];
        if self.uid != 0 {
            storage.options.push(format!("uid={}", self.uid));
        }
        if self.gid != 0 {
            storage.options.push(format!("fsgid={}", self.gid));
        }
        storage.mount_point = self.root().display().to_string();
        storage
    }
}

/// The volume behind a bind's source, if it is one that cannot just be shared.
///
/// # Errors
/// The mounts of this host, or the volume, cannot be looked at.
pub(super) fn volume(source: &Path) -> io::Result<Option<Volume>> {
    let Some(Place { root, name, plugin }) = Place::of(source) else {
        return Ok(None);
    };
    match plugin {
        Some(
            "kubernetes.io~configmap"
            | "kubernetes.io~secret"
            | "kubernetes.io~projected"
            | "kubernetes.io~downward-api",
        ) => {
            let updated = source.join(KUBELET_DATA).is_symlink();
            Ok(updated.then(|| Volume::Updated(name.into())))
        }
        Some("kubernetes.io~empty-dir") | None => {
            let root = root.join("volumes/kubernetes.io~empty-dir").join(name);
            let mounts = mountinfo::mounts()?;
            let Some(medium) = mounted_at(&root, &mounts).map(|mount| medium(mount, &root)) else {
                return Ok(None);
            };
            let Some(medium) = medium? else { return Ok(None) };
            memory(&root, source, &mounts)
                .map(|below| look_at(name, &root, below, medium))
                .transpose()
        }
        Some(_) => Ok(None),
    }
}

/// The emptyDir that a bind's source is, or may be a part of: it is the pod's alone, and all of its containers may write
/// to it.
pub(super) fn of_the_pod_alone(source: &Path) -> Option<PathBuf> {
    let Place { root, name, plugin } = Place::of(source)?;
    match plugin {
        Some("kubernetes.io~empty-dir") => Some(source.to_owned()),
        Some(_) => None,
        None => Some(root.join("volumes/kubernetes.io~empty-dir").join(name)).filter(|volume| volume.is_dir()),
    }
}

/// Whether a bind's source is a volume of the kubelet's, of whatever kind.
pub(super) fn is_volume(source: &Path) -> bool {
    Place::of(source).is_some()
}

struct Place<'a> {
    /// The pod's folder.
    root: &'a Path,
    name: &'a str,
    /// None for a `subPath`.
    plugin: Option<&'a str>,
}

impl<'a> Place<'a> {
    fn of(source: &'a Path) -> Option<Place<'a>> {
        fn text(path: &Path) -> Option<&str> {
            path.file_name()?.to_str()
        }
        let up = |steps: usize| source.ancestors().nth(steps);
        let is_pod = |folder: &&Path| folder.parent().and_then(text) == Some("pods");
        if text(up(2)?) == Some("volumes") {
            let root = up(3).filter(is_pod)?;
            return Some(Place {
                root,
                name: text(source)?,
                plugin: Some(text(up(1)?)?),
            });
        }
        if text(up(3)?) == Some("volume-subpaths") {
            let root = up(4).filter(is_pod)?;
            return Some(Place {
                root,
                name: text(up(2)?)?,
                plugin: None,
            });
        }
        None
    }
}

/// What is mounted there, the last of several.
fn mounted_at<'m>(point: &Path, mounts: &'m [Mount]) -> Option<&'m Mount> {
    mounts.iter().rev().find(|mount| mount.point == point)
}

/// Where in the volume mounted at `root` the source is.
fn memory(root: &Path, source: &Path, mounts: &[Mount]) -> Option<PathBuf> {
    let volume = mounted_at(root, mounts)?;
    let part = mounted_at(source, mounts).filter(|mount| mount.device == volume.device)?;
    part.root.strip_prefix(&volume.root).ok().map(Path::to_owned)
}

fn medium(mount: &Mount, root: &Path) -> io::Result<Option<Medium>> {
    match mount.kind.as_str() {
        "tmpfs" => mountinfo::size(root).map(|size| Some(Medium::Memory(size))),
        "hugetlbfs" if mount.super_options.iter().any(|option| option == HUGE_PAGES) => Ok(Some(Medium::HugePages)),
        "hugetlbfs" => Err(io::Error::other(
            "its huge pages are not those of 2 MiB that the guest has",
        )),
        _ => Ok(None),
    }
}

fn look_at(name: &str, root: &Path, below: PathBuf, medium: Medium) -> io::Result<Volume> {
    let meta = std::fs::metadata(root)?;
    Ok(Volume::Memory(MemoryVolume {
        name: name.into(),
        below,
        medium,
        mode: meta.mode() & 0o7777,
        gid: meta.gid(),
        uid: meta.uid(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/4f0c";

    fn mounted(device: &str, root: &str, point: &str, kind: &str) -> Mount {
        Mount {
            id: 0,
            device: device.into(),
            root: root.into(),
            point: format!("{POD}/{point}").into(),
            options: Vec::new(),
            follows: false,
            kind: kind.into(),
            super_options: Vec::new(),
        }
    }

    #[test]
    fn a_volume_in_memory_is_found_behind_its_subpath() {
        let mounts = [
            mounted("0:50", "/", "volumes/kubernetes.io~empty-dir/scratch", "tmpfs"),
            mounted("0:50", "/a/b", "volume-subpaths/scratch/app/0", "tmpfs"),
            mounted("8:1", "/x", "volume-subpaths/disk/app/0", "ext4"),
        ];
        let find = |name: &str, source: &str| {
            let source = PathBuf::from(format!("{POD}/{source}"));
            let place = Place::of(&source).unwrap();
            assert_eq!((place.name, place.root), (name, Path::new(POD)));
            memory(
                &place.root.join("volumes/kubernetes.io~empty-dir").join(name),
                &source,
                &mounts,
            )
        };
        assert_eq!(
            find("scratch", "volumes/kubernetes.io~empty-dir/scratch"),
            Some(PathBuf::new())
        );
        assert_eq!(find("scratch", "volume-subpaths/scratch/app/0"), Some("a/b".into()));
        assert_eq!(find("disk", "volume-subpaths/disk/app/0"), None);
        assert_eq!(find("disk", "volumes/kubernetes.io~empty-dir/disk"), None);
    }

    #[test]
    fn only_the_kubelets_paths_are_its_volumes() {
        for other in [
            "/",
            "/data",
            "/volumes/kubernetes.io~secret/x",
            "/var/lib/kubelet/pods/4f0c/etc-hosts",
        ] {
            assert!(!is_volume(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn the_agent_mounts_a_memory_volume_with_the_size_and_group_of_the_hosts() {
        let volume = MemoryVolume {
            name: "scratch".into(),
            below: "a".into(),
            medium: Medium::Memory(4096),
            mode: 0o2777,
            gid: 7,
            uid: 0,
        };
        assert_eq!(
            volume.source(),
            Path::new("/run/kata-containers/sandbox/ephemeral/scratch/a")
        );
        let storage = volume.storage();
        assert_eq!(storage.mount_point, "/run/kata-containers/sandbox/ephemeral/scratch");
        assert_eq!(storage.options, ["size=4096", "mode=2777", "fsgid=7"]);
        let mut mapped = volume.clone();
        mapped.seen_by(&IdMaps::parse("0:100000:65536", "0:200000:65536").unwrap());
        let owners = ["size=4096", "mode=2777", "uid=100000", "fsgid=200007"];
        assert_eq!(mapped.storage().options, owners);
        let huge = MemoryVolume {
            medium: Medium::HugePages,
            ..volume
        };
        assert_eq!(huge.storage().fstype, "hugetlbfs");
        assert_eq!(huge.storage().options, ["pagesize=2M", "mode=2777", "fsgid=7"]);
    }
}
