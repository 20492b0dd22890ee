//! The system calls that need `unsafe`, and nothing else.
#![allow(unsafe_code)]

pub mod bpf;

use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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

nix::ioctl_read_bad!(
    /// Source: ioctl_pipe(2).
    fionread,
    libc::FIONREAD,
    libc::c_int
);

/// Bytes in a pipe that nobody has read yet.
///
/// # Errors
/// Not a pipe.
pub fn unread(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `int`, which outlives the call.
    unsafe { fionread(pipe.as_raw_fd(), &raw mut bytes) }?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

nix::ioctl_read_bad!(
    /// Source: ioctl_tty(2).
    tiocgwinsz,
    libc::TIOCGWINSZ,
    libc::winsize
);

/// Rows and columns of a terminal.
///
/// # Errors
/// Not a terminal.
pub fn window_size(terminal: BorrowedFd<'_>) -> io::Result<libc::winsize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open, and the kernel writes one `winsize`, which outlives the call.
    unsafe { tiocgwinsz(terminal.as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// A descriptor that means this process for ever; `None` when it is gone. Source: pidfd_open(2).
///
/// # Errors
/// Too many open files.
pub fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match nix::Error::result(fd) {
        Ok(fd) => {
            let fd = i32::try_from(fd).map_err(io::Error::other)?;
            // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        Err(nix::Error::ESRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Kills the process behind a pidfd; succeeds when it is gone. Source: pidfd_send_signal(2).
///
/// # Errors
/// No right to.
pub fn pidfd_kill(process: &OwnedFd) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open, and a null `siginfo_t` is what kill(2) does.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            0,
        )
    };
    match nix::Error::result(sent) {
        Ok(_) | Err(nix::Error::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
