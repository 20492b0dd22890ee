//! Files that the host sends: volumes whose updates must wake those who watch them in the guest.
//!
//! What is sent appears whole: a file, a link or its replacement is made under another name and renamed (the
//! conventions are those of `do_copy_file` in `src/agent/src/rpc.rs` of kata-containers).

use std::{
    ffi::{OsStr, OsString},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use agent_protocol::{GUEST_SHARE, KUBELET_DATA, protocol::agent::CopyFileRequest};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, readlinkat, renameat},
    sys::stat::{Mode, SFlag, fchmod, mkdirat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat},
};

use super::error::{Doing, Error, Result};
/// What the name of something that is not whole yet ends with.
const SUFFIX: &str = ".tmp";
/// The most bytes of a name (`NAME_MAX` of limits.h).
const LONGEST_NAME: usize = 255;

/// How folders are opened.
pub(super) const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Makes a folder, a link, or a part of a file. Blocks.
pub(super) fn copy(request: &CopyFileRequest) -> Result<()> {
    let (parents, name) = place(&request.path)?;
    let parent = folder(&parents, mode(request.dir_mode)).doing(|| format!("make the folder of {:?}", request.path))?;
    let target = Target {
        parent,
        name,
        user: u32::try_from(request.uid).ok(),
        group: u32::try_from(request.gid).ok(),
    };
    let bits = mode(request.file_mode);
    let made = match SFlag::from_bits_truncate(request.file_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => target.make_folder(bits),
        SFlag::S_IFLNK => target.link(OsStr::from_bytes(&request.data)),
        _ => {
            let last = check_part(request)?.then_some(bits);
            target.write(request.offset.unsigned_abs(), &request.data, last)
        }
    };
    made.doing(|| format!("copy {:?}", request.path))
}

/// The folders from [`GUEST_SHARE`] on, and the last name.
fn place(path: &str) -> Result<(Vec<OsString>, OsString)> {
    let refused = || Error::Invalid(format!("the path {path:?} of a file is not below {GUEST_SHARE}"));
    let below = Path::new(path).strip_prefix(GUEST_SHARE).map_err(|_| refused())?;
    let name = |part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        _ => None,
    };
    let mut names: Vec<_> = below
        .components()
        .map(name)
        .collect::<Option<_>>()
        .ok_or_else(refused)?;
    let last = names.pop().ok_or_else(refused)?;
    Ok((names, last))
}

/// Whether this part ends the file.
fn check_part(request: &CopyFileRequest) -> Result<bool> {
    let end = request.offset.checked_add_unsigned(request.data.len() as u64);
    match end {
        Some(end) if request.offset >= 0 && end <= request.file_size => Ok(end == request.file_size),
        _ => Err(Error::Invalid(format!(
            "{} bytes at {} do not fit the file {:?} of {} bytes",
            request.data.len(),
            request.offset,
            request.path,
            request.file_size
        ))),
    }
}

/// Opens the folder, and makes what is missing of it. Links are not followed.
fn folder(names: &[OsString], mode: Mode) -> io::Result<OwnedFd> {
    let mut folder = open(GUEST_SHARE, FOLDER, Mode::empty())?;
    for name in names {
        let open = |folder: &OwnedFd| openat(folder, name.as_os_str(), FOLDER, Mode::empty());
        folder = match open(&folder) {
            Err(Errno::ENOENT) => {
                mkdirat(&folder, name.as_os_str(), mode)?;
                open(&folder)?
            }
            opened => opened?,
        };
    }
    Ok(folder)
}

/// The permissions of a file's mode.
pub(super) fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits & 0o7777)
}

/// Where a folder, a file or a link is to be.
#[derive(Debug)]
pub(super) struct Target {
    /// The folder that it is in.
    pub(super) parent: OwnedFd,
    /// Its name there.
    pub(super) name: OsString,
    /// Whose it is; the agent's where there is none.
    pub(super) user: Option<u32>,
    /// As above.
    pub(super) group: Option<u32>,
}

impl Target {
    /// Makes a folder, or gives one that is there its owner and permissions.
    pub(super) fn make_folder(&self, mode: Mode) -> io::Result<()> {
        match mkdirat(&self.parent, self.name.as_os_str(), Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let made = openat(&self.parent, self.name.as_os_str(), FOLDER, Mode::empty())?;
        self.own(&self.name)?;
        Ok(fchmod(&made, mode)?)
    }

    /// Makes a link, or swaps it in one step. When [`KUBELET_DATA`] has gone over to a new folder, the old one is
    /// removed.
    pub(super) fn link(&self, to: &OsStr) -> io::Result<()> {
        let temporary = self.temporary();
        let before = readlinkat(&self.parent, self.name.as_os_str()).ok();
        remove(&self.parent, &temporary)?;
        symlinkat(to, &self.parent, temporary.as_os_str())?;
        self.own(&temporary)?;
        renameat(&self.parent, temporary.as_os_str(), &self.parent, self.name.as_os_str())?;
        match before {
            Some(before) if self.name == KUBELET_DATA && before != to => self.remove_stale(&before),
            _ => Ok(()),
        }
    }

    /// Writes a part of a file. With the last one, which knows the permissions, the file is there.
    pub(super) fn write(&self, offset: u64, data: &[u8], last: Option<Mode>) -> io::Result<()> {
        let temporary = self.temporary();
        let mut flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        if offset == 0 {
            remove(&self.parent, &temporary)?;
            flags |= OFlag::O_CREAT | OFlag::O_EXCL;
        }
        let file = openat(
            &self.parent,
            temporary.as_os_str(),
            flags,
            Mode::S_IRUSR | Mode::S_IWUSR,
        )?;
        let mut file = fs::File::from(file);
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(data)?;
        if let Some(mode) = last {
            self.own(&temporary)?;
            fchmod(&file, mode)?;
            renameat(&self.parent, temporary.as_os_str(), &self.parent, self.name.as_os_str())?;
        }
        Ok(())
    }

    /// A name beside its own, which may be as long as a name can be.
    fn temporary(&self) -> OsString {
        let bytes = self.name.as_bytes();
        let suffix = match bytes.len() + SUFFIX.len() {
            0..=LONGEST_NAME => SUFFIX.to_owned(),
            _ => {
                let mut hash = DefaultHasher::new();
                bytes.hash(&mut hash);
                format!("{:016x}{SUFFIX}", hash.finish())
            }
        };
        let kept = bytes.len().min(LONGEST_NAME - suffix.len());
        let mut name = OsStr::from_bytes(&bytes[..kept]).to_owned();
        name.push(suffix);
        name
    }

    fn own(&self, name: &OsStr) -> io::Result<()> {
        let (user, group) = (self.user.map(Uid::from_raw), self.group.map(Gid::from_raw));
        Ok(fchownat(&self.parent, name, user, group, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// After the swap: the files of before, and the links to those that are no more. Whoever watches one of them sees
    /// its end.
    fn remove_stale(&self, before: &OsStr) -> io::Result<()> {
        let parent = path_of(&self.parent);
        for entry in fs::read_dir(&parent)? {
            let entry = entry?;
            let dangles =
                || matches!(fs::metadata(entry.path()), Err(error) if error.kind() == io::ErrorKind::NotFound);
            if entry.file_type()?.is_symlink() && dangles() {
                remove(&self.parent, &entry.file_name())?;
            }
        }
        match Path::new(before).components().collect::<Vec<_>>()[..] {
            [Component::Normal(name)] => fs::remove_dir_all(parent.join(name)).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }),
            _ => Ok(()),
        }
    }
}

/// A path to what is open, wherever it is.
pub(super) fn path_of(open: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", open.as_fd().as_raw_fd()))
}

fn remove(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_has_another_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        for (length, other) in [(3, 3), (251, 252), (252, 253), (255, 254)] {
            let target = |length: usize| Target {
                parent: open(folder.path(), FOLDER, Mode::empty()).unwrap(),
                name: "n".repeat(length).into(),
                user: None,
                group: None,
            };
            let (one, other) = (target(length), target(other));
            one.write(0, b"text", Some(Mode::S_IRUSR)).unwrap();
            one.link(OsStr::new("elsewhere")).unwrap();
            assert_eq!(one.temporary(), one.temporary());
            assert!(one.name == other.name || one.temporary() != other.temporary());
        }
    }

    #[test]
    fn a_file_has_a_place_below_the_share_and_nowhere_else() {
        let (folders, name) = place("/run/kata-containers/shared/containers/mirrors/0/..data").unwrap();
        assert_eq!((folders, name), (vec!["mirrors".into(), "0".into()], "..data".into()));
        for path in [
            "",
            "/etc/passwd",
            GUEST_SHARE,
            "/run/kata-containers/shared/containers/../x",
            "mirrors/0",
        ] {
            let said = place(path).unwrap_err().to_string();
            assert!(
                said.ends_with("is not below /run/kata-containers/shared/containers"),
                "{said}"
            );
        }
    }

    #[test]
    fn a_part_has_a_place_in_its_file() {
        let mut request = CopyFileRequest::new();
        (request.file_size, request.offset, request.data) = (5, 2, b"abc".to_vec());
        assert!(check_part(&request).unwrap());
        request.data.pop();
        assert!(!check_part(&request).unwrap());
        for offset in [4, -1, i64::MAX] {
            request.offset = offset;
            assert!(check_part(&request).is_err());
        }
    }
}
