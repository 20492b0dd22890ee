//! File systems in memory that begin with what the image has at their place: runc's mount option `tmpcopyup`. CRI-O
//! with `read_only = true` asks for three of them in each container.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink},
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, mknod},
};
use oci_spec::runtime::Mount;
use walkdir::WalkDir;

use super::{
    beneath,
    error::{Doing, Result},
    storage::Options,
};
use crate::engine::open_in;

const OPTION: &str = "tmpcopyup";

/// Whether a mount is to begin with what is there.
pub(super) fn is_asked(given: &Mount) -> bool {
    given.typ().as_deref() == Some("tmpfs") && given.options().iter().flatten().any(|option| option == OPTION)
}

/// Mounts what is asked for on `place`, with what the container's `root` has there. Blocks.
pub(super) fn mount_on(place: &Path, root: &Path, given: &Mount) -> Result<()> {
    let options = given.options().iter().flatten().filter(|option| *option != OPTION);
    let options = Options::parse(&options.cloned().collect::<Vec<_>>())?;
    let what = || format!("mount a tmpfs for {}", given.destination().display());
    let data = (!options.data.is_empty()).then_some(options.data.as_str());
    // One that may only be read becomes that when it has its files.
    let flags = options.flags.difference(MsFlags::MS_RDONLY);
    mount(Some("tmpfs"), place, Some("tmpfs"), flags, data).doing(what)?;
    let keeps_mode = !options.data.split(',').any(|option| option.starts_with("mode="));
    copy(root, given.destination(), place, keeps_mode)
        .doing(|| format!("copy what the image has at {}", given.destination().display()))
}

/// The container does not run yet, and its root is nobody else's: what is found is not exchanged meanwhile.
fn copy(root: &Path, from: &Path, to: &Path, keeps_mode: bool) -> io::Result<()> {
    let folder = OFlag::O_PATH | OFlag::O_DIRECTORY;
    match open_in(&beneath::open(root, folder)?, from, folder) {
        // The container's creation makes the folder.
        Err(Errno::ENOENT) => Ok(()),
        found => {
            let found = found?;
            copy_tree(
                Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())),
                to,
                keeps_mode,
            )
        }
    }
}

fn copy_tree(from: &Path, to: &Path, keeps_mode: bool) -> io::Result<()> {
    // This may be a link, to the folder that is open.
    let top = fs::metadata(from)?;
    lchown(to, Some(top.uid()), Some(top.gid()))?;
    if keeps_mode {
        fs::set_permissions(to, top.permissions())?;
    }
    for entry in WalkDir::new(from).min_depth(1).same_file_system(true) {
        let entry = entry?;
        let (kind, found) = (entry.file_type(), entry.metadata()?);
        let copy = to.join(entry.path().strip_prefix(from).map_err(io::Error::other)?);
        if kind.is_dir() {
            fs::create_dir(&copy)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &copy)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &copy)?;
        } else if kind.is_socket() {
            // Nobody listens on an image's socket.
            continue;
        } else {
            mknod(
                &copy,
                SFlag::from_bits_truncate(found.mode()),
                Mode::empty(),
                found.rdev(),
            )?;
        }
        lchown(&copy, Some(found.uid()), Some(found.gid()))?;
        if !kind.is_symlink() {
            fs::set_permissions(&copy, fs::Permissions::from_mode(found.mode() & 0o7777))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_links_owners_and_modes() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("lib/deep")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("lib/deep/file"), "text").unwrap();
        lchown(from.join("lib/deep/file"), Some(12), Some(34)).unwrap();
        fs::set_permissions(from.join("lib/deep/file"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        mknod(&from.join("pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o622), 0).unwrap();
        copy_tree(&from, &to, true).unwrap();

        let look = |path: &str| {
            let found = fs::symlink_metadata(to.join(path)).unwrap();
            (found.mode(), found.uid(), found.gid())
        };
        assert_eq!(look(""), (0o41777, 0, 0));
        assert_eq!(look("lib/deep/file"), (0o104_750, 12, 34));
        assert_eq!(fs::read_to_string(to.join("lib/deep/file")).unwrap(), "text");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(look("pipe").0, fs::symlink_metadata(from.join("pipe")).unwrap().mode());
    }
}
