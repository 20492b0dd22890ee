//! A container's mounts: which come from the host, which are the guest's own, which cannot be had.

use super::{
    Context, GUEST_SHARE, GUEST_SHM, SpecError,
    kubelet::{self, MemoryVolume, Volume},
    unsupported,
};
use crate::volumes::{Access, Placed};
use agent_protocol::idmap::{BadMaps, IdMaps};
use oci_spec::runtime::{Mount, Spec};
use std::path::{Component, Path, PathBuf};

/// A file or folder of the host that a container sees in the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareMount {
    /// On the host: a file or a folder.
    pub source: PathBuf,
    /// The emptyDir that it is, or may be a part of. Of such a volume all is in the share, and may be written to,
    /// whatever the first container sees of it: another one may see more.
    pub whole: Option<PathBuf>,
    /// In the share: `updated/<volume>` for what the kubelet updates; else `<container id>/mounts/<n>`, until
    /// [`ShareMount::is_at`] says where it is.
    pub share_path: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// The container may not write to it; the bind in the share is made read-only too.
    pub readonly: bool,
    /// Neither to what is mounted below it (`rro`; Kubernetes: `recursiveReadOnly`).
    pub readonly_below: bool,
    /// What lies below the source is mounted with it (`rbind`).
    pub recursive: bool,
    /// Whether later mounts of the host show in the container.
    pub propagation: Propagation,
    /// The kubelet changes its files while the pod runs, all at once.
    pub updates: bool,
    /// What the IDs of its files are in the guest, where they are not the same.
    pub maps: Option<IdMaps>,
}

impl ShareMount {
    /// Where the guest finds it.
    fn in_guest(&self) -> PathBuf {
        Path::new(GUEST_SHARE).join(&self.share_path)
    }

    /// What the container may write to.
    pub fn access(&self) -> Access {
        match (self.readonly, self.readonly_below) {
            (false, _) => Access::All,
            (true, false) => Access::Below,
            (true, true) => Access::None,
        }
    }

    /// Makes the container's mount one of the volume's place. What is mounted below a read-only volume and may be
    /// written to becomes a mount of its own: below a read-only mount a guest's kernel mounts it read-only.
    pub fn is_at(&self, placed: &Placed, spec: &mut Spec) {
        let own = |mount: &Mount| {
            mount.destination() == &self.destination && mount.source().as_ref() == Some(&self.in_guest())
        };
        let mut mounts = spec.mounts_mut().take().unwrap_or_default();
        let Some(index) = mounts.iter().position(own) else {
            spec.set_mounts(Some(mounts));
            return;
        };
        let source = Path::new(GUEST_SHARE).join(&placed.path);
        let options = options(&mounts[index]).map(str::to_owned);
        let options: Vec<_> = options
            .chain(placed.options.iter().map(|option| (*option).to_owned()))
            .collect();
        mounts[index]
            .set_source(Some(source.clone()))
            .set_options(Some(options));
        // What is mounted below a part comes with it.
        let is_below = |part: &&PathBuf| {
            placed
                .writable
                .iter()
                .any(|other| *part != other && part.starts_with(other))
        };
        let parts = placed.writable.iter().filter(|part| !is_below(part)).map(|part| {
            let mut mount = Mount::default();
            mount
                .set_destination(self.destination.join(part))
                .set_source(Some(source.join(part)))
                .set_typ(Some("bind".into()))
                .set_options(Some(["rbind", "rprivate", "rw"].map(str::to_owned).to_vec()));
            mount
        });
        mounts.splice(index + 1..index + 1, parts);
        spec.set_mounts(Some(mounts));
    }
}

/// The mount propagation of a [`ShareMount`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// `rprivate`, the default (Kubernetes: None).
    Private,
    /// `rslave` (Kubernetes: HostToContainer).
    Slave,
}

/// What becomes of one mount.
enum Class {
    /// As it stands: the guest's kernel has it.
    Guest,
    /// As it stands, but the host's own cannot be seen.
    GuestInstead,
    /// A bind of the pod's `/dev/shm`.
    Shm,
    /// A bind from the share.
    Share(PathBuf),
    /// The same, of a copy that follows the volume of this name.
    Updated(PathBuf, String),
    /// A file system in the guest's memory.
    Memory(MemoryVolume),
}

/// What becomes of all mounts.
pub(super) struct Translated {
    /// For the agent.
    pub mounts: Vec<Mount>,
    /// For the share.
    pub shares: Vec<ShareMount>,
    /// For the guest's memory.
    pub memory: Vec<MemoryVolume>,
}

/// Filesystems without a host behind them.
const GUEST_TYPES: &[&str] = &[
    "proc",
    "sysfs",
    "tmpfs",
    "mqueue",
    "devpts",
    "cgroup",
    "cgroup2",
    "devtmpfs",
    "hugetlbfs",
];
/// Device files that are the same in every kernel.
const GUEST_DEVICES: &[&str] = &[
    "null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "net/tun",
];

/// Translates all mounts, in their order.
pub(super) fn translate(
    mounts: Vec<Mount>,
    context: &Context<'_>,
    warnings: &mut Vec<String>,
) -> Result<Translated, SpecError> {
    let mut shares = Vec::new();
    let mut memory = Vec::new();
    let mut translated = Vec::with_capacity(mounts.len());
    for (index, mut mount) in mounts.into_iter().enumerate() {
        let maps = take_maps(&mut mount, context.id_maps)?;
        match classify(&mount, context.bundle)? {
            Class::Guest => {}
            Class::GuestInstead => {
                let source = mount.source().as_deref().unwrap_or(Path::new("")).display();
                warnings.push(format!("the mount of {source} shows the guest's own, not the host's."));
            }
            Class::Shm => {
                let options = options(&mount).filter(|option| *option == "ro").map(String::from);
                let options = ["rbind".to_owned()].into_iter().chain(options).collect();
                mount
                    .set_source(Some(GUEST_SHM.into()))
                    .set_typ(Some("bind".into()))
                    .set_options(Some(options));
            }
            Class::Share(source) => {
                let place = Place::OfContainer(context.container_id, index);
                let share = share(&mount, source, place, maps)?;
                mount.set_source(Some(share.in_guest())).set_typ(Some("bind".into()));
                shares.push(share);
            }
            Class::Updated(source, name) => {
                let share = share(&mount, source, Place::OfPod(name), maps)?;
                mount.set_source(Some(share.in_guest())).set_typ(Some("bind".into()));
                shares.push(share);
            }
            Class::Memory(mut volume) => {
                if let Some(maps) = maps {
                    volume.seen_by(&maps);
                }
                mount.set_source(Some(volume.source())).set_typ(Some("bind".into()));
                memory.push(volume);
            }
        }
        translated.push(mount);
    }
    Ok(Translated {
        mounts: translated,
        shares,
        memory,
    })
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn classify(mount: &Mount, bundle: &Path) -> Result<Class, SpecError> {
    let destination = mount.destination().display();
    let typ = mount.typ().as_deref().unwrap_or_default();
    let bind = typ == "bind" || options(mount).any(|option| option == "bind" || option == "rbind");
    if !bind {
        return match typ {
            typ if GUEST_TYPES.contains(&typ) => Ok(Class::Guest),
            "overlay" => Err(unsupported(
                format!("the image volume at {destination}"),
                "its layers are the host's",
            )),
            _ => Err(unsupported(
                format!("the mount of type `{typ}` at {destination}"),
                "the guest cannot mount it",
            )),
        };
    }
    let Some(source) = mount.source().as_ref().filter(|source| !source.as_os_str().is_empty()) else {
        return Err(unsupported(format!("the bind at {destination}"), "it has no source"));
    };
    let source = normal(&bundle.join(source));
    match kubelet::volume(&source).map_err(|error| SpecError::Volume(source.clone(), error.to_string()))? {
        Some(Volume::Memory(volume)) => return Ok(Class::Memory(volume)),
        Some(Volume::Updated(name)) => return Ok(Class::Updated(source, name)),
        None => {}
    }
    // What the CRI gives every container of the pod; a volume that somebody mounts there is a volume.
    if mount.destination() == Path::new("/dev/shm") && !kubelet::is_volume(&source) {
        return Ok(Class::Shm);
    }
    if source.starts_with("/proc") || source.starts_with("/sys") {
        return Ok(Class::GuestInstead);
    }
    if source.starts_with("/dev/shm") {
        return Ok(Class::Share(source));
    }
    match source.strip_prefix("/dev") {
        Err(_) => Ok(Class::Share(source)),
        Ok(device) if GUEST_DEVICES.iter().any(|known| device == Path::new(known)) => Ok(Class::Guest),
        Ok(folder) if folder.as_os_str().is_empty() || folder == Path::new("pts") => Ok(Class::GuestInstead),
        Ok(_) => Err(unsupported(
            format!("host device {}", source.display()),
            "no device of the host is passed to the guest by a mount",
        )),
    }
}

/// Whose a part of the share is.
enum Place<'a> {
    /// The mount of this number of a container's.
    OfContainer(&'a str, usize),
    /// A volume of the pod's, by its name.
    OfPod(String),
}

/// Takes off a mount the mapping of its IDs, which is the host's work: its own, or the container's if it only says that
/// there is one.
fn take_maps(mount: &mut Mount, of_container: Option<&IdMaps>) -> Result<Option<IdMaps>, SpecError> {
    let bad = |error: BadMaps| SpecError::IdMaps(format!("the mount at {}: {error}", mount.destination().display()));
    let own = IdMaps::of_mount(mount).map_err(bad)?;
    let is_asked = |option: &str| option == "idmap" || option == "ridmap";
    let asked = options(mount).any(is_asked);
    if asked && own.is_none() && of_container.is_none() {
        return Err(SpecError::IdMaps(format!(
            "the mount at {} is to be ID-mapped, but neither it nor the container says how",
            mount.destination().display()
        )));
    }
    let kept = mount
        .options()
        .iter()
        .flatten()
        .filter(|option| !is_asked(option))
        .cloned()
        .collect();
    mount
        .set_options(Some(kept))
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(own.or_else(|| of_container.filter(|_| asked).cloned()))
}

fn share(mount: &Mount, source: PathBuf, place: Place<'_>, maps: Option<IdMaps>) -> Result<ShareMount, SpecError> {
    if options(mount).any(|option| option == "rshared" || option == "shared") {
        let what = format!("mount propagation `Bidirectional` at {}", mount.destination().display());
        return Err(unsupported(what, "a mount made in the guest cannot appear on the host"));
    }
    // The last of two contradicting options holds, as for mount(8).
    let readonly = options(mount)
        .filter(|option| matches!(*option, "ro" | "rro" | "rw"))
        .last();
    let slave = options(mount).any(|option| option == "rslave" || option == "slave");
    Ok(ShareMount {
        updates: matches!(place, Place::OfPod(_)),
        whole: kubelet::of_the_pod_alone(&source),
        share_path: match place {
            Place::OfPod(volume) => Path::new("updated").join(volume),
            Place::OfContainer(id, index) => PathBuf::from(format!("{id}/mounts/{index}")),
        },
        destination: mount.destination().clone(),
        readonly: matches!(readonly, Some("ro" | "rro")),
        readonly_below: readonly == Some("rro"),
        recursive: !options(mount).any(|option| option == "bind") || options(mount).any(|option| option == "rbind"),
        propagation: if slave {
            Propagation::Slave
        } else {
            Propagation::Private
        },
        maps,
        source,
    })
}

/// `path` without `.` and `..`, so that `/dev/../etc` is what it is. Symbolic links are followed by the mount, not
/// here.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => drop(normal.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}
