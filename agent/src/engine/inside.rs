//! Files of a container, looked up from outside as the container sees them: no link leads out of its root.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
    unistd::{Gid, Uid, fchownat},
};
use oci_spec::runtime::{Linux, Spec};

use super::spec::{guest_id, is_bind};

/// Bytes of `/etc/passwd` that are searched.
const MAX_PASSWD: u64 = 1 << 20;

fn open_root(root: &Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(
        root,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// Opens what a container sees at a path.
pub(crate) fn open_in(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(
        root,
        path,
        OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve),
    )
}

/// The home directory of a user; `/` if `/etc/passwd` does not know the user, as in runc.
///
/// libcontainer asks the C library *inside* the container, which in a static program loads the plugins named in
/// the image's `nsswitch.conf`.
pub(super) fn home(root: &Path, uid: u32) -> String {
    let read = || -> io::Result<String> {
        let root = open_root(root)?;
        let file = File::from(open_in(
            &root,
            Path::new("etc/passwd"),
            OFlag::O_RDONLY | OFlag::O_NONBLOCK,
        )?);
        let mut bytes = Vec::new();
        file.take(MAX_PASSWD).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let passwd = read().unwrap_or_default();
    home_of(&passwd, uid).unwrap_or("/").to_owned()
}

fn home_of(passwd: &str, uid: u32) -> Option<&str> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut homes = fields.filter(|f| f.len() >= 6 && f[2].parse() == Ok(uid)).map(|f| f[5]);
    homes.find(|home| !home.is_empty())
}

/// Makes the working directory of a new container, as runc does and libcontainer does not.
///
/// Called before the container's mounts are made: a directory below a bind mount is made in its source; one on
/// any other mount cannot be. What fails here fails again, and with a message, when the process changes to it.
pub(super) fn ensure_cwd(root: &Path, spec: &Spec, cwd: &Path) {
    if let Some((base, below)) = cwd_source(root, spec, cwd) {
        let _ = make_directories(&base, &below, owner(spec));
    }
}

/// The container's root: it owns what runc makes, which is in the container's user namespace by then. Made as that
/// user, who has no capabilities here, a folder could not be made where the image lets nobody write.
fn owner(spec: &Spec) -> (Uid, Gid) {
    let linux = spec.linux().as_ref();
    let user = guest_id(linux.map_or(&None, Linux::uid_mappings), 0);
    let group = guest_id(linux.map_or(&None, Linux::gid_mappings), 0);
    (Uid::from_raw(user), Gid::from_raw(group))
}

fn cwd_source(root: &Path, spec: &Spec, cwd: &Path) -> Option<(PathBuf, PathBuf)> {
    let mounts = spec.mounts().iter().flatten();
    let covering = mounts
        .filter_map(|m| Some((m, cwd.strip_prefix(m.destination()).ok()?)))
        .min_by_key(|(_, below)| below.components().count());
    let Some((mount, below)) = covering else {
        return Some((root.to_owned(), cwd.strip_prefix("/").ok()?.to_owned()));
    };
    is_bind(mount).then(|| Some((mount.source().clone()?, below.to_owned())))?
}

fn make_directories(base: &Path, below: &Path, owner: (Uid, Gid)) -> nix::Result<()> {
    let root = open_root(base)?;
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
    if below.as_os_str().is_empty() || open_in(&root, below, directory).is_ok() {
        return Ok(());
    }
    let mut path = PathBuf::new();
    for name in below {
        let parent = path.clone();
        path.push(name);
        match open_in(&root, &path, directory) {
            Err(Errno::ENOENT) => make_directory(&root, &parent, name, owner)?,
            other => drop(other?),
        }
    }
    Ok(())
}

fn make_directory(root: &OwnedFd, parent: &Path, name: &OsStr, (user, group): (Uid, Gid)) -> nix::Result<()> {
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let parent = open_in(root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
    if user.is_root() && group.as_raw() == 0 {
        return Ok(());
    }
    fchownat(&parent, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// Names the working directory in an error that came from changing to it, which libcontainer does not.
pub(super) fn name_cwd(error: String, cwd: &Path) -> String {
    if !error.contains("failed to chdir") {
        return error;
    }
    let errno = error
        .rsplit(|c: char| !c.is_ascii_alphanumeric())
        .find(|word| word.starts_with('E'));
    let text = match errno {
        Some("ENOENT") => "no such file or directory",
        Some("ENOTDIR") => "not a directory",
        Some("EACCES") => "permission denied",
        Some(other) => other,
        None => "unknown error",
    };
    format!("cannot change to the working directory {:?}: {text}", cwd.display())
}

#[cfg(test)]
mod tests {
    use super::home_of;

    #[test]
    fn home_is_found_by_uid_and_never_empty() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/srv/www:/bin/false\nnone:x:5:5:::\n";
        assert_eq!(home_of(passwd, 0), Some("/root"));
        assert_eq!(home_of(passwd, 33), Some("/srv/www"));
        assert_eq!(home_of(passwd, 5), None);
        assert_eq!(home_of(passwd, 1000), None);
    }
}
