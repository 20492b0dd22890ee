//! The system calls of PID 1 that have no safe wrapper.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_int},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Loads a kernel module from its file (`finit_module(2)`); `parameters` as on modprobe's command line.
pub(super) fn load_module(file: &File, parameters: &CStr) -> nix::Result<()> {
    // SAFETY: the descriptor and the string live for the duration of the call, which reads both.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    Errno::result(result).map(drop)
}

/// Hands a descriptor that never waits to the runtime. Must be called in it.
pub(super) fn asynchronous(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the value owns the descriptor: it stays open and the same until it is taken off the runtime.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}

/// Signals a process; unlike nix's, with real-time signals.
pub(super) fn kill(pid: i32, signal: c_int) -> nix::Result<()> {
    // SAFETY: kill(2) takes two integers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Bytes that can be read from a pipe or a terminal without waiting.
pub(super) fn unread(fd: impl AsFd) -> nix::Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: FIONREAD writes an int.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Reads at most `most` bytes, once. Unlike with a slice, nothing is written to the memory before.
pub(super) fn read(fd: impl AsFd, most: usize) -> nix::Result<Vec<u8>> {
    let mut data = Vec::<u8>::with_capacity(most);
    // SAFETY: read(2) writes at most `most` bytes, for which there is room.
    let count = Errno::result(unsafe { libc::read(fd.as_fd().as_raw_fd(), data.as_mut_ptr().cast(), most) })?;
    // SAFETY: the kernel has written these.
    unsafe { data.set_len(count as usize) };
    Ok(data)
}

/// Lets a pipe hold `bytes`.
pub(super) fn set_pipe_size(fd: &OwnedFd, bytes: c_int) -> nix::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETPIPE_SZ(bytes)).map(drop)
}

/// Brings the loopback interface up.
pub(super) fn loopback_up() -> nix::Result<()> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all of the structure's fields are integers, arrays and unions of them, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an `ifreq` with a terminated name.
    Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }).map(drop)
}

/// Mixes `data` into the kernel's random number generator, counts its bits as entropy, and reseeds (`random(4)`).
pub(super) fn add_entropy(random: &File, data: &[u8]) -> nix::Result<()> {
    // From <linux/random.h>: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let size = c_int::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
    let bits = size.checked_mul(8).ok_or(Errno::EINVAL)?;
    let mut pool = Vec::with_capacity(8 + data.len());
    pool.extend_from_slice(&bits.to_ne_bytes());
    pool.extend_from_slice(&size.to_ne_bytes());
    pool.extend_from_slice(data);
    // SAFETY: RNDADDENTROPY reads two ints, of which the second is the number of bytes that follow them.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}
