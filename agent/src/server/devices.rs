//! The device files of the guest, which a privileged container has as it would have a node's.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use agent_protocol::oci::allows_every_device;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, major, makedev, minor, mknod},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};

use super::{
    error::{Doing, Result},
    sys,
};
const DEV: &str = "/dev";

/// What a container has of its own, or what is the agent's: terminals, the console and the host's channels.
const NOT_FOR_CONTAINERS: &[&str] = &["console", "hvc", "ptmx", "pts", "shm", "mqueue", "tty", "ttyS", "vport"];

/// What libcontainer makes in every `/dev` (runtime-spec, config-linux, "Default Devices").
const DEFAULT: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// How many loop devices there are as on a node, where the driver makes them at boot.
const LOOPS: u32 = 8;

/// Gives a container that may open every device the files of all that the guest has, unless it brings its own `/dev`.
pub(super) fn give_all(spec: &mut Spec) -> Result<()> {
    let brings_its_own = spec.mounts().iter().flatten().any(is_guests_dev);
    let Some(linux) = spec.linux_mut().as_mut() else {
        return Ok(());
    };
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_ref());
    if brings_its_own || !rules.is_some_and(|rules| allows_every_device(rules)) {
        return Ok(());
    }
    let mut devices = linux.devices().clone().unwrap_or_default();
    let given: HashSet<_> = devices.iter().map(|device| device.path().clone()).collect();
    make_loops()?;
    let mut found = Vec::new();
    collect(Path::new(DEV), &mut found).doing(|| format!("read {DEV}"))?;
    devices.extend(found.into_iter().filter(|device| !given.contains(device.path())));
    linux.set_devices(Some(devices));
    Ok(())
}

/// Has the kernel make loop devices, of which it makes none at boot. Idempotent.
fn make_loops() -> Result<()> {
    let control = match fs::File::open("/dev/loop-control") {
        Ok(control) => control,
        // A kernel without them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).doing(|| "open /dev/loop-control".into()),
    };
    for number in 0..LOOPS {
        match sys::add_loop(&control, number) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error).doing(|| format!("make /dev/loop{number}")),
        }
    }
    Ok(())
}

fn collect(folder: &Path, found: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let kind = name.to_string_lossy();
        if NOT_FOR_CONTAINERS.contains(&kind.trim_end_matches(|c: char| c.is_ascii_digit() || c == 'p')) {
            continue;
        }
        let metadata = entry.metadata()?;
        let file_type = metadata.file_type();
        let typ = match () {
            () if file_type.is_dir() => {
                collect(&entry.path(), found)?;
                continue;
            }
            () if file_type.is_char_device() => LinuxDeviceType::C,
            () if file_type.is_block_device() => LinuxDeviceType::B,
            () => continue,
        };
        let number = metadata.rdev();
        let numbers = (major(number).cast_signed(), minor(number).cast_signed());
        found.push(device(
            entry.path(),
            typ,
            numbers.0,
            numbers.1,
            metadata.mode() & 0o7777,
        ));
    }
    Ok(())
}

fn device(path: PathBuf, typ: LinuxDeviceType, major: i64, minor: i64, mode: u32) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device.set_path(path);
    device.set_typ(typ);
    device.set_major(major);
    device.set_minor(minor);
    device.set_file_mode(Some(mode));
    device
}

/// Whether a mount puts the guest's `/dev` in the place of the container's: a `hostPath` of `/dev` at `/dev`.
pub(super) fn is_guests_dev(mount: &Mount) -> bool {
    mount.destination() == Path::new(DEV) && mount.source().as_deref() == Some(Path::new(DEV))
}

/// Mounts at `place` what a container sees as the guest's `/dev`: devices that come later are there too, and what is
/// made in it, which libcontainer does in every container's `/dev`, is the container's. `layer` is an empty folder.
pub(super) fn mount_for(spec: &Spec, layer: &Path, place: &Path) -> Result<()> {
    let what = || format!("mount {DEV} for a container");
    let made = || -> io::Result<()> {
        let options = Some("mode=755");
        mount(Some("tmpfs"), layer, Some("tmpfs"), MsFlags::MS_NOSUID, options)?;
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        for folder in ["pts", "shm"] {
            fs::create_dir(upper.join(folder))?;
        }
        // libcontainer makes these anew, and stops at one that is there.
        let own = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
        let own = own
            .into_iter()
            .flatten()
            .filter_map(|device| device.path().strip_prefix(DEV).ok());
        for name in DEFAULT.iter().map(Path::new).chain(own).collect::<HashSet<_>>() {
            if Path::new(DEV).join(name).exists() {
                fs::create_dir_all(upper.join(name).parent().unwrap_or(&upper))?;
                // A whiteout (overlayfs.rst of Linux).
                mknod(&upper.join(name), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?;
            }
        }
        let layers = format!("lowerdir={DEV},upperdir={},workdir={}", upper.display(), work.display());
        mount(
            Some("dev"),
            place,
            Some("overlay"),
            MsFlags::MS_NOSUID,
            Some(layers.as_str()),
        )?;
        Ok(())
    };
    made().doing(what)
}

/// The file systems that a node has in its `/dev`, for a container that brings the guest's and nothing there.
pub(super) fn mounts_in_dev(mounts: &mut Vec<Mount>) {
    for (path, typ, options) in [
        (
            "/dev/pts",
            "devpts",
            "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        ("/dev/shm", "tmpfs", "nosuid,nodev,mode=1777"),
    ] {
        if mounts.iter().any(|mount| mount.destination() == Path::new(path)) {
            continue;
        }
        let mut mount = Mount::default();
        mount.set_destination(path.into());
        mount.set_typ(Some(typ.into()));
        mount.set_source(Some(typ.into()));
        mount.set_options(Some(options.split(',').map(str::to_owned).collect()));
        mounts.push(mount);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(rules: serde_json::Value) -> Vec<oci_spec::runtime::LinuxDeviceCgroup> {
        serde_json::from_value(rules).unwrap()
    }

    #[test]
    fn who_may_open_all_devices_is_told_by_the_last_rule_about_all() {
        let all = json!({ "allow": true, "access": "rwm" });
        let none = json!({ "allow": false, "access": "rwm" });
        let one = json!({ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" });
        let block = json!({ "allow": true, "type": "b", "access": "rwm" });
        for (given, expected) in [
            (json!([none, all]), true),
            (
                json!([none, one, { "allow": true, "type": "a", "access": "rwm" }]),
                true,
            ),
            (json!([all, none]), false),
            (json!([none, one, block]), false),
            (json!([]), false),
        ] {
            assert_eq!(allows_every_device(&rules(given.clone())), expected, "{given}");
        }
    }
}
