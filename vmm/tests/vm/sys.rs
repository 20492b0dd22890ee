//! The one system call of the guest that has no safe wrapper in our dependencies.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd};

/// Loads a kernel module.
pub fn load_module(module: &File) -> io::Result<()> {
    // SAFETY: finit_module(2) reads an open file and a string that ends with NUL; the kernel checks both.
    let loaded = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if loaded == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
