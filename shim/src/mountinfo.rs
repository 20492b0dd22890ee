//! The mounts of this process's mount namespace, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)), and their sizes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of its file system.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
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
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(parse).collect())
}

/// Bytes that the file system at `path` has room for, used or not.
///
/// # Errors
/// It cannot be looked at.
pub fn size(path: &Path) -> io::Result<u64> {
    let space = statvfs(path)?;
    Ok(space.blocks() * space.fragment_size())
}

fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(2);
    let mut after = after.split(' ');
    Some(Mount {
        device: before.next()?.to_owned(),
        root: unescape(before.next()?).into(),
        point: unescape(before.next()?).into(),
        kind: after.next()?.to_owned(),
        super_options: after.nth(1)?.split(',').map(str::to_owned).collect(),
    })
}

/// Space, tab, newline and backslash are written as octal escapes.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_optional_fields_in_the_middle() {
        let line = "36 35 98:0 /mnt\\0401 /a\\134b rw,noatime master:1 shared:7 - cgroup cgroup rw,cpu,cpuacct";
        let mount = Mount {
            device: "98:0".into(),
            root: "/mnt 1".into(),
            point: "/a\\b".into(),
            kind: "cgroup".into(),
            super_options: ["rw", "cpu", "cpuacct"].map(str::to_owned).to_vec(),
        };
        assert_eq!(parse(line), Some(mount));
        assert_eq!(parse("36 35 98:0 /"), None);
    }
}
