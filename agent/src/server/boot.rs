//! From the initial RAM disk to a system that containers can run on. Nothing here needs a thread.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path, time::Duration};

use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        stat::Mode,
        sysinfo::sysinfo,
    },
    time::{ClockId, clock_gettime},
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::{
    disk,
    error::{Doing, Result},
    modules, namespaces, sys,
};

const CGROUPS: &str = "/sys/fs/cgroup";
const STRICT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
/// What a container may have open: what a container on a node gets.
const OPEN_FILES: u64 = 1 << 20;

/// The guest's clock since its kernel began.
pub(super) fn clock() -> Duration {
    // CLOCK_BOOTTIME exists in every kernel that has cgroup v2.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Leaves the initial RAM disk and makes what it takes to speak to the host and to fork the engine's helper: devices,
/// limits, and the modules without which there is no channel. The other modules are returned.
pub(super) fn begin() -> Result<modules::Boot> {
    let mut boot = modules::Boot::read()?;
    leave_ram_disk()?;
    let (nosuid, strict) = (MsFlags::MS_NOSUID, STRICT);
    attach("proc", Path::new("/proc"), "proc", strict, None)?;
    // Before there is a view of the network.
    namespaces::join()?;
    attach("sysfs", Path::new("/sys"), "sysfs", strict, None)?;
    attach("devtmpfs", Path::new("/dev"), "devtmpfs", nosuid, Some("mode=755"))?;
    if boot.load_until_channel()? {
        // The console came with a module, so the kernel could not open it for PID 1.
        reopen_console()?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).doing(|| "raise the limit of open files".into())?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).doing(|| "raise the limit of processes".into())?;
    // For the helper; the engine gives containers their own.
    write("/proc/self/oom_score_adj", "-1000")?;
    Ok(boot)
}

/// Makes what containers need besides. Terminals, shared memory and links in `/dev` are each container's own, and `/run`
/// is in memory like the rest of the root.
pub(super) fn finish() -> Result<()> {
    attach("cgroup2", Path::new(CGROUPS), "cgroup2", STRICT, Some("nsdelegate"))?;
    enable_controllers()?;
    // As many processes as a node has, so that a pid is not soon another's.
    write("/proc/sys/kernel/pid_max", "4194304")?;
    limit_reserve()?;
    disk::scan_on_demand()?;
    sys::loopback_up().doing(|| "bring the loopback interface up".into())
}

/// Where transparent huge pages may be asked for, the kernel keeps some 35 MiB out of use to have them at hand. The pod
/// gets them, and the kernel its usual reserve for such a machine (`init_per_zone_wmark_min` in its `mm/page_alloc.c`).
fn limit_reserve() -> Result<()> {
    const RESERVE: &str = "/proc/sys/vm/min_free_kbytes";
    let memory = sysinfo().doing(|| "ask for the size of the memory".into())?.ram_total();
    let usual = (memory / 1024 * 16).isqrt();
    let now = fs::read_to_string(RESERVE).doing(|| format!("read {RESERVE}"))?;
    match now.trim().parse::<u64>() {
        Ok(now) if now > usual => write(RESERVE, &usual.to_string()),
        _ => Ok(()),
    }
}

/// Moves onto a tmpfs: `pivot_root(2)`, which containers need, refuses to leave the initial RAM disk.
///
/// The disk's pages that are still used, the agent's own and the modules', stay where they are.
fn leave_ram_disk() -> Result<()> {
    let root = Path::new("/newroot");
    fs::create_dir(root).doing(|| "make the root".into())?;
    attach("tmpfs", root, "tmpfs", MsFlags::empty(), Some("mode=755,size=50%"))?;
    for name in ["proc", "sys", "dev", "run", "etc", "sbin", "lib"] {
        fs::create_dir(root.join(name)).doing(|| format!("make /{name}"))?;
    }
    let shared = |name: &str| fs::DirBuilder::new().mode(0o1777).create(root.join(name));
    shared("tmp").doing(|| "make /tmp".into())?;
    if Path::new("/lib/modules").exists() {
        bind("/lib/modules", &root.join("lib/modules"), true)?;
        // The kernel asks for modules by running this; see `modules::serve_kernel`.
        bind("/init", &root.join("sbin/modprobe"), false)?;
    }
    chdir(root).doing(|| "enter the root".into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).doing(|| "move the root".into())?;
    chroot(".").doing(|| "change the root".into())?;
    chdir("/").doing(|| "enter the root".into())
}

/// Containers' cgroups get every controller that the kernel has.
fn enable_controllers() -> Result<()> {
    let all = fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers"))
        .doing(|| "read the cgroup controllers".into())?;
    let wanted: Vec<_> = all.split_whitespace().map(|name| format!("+{name}")).collect();
    write(Path::new(CGROUPS).join("cgroup.subtree_control"), &wanted.join(" "))
}

fn reopen_console() -> Result<()> {
    let console = nix::fcntl::open(
        "/dev/console",
        OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    // A guest may have no console: then PID 1 keeps /dev/null.
    let Ok(console) = console else { return Ok(()) };
    dup2_stdin(&console)
        .and_then(|()| dup2_stdout(&console))
        .and_then(|()| dup2_stderr(&console))
        .doing(|| "use the console".into())
}

fn bind(source: &str, target: &Path, folder: bool) -> Result<()> {
    let made = if folder {
        fs::create_dir(target)
    } else {
        fs::write(target, "")
    };
    made.doing(|| format!("make {}", target.display()))?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).doing(|| format!("keep {source}"))
}

fn attach(source: &str, target: &Path, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, data).doing(|| format!("mount {kind} on {}", target.display()))
}

pub(super) fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).doing(|| format!("write {text:?} to {}", path.display()))
}
