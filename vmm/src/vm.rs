//! A running virtual machine.
//!
//! ```text
//! VmSpec ──start──▶ running ──stop, guest shuts down, QEMU dies, parent dies──▶ ended
//! ```

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use nix::unistd::{Gid, Uid};
use tokio::{net::UnixStream, sync::Mutex, time::timeout};
use vmm_host::kvm_ready;

use crate::{
    args::{self, FdNumbers},
    channel::{AgentStream, Link, Prepared},
    clock::Moment,
    disk::Disks,
    error::VmError,
    process::{Child, ExitReason, Spawner},
    qmp::Qmp,
    spec::{Accelerator, Channel, VmSpec},
    sys::{ChildSetup, User},
    tail::Tail,
};

/// Where and as whom QEMU runs.
#[derive(Debug)]
pub struct Placement {
    /// Network namespace to run in; ours without one.
    pub netns: Option<OwnedFd>,
    /// User id; needs no account.
    pub uid: u32,
    /// Group id; the owner group of `/dev/kvm` comes in addition where KVM is used.
    pub gid: u32,
    /// SELinux label to run with; that which the host's policy gives without one.
    pub label: Option<String>,
    /// How readily the OOM killer takes it, -1000 to 1000 (proc_pid_oom_score_adj(5)); as readily as this process
    /// without.
    pub oom_score_adj: Option<i32>,
}

/// Open files that QEMU takes over.
#[derive(Debug, Default)]
pub struct VmFds {
    /// The connection to virtiofsd; present exactly if the VM has a virtiofs device.
    pub fs: Option<OwnedFd>,
    /// `/dev/vhost-vsock`; present exactly if the agent is reached by it.
    pub vhost_vsock: Option<OwnedFd>,
    /// One tap per interface, in order.
    pub taps: Vec<OwnedFd>,
    /// Empty, or one open `/dev/vhost-net` per interface.
    pub vhost_net: Vec<OwnedFd>,
}

/// A running VM. Dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    pub(crate) qmp: Qmp,
    pub(crate) spec: VmSpec,
    /// Held while the VM is resized: one change at a time.
    pub(crate) resizing: Mutex<()>,
    pub(crate) disks: Mutex<Disks>,
    /// Whether an interface has come since the start.
    pub(crate) late_nic: Mutex<bool>,
    link: Link,
    console: Tail,
    log: Tail,
    spawned_at: SystemTime,
    qmp_ready_at: SystemTime,
}

/// Everything that is handed to QEMU.
struct Wiring {
    numbers: FdNumbers,
    inherit: Vec<OwnedFd>,
    link: Link,
    qmp: StdUnixStream,
    console: Tail,
}

impl Vm {
    /// Validates the description, checks the accelerator, starts QEMU and shakes hands with it. The guest boots
    /// meanwhile.
    ///
    /// # Errors
    /// When the description or the files are contradictory, KVM is asked for and not there, a file cannot be opened,
    /// or QEMU does not come up; then the error holds QEMU's own words.
    pub async fn start(spawner: &Spawner, spec: &VmSpec, fds: VmFds, placement: &Placement) -> Result<Vm, VmError> {
        spec.validate()?;
        fds.check(spec)?;
        if spec.accelerator == Accelerator::Kvm {
            kvm_ready()?;
        }
        let wiring = Wiring::new(spec, fds, spawner.born())?;
        let (log, stderr) = Tail::pipe().map_err(VmError::system("make a pipe for QEMU's log"))?;
        let mut command = Command::new(&spec.qemu);
        command.args(args::render(spec, &wiring.numbers));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let setup = ChildSetup {
            label: placement.label.clone(),
            oom_score_adj: placement.oom_score_adj,
            netns: duplicate(placement.netns.as_ref())?,
            own_proc: true,
            locked_memory: locked_memory(spec),
            user: Some(identity(spec.accelerator, placement)?),
            inherit: wiring.inherit,
            ..ChildSetup::default()
        };

        let spawned_at = SystemTime::now();
        let spawned = spawner.start(command, setup);
        let child = spawned.map_err(|source| VmError::spawn(&spec.qemu, placement.label.as_deref(), source))?;
        let qmp = async {
            Qmp::connect(UnixStream::from_std(wiring.qmp).map_err(VmError::system("talk to QEMU"))?)
                .await
                .map_err(VmError::from)
        };
        let qmp = match qmp.await {
            Ok(qmp) => qmp,
            Err(error) => return Err(explain(error, &child, &log).await),
        };
        Ok(Vm {
            child,
            qmp,
            spec: spec.clone(),
            resizing: Mutex::new(()),
            disks: Mutex::default(),
            late_nic: Mutex::default(),
            link: wiring.link,
            console: wiring.console,
            log,
            spawned_at,
            qmp_ready_at: SystemTime::now(),
        })
    }

    /// The QEMU process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// When QEMU was started.
    pub fn spawned_at(&self) -> SystemTime {
        self.spawned_at
    }

    /// When QEMU had answered and the guest's first instruction was about to run.
    pub fn qmp_ready_at(&self) -> SystemTime {
        self.qmp_ready_at
    }

    /// A stream to the agent. Over virtio-serial it is there at once, before the guest is up, and only once.
    ///
    /// # Errors
    /// When the agent cannot be reached within `deadline`, or the one stream has been taken.
    pub async fn agent_stream(&self, deadline: Duration) -> Result<AgentStream, VmError> {
        self.link.open(deadline).await
    }

    /// Resolves with the reason when QEMU has sent something on its monitor that is not its protocol: the VM runs, and
    /// nobody can resize it or give it a device any more. Never when it has ended.
    pub async fn monitor_lost(&self) -> String {
        self.qmp.nonsense().await
    }

    /// Ends the VM at once, whatever state it is in, and waits until the kernel has taken it down. Can be called again,
    /// and then returns the same.
    ///
    /// QEMU is killed, not asked: it holds nothing that it would have to write out, and a guest that has broken into it
    /// has no say.
    pub async fn stop(&self) -> ExitReason {
        self.child.kill();
        self.child.exited().await
    }

    /// The last 64 KiB of the guest's console.
    pub fn console_tail(&self) -> String {
        self.console.text()
    }

    /// The same of a VM that has ended: what is on its way is waited for, a second at most.
    pub async fn console_last_words(&self) -> String {
        self.console.last_words().await
    }

    /// The last 64 KiB of what QEMU wrote to its standard error.
    pub fn log_tail(&self) -> String {
        self.log.text()
    }
}

impl VmFds {
    fn check(&self, spec: &VmSpec) -> Result<(), VmError> {
        let same = |device, devices, files| {
            if devices == files {
                Ok(())
            } else {
                Err(VmError::Files { device, devices, files })
            }
        };
        same(
            "virtiofs",
            usize::from(spec.fs.is_some()),
            usize::from(self.fs.is_some()),
        )?;
        same(
            "vhost-vsock",
            usize::from(spec.channel == Channel::VhostVsock),
            usize::from(self.vhost_vsock.is_some()),
        )?;
        same("network", spec.nics.len(), self.taps.len())?;
        if self.vhost_net.is_empty() {
            Ok(())
        } else {
            same("vhost-net", spec.nics.len(), self.vhost_net.len())
        }
    }
}

impl Wiring {
    fn new(spec: &VmSpec, fds: VmFds, born: Moment) -> Result<Wiring, VmError> {
        let (kernel, initrd) = (open(&spec.kernel)?, open(&spec.initrd)?);
        let (qmp, qmp_qemu) = socket_pair()?;
        let (console, console_qemu) = socket_pair()?;
        let Prepared { link, wiring, inherit } = Link::prepare(&spec.channel, fds.vhost_vsock)?;
        let number = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<RawFd>>();
        let numbers = FdNumbers {
            kernel: kernel.as_raw_fd(),
            initrd: initrd.as_raw_fd(),
            qmp: qmp_qemu.as_raw_fd(),
            console: console_qemu.as_raw_fd(),
            channel: wiring,
            fs: fds.fs.as_ref().map(AsRawFd::as_raw_fd),
            taps: number(&fds.taps),
            vhost_net: number(&fds.vhost_net),
            tsc_khz: born.tsc_khz(),
        };
        let length = args::command_line(spec, &numbers).len();
        if length > args::LONGEST_COMMAND_LINE {
            return Err(crate::spec::SpecError::CommandLine(length).into());
        }
        let mut given = vec![kernel, initrd, qmp_qemu.into(), console_qemu.into(), inherit];
        given.extend(fds.fs.into_iter().chain(fds.taps).chain(fds.vhost_net));
        let console = UnixStream::from_std(console).map_err(VmError::system("read the guest's console"))?;
        Ok(Wiring {
            numbers,
            inherit: given,
            link,
            qmp,
            console: Tail::follow(console),
        })
    }
}

/// Our end (for tokio) and QEMU's end.
fn socket_pair() -> Result<(StdUnixStream, StdUnixStream), VmError> {
    let (ours, theirs) = StdUnixStream::pair().map_err(VmError::system("make a socket pair for QEMU"))?;
    ours.set_nonblocking(true)
        .map_err(VmError::system("make a socket pair for QEMU"))?;
    Ok((ours, theirs))
}

/// Opened here, as root, so that the folder need not be reachable for QEMU's user.
fn open(path: &Path) -> Result<OwnedFd, VmError> {
    let opened = File::open(path).and_then(|file| match file.metadata()?.is_file() {
        true => Ok(file.into()),
        // QEMU would read nothing from it, and complain of something else.
        false => Err(io::Error::other("not a regular file")),
    });
    opened.map_err(|source| VmError::Open {
        path: path.into(),
        source,
    })
}

fn duplicate(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, VmError> {
    fd.map(OwnedFd::try_clone)
        .transpose()
        .map_err(VmError::system("duplicate the network namespace's descriptor"))
}

fn identity(accelerator: Accelerator, placement: &Placement) -> Result<User, VmError> {
    let groups = match accelerator {
        Accelerator::Tcg => Vec::new(),
        Accelerator::Kvm => {
            let device = nix::sys::stat::stat("/dev/kvm").map_err(VmError::system("look at /dev/kvm"))?;
            vec![Gid::from_raw(device.st_gid)]
        }
    };
    Ok(User {
        uid: Uid::from_raw(placement.uid),
        gid: Gid::from_raw(placement.gid),
        groups,
    })
}

/// A device of the host reaches the guest's memory by addresses that the kernel fixes, all of it; the rest of QEMU that
/// it counts, such as firmware, is below a GiB (libvirt's `qemuDomainGetMemLockLimitBytes` takes as much).
fn locked_memory(spec: &VmSpec) -> Option<u64> {
    (!spec.passthrough.is_empty()).then(|| (spec.memory.max_mib + 1024) << 20)
}

/// A QEMU that hangs up before it has answered is about to die; its last words say why.
async fn explain(error: VmError, child: &Child, log: &Tail) -> VmError {
    match timeout(Duration::from_secs(2), child.exited()).await {
        Ok(reason) => VmError::died("QEMU", reason, &log.last_words().await),
        Err(_) => error,
    }
}
