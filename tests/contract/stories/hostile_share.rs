//! A guest whose root speaks to virtiofsd itself: `tests/src/bin/hostile-agent/attack.rs` is what it says.
//!
//! It takes the virtio-fs device from the guest's kernel and sends FUSE messages that no kernel sends. On the host
//! nothing changes but the container's own root and the volume that it may write to.

use std::{
    fs::{self, File, Permissions},
    io::Read,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    slice,
};

use containerd_shim_protos::api::Status;
use nix::libc;
use tests::{
    failure::{Failure, Result, Trying, claim, same},
    tree::Tree,
    wait::Bell,
};

use super::{OURS, Told, hostile::against};
use crate::{
    bundle::Wanted,
    crio::Crio,
    pod::Pod,
    process::{self, Kind},
    task::{BOOT, ORDINARY, Task},
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "a_hostile_guest_that_speaks_raw_fuse_stays_in_its_share", whole),
    (OURS, "a_hostile_guest_that_breaks_the_file_server_is_ended", malformed),
];

/// The attacker's last words.
const ALL: &str = "that is all";

/// Messages that no file server can make sense of, and one of that kind that it answers.
const MALFORMED: &[&str] = &[
    "well-made",
    "length-none",
    "length-long",
    "no-nul",
    "value-short",
    "little-room",
    "loop",
    "elsewhere",
    "endless",
    "far-write",
    "read-without-room",
];

/// Folders of the host: two are volumes of the attacker's, and the others are none of its business.
struct World {
    writable: PathBuf,
    readonly: PathBuf,
    canary: PathBuf,
    /// What must be the same afterwards.
    witnesses: Vec<PathBuf>,
    before: Tree,
}

impl World {
    fn make(crio: &Crio<'_>) -> Result<World> {
        let folder = crio.node.folder().join("storage/attacked");
        let [writable, readonly, canary] = ["writable", "readonly", "canary"].map(|name| folder.join(name));
        let made = || {
            for (folder, file, text) in [
                (&writable, "mine", "mine"),
                (&readonly, "theirs", "theirs"),
                (&canary, "secret", "secret"),
            ] {
                fs::create_dir_all(folder)?;
                fs::write(folder.join(file), text)?;
            }
            fs::create_dir_all(canary.join("folder"))?;
            fs::write(folder.join("beside"), "the volumes")?;
            fs::set_permissions(canary.join("secret"), Permissions::from_mode(0o600))
        };
        made().trying("making what is attacked")?;
        let witnesses = vec![
            readonly.clone(),
            canary.clone(),
            folder.join("beside"),
            crio.node.image(),
        ];
        Ok(World {
            writable,
            readonly,
            canary,
            before: Tree::stamped(&witnesses)?,
            witnesses,
        })
    }

    /// A container that attacks in this manner.
    fn attacker(&self, words: &[&str]) -> Wanted {
        let wanted = Wanted {
            args: words.iter().map(|word| (*word).to_owned()).collect(),
            ..Wanted::default()
        };
        let wanted = wanted.with_volume(&self.writable, "/writable", false);
        wanted.with_volume(&self.readonly, "/readonly", true)
    }

    fn is_whole(&self) -> Result {
        Tree::stamped(&self.witnesses)?.same_as(&self.before)
    }

    fn manner(&self) -> String {
        format!("raw-fuse canary={}", self.canary.display())
    }
}

/// Says everything that is well made.
fn whole(crio: &Crio<'_>) -> Result {
    let world = World::make(crio)?;
    let neighbour = Pod::run(crio)?;
    let honest = neighbour.idle()?;
    let others = process::running(Kind::FileServer, crio);
    against(crio, &world.manner(), "", |crio| {
        let pod = Pod::run(crio)?;
        let mut container = pod.create(&world.attacker(&["whole"]))?;
        let servers = process::running(Kind::FileServer, crio);
        let server = servers.iter().rfind(|server| !others.contains(server)).copied();
        let server = server.ok_or_else(|| Failure::Claim("the pod has no file server".into()))?;
        let top = PathBuf::from(format!("/proc/{server}/root"));
        let share = Tree::stamped(slice::from_ref(&top))?;
        container.start()?;
        container.stdout()?.line(ALL, BOOT)?;
        let said = container.stdout()?.text();
        println!("the attacker's messages were {}", said.trim_end());
        claim(
            said.starts_with("answered as they should be: "),
            format!("the share's server answered otherwise than it should:\n{said}"),
        )?;
        world.is_whole()?;
        Tree::stamped(slice::from_ref(&top))?.same_as(&share)?;
        no_devices(server, &world.writable)?;
        no_trusted_attributes(&world.writable)?;
        pod.sandbox.is(Status::RUNNING)?;
        still_there(&honest)?;
        pod.end([container])
    })?;
    world.is_whole()?;
    neighbour.end([honest])
}

/// The device files that the attacker has made are there, and cannot be opened in the share.
fn no_devices(server: i32, volume: &Path) -> Result {
    let zero = volume.join("zero");
    let kind = fs::symlink_metadata(&zero)
        .trying("looking at a device file")?
        .file_type();
    claim(kind.is_char_device(), format!("{} is {kind:?}", zero.display()))?;
    let mut byte = [0; 1];
    // With this name it can be opened: it is of a file system that has devices.
    let opened = File::open(&zero).and_then(|mut file| file.read_exact(&mut byte));
    opened.trying("opening a device file of the host's")?;
    let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).trying("reading the server's mounts")?;
    let mut devices = 0;
    for mount in mounts.lines() {
        let fields: Vec<_> = mount.split(' ').collect();
        let [_, _, _, root, point, options, ..] = fields[..] else {
            return Err(Failure::Claim(format!("a mount is {mount:?}")));
        };
        claim(
            options.split(',').any(|option| option == "nodev"),
            format!("the file server could open devices at {mount:?}"),
        )?;
        let device = PathBuf::from(format!("/proc/{server}/root{point}/zero"));
        if root.ends_with("/attacked/writable") || point.ends_with("/rootfs") {
            let opened = File::open(&device).map(drop).map_err(|error| error.raw_os_error());
            same("opening the device in the share", opened, Err(Some(libc::EACCES)))?;
            devices += 1;
        }
    }
    same("places with a device file", devices, 2)
}

/// What the attacker has set as an attribute of the host's root is none on the host.
fn no_trusted_attributes(volume: &Path) -> Result {
    let mut names = Vec::with_capacity(1 << 10);
    rustix::fs::listxattr(volume, rustix::buffer::spare_capacity(&mut names))
        .trying("listing a volume's attributes")?;
    let names = String::from_utf8_lossy(&names);
    let mut names: Vec<_> = names
        .split_terminator('\0')
        .filter(|name| name.contains("trusted."))
        .collect();
    names.sort_unstable();
    let renamed = ["any", "overlay.opaque", "overlay.redirect"].map(|key| format!("user.virtiofs.trusted.{key}"));
    same(
        "attributes of the volume on the host",
        names,
        renamed.each_ref().map(String::as_str).to_vec(),
    )
}

/// Each message in a pod of its own. It is answered, or the server ends and the pod with it.
fn malformed(crio: &Crio<'_>) -> Result {
    let world = World::make(crio)?;
    let neighbour = Pod::run(crio)?;
    let honest = neighbour.idle()?;
    let others = process::of_the_vm(crio);
    for kind in MALFORMED {
        against(crio, &world.manner(), "", |crio| {
            let pod = Pod::run(crio)?;
            let mut container = pod.create(&world.attacker(&["malformed", kind]))?;
            let mut machine = process::of_the_vm(crio);
            machine.retain(|pid| !others.contains(pid));
            container.start()?;
            match container.stdout()?.line(ALL, BOOT) {
                Ok(()) => {
                    let said = container.stdout()?.text();
                    claim(
                        said.contains("back with"),
                        format!("the server has not answered: {said}"),
                    )?;
                    pod.sandbox.is(Status::RUNNING)?;
                }
                Err(failure) if *kind == "well-made" => return Err(failure),
                Err(_) => ended(crio, &container, &machine)?,
            }
            world.is_whole()?;
            still_there(&honest)?;
            pod.end([container])
        })
        .map_err(|failure| Failure::Claim(format!("{kind}: {failure}")))?;
    }
    neighbour.end([honest])
}

/// The pod has ended with its file server, and its shim says so.
fn ended(crio: &Crio<'_>, container: &Task<'_, '_>, machine: &[i32]) -> Result {
    same("the exit", container.exited(BOOT)?.exit_status, 137)?;
    process::gone("the machine", machine, ORDINARY)?;
    Bell::default().until("the reason in the shim's log", ORDINARY, || match crio.log() {
        log if log.contains("the virtual machine ends reason=\"ended: virtiofsd exited with code") => Ok(()),
        log => Err(log),
    })
}

fn still_there(neighbour: &Task<'_, '_>) -> Result {
    same("the neighbour's word", neighbour.shell("echo here")?, "here")
}
