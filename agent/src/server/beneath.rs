//! Paths that the host names: looked up without leaving the agent's own folder, whatever links the host's files
//! contain.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

/// Everything in the guest that the host may name is below.
pub(super) const BASE: &str = "/run/kata-containers";

/// Whether a path is absolute and has no way back in it.
pub(super) fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// Whether the host may name it.
pub(super) fn is_ours(path: &Path) -> bool {
    is_below(Path::new(BASE), path)
}

/// Whether a path leads to something below a folder, and not to the folder itself.
pub(super) fn is_below(folder: &Path, path: &Path) -> bool {
    path != folder && path.starts_with(folder) && is_plain(path)
}

/// Opens what the host has named ([`is_ours`]). Links are followed as long as they stay below [`BASE`]; any other is
/// EXDEV.
pub(super) fn open(path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let below = path.strip_prefix(BASE).map_err(|_| Errno::EXDEV)?;
    let base = nix::fcntl::open(
        BASE,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    Ok(openat2(base, below, how(flags, resolve))?)
}

/// Opens what is below a folder that is open. Links are not followed; an empty path is the folder itself.
pub(super) fn open_at(folder: impl AsFd, below: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let below = match below.as_os_str().is_empty() {
        true => Path::new("."),
        false => below,
    };
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    Ok(openat2(folder, below, how(flags, resolve))?)
}

fn how(flags: OFlag, resolve: ResolveFlag) -> OpenHow {
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn the_host_names_only_what_is_the_agents() {
        assert!(is_ours(Path::new("/run/kata-containers/shared/containers/c1-data")));
        for other in [
            "/run/kata-containers",
            "/run/kata-containers/../x",
            "/run/kata-containersx/y",
            "/etc",
            "run/kata-containers/x",
            "",
        ] {
            assert!(!is_ours(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn no_link_and_no_way_back_leads_out_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/file"), "").unwrap();
        symlink("inner", folder.path().join("link")).unwrap();
        let open_folder = fs::File::open(folder.path()).unwrap();
        let look = |path: &str| open_at(&open_folder, Path::new(path), OFlag::O_PATH);
        for there in ["", "inner", "inner/file"] {
            assert!(look(there).is_ok(), "{there}");
        }
        for refused in ["link/file", "..", "/etc"] {
            assert!(look(refused).is_err(), "{refused}");
        }
    }
}
