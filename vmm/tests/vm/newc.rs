//! Initial RAM disks (cpio, format "newc").

use std::io::Write;

/// A RAM disk with `init` as its `/init`, a console for it, and `modules` as `/modules/0`, `/modules/1` and so on.
pub fn ram_disk(init: &[u8], modules: &[Vec<u8>]) -> Vec<u8> {
    const FILE: u32 = 0o100_755;
    const FOLDER: u32 = 0o40_755;
    const DEVICE: u32 = 0o20_600;
    let mut disk = Vec::new();
    entry(&mut disk, "dev", FOLDER, (0, 0), &[]);
    entry(&mut disk, "dev/console", DEVICE, (5, 1), &[]);
    // While the console's driver is a module that is not loaded yet, there is no console to open; then Rust's runtime
    // wants this one, and ends the program without it.
    entry(&mut disk, "dev/null", DEVICE, (1, 3), &[]);
    entry(&mut disk, "init", FILE, (0, 0), init);
    for folder in ["mnt", "modules", "proc", "sys"] {
        entry(&mut disk, folder, FOLDER, (0, 0), &[]);
    }
    for (number, module) in modules.iter().enumerate() {
        entry(&mut disk, &format!("modules/{number}"), FILE, (0, 0), module);
    }
    entry(&mut disk, "TRAILER!!!", 0, (0, 0), &[]);
    disk
}

fn entry(disk: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
    disk.extend(b"070701");
    for field in [1, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        write!(disk, "{field:08x}").unwrap();
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
