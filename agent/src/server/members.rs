//! The processes of a container.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, ErrorKind},
    path::Path,
};

use nix::libc;

/// The processes in a cgroup (v2) and below it, by their numbers in the agent's PID namespace. Cgroups that go
/// meanwhile have none.
///
/// # Errors
/// The kernel's.
pub(super) fn of(cgroup: &Path) -> io::Result<BTreeSet<i32>> {
    let mut all = BTreeSet::new();
    collect(cgroup, &mut all)?;
    Ok(all)
}

fn collect(cgroup: &Path, all: &mut BTreeSet<i32>) -> io::Result<()> {
    match fs::read_to_string(cgroup.join("cgroup.procs")) {
        Ok(text) => all.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        Err(error) if is_gone(&error) => return Ok(()),
        // The processes of a threaded cgroup are listed by the one above it (cgroup-v2.rst, "Threads").
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let entries = match fs::read_dir(cgroup) {
        Err(error) if is_gone(&error) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), all)?;
        }
    }
    Ok(())
}

/// A file of a cgroup that was removed while it was open answers `ENODEV`.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processes_of_all_cgroups_below_are_counted_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        for (cgroup, processes) in [("", "1\n2\n"), ("a", ""), ("a/b", "2\n30\n")] {
            fs::write(folder.path().join(cgroup).join("cgroup.procs"), processes).unwrap();
        }
        assert_eq!(of(folder.path()).unwrap(), BTreeSet::from([1, 2, 30]));
        assert_eq!(of(&folder.path().join("gone")).unwrap(), BTreeSet::new());
    }
}
