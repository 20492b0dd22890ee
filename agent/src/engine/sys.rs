//! The system calls of the engine that have no safe wrapper.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_int},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
    },
    unistd::{ForkResult, Pid},
};

/// Forks; `None` in the child. The calling process must have a single thread.
pub(crate) fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: the zygote and its workers are single-threaded (see `Engine::spawn`), so the child may do
    // anything that the parent could.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Ends a forked process at once, without the exit handlers of the program it was forked from.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Lets the kernel reap the caller's children.
pub(super) fn ignore_children() -> nix::Result<()> {
    disposition(Signal::SIGCHLD, SigHandler::SigIgn)
}

/// Reverses [`ignore_children`].
pub(super) fn default_children() -> nix::Result<()> {
    disposition(Signal::SIGCHLD, SigHandler::SigDfl)
}

/// Restores what a new program expects and `execve` would not: SIGPIPE (ignored by Rust's runtime) with its
/// default action, and no blocked signals.
pub(super) fn default_signals() -> nix::Result<()> {
    disposition(Signal::SIGPIPE, SigHandler::SigDfl)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

fn disposition(signal: Signal, handler: SigHandler) -> nix::Result<()> {
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the action is to ignore or the default; no handler function is installed.
    unsafe { sigaction(signal, &action) }.map(drop)
}

/// Closes every descriptor, the standard streams too.
pub(super) fn close_all() {
    // SAFETY: nothing is used after this that owns a descriptor: the caller only waits for its end.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
}

/// Makes the caller's session keyring the one of this name, which is made if there is none, and lets its owner's other
/// processes find it (`keyctl(2)`).
pub(super) fn join_session_keyring(name: &CStr) -> nix::Result<()> {
    const MAY_BE_FOUND: u32 = 0x0008_0000; // KEY_USR_SEARCH in Linux
    const POSSESSORS: u32 = 0x3f00_0000; // KEY_POS_ALL
    // SAFETY: the kernel reads a string that lives longer than the call.
    let ring = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    let ring = nix::errno::Errno::result(ring)?;
    // As the kernel makes it (`join_session_keyring`: view, read, link), and searched.
    let permissions = POSSESSORS | 0x0013_0000 | MAY_BE_FOUND;
    // SAFETY: takes integers.
    let set = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_SETPERM, ring, permissions) };
    nix::errno::Errno::result(set).map(drop)
}

/// Subjects the calling thread to a seccomp filter (`SECCOMP_SET_MODE_FILTER`).
pub(super) fn set_seccomp_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> nix::Result<()> {
    let program = libc::sock_fprog {
        // The kernel takes 4,096 instructions, and refuses none.
        len: u16::try_from(program.len()).map_err(|_| nix::errno::Errno::EINVAL)?,
        filter: program.as_ptr().cast_mut(),
    };
    let set = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads so many instructions from a slice that lives longer than the call.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, set, flags, &raw const program) };
    nix::errno::Errno::result(done).map(drop)
}

/// Waits until a signal ends the process.
pub(super) fn wait_forever() -> ! {
    loop {
        // SAFETY: pause(2) takes nothing.
        unsafe { libc::pause() };
    }
}

/// Receives one message and the descriptors that came with it (at most 8).
pub(super) fn receive(socket: BorrowedFd<'_>, buf: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [io::IoSliceMut::new(buf)];
    let mut space = nix::cmsg_space!([c_int; 8]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let msg = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for cmsg in msg.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = cmsg {
            // SAFETY: the kernel has just installed these descriptors for this message; nothing else owns them.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((msg.bytes, fds))
}

/// Opens a pidfd of a process that the caller has not reaped yet (`pidfd_open(2)`).
pub(super) fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = nix::errno::Errno::result(fd)?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// Sets the size of a terminal, in characters.
pub(crate) fn set_window_size(pty: BorrowedFd<'_>, rows: u16, columns: u16) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a `winsize`.
    nix::errno::Errno::result(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// Opens the other end of a terminal without looking it up by name (`TIOCGPTPEER`).
pub(super) fn terminal_peer(master: &OwnedFd) -> nix::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value.
    let fd = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let fd = nix::errno::Errno::result(fd)?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
