//! The bare boot: QEMU's exec to PID 1 in the guest, with nothing else going on.
//!
//! The machine is described as the shim describes that of a `ctr run` pod, started by the same crate, and its command
//! line is compared with a pod's. The shim's own waterfall would not do as the reference: its boot shares the
//! processors with everything that the shim does meanwhile.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use agent_protocol::{client::Client, protocol::agent::GuestDetailsRequest};
use nix::unistd::{SysconfVar, sysconf};
use tests::{
    config::{self, Guest},
    failure::{Failure, Result, Trying, same},
    places,
};
use tokio::runtime::Runtime;
use vmm::{
    Placement, Spawner, Virtiofsd, VirtiofsdSpec, Vm, VmFds,
    spec::{Accelerator, Channel, FsDevice, Memory, MemoryPlug, Vcpus, VmSpec},
};

/// How long a boot may take.
const BOOT: Duration = Duration::from_secs(60);

/// Starts virtual machines without pods.
pub struct Bare {
    runtime: Runtime,
    spawner: Spawner,
    folder: tempfile::TempDir,
}

/// One boot.
pub struct Boot {
    /// From QEMU's exec to PID 1.
    pub took: Duration,
    /// QEMU's command line.
    pub line: Vec<String>,
}

impl Bare {
    /// Prepares for boots.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<Bare> {
        Ok(Bare {
            runtime: Runtime::new().trying("starting threads")?,
            spawner: Spawner::new().trying("starting a thread")?,
            folder: tempfile::tempdir().trying("making an empty folder to share")?,
        })
    }

    /// Boots a guest and ends it.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boot(&self, guest: Guest) -> Result<Boot> {
        let vhost_vsock = vmm_host::open_device(vmm_host::VHOST_VSOCK.as_ref()).trying("opening the vsock device")?;
        let spec = spec(guest, vhost_vsock.is_some())?;
        self.runtime.block_on(async {
            let share = VirtiofsdSpec {
                program: places::virtiofsd()?,
                shared_dir: self.folder.path().into(),
                cache: "auto".into(),
                extra_args: Vec::new(),
                label: None,
                oom_score_adj: None,
            };
            let (virtiofsd, connection) = Virtiofsd::start(&self.spawner, &share).map_err(refused)?;
            let fds = VmFds {
                fs: Some(connection),
                vhost_vsock,
                ..VmFds::default()
            };
            let placement = Placement {
                netns: None,
                uid: 64620,
                gid: 64620,
                label: None,
                oom_score_adj: None,
            };
            let vm = Vm::start(&self.spawner, &spec, fds, &placement)
                .await
                .map_err(refused)?;
            let booted = first_process(&vm).await;
            let line = command_line(vm.child().pid())?;
            vm.stop().await;
            virtiofsd.child().kill();
            virtiofsd.child().exited().await;
            let took = booted?.duration_since(vm.spawned_at());
            let took = took.map_err(|_| Failure::Claim("the guest's clock runs before its machine".into()))?;
            Ok(Boot { took, line })
        })
    }
}

/// What the shim makes of the harness's configuration for a pod without a network.
fn spec(guest: Guest, vsock: bool) -> Result<VmSpec> {
    let folder = places::guest(guest.name())?;
    let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).map_err(std::io::Error::from);
    let cpus = cpus.trying("counting processors")?.unwrap_or(1);
    Ok(VmSpec {
        name: "bare".into(),
        qemu: PathBuf::from("/usr/bin/qemu-system-x86_64"),
        accelerator: if config::accelerator() == "kvm" {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        },
        kernel: folder.join("vmlinux"),
        initrd: folder.join("initrd"),
        kernel_params: Vec::new(),
        vcpus: Vcpus {
            boot: 1,
            max: u32::try_from(cpus).unwrap_or(1),
        },
        memory: Memory {
            boot_mib: 2048,
            max_mib: host_memory_mib()? & !1,
            plug: match guest {
                Guest::Own | Guest::Tracing => MemoryPlug::VirtioMem,
                Guest::Debian => MemoryPlug::PcDimm { slots: 10 },
            },
        },
        channel: match vsock {
            true => Channel::VhostVsock,
            false => Channel::VirtioSerial,
        },
        fs: Some(FsDevice {
            tag: "kataShared".into(),
            queue_size: 1024,
        }),
        nics: Vec::new(),
        passthrough: vmm::pcie::Passthrough::default(),
        nested: false,
        seccomp: true,
    })
}

/// When the guest's PID 1 began, by the guest's own clock.
async fn first_process(vm: &Vm) -> Result<SystemTime> {
    let stream = vm.agent_stream(BOOT).await.map_err(refused)?;
    let client = Client::new(stream);
    client.check(BOOT).await.map_err(refused)?;
    let details = client
        .get_guest_details(GuestDetailsRequest::new())
        .await
        .map_err(refused)?;
    let answered = SystemTime::now();
    let features = &details.agent_details.extra_features;
    let clock = |key: &str| {
        let value = features
            .iter()
            .find_map(|feature| feature.strip_prefix(key)?.parse::<u64>().ok());
        value.ok_or_else(|| Failure::Claim(format!("the agent does not tell {key}")))
    };
    let since = clock("sandpod.now_us=")? - clock("sandpod.pid1_us=")?;
    Ok(answered - Duration::from_micros(since))
}

/// Fails when a pod's QEMU has other devices or sizes than the bare one.
///
/// # Errors
/// Where the two differ.
pub fn same_machine(bare: &[String], pod: &[String]) -> Result {
    same("the machine of a pod", plain(pod), plain(bare))
}

/// The arguments without the VM's name, the numbers of open files, and the clock's frequency, which is measured anew
/// for each.
fn plain(line: &[String]) -> Vec<String> {
    let named = |at: usize| at > 0 && line[at - 1] == "-name";
    let words = line.iter().enumerate().filter(|(at, _)| !named(*at));
    words
        .map(|(_, word)| {
            let parts = word.split([',', ' ', '/']).map(|part| match part.split_once('=') {
                Some((key @ ("fd" | "vhostfd" | "guest-cid" | "tsc_early_khz" | "lpj"), _)) => key,
                _ if part.parse::<u32>().is_ok() => "N",
                _ => part,
            });
            parts.collect::<Vec<_>>().join(",")
        })
        .collect()
}

/// A process's command line.
///
/// # Errors
/// When it is gone.
pub fn command_line(pid: u32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/cmdline");
    let bytes = fs::read(&path).trying(format!("reading {path}"))?;
    // Each word ends with a NUL.
    let words = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    Ok(words
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect())
}

fn host_memory_mib() -> Result<u64> {
    let table = fs::read_to_string("/proc/meminfo").trying("reading /proc/meminfo")?;
    let line = table.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|kib| kib / 1024)
        .ok_or_else(|| Failure::Claim("/proc/meminfo has no MemTotal".into()))
}

fn refused(error: impl std::error::Error) -> Failure {
    Failure::Claim(format!("a bare boot failed: {error}"))
}
