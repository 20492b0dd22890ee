//! What tests that boot a guest have in common: the kernel, its command line, and RAM disks.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

const FILE: u32 = 0o100_755;
const FOLDER: u32 = 0o40_755;
const DEVICE: u32 = 0o20_666;

/// A guest kernel.
pub struct Kernel {
    /// The program that QEMU loads.
    pub vmlinux: PathBuf,
}

impl Kernel {
    /// `SANDPOD_TEST_KERNEL` (a file, or a folder with `vmlinux` and perhaps modules), or else what
    /// `deploy/guest/build-kernel.sh` prints.
    pub fn find() -> Result<Kernel, String> {
        let found = match env::var_os("SANDPOD_TEST_KERNEL") {
            Some(found) => PathBuf::from(found),
            None => {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guest/build-kernel.sh");
                let built = Command::new(&script)
                    .output()
                    .map_err(|e| format!("{}: {e}", script.display()))?;
                PathBuf::from(String::from_utf8_lossy(&built.stdout).trim())
            }
        };
        let vmlinux = if found.is_dir() { found.join("vmlinux") } else { found };
        if vmlinux.is_file() {
            return Ok(Kernel { vmlinux });
        }
        Err(format!(
            "there is no guest kernel {:?}: build one with deploy/guest/build-kernel.sh, or name one in SANDPOD_TEST_KERNEL",
            vmlinux.display()
        ))
    }

    /// What a command line needs besides the console, for a guest that is emulated.
    pub fn parameters() -> Result<String, String> {
        let khz = cpu_khz()?;
        Ok(format!(
            "quiet panic=-1 reboot=t no_timer_check noreplace-smp swiotlb=noforce tsc=reliable tsc_early_khz={khz} lpj={} cgroup_no_v1=all",
            khz * 1000 / 250
        ))
    }
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

/// A RAM disk (cpio, "newc") with `/dev` and what is put on it.
pub struct RamDisk(Vec<u8>);

impl RamDisk {
    /// One with `/init`.
    pub fn new(init: &Path) -> Result<RamDisk, String> {
        let mut disk = RamDisk(Vec::new());
        disk.folder("dev");
        disk.entry("dev/console", DEVICE, (5, 1), &[]);
        disk.entry("dev/null", DEVICE, (1, 3), &[]);
        disk.file("init", init)?;
        Ok(disk)
    }

    /// Adds a folder.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, FOLDER, (0, 0), &[]);
    }

    /// Adds a program or file of the host.
    pub fn file(&mut self, name: &str, from: &Path) -> Result<(), String> {
        let data = fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
        self.program(name, &data);
        Ok(())
    }

    /// Adds a program by its content.
    pub fn program(&mut self, name: &str, data: &[u8]) {
        self.entry(name, FILE, (0, 0), data);
    }

    /// Adds a folder of the host with all that is in it.
    #[allow(dead_code)] // not each of the tests has one
    pub fn tree(&mut self, name: &str, from: &Path) -> Result<(), String> {
        let error = |e: std::io::Error| format!("{}: {e}", from.display());
        self.folder(name);
        for entry in fs::read_dir(from).map_err(error)? {
            let path = entry.map_err(error)?.path();
            let below = format!("{name}/{}", path.file_name().unwrap_or_default().to_string_lossy());
            if path.is_dir() {
                self.tree(&below, &path)?;
            } else {
                self.file(&below, &path)?;
            }
        }
        Ok(())
    }

    /// The disk's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.0
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        let disk = &mut self.0;
        let size = data.len() as u32;
        let name_size = name.len() as u32 + 1;
        let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        disk.extend(b"070701");
        for field in fields {
            let _ = write!(disk, "{field:08x}");
        }
        disk.extend(name.as_bytes());
        disk.push(0);
        disk.resize(disk.len().next_multiple_of(4), 0);
        disk.extend(data);
        disk.resize(disk.len().next_multiple_of(4), 0);
    }
}
