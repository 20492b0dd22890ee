//! In the guest: PID 1, which answers one line per question on the agent's port.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify},
        reboot::{RebootMode, reboot},
    },
};

/// Says `up` and serves until the host has no more questions.
pub fn main() -> ! {
    load_modules();
    let port = port();
    (&port).write_all(b"up\n").expect("a line to the host");
    new_mount("proc", "/proc").expect("/proc");
    new_mount("sysfs", "/sys").expect("/sys");
    let scan = Path::new("/sys/module/scsi_mod/parameters/scan");
    if scan.exists() {
        fs::write(scan, "manual").expect("no scan");
    }
    let mut guest = Guest::default();
    for question in BufReader::new(&port).lines() {
        let question = question.expect("a question");
        let (verb, object) = question.split_once(' ').unwrap_or((&question, ""));
        let answer = match guest.answer(verb, object) {
            Ok(text) => text,
            Err(error) => format!("error: {error}"),
        };
        writeln!(&port, "{answer}").expect("a line to the host");
    }
    panic!("the host has closed the port, which it does not do in a VM's life");
}

fn load_modules() {
    for number in 0.. {
        let Ok(module) = File::open(format!("/modules/{number}")) else {
            return;
        };
        // The next ones tell if this one was needed.
        crate::sys::load_module(&module).unwrap_or_else(|error| eprintln!("module {number}: {error}"));
    }
}

/// The kernel makes the port's file at some time around the start of PID 1.
fn port() -> File {
    new_mount("devtmpfs", "/dev").expect("/dev");
    let watch = Inotify::init(InitFlags::empty()).expect("a watch");
    watch
        .add_watch("/dev", AddWatchFlags::IN_CREATE)
        .expect("a watch on /dev");
    let port = loop {
        match agent_port() {
            Some(port) => break port,
            None => drop(watch.read_events().expect("a new device")),
        }
    };
    let opened = File::options().read(true).write(true).open(port);
    opened.expect("the agent's port")
}

/// The second port of the only device, whose number is its place among all virtio devices.
fn agent_port() -> Option<PathBuf> {
    let devices = fs::read_dir("/dev").expect("/dev").flatten();
    devices.map(|device| device.path()).find(|path| {
        let name = path.to_string_lossy();
        name.starts_with("/dev/vport") && name.ends_with("p1")
    })
}

fn new_mount(kind: &str, path: &str) -> nix::Result<()> {
    mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)
}

#[derive(Default)]
struct Guest {
    held: Vec<u8>,
}

impl Guest {
    fn answer(&mut self, verb: &str, object: &str) -> std::io::Result<String> {
        let done = || "done".to_owned();
        match verb {
            "echo" => Ok(object.to_owned()),
            "cmdline" => Ok(fs::read_to_string("/proc/cmdline")?.trim().to_owned()),
            "meminfo" => meminfo(object),
            // Every page is written to, so that it is there.
            "hold" => {
                self.held = vec![1; megabytes(object)?];
                Ok(done())
            }
            "check" => {
                let mut pages = self.held.iter().step_by(4096);
                Ok(pages.all(|byte| *byte == 1).to_string())
            }
            "online" => online(),
            "mount" => {
                mount(Some(object), "/mnt", Some("virtiofs"), MsFlags::empty(), None::<&str>)?;
                Ok(done())
            }
            "read" => fs::read_to_string(object),
            "disk" => disk(object),
            "write" => {
                let (path, text) = object.split_once(' ').unwrap_or((object, ""));
                fs::write(path, text)?;
                Ok(done())
            }
            "say" => {
                writeln!(File::options().write(true).open("/dev/console")?, "{object}")?;
                Ok(done())
            }
            "off" => Ok(format!("{:?}", reboot(RebootMode::RB_AUTOBOOT))),
            "exit" => std::process::exit(3),
            _ => Err(std::io::Error::other("there is no such verb")),
        }
    }
}

/// Of a disk at an address, its size in bytes and its first line. The kernel looks for it when it is told to: by itself
/// it spends seconds on all targets.
fn disk(address: &str) -> std::io::Result<String> {
    if let Some(host) = fs::read_dir("/sys/class/scsi_host")?.flatten().next() {
        fs::write(host.path().join("scan"), format!("0 {}", address.replace(':', " ")))?;
    }
    let devices = fs::read_dir("/sys/class/scsi_device")?.flatten();
    let device = devices
        .map(|device| device.path())
        .find(|path| path.to_string_lossy().ends_with(&format!(":{address}")));
    let Some(device) = device else { return Ok("none".into()) };
    let Some(block) = fs::read_dir(device.join("device/block"))
        .ok()
        .and_then(|mut names| names.next())
    else {
        return Ok("no block device".into());
    };
    let block = block?.path();
    let sectors: u64 = fs::read_to_string(block.join("size"))?.trim().parse().unwrap_or(0);
    let mut line = String::new();
    let name = block.file_name().unwrap_or_default();
    BufReader::new(File::open(PathBuf::from("/dev").join(name))?).read_line(&mut line)?;
    Ok(format!("{} {}", sectors * 512, line.trim()))
}

fn megabytes(count: &str) -> std::io::Result<usize> {
    count
        .parse::<usize>()
        .map(|count| count << 20)
        .map_err(std::io::Error::other)
}

/// A field of /proc/meminfo, in MiB.
fn meminfo(field: &str) -> std::io::Result<String> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| (kib / 1024).to_string())
        .ok_or_else(|| std::io::Error::other("there is no such field"))
}

/// Brings every CPU online and tells how many there are.
fn online() -> std::io::Result<String> {
    let mut count = 0;
    for entry in fs::read_dir("/sys/devices/system/cpu")? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("cpu").and_then(|number| number.parse::<u32>().ok());
        if number.is_none() {
            continue;
        }
        count += 1;
        let switch = path.join("online");
        if fs::read_to_string(&switch).is_ok_and(|state| state.trim() == "0") {
            fs::write(&switch, "1")?;
        }
    }
    Ok(count.to_string())
}
