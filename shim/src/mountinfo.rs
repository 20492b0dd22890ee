//! The mounts of this process's mount namespace, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)), and their sizes.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its number, as in `/proc/<pid>/fdinfo/<fd>`.
    pub id: u64,
    /// `major:minor` of its file system.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// The options of the mount.
    pub options: Vec<String>,
    /// Mounted and unmounted below it is what its original gets and loses (`master` in mount_namespaces(7)).
    pub follows: bool,
    /// The file system's type.
    pub kind: String,
    /// The options of the file system.
    pub super_options: Vec<String>,
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// The table cannot be read.
pub fn mounts() -> io::Result<Vec<Mount>> {
    read("/proc/self/mountinfo")
}

/// The same of the calling thread, which may be in another mount namespace than the process.
///
/// # Errors
/// As above.
pub fn mounts_of_thread() -> io::Result<Vec<Mount>> {
    read("/proc/thread-self/mountinfo")
}

fn read(table: &str) -> io::Result<Vec<Mount>> {
    let table = fs::read(table)?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// Bytes that the file system at `path` has room for, used or not.
///
/// # Errors
/// It cannot be looked at.
pub fn size(path: &Path) -> io::Result<u64> {
    let space = statvfs(path)?;
    Ok(space.blocks() * space.fragment_size())
}

/// Paths are bytes: somebody's mount point in another encoding must not hide all the other mounts.
fn parse(line: &[u8]) -> Option<Mount> {
    const SEPARATOR: &[u8] = b" - ";
    let middle = line.windows(SEPARATOR.len()).position(|bytes| bytes == SEPARATOR)?;
    let fields = |part: &'_ [u8]| -> Vec<Vec<u8>> { part.split(|byte| *byte == b' ').map(<[u8]>::to_vec).collect() };
    let (before, after) = (fields(&line[..middle]), fields(&line[middle + SEPARATOR.len()..]));
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let words = |field: &[u8]| text(field).split(',').map(str::to_owned).collect();
    Some(Mount {
        id: text(before.first()?).parse().ok()?,
        device: text(before.get(2)?),
        root: unescape(before.get(3)?),
        point: unescape(before.get(4)?),
        options: words(before.get(5)?),
        // Behind the options of the mount.
        follows: before.iter().skip(6).any(|field| field.starts_with(b"master:")),
        kind: text(after.first()?),
        super_options: words(after.get(2)?),
    })
}

/// A byte that would end the field, such as a space, is written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| *first == b'\\') {
            Some(byte) => {
                path.push(byte);
                rest = &after[3..];
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    use super::*;

    #[test]
    fn a_line_has_its_optional_fields_in_the_middle() {
        let line = b"36 35 98:0 /mnt\\0401 /a\\134b rw,noatime master:1 shared:7 - cgroup cgroup rw,cpu,cpuacct";
        let mount = Mount {
            id: 36,
            device: "98:0".into(),
            root: "/mnt 1".into(),
            point: "/a\\b".into(),
            options: ["rw", "noatime"].map(str::to_owned).to_vec(),
            follows: true,
            kind: "cgroup".into(),
            super_options: ["rw", "cpu", "cpuacct"].map(str::to_owned).to_vec(),
        };
        assert_eq!(parse(line), Some(mount));
        assert_eq!(parse(b"36 35 98:0 /"), None);
    }

    #[test]
    fn a_mount_point_may_be_in_any_encoding_and_hold_what_looks_like_an_escape() {
        let mount =
            parse(b"36 35 98:0 / /mnt/caf\xe9\\040\\134040\\777 rw - vfat /dev/sdb1 rw,iocharset=iso8859-1").unwrap();
        assert_eq!(mount.point.as_os_str(), OsStr::from_bytes(b"/mnt/caf\xe9 \\040\\777"));
        assert_eq!(mount.kind, "vfat");
    }
}
