//! On the host: the RAM disk, QEMU, and what the guest said.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// For the whole run; it takes some 20 s with emulation on one core.
const DEADLINE: Duration = Duration::from_secs(240);

/// What the guest said about each case: nothing, or why it failed.
pub struct Report {
    results: HashMap<String, Option<String>>,
    console: String,
}

impl Report {
    pub fn of(&self, case: &str) -> Result<(), String> {
        match self.results.get(case) {
            Some(None) => Ok(()),
            Some(Some(why)) => Err(why.clone()),
            None => Err(format!(
                "the guest did not get there; its console ends with:\n{}",
                self.console
            )),
        }
    }
}

/// Boots the guest and waits for its end.
pub fn boot() -> Result<Report, String> {
    let kernel = kernel()?;
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let initrd = folder.path().join("initrd");
    fs::write(&initrd, ram_disk()?).map_err(|e| e.to_string())?;
    let khz = cpu_khz()?;
    let line = format!(
        "console=ttyS0 quiet panic=-1 reboot=t noreplace-smp tsc=reliable tsc_early_khz={khz} lpj={} cgroup_no_v1=all",
        khz * 1000 / 250
    );
    let mut qemu = Command::new("qemu-system-x86_64")
        .args("-nodefaults -no-user-config -display none -no-reboot -smp 1 -m 768 -serial stdio".split(' '))
        .args("-M q35 -accel tcg,tb-size=64 -cpu max".split(' '))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", &line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("qemu-system-x86_64: {e}"))?;
    let report = listen(&mut qemu);
    let _ = qemu.kill();
    let _ = qemu.wait();
    report
}

fn listen(qemu: &mut Child) -> Result<Report, String> {
    let output = qemu.stdout.take().ok_or("QEMU has no output")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    });
    let mut report = Report {
        results: HashMap::new(),
        console: String::new(),
    };
    let deadline = Instant::now() + DEADLINE;
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        match line.split_once("@ ").map(|(_, said)| said) {
            Some(said) => match said.split_once(' ') {
                Some(("ok", name)) => drop(report.results.insert(name.to_owned(), None)),
                Some(("failed", rest)) => {
                    let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
                    report.results.insert(name.to_owned(), Some(why.to_owned()));
                }
                _ => eprintln!("guest: {said}"),
            },
            None => report.console = format!("{}{line}\n", tail(&report.console)),
        }
    }
    Ok(report)
}

fn tail(console: &str) -> String {
    let lines: Vec<_> = console.lines().rev().take(40).collect();
    lines.into_iter().rev().map(|line| format!("{line}\n")).collect()
}

fn kernel() -> Result<PathBuf, String> {
    let folder = match env::var_os("SANDPOD_TEST_KERNEL") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guest/build-kernel.sh");
            let built = Command::new(&script)
                .output()
                .map_err(|e| format!("{}: {e}", script.display()))?;
            PathBuf::from(String::from_utf8_lossy(&built.stdout).trim())
        }
    };
    let kernel = if folder.is_dir() {
        folder.join("vmlinux")
    } else {
        folder
    };
    if kernel.is_file() {
        return Ok(kernel);
    }
    Err(format!(
        "there is no guest kernel {:?}: build one with deploy/guest/build-kernel.sh, or name one in SANDPOD_TEST_KERNEL",
        kernel.display()
    ))
}

/// A RAM disk (cpio, "newc") with this program as `/init`.
fn ram_disk() -> Result<Vec<u8>, String> {
    const FILE: u32 = 0o100_755;
    const FOLDER: u32 = 0o40_755;
    const CONSOLE: u32 = 0o20_600;
    let read = |path: &Path| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    let init = read(&env::current_exe().map_err(|e| e.to_string())?)?;
    let busybox = read(Path::new("/bin/busybox"))?;
    let mut disk = Vec::new();
    entry(&mut disk, "dev", FOLDER, (0, 0), &[]);
    entry(&mut disk, "dev/console", CONSOLE, (5, 1), &[]);
    entry(&mut disk, "init", FILE, (0, 0), &init);
    entry(&mut disk, "busybox", FILE, (0, 0), &busybox);
    entry(&mut disk, "root", FOLDER, (0, 0), &[]);
    entry(&mut disk, "TRAILER!!!", 0, (0, 0), &[]);
    Ok(disk)
}

fn entry(disk: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let fields = [
        1,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    disk.extend(b"070701");
    for field in fields {
        let _ = write!(disk, "{field:08x}");
    }
    disk.extend(name.as_bytes());
    disk.push(0);
    pad(disk);
    disk.extend(data);
    pad(disk);
}

fn pad(disk: &mut Vec<u8>) {
    disk.resize(disk.len().next_multiple_of(4), 0);
}

fn cpu_khz() -> Result<u64, String> {
    let info = fs::read_to_string("/proc/cpuinfo").map_err(|e| e.to_string())?;
    let mhz = info.lines().find_map(|line| {
        line.strip_prefix("cpu MHz")?
            .split_once(':')?
            .1
            .trim()
            .parse::<f64>()
            .ok()
    });
    mhz.map(|mhz| (mhz * 1000.0) as u64)
        .ok_or_else(|| "/proc/cpuinfo tells no frequency".to_owned())
}
