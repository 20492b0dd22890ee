//! System calls that have no safe wrapper in our dependencies, and nothing else.
#![allow(unsafe_code)]

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open},
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        stat::Mode,
    },
    unistd::{Gid, Pid, Uid, getppid, setgroups, setresgid, setresuid, write},
};
use tokio::io::{Interest, unix::AsyncFd};

/// What a child does between fork and exec.
#[derive(Debug, Default)]
pub(crate) struct ChildSetup {
    /// SELinux label of the program that is executed.
    pub label: Option<String>,
    /// Network namespace to enter.
    pub netns: Option<OwnedFd>,
    /// Identity to take on for good; without one the child stays who the parent is.
    pub user: Option<User>,
    /// Bytes of memory that it may lock, whoever it is; as many as its parent without.
    pub locked_memory: Option<u64>,
    /// Files that stay open across exec, under the numbers they have here.
    pub inherit: Vec<OwnedFd>,
}

/// An unprivileged identity.
#[derive(Debug)]
pub(crate) struct User {
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
}

/// Makes `command` run `setup` in the child. The child dies with the thread that spawns it.
pub(crate) fn prepare(command: &mut Command, setup: ChildSetup) {
    let parent = Pid::this();
    // SAFETY: between fork and exec the closure only makes system calls and reads memory that was filled before; it
    // neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || setup.apply(parent).map_err(io::Error::from)) };
}

impl ChildSetup {
    fn apply(&self, parent: Pid) -> Result<(), Errno> {
        if let Some(label) = &self.label {
            set_exec_label(label)?;
        }
        if let Some(netns) = &self.netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        if let Some(bytes) = self.locked_memory {
            // To raise what the parent may have takes a privilege of its own, so it is not touched where it is enough.
            let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
            setrlimit(Resource::RLIMIT_MEMLOCK, bytes, most.max(bytes))?;
        }
        if let Some(user) = &self.user {
            setgroups(&user.groups)?;
            setresgid(user.gid, user.gid, user.gid)?;
            setresuid(user.uid, user.uid, user.uid)?;
            prctl::set_no_new_privs()?;
        }
        // A change of credentials clears the death signal, so it comes after; and it says nothing of a parent that
        // was dead before, so the parent is checked after that.
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != parent {
            return Err(Errno::ESRCH);
        }
        for fd in &self.inherit {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    }
}

/// Tells the kernel the label of the program that this thread executes next (proc_pid_attr(5)). Allocates nothing.
fn set_exec_label(label: &str) -> Result<(), Errno> {
    let opened = open(
        c"/proc/thread-self/attr/exec",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    // A kernel without labels has no such file; the error of a program that is missing must not be the same.
    let file = opened.map_err(|error| if error == Errno::ENOENT { Errno::ENOTSUP } else { error })?;
    write(&file, label.as_bytes()).map(drop)
}

/// A file descriptor that stands for the process `pid`, a child that nobody has waited for yet.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and returns a new descriptor (close-on-exec) or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for `fd` to become readable, which for a pidfd is the end of its process.
pub(crate) fn readiness(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` keeps this one descriptor open, under this number, for as long as the reactor knows of it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Sends `signal` to the process behind `pidfd`.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> Result<(), Errno> {
    // SAFETY: pidfd_send_signal(2) takes a descriptor, an integer and, here, no further information.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<u8>(),
            0,
        )
    };
    Errno::result(sent).map(drop)
}

/// Gives the vhost-vsock device `vhost` the context id `cid`, which its closing gives back.
pub(crate) fn vhost_vsock_set_guest_cid(vhost: BorrowedFd<'_>, cid: u64) -> Result<(), Errno> {
    // VHOST_VSOCK_SET_GUEST_CID of <linux/vhost.h>.
    const REQUEST: libc::c_ulong = nix::request_code_write!(0xaf, 0x60, size_of::<u64>());
    // SAFETY: the request reads one u64, which outlives the call.
    let set = unsafe { libc::ioctl(vhost.as_raw_fd(), REQUEST, &raw const cid) };
    Errno::result(set).map(drop)
}

/// The CPU's time stamp counter.
pub(crate) fn time_stamp_counter() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets user space run it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
