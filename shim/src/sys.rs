//! The system calls that need `unsafe`, and nothing else.
#![allow(unsafe_code)]

use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

nix::ioctl_write_ptr_bad!(
    /// Source: linux/if_tun.h.
    tunsetiff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Makes a tap in the calling thread's network namespace, with a `virtio_net_hdr` before each frame. It is not persistent: it vanishes with
/// the last duplicate of the returned descriptor.
///
/// # Errors
/// A name that is too long or taken; no `/dev/net/tun`, or no right to use it.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: all-zero is a valid `ifreq`: it holds integers, a byte array and raw pointers only.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = i16::from_ne_bytes(u16::try_from(flags).unwrap_or_default().to_ne_bytes());
    let tun: File = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq`, which outlives the call.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw mut request) }?;
    Ok(tun.into())
}
