//! Block devices of the node for stories.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    failure::{Result, Trying},
    run::{self, succeed},
};

/// A file that is a block device; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    file: PathBuf,
    device: PathBuf,
}

impl LoopDevice {
    /// Makes the file, of so many MiB and with a text at its beginning, and its device.
    ///
    /// # Errors
    /// When the machine has no loop devices.
    pub fn make(file: &Path, mib: u64, text: &str) -> Result<LoopDevice> {
        let what = || format!("making {}", file.display());
        let mut made = File::create(file).trying(what())?;
        made.write_all(text.as_bytes()).trying(what())?;
        made.set_len(mib << 20).trying(what())?;
        let mut attach = Command::new("losetup");
        attach.args(["--find", "--show"]).arg(file);
        let device = succeed(&mut attach, run::ORDINARY)?.text();
        Ok(LoopDevice {
            file: file.into(),
            device: device.into(),
        })
    }

    /// Its path on the node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// What is at its beginning.
    ///
    /// # Errors
    /// The kernel's.
    pub fn begins(&self, length: u64) -> Result<String> {
        let mut text = String::new();
        let file = File::open(&self.file).trying("opening the device's file")?;
        file.take(length)
            .read_to_string(&mut text)
            .trying("reading the device's file")?;
        Ok(text)
    }

    /// Makes it larger.
    ///
    /// # Errors
    /// The kernel's.
    pub fn grow(&self, mib: u64) -> Result {
        let file = File::options().write(true).open(&self.file);
        file.and_then(|file| file.set_len(mib << 20))
            .trying("growing the device's file")?;
        let mut grow = Command::new("losetup");
        succeed(grow.arg("--set-capacity").arg(&self.device), run::ORDINARY).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut detach = Command::new("losetup");
        if let Err(failure) = succeed(detach.arg("--detach").arg(&self.device), run::ORDINARY) {
            eprintln!("a loop device was not detached: {failure}");
        }
    }
}
