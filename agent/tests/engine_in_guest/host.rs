//! On the host: the RAM disk, QEMU, and what the guest said.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use super::support::{Kernel, RamDisk};

/// For the whole run; it takes some 20 s with emulation on one core, and thirty times as long on a machine that is that
/// busy.
const DEADLINE: Duration = Duration::from_secs(1800);

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
    let kernel = Kernel::find()?;
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let initrd = folder.path().join("initrd");
    let mut disk = RamDisk::new(&env::current_exe().map_err(|e| e.to_string())?)?;
    disk.file("busybox", Path::new("/bin/busybox"))?;
    disk.folder("root");
    fs::write(&initrd, disk.finish()).map_err(|e| e.to_string())?;
    let line = format!("console=ttyS0 {}", Kernel::parameters()?);
    let mut qemu = Command::new("qemu-system-x86_64")
        .args("-nodefaults -no-user-config -display none -no-reboot -smp 1 -m 768 -serial stdio".split(' '))
        .args("-M q35 -accel tcg,tb-size=64 -cpu max".split(' '))
        .arg("-kernel")
        .arg(kernel.vmlinux)
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
