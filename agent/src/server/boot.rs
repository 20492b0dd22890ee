//! From the initial RAM disk to a system that containers can run on. Nothing here needs a thread.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, symlink},
    path::Path,
    time::Duration,
};

use agent_protocol::GUEST_SHARE;
use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        stat::Mode,
    },
    time::{ClockId, clock_gettime},
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::{
    disk,
    error::{Doing, Result},
    memory::Memory,
    modules, namespaces, sys,
};
/// The folders of the agent's own root.
const OWN: [&str; 6] = ["proc", "sys", "dev", "run", "etc", "sbin"];
/// Those that are the image's, where it has them.
const IMAGE: [&str; 5] = ["bin", "lib", "lib64", "opt", "usr"];
pub(super) const CGROUPS: &str = "/sys/fs/cgroup";
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

/// What a node has, and a kernel by itself has not. The limits are of what one user may take; Linux derives some of them
/// from the memory at boot, and a pod's grows.
const SYSCTLS: &[(&str, &str)] = &[
    // So that a pid is not soon another's.
    ("kernel/pid_max", "4194304"),
    // systemd's `50-default.conf`, and Debian's kernel.
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "1"),
    ("kernel/dmesg_restrict", "1"),
    // Debian 13, Ubuntu 24.04, Fedora.
    ("vm/max_map_count", "1048576"),
    // What Linux allows a machine of 64 GiB, and what watching a large tree takes.
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "1024"),
];

/// Makes what containers need besides. Terminals, shared memory and links in `/dev` are each container's own, and
/// `/run` is in memory like the rest of the root.
pub(super) fn finish() -> Result<Memory> {
    attach("cgroup2", Path::new(CGROUPS), "cgroup2", STRICT, Some("nsdelegate"))?;
    enable_controllers()?;
    for (name, value) in SYSCTLS {
        write(format!("/proc/sys/{name}"), value)?;
    }
    // Files are copied there when no file system is shared.
    fs::create_dir_all(GUEST_SHARE).doing(|| format!("make {GUEST_SHARE}"))?;
    disk::scan_on_demand()?;
    sys::loopback_up().doing(|| "bring the loopback interface up".into())?;
    Memory::at_boot()
}

/// Moves onto a tmpfs: `pivot_root(2)`, which containers need, refuses to leave the initial RAM disk.
///
/// The disk's pages that are still used, the agent's own and the modules', stay where they are.
fn leave_ram_disk() -> Result<()> {
    let root = Path::new("/newroot");
    fs::create_dir(root).doing(|| "make the root".into())?;
    attach("tmpfs", root, "tmpfs", MsFlags::empty(), Some("mode=755,size=50%"))?;
    for name in OWN {
        fs::create_dir(root.join(name)).doing(|| format!("make /{name}"))?;
    }
    let shared = |name: &str| fs::DirBuilder::new().mode(0o1777).create(root.join(name));
    shared("tmp").doing(|| "make /tmp".into())?;
    keep_image(root)?;
    if Path::new("/lib/modules").exists() {
        // The kernel asks for modules by running this; see `modules::serve_kernel`.
        bind("/init", &root.join("sbin/modprobe"), false)?;
    }
    chdir(root).doing(|| "enter the root".into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).doing(|| "move the root".into())?;
    chroot(".").doing(|| "change the root".into())?;
    chdir("/").doing(|| "enter the root".into())
}

/// Keeps what an image has beside the agent: the kernel's modules, and programs for guest hooks or for the packet
/// filter, with the libraries that they need. Our own image has modules at most.
fn keep_image(root: &Path) -> Result<()> {
    for name in IMAGE {
        let (source, target) = (Path::new("/").join(name), root.join(name));
        let what = || format!("keep {}", source.display());
        match fs::symlink_metadata(&source) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Where `/usr` has all of it.
            Ok(found) if found.is_symlink() => {
                let to = fs::read_link(&source).doing(what)?;
                symlink(to, &target).doing(what)?;
            }
            found => {
                found.doing(what)?;
                bind(&source, &target, true)?;
            }
        }
    }
    // The agent has a folder of its own there, for the one file that is below.
    let sbin = Path::new("/sbin");
    if fs::symlink_metadata(sbin).is_ok_and(|found| found.is_dir()) {
        for program in fs::read_dir(sbin).doing(|| "read /sbin".into())? {
            let program = program.doing(|| "read /sbin".into())?;
            if program.file_name() != "modprobe" {
                let target = root.join("sbin").join(program.file_name());
                bind(program.path(), &target, program.path().is_dir())?;
            }
        }
    }
    Ok(())
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

fn bind(source: impl AsRef<Path>, target: &Path, folder: bool) -> Result<()> {
    let source = source.as_ref();
    let made = if folder {
        fs::create_dir(target)
    } else {
        fs::write(target, "")
    };
    made.doing(|| format!("make {}", target.display()))?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .doing(|| format!("keep {}", source.display()))
}

fn attach(source: &str, target: &Path, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, data).doing(|| format!("mount {kind} on {}", target.display()))
}

pub(super) fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).doing(|| format!("write {text:?} to {}", path.display()))
}
