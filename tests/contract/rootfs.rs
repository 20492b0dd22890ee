//! The root file system of a container, mounted and unmounted by CRI-O.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tests::failure::{Result, Trying, claim};

use crate::crio::Crio;

/// An overlay that CRI-O's storage has mounted.
#[derive(Debug)]
pub struct Rootfs {
    layer: PathBuf,
    /// Where it is mounted.
    pub merged: PathBuf,
    mounted: bool,
}

impl Rootfs {
    /// Mounts an overlay over the test image for the container `id`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount(crio: &Crio<'_>, id: &str) -> Result<Rootfs> {
        let layer = crio.node.folder().join("storage/overlay").join(id);
        let merged = layer.join("merged");
        for folder in ["diff", "work", "merged"] {
            fs::create_dir_all(layer.join(folder)).trying("making an overlay's folders")?;
        }
        let (lower, layers) = (crio.node.image(), layer.display());
        let options = format!(
            "lowerdir={},upperdir={layers}/diff,workdir={layers}/work,volatile",
            lower.display()
        );
        mount(
            Some("overlay"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .trying("mounting an overlay")?;
        Ok(Rootfs {
            layer,
            merged,
            mounted: true,
        })
    }

    /// Unmounts it, as the storage does right after the container's stop.
    ///
    /// # Errors
    /// `EBUSY` when somebody holds it; [`Failure::Claim`] when some mount namespace of the node still has it.
    pub fn unmount(&mut self) -> Result {
        if !self.mounted {
            return Ok(());
        }
        let device = device_of(&self.merged);
        self.unmount_here()?;
        let holders = holders_of(&device);
        claim(
            holders.is_empty(),
            format!(
                "the root file system is unmounted, but {} still have it mounted",
                holders.join(", ")
            ),
        )
    }

    /// Unmounts it, whoever has a copy of the mount.
    ///
    /// # Errors
    /// `EBUSY` when somebody holds it.
    pub fn unmount_here(&mut self) -> Result {
        self.mounted = false;
        umount2(&self.merged, MntFlags::empty()).trying(format!("unmounting {}", self.merged.display()))
    }

    /// Unmounts it, and removes its layer.
    ///
    /// # Errors
    /// Those of [`Rootfs::unmount`].
    pub fn remove(&mut self) -> Result {
        self.unmount()?;
        fs::remove_dir_all(&self.layer).trying(format!("removing {}", self.layer.display()))
    }
}

/// The device number of the file system mounted at `path`, as mountinfo writes it.
fn device_of(path: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = path.display().to_string();
    let mounted = table
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(4) == Some(&path.as_str()));
    mounted
        .and_then(|fields| Some((*fields.get(2)?).to_owned()))
        .unwrap_or_default()
}

/// The programs in whose mount namespaces a file system of this device number is mounted.
fn holders_of(device: &str) -> Vec<String> {
    let holds = |process: &tests::procs::Process| {
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).unwrap_or_default();
        table.lines().any(|line| line.split(' ').nth(2) == Some(device))
    };
    tests::procs::all()
        .iter()
        .filter(|process| holds(process))
        .map(|process| format!("{} ({})", process.program(), process.pid))
        .collect()
}
