//! System calls that have no safe wrapper in our dependencies, and nothing else.
#![allow(unsafe_code)]

use std::{
    fs, io,
    ops::Range,
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
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, SigSet, SigmaskHow, Signal, signal},
        stat::Mode,
    },
    unistd::{ForkResult, Gid, Uid, chdir, fork, setgroups, setresgid, setresuid, write},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The name of a keeper in process lists.
const KEEPER: &std::ffi::CStr = c"vm-keeper";

/// What a child's core dump holds (core(5)): its own memory, and not the guest's, which it shares. A guest that makes
/// its server crash would otherwise fill the node's disk with it.
const DUMPED: &str = "0x31";

/// What a child does between fork and exec.
#[derive(Debug, Default)]
pub(crate) struct ChildSetup {
    /// SELinux label of the program that is executed.
    pub label: Option<String>,
    /// How readily the OOM killer takes it (proc_pid_oom_score_adj(5)); as readily as its parent without.
    pub oom_score_adj: Option<i32>,
    /// Network namespace to enter.
    pub netns: Option<OwnedFd>,
    /// Whether it has a mount namespace of its own, in which `/proc` shows the processes of its PID namespace only.
    pub own_proc: bool,
    /// Identity to take on for good; without one the child stays who the parent is.
    pub user: Option<User>,
    /// Capabilities that the program cannot have, by their numbers (capabilities(7)).
    pub without: &'static [u8],
    /// Its soft limit of open files; its parent's without.
    pub open_files: Option<u64>,
    /// Bytes of memory that it may lock, whoever it is; as many as its parent without.
    pub locked_memory: Option<u64>,
    /// It keeps its capabilities while it acts as another user (`SECBIT_NO_SETUID_FIXUP` of capabilities(7)).
    pub keep_capabilities: bool,
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
    let score = setup.oom_score_adj.map(|score| score.to_string());
    // SAFETY: between fork and exec the closure only makes system calls and reads memory that was filled before; it
    // neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || setup.apply(score.as_deref()).map_err(io::Error::from)) };
}

impl ChildSetup {
    fn apply(&self, oom_score_adj: Option<&str>) -> Result<(), Errno> {
        if let Some(score) = oom_score_adj {
            match write_to(c"/proc/self/oom_score_adj", score) {
                // To lower it takes a privilege (CAP_SYS_RESOURCE); a VM that is not protected runs all the same.
                Ok(()) | Err(Errno::EACCES) => {}
                Err(error) => return Err(error),
            }
        }
        match write_to(c"/proc/self/coredump_filter", DUMPED) {
            // A kernel that dumps no memory.
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
        if let Some(label) = &self.label {
            set_exec_label(label)?;
        }
        if let Some(netns) = &self.netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        if self.own_proc {
            own_proc()?;
        }
        if let Some(files) = self.open_files {
            let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
            setrlimit(Resource::RLIMIT_NOFILE, files.min(most), most)?;
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
        }
        if self.keep_capabilities {
            keep_capabilities()?;
        }
        for capability in self.without {
            drop_capability(*capability)?;
        }
        prctl::set_no_new_privs()?;
        // A change of credentials clears the death signal, so it comes after. An exec that changes the SELinux domain
        // clears it too: then the keeper's end is what ends the child.
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        for fd in &self.inherit {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    }
}

/// Lets the program that this process executes keep its capabilities when it changes its user. Allocates nothing.
fn keep_capabilities() -> Result<(), Errno> {
    // <linux/securebits.h>
    const NO_SETUID_FIXUP: libc::c_int = 1 << 2;
    // SAFETY: PR_GET_SECUREBITS takes nothing and PR_SET_SECUREBITS an integer.
    let bits = Errno::result(unsafe { libc::prctl(libc::PR_GET_SECUREBITS) })?;
    // SAFETY: as above.
    let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, (bits | NO_SETUID_FIXUP) as libc::c_ulong) };
    Errno::result(set).map(drop)
}

/// Tells the kernel the label of the program that this thread executes next (proc_pid_attr(5)). Allocates nothing.
fn set_exec_label(label: &str) -> Result<(), Errno> {
    write_to(c"/proc/thread-self/attr/exec", label).map_err(|error| match error {
        // A kernel without labels has no such file; the error of a program that is missing must not be the same.
        Errno::ENOENT => Errno::ENOTSUP,
        error => error,
    })
}

/// Writes to a file of the kernel's. Allocates nothing.
fn write_to(path: &std::ffi::CStr, text: &str) -> Result<(), Errno> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, text.as_bytes()).map(drop)
}

/// Leaves the mount namespace for a copy whose `/proc` shows this process's PID namespace. Allocates nothing.
///
/// What the host unmounts later goes from the copy too, so that it keeps no volume busy.
fn own_proc() -> Result<(), Errno> {
    const NONE: Option<&std::ffi::CStr> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, c"/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(c"proc"), c"/proc", Some(c"proc"), flags, NONE)
}

/// Takes a capability out of what the program that is executed next can have; one that the kernel does not know is
/// nobody's.
fn drop_capability(number: u8) -> Result<(), Errno> {
    // SAFETY: the call takes integers only.
    let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
    match Errno::result(dropped) {
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Lets this process have as many open files as it may. Returns the limits that it was started with, soft and hard.
pub(crate) fn raise_open_files() -> io::Result<(u64, u64)> {
    /// What the kernel itself allows by default (`nr_open` in proc_sys_fs(5)).
    const MOST: u64 = 1 << 20;
    let (now, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, now.max(most.min(MOST)), most)?;
    Ok((now, most))
}

/// Makes a PID namespace for the children that this thread starts from now on, and its first process, the keeper, which
/// ends with this process: by its death signal, and because it watches this process. With it the kernel ends
/// everything in the namespace (pid_namespaces(7)). Returns its number here.
///
/// It executes no program, so no security module takes its death signal away, and it can be killed by nobody but who
/// may kill this process.
pub(crate) fn fork_keeper() -> io::Result<u32> {
    // A thread can leave its own namespace once only, so it goes back there first.
    let own = open(c"/proc/self/ns/pid", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    setns(&own, CloneFlags::CLONE_NEWPID)?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let parent = pidfd_open(std::process::id())?;
    let (arguments, memory) = (arguments()?, memory((&raw const parent).addr())?);
    // No handler of this process is to run in the keeper.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the child never returns from `keep`, which only makes system calls and uses this stack and the
    // arguments; it neither allocates nor takes a lock.
    let forked = unsafe { fork() };
    if let Ok(ForkResult::Child) = forked {
        keep(parent.as_raw_fd(), &arguments, &memory);
    }
    mask.thread_set_mask()?;
    match forked? {
        ForkResult::Parent { child } => Ok(child.as_raw().unsigned_abs()),
        ForkResult::Child => unreachable!("`keep` does not return"),
    }
}

/// Where this process's command line is in memory (`arg_start` and `arg_end` of proc_pid_stat(5)).
fn arguments() -> io::Result<Range<usize>> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rfind(')').map(|end| &stat[end + 1..]).unwrap_or_default();
    // The first one after the name is the third.
    let mut fields = fields.split_whitespace().skip(48 - 3).map(str::parse);
    match (fields.next(), fields.next()) {
        (Some(Ok(start)), Some(Ok(end))) if start <= end => Ok(start..end),
        _ => Err(io::Error::other(
            "/proc/self/stat does not tell where the command line is",
        )),
    }
}

/// Parts of a process's memory, by their addresses and lengths; unused entries are empty.
type Memory = [(usize, usize); 64];

/// What this process has written and a copy of it that only waits has no use for (proc_pid_maps(5)): heaps and stacks,
/// but for the stack with the address `own`. The variables of the program itself, which follow its file, stay too.
fn memory(own: usize) -> io::Result<Memory> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut memory: Memory = [(0, 0); 64];
    let mut unused = memory.iter_mut();
    let mut file_ends = 0;
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().unwrap_or_default(), fields.next());
        let (inode, name) = (fields.nth(2), fields.next().unwrap_or_default());
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let address = |text| usize::from_str_radix(text, 16).map_err(io::Error::other);
        let (start, end) = (address(start)?, address(end)?);
        if inode != Some("0") {
            file_ends = end;
        } else if mode == Some("rw-p")
            && matches!(name, "" | "[heap]" | "[stack]")
            && start != file_ends
            && !(start..end).contains(&own)
            && let Some(part) = unused.next()
        {
            *part = (start, end - start);
        }
    }
    Ok(memory)
}

/// The keeper's life: it holds nothing and waits for the end of `parent`, a pidfd. Its children are those whose
/// parents have ended; the kernel removes them.
fn keep(parent: RawFd, arguments: &Range<usize>, memory: &Memory) -> ! {
    // SAFETY: SIGCHLD gets no handler. The memory is this process's own copy, of which only this stack and the
    // program's variables are in use from here on: the rest may become zeros, and the arguments the name, which is cut
    // to their length. The calls take integers and pointers to what outlives them.
    unsafe {
        let _best_effort = (
            prctl::set_pdeathsig(Signal::SIGKILL),
            signal(Signal::SIGCHLD, SigHandler::SigIgn),
            prctl::set_name(KEEPER),
            chdir(c"/"),
        );
        for (start, length) in memory {
            libc::madvise(*start as *mut libc::c_void, *length, libc::MADV_DONTNEED);
        }
        let name = KEEPER.to_bytes();
        std::ptr::write_bytes(arguments.start as *mut u8, 0, arguments.len());
        std::ptr::copy_nonoverlapping(
            name.as_ptr(),
            arguments.start as *mut u8,
            name.len().min(arguments.len().saturating_sub(1)),
        );
        // The pidfd becomes the only open file.
        libc::dup2(parent, 0);
        if libc::syscall(libc::SYS_close_range, 1, libc::c_uint::MAX, 0) != 0 {
            // Linux before 5.9.
            let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(most, _)| most);
            for fd in 1..i32::try_from(most).unwrap_or(i32::MAX) {
                libc::close(fd);
            }
        }
        let mut end = libc::pollfd {
            fd: 0,
            events: libc::POLLIN,
            revents: 0,
        };
        // Every signal is blocked but the one that ends it; a debugger may interrupt it.
        while libc::poll(&raw mut end, 1, -1) < 0 && Errno::last() == Errno::EINTR {}
        libc::_exit(0)
    }
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
