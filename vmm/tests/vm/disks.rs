//! Block devices of the host in the guest.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Story,
    machine::{Kit, Machine},
    stories,
};

pub fn stories() -> impl IntoIterator<Item = Story> {
    stories![disks_come_and_go, a_disk_follows_the_size_of_its_device]
}

/// How soon the guest sees what has changed, on a machine that is busy with other stories.
const SOON: Duration = Duration::from_secs(5);

const MIB: u64 = 1 << 20;

/// A block device of the host that is a file.
struct Loop {
    file: tempfile::NamedTempFile,
    device: PathBuf,
}

impl Loop {
    fn new(line: &str) -> Loop {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("{line}\n")).unwrap();
        file.as_file().set_len(4 * MIB).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Loop { file, device }
    }

    fn open(&self, read_only: bool) -> OwnedFd {
        File::options()
            .read(true)
            .write(!read_only)
            .open(&self.device)
            .unwrap()
            .into()
    }

    fn grow(&self, mib: u64) {
        self.file.as_file().set_len(mib * MIB).unwrap();
        let grown = Command::new("losetup")
            .arg("--set-capacity")
            .arg(&self.device)
            .status()
            .unwrap();
        assert!(grown.success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let gone = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(gone.is_ok_and(|status| status.success()));
    }
}

/// Waits until the guest says this of the disk at an address.
async fn shows(machine: &mut Machine, address: &str, expected: &str) {
    let began = Instant::now();
    loop {
        let found = machine.ask(&format!("disk {address}")).await;
        if found == expected {
            return;
        }
        assert!(began.elapsed() < SOON, "{found} instead of {expected}");
    }
}

async fn disks_come_and_go(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let (one, two) = (Loop::new("the first"), Loop::new("the second"));
    let first = machine.vm.add_disk(one.open(false), false).await.unwrap();
    shows(&mut machine, &first.address(), &format!("{} the first", 4 * MIB)).await;
    let second = machine.vm.add_disk(two.open(true), true).await.unwrap();
    shows(&mut machine, &second.address(), &format!("{} the second", 4 * MIB)).await;
    machine.vm.remove_disk(first).await.unwrap();
    machine.vm.remove_disk(first).await.unwrap();
    shows(&mut machine, &first.address(), "none").await;
    let again = machine.vm.add_disk(one.open(false), false).await.unwrap();
    assert_eq!(again, first, "its place is free");
    shows(&mut machine, &again.address(), &format!("{} the first", 4 * MIB)).await;
    let file = File::open("/dev/null").unwrap();
    let refused = machine.vm.add_disk(file.into(), true).await.unwrap_err();
    assert!(refused.to_string().contains("blockdev-add"), "{refused}");
    machine.end().await;
}

async fn a_disk_follows_the_size_of_its_device(kit: Arc<Kit>) {
    let mut machine = Machine::boot(&kit.spec()).await;
    let device = Loop::new("growing");
    let disk = machine.vm.add_disk(device.open(false), false).await.unwrap();
    shows(&mut machine, &disk.address(), &format!("{} growing", 4 * MIB)).await;
    device.grow(16);
    machine.vm.resize_disk(disk, 16 * MIB).await.unwrap();
    shows(&mut machine, &disk.address(), &format!("{} growing", 16 * MIB)).await;
    machine.end().await;
}
