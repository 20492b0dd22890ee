//! The one place of the installer that talks to the kernel without a wrapper.
#![allow(unsafe_code)]

use std::{ffi::CStr, io};

use nix::libc;

/// Sets an extended attribute of a file (setxattr(2)).
///
/// # Errors
/// The kernel's.
pub fn set_attribute(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: both strings end with a NUL, and the kernel reads as many bytes of the value as it has.
    let answer = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
