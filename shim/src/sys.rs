//! The system calls that need `unsafe`, and nothing else.
#![allow(unsafe_code)]

pub mod bpf;

use agent_protocol::idmap::IdMaps;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

nix::ioctl_write_ptr_bad!(
    /// Source: linux/if_tun.h.
    tunsetiff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Makes a tap in the calling thread's network namespace, with a `virtio_net_hdr` before each frame. It is not
/// persistent: it vanishes with the last duplicate of the returned descriptor.
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
        // A number without a process: nobody's any more, one that its children have as that of their session still
        // (EINVAL up to Linux 6.14), or that of a thread (ENOENT since).
        Err(nix::Error::ESRCH | nix::Error::EINVAL | nix::Error::ENOENT) => Ok(None),
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

/// Closes every descriptor above standard error: what a caller has left open must not stay open in a shim that outlives
/// it. To be called before this process has opened anything.
///
/// # Errors
/// `/proc` is not mounted.
pub fn close_inherited() -> io::Result<()> {
    let entries = std::fs::read_dir("/proc/self/fd")?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<libc::c_int>().ok());
    // Collected first: the folder's own descriptor is among them, and closed by then.
    let numbers: Vec<_> = numbers.filter(|number| *number > libc::STDERR_FILENO).collect();
    for number in numbers {
        // SAFETY: nothing in this process owns a descriptor of this number, and the call touches no memory of ours.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// A user namespace with these mappings, in which nobody is. Source: user_namespaces(7).
///
/// # Errors
/// The kernel has no user namespaces, or no more of them.
pub fn user_namespace(maps: &IdMaps) -> io::Result<OwnedFd> {
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    let parent = nix::unistd::getpid().as_raw();
    // SAFETY: without CLONE_VM and without a stack of its own this is fork(2). Of this process's threads only the
    // child's copy of the calling one runs on, and does nothing but system calls, the last for ever.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: none of these takes anything that could be invalid, and nothing of this copy of the process runs on
        // that could own a descriptor.
        unsafe {
            // Fifos and sockets of the shim must not stay open in here.
            libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // A parent that had died before gives no signal.
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0)
        }
    }
    let child = Pid::from_raw(i32::try_from(nix::Error::result(child)?).map_err(io::Error::other)?);
    let filled = || -> io::Result<OwnedFd> {
        for (file, ranges) in maps.files() {
            std::fs::write(format!("/proc/{child}/{file}"), ranges)?;
        }
        Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
    };
    let namespace = filled();
    kill(child, Signal::SIGKILL)?;
    waitpid(child, None)?;
    namespace
}

/// A copy of the mount at `path` that is mounted nowhere; with all that is mounted below it if `recursive`. Until its
/// propagation is changed it is a peer of a shared mount: what is unmounted below it goes from the original too.
/// Source: open_tree(2).
///
/// # Errors
/// No such path, or a mount that may not be bound; a kernel older than 5.2.
pub fn open_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | below.cast_unsigned();
    // SAFETY: the kernel reads a string that ends with a NUL and outlives the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) };
    let tree = i32::try_from(nix::Error::result(tree)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(tree) })
}

/// Makes of the IDs of files what `users`, a user namespace, makes of them, in a copy that [`open_tree`] made; also in
/// what is mounted below it if `recursive`. Source: mount_setattr(2).
///
/// # Errors
/// The file system cannot map IDs, or the kernel is older than 5.12.
pub fn map_ids(tree: &OwnedFd, recursive: bool, users: &OwnedFd) -> io::Result<()> {
    let users = u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?;
    set_attributes(tree, recursive, libc::MOUNT_ATTR_IDMAP, users)
}

/// Lets nobody open a device file in a copy that [`open_tree`] made, nor in what is mounted below it. Source:
/// mount_setattr(2).
///
/// # Errors
/// The kernel is older than 5.12 (`ENOSYS`).
pub fn forbid_devices(tree: &OwnedFd) -> io::Result<()> {
    set_attributes(tree, true, libc::MOUNT_ATTR_NODEV, 0)
}

fn set_attributes(tree: &OwnedFd, recursive: bool, attributes: u64, users: u64) -> io::Result<()> {
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: users,
    };
    // SAFETY: the descriptors are open, the name is an empty string, and the kernel reads one `mount_attr` of the size
    // that it is told.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    nix::Error::result(set).map(drop).map_err(Into::into)
}

/// Mounts what [`open_tree`] made. Source: move_mount(2).
///
/// # Errors
/// No such place, or a folder on a file.
pub fn mount_copy(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let name = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: the descriptor is open, and both strings end with a NUL and outlive the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            name.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    nix::Error::result(moved).map(drop).map_err(Into::into)
}
