//! A container's mounts: which come from the host, which are the guest's own, which cannot be had.

use super::{Context, GUEST_SHARE, GUEST_SHM, SpecError, unsupported};
use crate::mirror;
use oci_spec::runtime::Mount;
use std::path::{Component, Path, PathBuf};

/// A file or folder of the host that a container sees: the shim binds `source` to `share_path` below the shared folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareMount {
    /// On the host: a file or a folder.
    pub source: PathBuf,
    /// In the share: `<container id>/mounts/<n>-<basename>`, or `updated/<volume>` for what all containers of the pod see.
    pub share_path: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// The container may not write to it; the bind in the share is made read-only too.
    pub readonly: bool,
    /// What lies below the source is mounted with it (`rbind`).
    pub recursive: bool,
    /// Whether later mounts of the host show in the container.
    pub propagation: Propagation,
    /// The kubelet changes its files while the pod runs, all at once: a ConfigMap, a Secret, a projected or downward-API volume.
    pub updates: bool,
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
}

/// Filesystems without a host behind them.
const GUEST_TYPES: &[&str] = &[
    "proc", "sysfs", "tmpfs", "mqueue", "devpts", "cgroup", "cgroup2", "devtmpfs",
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
) -> Result<(Vec<Mount>, Vec<ShareMount>), SpecError> {
    let mut shares = Vec::new();
    let mut translated = Vec::with_capacity(mounts.len());
    for (index, mut mount) in mounts.into_iter().enumerate() {
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
                let share = share(&mount, source, context.container_id, index)?;
                mount
                    .set_source(Some(Path::new(GUEST_SHARE).join(&share.share_path)))
                    .set_typ(Some("bind".into()));
                shares.push(share);
            }
        }
        translated.push(mount);
    }
    Ok((translated, shares))
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
            "hugetlbfs" => Err(unsupported(
                format!("the huge pages at {destination}"),
                "the guest has none",
            )),
            _ => Err(unsupported(
                format!("the mount of type `{typ}` at {destination}"),
                "the guest cannot mount it",
            )),
        };
    }
    let mapped = mount.uid_mappings().is_some() || options(mount).any(|option| option == "idmap" || option == "ridmap");
    if mapped {
        return Err(unsupported(
            format!("the ID-mapped mount at {destination}"),
            "remove `hostUsers: false`",
        ));
    }
    if mount.destination() == Path::new("/dev/shm") {
        return Ok(Class::Shm);
    }
    let Some(source) = mount.source().as_ref().filter(|source| !source.as_os_str().is_empty()) else {
        return Err(unsupported(format!("the bind at {destination}"), "it has no source"));
    };
    let source = normal(&bundle.join(source));
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
            "no host device is passed to the guest",
        )),
    }
}

fn share(mount: &Mount, source: PathBuf, container_id: &str, index: usize) -> Result<ShareMount, SpecError> {
    if options(mount).any(|option| option == "rshared" || option == "shared") {
        let what = format!("mount propagation `Bidirectional` at {}", mount.destination().display());
        return Err(unsupported(what, "a mount made in the guest cannot appear on the host"));
    }
    let name = source
        .file_name()
        .map_or_else(|| "root".into(), |name| name.to_string_lossy().into_owned());
    // The last of two contradicting options holds, as for mount(8).
    let readonly = options(mount)
        .filter(|option| matches!(*option, "ro" | "rro" | "rw"))
        .last();
    let volume = updated_volume(&source);
    let slave = options(mount).any(|option| option == "rslave" || option == "slave");
    Ok(ShareMount {
        share_path: match volume {
            Some(volume) => Path::new("updated").join(volume),
            None => PathBuf::from(format!("{container_id}/mounts/{index}-{name}")),
        },
        updates: volume.is_some(),
        destination: mount.destination().clone(),
        readonly: matches!(readonly, Some("ro" | "rro")),
        recursive: !options(mount).any(|option| option == "bind") || options(mount).any(|option| option == "rbind"),
        propagation: if slave {
            Propagation::Slave
        } else {
            Propagation::Private
        },
        source,
    })
}

/// The name of the kubelet's volume that is mounted at `source`, if it is of a kind that the kubelet updates, and written as it does
/// that. Paths of `subPath` are elsewhere, and never updated.
fn updated_volume(source: &Path) -> Option<&str> {
    let mut parts = source.iter().rev().map(|part| part.to_str());
    let (name, plugin) = (parts.next()??, parts.next()??);
    let (volumes, _uid, pods) = (parts.next()??, parts.next()??, parts.next()??);
    let updates = matches!(
        plugin,
        "kubernetes.io~configmap" | "kubernetes.io~secret" | "kubernetes.io~projected" | "kubernetes.io~downward-api"
    );
    let is_volume = updates && volumes == "volumes" && pods == "pods";
    (is_volume && source.join(mirror::DATA).is_symlink()).then_some(name)
}

/// `path` without `.` and `..`, so that `/dev/../etc` is what it is. Symbolic links are followed by the mount, not here.
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
