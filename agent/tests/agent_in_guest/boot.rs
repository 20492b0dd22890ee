//! The machine: QEMU and virtiofsd, which end with the test.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use tokio::net::UnixStream;

use super::support::{Kernel, RamDisk};

/// What the share is called.
pub const TAG: &str = "kataShared";
/// Where the guest's image has its hooks.
pub const HOOKS: &str = "/usr/share/hooks";
/// A hook: keeps what it is told where the pod's containers find it, and fails if the container's annotation says so.
const HOOK: &str = r#"#!/bin/busybox sh
state=$(/bin/busybox cat)
id=${state#*\"id\":\"}
echo "$state" >/run/kata-containers/sandbox/shm/$1-${id%%\"*}
case "$state" in *fail-at-$1*) exit 3;; esac
"#;
/// The packet filter's programs: rules that are restored are saved, but for some that tell what is to happen.
const RESTORE: &str = r#"#!/bin/busybox sh
name=${0##*/}
read -r first
case "$first" in
  bad) printf 'line 1 is bad\nnothing is done\n' >&2; exit 2;;
  hang) exec /bin/busybox sleep 600;;
esac
{ echo "$first"; /bin/busybox cat; } >/run/${name%-restore}
echo "$name $*"
"#;
const SAVE: &str = "#!/bin/busybox sh\nexec /bin/busybox cat /run/iptables\n";
/// For QEMU and virtiofsd to find each other.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running machine.
pub struct Machine {
    qemu: Mutex<Child>,
    virtiofsd: Mutex<Child>,
    console: Arc<Mutex<String>>,
    folder: tempfile::TempDir,
}

impl Machine {
    /// Starts the guest; its agent will be at the other end of the stream.
    pub fn start() -> Result<(Machine, UnixStream), String> {
        let kernel = Kernel::find()?;
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("share")).map_err(|e| e.to_string())?;
        fs::write(at("initrd"), ram_disk(&kernel)?).map_err(|e| e.to_string())?;
        let virtiofsd = virtiofsd(&at("share"), &at("fs.sock"))?;
        let listen = |name: &str| UnixListener::bind(at(name)).map_err(|e| e.to_string());
        let (agent, console) = (listen("agent.sock")?, listen("console.sock")?);
        let qemu = qemu(&kernel, folder.path())?;
        let machine = Machine {
            qemu: Mutex::new(qemu),
            virtiofsd: Mutex::new(virtiofsd),
            console: Arc::default(),
            folder,
        };
        let mut console = accept(&console)?;
        let text = Arc::clone(&machine.console);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut bytes) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        let agent = accept(&agent)?;
        agent.set_nonblocking(true).map_err(|e| e.to_string())?;
        let agent = UnixStream::from_std(agent).map_err(|e| e.to_string())?;
        Ok((machine, agent))
    }

    /// The host's side of the share.
    pub fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// What the guest's console says.
    pub fn console(&self) -> String {
        let text = self.console.lock().unwrap();
        format!("console:\n{}", *text)
    }

    /// Plugs a second processor; returns when QEMU has done its part.
    pub fn plug_processor(&self) -> std::io::Result<()> {
        let plug = r#"{"execute":"device_add","arguments":{"driver":"max-x86_64-cpu","socket-id":0,"core-id":1,"thread-id":0}}"#;
        let stream = std::os::unix::net::UnixStream::connect(self.folder.path().join("qmp.sock"))?;
        let mut lines = BufReader::new(&stream).lines();
        for command in [r#"{"execute":"qmp_capabilities"}"#, plug] {
            writeln!(&stream, "{command}")?;
            while let Some(line) = lines.next().transpose()? {
                if line.contains("\"error\"") {
                    return Err(std::io::Error::other(line));
                }
                if line.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Ends it.
    pub fn end(&self) {
        for child in [&self.qemu, &self.virtiofsd] {
            let mut child = child.lock().unwrap();
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

fn ram_disk(kernel: &Kernel) -> Result<Vec<u8>, String> {
    let mut disk = RamDisk::new(Path::new(env!("CARGO_BIN_EXE_kata-agent")))?;
    // A kernel that is not all of one piece comes with a folder of modules, and a list of those to load.
    let modules = kernel.vmlinux.with_file_name("modules");
    if modules.is_dir() {
        disk.folder("etc");
        disk.file(
            "etc/modules-load.list",
            &kernel.vmlinux.with_file_name("modules-load.list"),
        )?;
        disk.tree("lib", &modules.join("lib"))?;
    }
    add_programs(&mut disk)?;
    Ok(disk.finish())
}

/// What our own image has not, and another's may.
fn add_programs(disk: &mut RamDisk) -> Result<(), String> {
    disk.folder("bin");
    disk.file("bin/busybox", Path::new("/bin/busybox"))?;
    for folder in ["usr", "usr/sbin", "usr/share", &HOOKS[1..]] {
        disk.folder(folder);
    }
    for stage in ["prestart", "poststart", "poststop"] {
        let folder = format!("{}/{stage}", &HOOKS[1..]);
        disk.folder(&folder);
        disk.program(&format!("{folder}/note"), HOOK.as_bytes());
    }
    // Saving IPv6 rules is missing.
    for (name, script) in [
        ("iptables-save", SAVE),
        ("iptables-restore", RESTORE),
        ("ip6tables-restore", RESTORE),
    ] {
        disk.program(&format!("usr/sbin/{name}"), script.as_bytes());
    }
    Ok(())
}

fn virtiofsd(share: &Path, socket: &Path) -> Result<Child, String> {
    let program = env::var_os("SANDPOD_TEST_VIRTIOFSD").ok_or("name virtiofsd in SANDPOD_TEST_VIRTIOFSD")?;
    let child = Command::new(&program)
        .args(["--sandbox=none", "--cache=auto", "--log-level=error"])
        .arg("--socket-path")
        .arg(socket)
        .arg("--shared-dir")
        .arg(share)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("{}: {e}", Path::new(&program).display()))?;
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err("virtiofsd does not listen".into());
        }
        std::thread::yield_now();
    }
    Ok(child)
}

/// The guest as the shim has it (`vmm`, `args.rs`), with an interface that leads nowhere. On one thread: QEMU 7.2
/// aborts when a processor is plugged and the others' share of the translated code is in use
/// (`tcg_region_initial_alloc`).
fn qemu(kernel: &Kernel, folder: &Path) -> Result<Child, String> {
    let at = |name: &str| folder.join(name).display().to_string();
    let line = format!("console=hvc0 memhp_default_state=online {}", Kernel::parameters()?);
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(
        "-nodefaults -no-user-config -display none -no-reboot -smp 1,maxcpus=2,sockets=1,cores=2,threads=1".split(' '),
    )
    .args("-machine q35,memory-backend=ram0,sata=off,smbus=off,vmport=off,usb=off".split(' '))
    .args("-accel tcg,thread=single,tb-size=32 -cpu max,-erms -m 1024M -object memory-backend-memfd,id=ram0,size=1024M,share=on".split(' '))
    .arg("-kernel")
    .arg(&kernel.vmlinux)
    .args(["-initrd", &at("initrd"), "-append", &line])
    .args([
        "-chardev",
        &format!("socket,id=qmp,path={},server=on,wait=off", at("qmp.sock")),
    ])
    .args([
        "-mon",
        "chardev=qmp,mode=control",
        "-device",
        "virtio-serial-pci,id=serial0,max_ports=3",
    ])
    .args(["-chardev", &format!("socket,id=console,path={}", at("console.sock"))])
    .args(["-device", "virtconsole,bus=serial0.0,nr=0,chardev=console"])
    .args(["-chardev", &format!("socket,id=agent,path={}", at("agent.sock"))])
    .args([
        "-device",
        "virtserialport,bus=serial0.0,nr=1,chardev=agent,name=sandpod.agent",
    ])
    .args("-object rng-builtin,id=rng0 -device virtio-rng-pci,rng=rng0".split(' '))
    .args(["-chardev", &format!("socket,id=fs,path={}", at("fs.sock"))])
    .args(["-device", &format!("vhost-user-fs-pci,chardev=fs,tag={TAG}")])
    .args(
        "-netdev hubport,id=net0,hubid=0 -device virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=".split(' '),
    );
    qemu.stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("qemu-system-x86_64: {e}"))
}

fn accept(listener: &UnixListener) -> Result<std::os::unix::net::UnixStream, String> {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(1) => listener.accept().map(|(stream, _)| stream).map_err(|e| e.to_string()),
        _ => Err("QEMU does not connect; what it said is above".into()),
    }
}
