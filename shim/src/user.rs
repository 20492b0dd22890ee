//! QEMU's users: each sandbox has one to itself, so that a QEMU that a guest has broken into is a stranger to all other
//! pods' processes.
//!
//! Users are numbers without an account. A shim holds its number by a lock on one byte of a file, which the kernel
//! gives back when the shim ends, however it ends (fcntl(2), open file description locks).

use std::{
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

use crate::{
    error::{Context, Result},
    undo::RUN_DIR,
};

/// The first number: above those that systemd gives to containers (`UIDS-GIDS.md` of systemd), and far above those of
/// people, programs and the kubelet's user namespaces.
const FIRST: u32 = 0x7000_0000;
/// How many there are; a node has far fewer pods.
const COUNT: u32 = 0x1_0000;

/// A user that no other sandbox of this node has as long as this value lives.
#[derive(Debug)]
pub struct User {
    id: u32,
    /// Holds the lock.
    _leases: File,
}

impl User {
    /// Leases a free number.
    ///
    /// # Errors
    /// The file of leases cannot be used; all numbers are taken.
    pub fn lease(sandbox: &str) -> Result<User> {
        // The number of a sandbox that has just ended is not the first to be given again: a process of it may still be
        // on its way out.
        let mut hasher = DefaultHasher::new();
        sandbox.hash(&mut hasher);
        User::lease_from(&Path::new(RUN_DIR).join("uids"), COUNT, hasher.finish())
    }

    fn lease_from(path: &PathBuf, count: u32, start: u64) -> Result<User> {
        let leases = File::options().create(true).truncate(false).write(true).open(path);
        let leases = leases.at("open", path)?;
        let start = u32::try_from(start % u64::from(count)).unwrap_or_default();
        for number in (start..count).chain(0..start) {
            if lock(&leases, number).at("lock", path)? {
                return Ok(User {
                    id: FIRST + number,
                    _leases: leases,
                });
            }
        }
        Err(io::Error::other("all users are taken by other sandboxes")).at("lease a user for QEMU in", path)
    }

    /// The number of the user, and of the user's group.
    pub fn id(&self) -> u32 {
        self.id
    }
}

/// Locks byte `number`; `false` if somebody else has.
fn lock(file: &File, number: u32) -> io::Result<bool> {
    let byte = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: number.into(),
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&byte)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_holder_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uids");
        let lease = |start| User::lease_from(&path, 3, start);
        let (first, second, third) = (lease(1).unwrap(), lease(1).unwrap(), lease(4).unwrap());
        assert_eq!(
            [first.id(), second.id(), third.id()],
            [1, 2, 0].map(|number| FIRST + number)
        );
        let refused = lease(0).unwrap_err().to_string();
        assert!(refused.contains("all users are taken by other sandboxes"), "{refused}");
        drop(second);
        assert_eq!(lease(0).unwrap().id(), FIRST + 2);
    }
}
