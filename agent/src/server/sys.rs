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

use super::clock::SAMPLES;

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

/// Makes the loop device of this number; `control` is `/dev/loop-control`.
pub(super) fn add_loop(control: &File, number: u32) -> nix::Result<()> {
    // From <linux/loop.h>.
    const LOOP_CTL_ADD: libc::c_ulong = 0x4C80;
    // SAFETY: LOOP_CTL_ADD takes a number by value.
    Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_ADD, libc::c_ulong::from(number)) }).map(drop)
}

/// The host's clock and the guest's, at one moment, in nanoseconds since the epoch (`PTP_SYS_OFFSET_PRECISE` of
/// `<linux/ptp_clock.h>`).
pub(super) fn clocks_at_once(clock: &File) -> nix::Result<(i64, i64)> {
    // SAFETY: all of the structure's fields are integers, for which zero is a value.
    let mut both: libc::ptp_sys_offset_precise = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes such a structure.
    Errno::result(unsafe { libc::ioctl(clock.as_raw_fd(), libc::PTP_SYS_OFFSET_PRECISE, &mut both) })?;
    Ok((nanoseconds(both.device), nanoseconds(both.sys_realtime)))
}

/// Readings in turn of the guest's clock, the host's, the guest's and so on, in nanoseconds since the epoch
/// (`PTP_SYS_OFFSET`).
pub(super) fn clocks_in_turn(clock: &File) -> nix::Result<Vec<i64>> {
    // SAFETY: as above.
    let mut turns: libc::ptp_sys_offset = unsafe { std::mem::zeroed() };
    turns.n_samples = SAMPLES as u32;
    // SAFETY: the request reads the number of samples, at most the 25 that the structure has room for, and writes them.
    Errno::result(unsafe { libc::ioctl(clock.as_raw_fd(), libc::PTP_SYS_OFFSET, &mut turns) })?;
    Ok(turns.ts.into_iter().take(2 * SAMPLES + 1).map(nanoseconds).collect())
}

fn nanoseconds(time: libc::ptp_clock_time) -> i64 {
    time.sec
        .saturating_mul(1_000_000_000)
        .saturating_add(i64::from(time.nsec))
}

/// Lets the kernel's loop take an offset of the clock (nanoseconds, half a second at most) away: a sixteenth of what is
/// left each second. With `learn` the frequency is corrected too, by a 128th of the offset per second, for 32 s at most
/// between two corrections (`ntp_update_offset` in `kernel/time/ntp.c` of Linux).
pub(super) fn slew(offset: i64, learn: bool) -> nix::Result<()> {
    // SAFETY: all of the structure's fields are integers, for which zero is a value.
    let mut wanted: libc::timex = unsafe { std::mem::zeroed() };
    wanted.modes = libc::ADJ_NANO
        | libc::ADJ_STATUS
        | libc::ADJ_TIMECONST
        | libc::ADJ_OFFSET
        | libc::ADJ_MAXERROR
        | libc::ADJ_ESTERROR;
    wanted.status = libc::STA_PLL | if learn { 0 } else { libc::STA_FREQHOLD };
    wanted.constant = 2;
    wanted.offset = offset;
    // In microseconds. Programs that ask hear that the clock is synchronized, and how exactly.
    wanted.esterror = offset.saturating_abs() / 1000;
    wanted.maxerror = wanted.esterror + 1000;
    // SAFETY: the call reads and writes the structure.
    Errno::result(unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &mut wanted) }).map(drop)
}
