//! Device files of the host that a VM is faster with, and can do without.

use std::{fs::File, io, os::fd::OwnedFd, path::Path};

/// The host kernel's vsock device, for the stream to the agent.
pub const VHOST_VSOCK: &str = "/dev/vhost-vsock";
/// The host kernel's half of a network interface.
pub const VHOST_NET: &str = "/dev/vhost-net";

/// Opens a device for reading and writing; `None` where the host does not have it.
///
/// A file proves nothing: kmod makes those of modules that nobody has loaded, or that the administrator has forbidden.
///
/// # Errors
/// The host has the device, and it does not open.
pub fn open_device(path: &Path) -> io::Result<Option<OwnedFd>> {
    match File::options().read(true).write(true).open(path) {
        Ok(device) => Ok(Some(device.into())),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};

    use super::*;

    /// Major 10 is that of many small drivers, each of which opens its own minor; no driver has major 4095. Both
    /// files are there and lead nowhere. The link leads to itself.
    #[test]
    fn a_device_without_its_driver_is_absent_and_one_that_does_not_open_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let made = |name: &str, major, minor| {
            let path = folder.path().join(name);
            mknod(
                &path,
                SFlag::S_IFCHR,
                Mode::from_bits_truncate(0o600),
                makedev(major, minor),
            )
            .unwrap();
            path
        };
        let null = made("null", 1, 3);
        assert!(open_device(&null).unwrap().is_some());
        for absent in [
            made("minor", 10, 4095),
            made("major", 4095, 0),
            folder.path().join("no file"),
        ] {
            assert!(open_device(&absent).unwrap().is_none(), "{}", absent.display());
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&link, &link).unwrap();
        assert_eq!(open_device(&link).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }
}
