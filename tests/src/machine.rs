//! A whole node in an emulated machine: its own kernel, systemd, cgroup v2, KVM with kernel vsock and vhost-net. It can
//! be rebooted, and its power can be cut.
//!
//! QEMU's TCG emulates AMD's virtualization, so the node's KVM is real wherever the tests run. The disk is an overlay
//! of the image that `tests/node/image.sh` makes. This machine's workspace and cache are there under the same paths,
//! read-only; what is built anew is in the node without another image. Commands go over a virtio-serial port to a
//! runner in the node.

mod channel;
mod kubelet;
mod pods;
mod suite;
pub mod wire;

use std::{
    env,
    ffi::OsString,
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use self::{channel::Channel, wire::Run};
pub use self::{
    channel::Running,
    kubelet::{Kubelet, OVERHEAD_MIB},
    pods::{Container, Pod, PodSpec},
};
use crate::{
    failure::{Failure, Result, Trying},
    places,
    run::{self, Output},
    wait::Bell,
};

/// A variable of the environment: when it is set, each command that runs in the node is said.
const SAY: &str = "SANDPOD_SAY_COMMANDS";

/// How long a boot may take: half a minute on two idle processors.
const BOOT: Duration = Duration::from_secs(600);

/// How long an ordinary command in the node may take: everything is some ten times slower there, and more on a machine
/// that does other work.
pub const ORDINARY: Duration = Duration::from_secs(600);

/// How long a node may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(600);

/// The node's kernel line. Its journal and console tell what happened, so nothing is asked at the console. Its kernel
/// trusts the processors' clock, else its KVM gives guests no clock to follow.
const KERNEL_LINE: &str = "console=ttyS0 root=/dev/vda rw quiet panic=-1 fsck.mode=skip systemd.show_status=true \
                           TERM=dumb no_timer_check tsc=reliable";

/// The file of the node's spare disk, in the node's folder.
const SPARE_DISK: &str = "spare.img";

/// The address of the node's spare network card.
pub const SPARE_MAC: &str = "52:54:00:5a:4d:01";

/// What a node is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSpec {
    /// Its RAM.
    pub memory_mib: u32,
    /// What its kernel asks before it lets a program do something.
    pub security: Security,
    /// Whether it has devices to give away: an NVMe disk and a network card, behind an IOMMU.
    pub spare_devices: bool,
}

impl Default for MachineSpec {
    fn default() -> Self {
        MachineSpec {
            memory_mib: 5120,
            security: Security::AppArmor,
            spare_devices: false,
        }
    }
}

/// A security module of Linux. The node's image is the same for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Debian's own choice.
    AppArmor,
    /// Enforcing, with the policy in `tests/node/image/etc/selinux/node`.
    SeLinux,
}

impl Security {
    /// What the kernel line says of it.
    fn kernel_line(self) -> &'static str {
        match self {
            Security::AppArmor => "",
            Security::SeLinux => " security=selinux enforcing=1",
        }
    }
}

/// A node; it and everything of it is gone when this is dropped.
#[derive(Debug)]
pub struct Machine {
    // Before the folder: QEMU has files in it.
    power: Option<Power>,
    spec: MachineSpec,
    image: PathBuf,
    folder: TempDir,
    serial: AtomicU32,
}

/// QEMU, and the way into the node, from one boot to its end.
#[derive(Debug)]
struct Power {
    channel: Channel,
    pid: i32,
    boot: String,
    // A thread of its own: the kernel ends QEMU with the thread that has started it.
    keeper: Option<JoinHandle<std::io::Result<ExitStatus>>>,
}

impl Machine {
    /// Boots a node. Its containerd runs, without images but those that its pods need (see [`Machine::load_images`]).
    ///
    /// # Errors
    /// When something it needs has not been made, or it does not come up; with the end of its console then.
    pub fn boot(spec: MachineSpec) -> Result<Machine> {
        let image = places::node_image()?;
        let folder = tempfile::Builder::new()
            .prefix("sandpod-machine-")
            .tempdir_in("/var/tmp")
            .trying("making a folder for the node")?;
        let mut overlay = Command::new("qemu-img");
        overlay.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        overlay
            .arg(image.join("root.img"))
            .arg(folder.path().join("disk.qcow2"));
        run::succeed(&mut overlay, run::ORDINARY)?;
        let spare = fs::File::create(folder.path().join(SPARE_DISK));
        spare
            .and_then(|spare| spare.set_len(64 << 20))
            .trying("making the node's spare disk")?;
        let mut machine = Machine {
            power: None,
            spec,
            image,
            folder,
            serial: 0.into(),
        };
        machine.power_on()?;
        Ok(machine)
    }

    /// Turns it on, with the disk as it is.
    ///
    /// # Errors
    /// When it does not come up; with the end of its console.
    pub fn power_on(&mut self) -> Result {
        let mut command = emulator(&self.image);
        command.args(self.qemu()?);
        let power = Power::on(command)?;
        // From here on it is ended with the node.
        let power = self.power.insert(power);
        match power.channel.greeting(BOOT) {
            Ok(boot) => power.boot = boot,
            Err(failure) => return Err(self.with_evidence(&failure)),
        }
        self.furnish()
    }

    /// QEMU's command line, without the program.
    fn qemu(&self) -> Result<Vec<OsString>> {
        let folder = self.folder.path().display();
        // This machine keeps its power: what the node has synced outlives QEMU in this machine's memory.
        let mut words: Vec<OsString> = format!(
            "-nodefaults -no-user-config -display none -no-reboot -accel tcg,thread=multi,tb-size=512 \
             -cpu max,+svm -machine q35 -smp 2 -m {memory} {devices} \
             -drive file={folder}/disk.qcow2,if=virtio,format=qcow2,cache=unsafe -device virtio-rng-pci \
             -chardev file,id=console,path={folder}/console.log,append=on -serial chardev:console \
             -device virtio-serial-pci \
             -chardev socket,id=commands,fd=0 -device virtserialport,chardev=commands,name=sandpod",
            memory = self.spec.memory_mib,
            devices = self.spare_devices(),
        )
        .split_whitespace()
        .map(OsString::from)
        .collect();
        for (option, file) in [("-kernel", "vmlinuz"), ("-initrd", "initrd.img")] {
            words.extend([option.into(), self.image.join(file).into_os_string()]);
        }
        let iommu = match self.spec.spare_devices {
            true => " intel_iommu=on iommu=pt",
            false => "",
        };
        let line = format!("{KERNEL_LINE}{}{iommu}", self.spec.security.kernel_line());
        words.extend(["-append".into(), line.into()]);
        words.extend(kubelet::network(self.folder.path())?.map(OsString::from));
        for (tag, path) in [("bin", &places::binaries()?)]
            .into_iter()
            .chain(shares().iter().map(|(tag, path)| (*tag, path)))
        {
            let path = path.display();
            let share = format!("local,path={path},mount_tag={tag},security_model=none,readonly=on,multidevs=remap");
            words.extend(["-virtfs".into(), share.into()]);
        }
        Ok(words)
    }

    /// What of QEMU's command line makes the devices to give away.
    fn spare_devices(&self) -> String {
        if !self.spec.spare_devices {
            return String::new();
        }
        let disk = self.spare_disk();
        format!(
            "-device intel-iommu,intremap=on,device-iotlb=on \
             -device pcie-root-port,id=port1,chassis=1,slot=1,addr=10.0,multifunction=on \
             -device pcie-root-port,id=port2,chassis=2,slot=2,addr=10.1 \
             -blockdev raw,node-name=spare,file.driver=file,file.filename={disk} \
             -device nvme,bus=port1,serial=spare,drive=spare \
             -netdev user,id=spare,restrict=on -device e1000e,bus=port2,netdev=spare,mac={SPARE_MAC}",
            disk = disk.display()
        )
    }

    /// What every boot needs: this machine's folders under their own paths.
    fn furnish(&self) -> Result {
        for (tag, path) in shares() {
            let path = path.display();
            // Root's home is closed to the pods' users, who use what is below it here.
            self.run(&format!(
                "mkdir -p {path} && chmod a+x /root && \
                 mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose {tag} {path}"
            ))?;
        }
        Ok(())
    }

    /// Shuts it down as its administrator would, and turns it on again.
    ///
    /// # Errors
    /// When it does not end or come up.
    pub fn reboot(&mut self) -> Result {
        let power = self.power.take().ok_or_else(off)?;
        // The runner is ended in the middle of this.
        drop(power.channel.start(&shell("systemctl reboot"))?.wait(SHUTDOWN));
        power.channel.end(SHUTDOWN)?;
        power.off()?;
        self.power_on()
    }

    /// Ends it at once; what was not synced is lost. [`Machine::power_on`] brings it back.
    ///
    /// # Errors
    /// When it was off.
    pub fn power_cut(&mut self) -> Result {
        self.power.take().ok_or_else(off)?.off()
    }

    /// What it is made of.
    #[must_use]
    pub fn spec(&self) -> MachineSpec {
        self.spec
    }

    /// The identifier of this boot.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        self.power.as_ref().map_or("", |power| &power.boot)
    }

    /// Starts a program in the node, with standard input when `input` says so.
    ///
    /// # Errors
    /// When the node does not take the word.
    pub fn start(&self, words: &[&str], input: bool) -> Result<Running<'_>> {
        if env::var_os(SAY).is_some() {
            eprintln!("node: {}", run::last_of(&words.join(" "), 300));
        }
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        let power = self.power.as_ref().ok_or_else(off)?;
        power.channel.start(&Run { words, input })
    }

    /// Runs a shell script in the node; it must succeed. Returns its output.
    ///
    /// # Errors
    /// When it fails, or takes longer than [`ORDINARY`].
    pub fn run(&self, script: &str) -> Result<String> {
        self.run_within(script, ORDINARY)
    }

    /// As [`Machine::run`] with another deadline.
    ///
    /// # Errors
    /// When it fails, or takes longer.
    pub fn run_within(&self, script: &str, deadline: Duration) -> Result<String> {
        let output = self.start(&["sh", "-c", script], false)?.succeed(deadline)?;
        Ok(output.text())
    }

    /// Runs a shell script in the node to its end, whatever its exit code.
    ///
    /// # Errors
    /// When it takes longer than [`ORDINARY`].
    pub fn try_run(&self, script: &str) -> Result<Output> {
        self.start(&["sh", "-c", script], false)?.wait(ORDINARY)
    }

    /// Asks a shell script until it succeeds, up to a deadline; returns its output.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with what it said last.
    pub fn until(&self, what: &str, script: &str, deadline: Duration) -> Result<String> {
        Bell::default().until(what, deadline, || match self.try_run(script) {
            Ok(output) if output.code == 0 => Ok(output.text()),
            Ok(output) => Err(format!("{} {}", output.text(), output.errors())),
            Err(failure) => Err(failure.to_string()),
        })
    }

    /// Writes a file of the node and makes the folders above it.
    ///
    /// # Errors
    /// When the node cannot.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result {
        let script = "mkdir -p \"$(dirname \"$1\")\" && cat >\"$1\"";
        let running = self.start(&["sh", "-c", script, "sh", path], true)?;
        running.input(bytes)?;
        running.end_input()?;
        running.succeed(ORDINARY).map(drop)
    }

    /// Reads a file of the node.
    ///
    /// # Errors
    /// When the node cannot.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.start(&["cat", path], false)?.succeed(ORDINARY)?;
        Ok(output.stdout)
    }

    /// Gives the node's containerd the test images.
    ///
    /// # Errors
    /// When they cannot be made, or containerd does not take them.
    pub fn load_images(&self) -> Result {
        let archive = crate::images::archive()?;
        self.run(&format!("ctr -n k8s.io images import {}", archive.display()))
            .map(drop)
    }

    /// The file of this machine that is the node's spare disk.
    #[must_use]
    pub fn spare_disk(&self) -> PathBuf {
        self.folder.path().join(SPARE_DISK)
    }

    /// Stops the whole node for so long: its processors, devices and timers, none of which hear of it.
    ///
    /// # Errors
    /// When it is off, or cannot be stopped.
    pub fn freeze(&self, duration: Duration) -> Result {
        let power = self.power.as_ref().ok_or_else(off)?;
        let signal = |signal| kill(Pid::from_raw(power.pid), signal).trying("stopping the node's QEMU");
        signal(Signal::SIGSTOP)?;
        // Waiting is all that happens here.
        thread::sleep(duration);
        signal(Signal::SIGCONT)
    }

    /// A number that no other thing of this node has.
    fn serial(&self) -> u32 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// The end of what its kernel and systemd have said on the console, over all boots.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = fs::read(self.folder.path().join("console.log")).unwrap_or_default();
        let said = String::from_utf8_lossy(&bytes);
        // What systemd shows again and again while it waits.
        let lines: Vec<_> = said.lines().filter(|line| !line.contains("start running (")).collect();
        run::last_of(&lines.join("\n"), 3000)
    }

    /// The end of a service's journal.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.run(&format!(
            "journalctl --no-pager --output cat --unit {unit} | grep -v -e 'loading plugin' -e 'skip loading' | cut -c -400 | tail -n 50"
        ))
    }

    /// A failure with what the node says of itself: the end of its console and of containerd's journal.
    #[must_use]
    pub fn with_evidence(&self, failure: &Failure) -> Failure {
        let journal = match self.power.as_ref().is_some_and(|power| !power.boot.is_empty()) {
            true => self.journal("containerd").unwrap_or_else(|error| error.to_string()),
            false => "the node is not up".to_owned(),
        };
        Failure::Claim(format!(
            "{failure}\n--- the node's console:\n{}\n--- containerd's journal:\n{}",
            self.console(),
            run::last_of(&journal, 6000)
        ))
    }
}

impl Power {
    fn on(mut command: Command) -> Result<Power> {
        let (ours, theirs) = UnixStream::pair().trying("making the node's port")?;
        command
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let (told, started) = mpsc::channel();
        let keeper = thread::spawn(move || {
            let mut child = command.spawn()?;
            // Ours of the two ends would keep the port open.
            drop(command);
            // Its receiver waits.
            let _ = told.send(child.id().cast_signed());
            child.wait()
        });
        match started.recv() {
            Ok(pid) => Ok(Power {
                channel: Channel::new(ours)?,
                pid,
                boot: String::new(),
                keeper: Some(keeper),
            }),
            Err(_) => match keeper.join() {
                Ok(Err(error)) => Err(error).trying("starting the node's QEMU with setpriv"),
                _ => Err(Failure::Claim("the thread of the node's QEMU panicked".into())),
            },
        }
    }

    /// Ends QEMU, which may have ended already, and waits until it is gone.
    fn off(mut self) -> Result {
        self.end()
    }

    fn end(&mut self) -> Result {
        let Some(keeper) = self.keeper.take() else {
            return Ok(());
        };
        // Its number is its own until the keeper has waited for it.
        let by_itself = keeper.is_finished();
        if !by_itself {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
        match keeper.join() {
            // A reboot ends it, and a panic of the node's kernel, with exit code 0.
            Ok(Ok(status)) if by_itself && !status.success() => {
                Err(Failure::Claim(format!("the node's QEMU ended by itself: {status}")))
            }
            Ok(waited) => waited.map(drop).trying("waiting for the node's QEMU"),
            Err(_) => Err(Failure::Claim("the thread of the node's QEMU panicked".into())),
        }
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        if let Err(failure) = self.end() {
            eprintln!("a node was not ended: {failure}");
        }
    }
}

/// The QEMU that comes with the node's image, with the libraries and the firmware that came with it. It ends with the
/// thread that starts it.
fn emulator(image: &Path) -> Command {
    let root = image.join("qemu");
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(root.join("usr/lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("usr/bin/qemu-system-x86_64"))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"));
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(firmware));
    }
    command
}

/// The folders of this machine that the node has under the same paths, and their tags.
fn shares() -> [(&'static str, PathBuf); 2] {
    [("workspace", places::workspace()), ("cache", places::cache())]
}

fn shell(script: &str) -> Run {
    Run {
        words: ["sh", "-c", script].map(str::to_owned).to_vec(),
        input: false,
    }
}

fn off() -> Failure {
    Failure::Claim("the node is off".into())
}
