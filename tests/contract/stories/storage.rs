//! Root file systems and volumes, however the node mounts them.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    os::{fd::AsRawFd, unix::fs::symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tests::{
    config::Guest,
    failure::{Result, Trying, claim, contains, same},
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{GRACE, Pod},
    process::{self, Kind},
    task::{BOOT, ORDINARY},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "what_lies_below_a_private_mount_reaches_a_container", private),
    (
        BOTH,
        "what_is_mounted_below_a_read_only_volume_is_writable",
        below_read_only,
    ),
    (OURS, "a_volume_that_never_answers_fails_its_container_only", no_answer),
    (OURS, "who_sees_the_whole_host_keeps_nobodys_files", whole_host),
];

const NONE: Option<&str> = None;

/// A mount that is undone when the story is over, whatever becomes of it.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: &Path) -> Result<Mounted> {
        fs::create_dir_all(path).trying(format!("making {}", path.display()))?;
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), NONE).trying("mounting a tmpfs")?;
        Ok(Mounted(path.into()))
    }

    /// A bind mount of a folder on itself that propagates nothing: what CRI-O makes of the home of its overlays.
    fn home(path: &Path) -> Result<Mounted> {
        fs::create_dir_all(path).trying(format!("making {}", path.display()))?;
        mount(Some(path), path, NONE, MsFlags::MS_BIND, NONE).trying("binding a folder to itself")?;
        mount(NONE, path, NONE, MsFlags::MS_PRIVATE, NONE).trying("making a mount private")?;
        Ok(Mounted(path.into()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A failure shows as a mount that is left on the node.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Nothing that is mounted below such a mount reaches a mount namespace that was made before. Of what was there already
/// each has a copy, which is not unmounted with the original.
fn private(crio: &Crio<'_>) -> Result {
    let storage = crio.node.folder().join("storage");
    let _home = Mounted::home(&storage)?;
    let pod = Pod::run(crio)?;
    let volume = storage.join("late");
    let _late = Mounted::tmpfs(&volume)?;
    fs::write(volume.join("seen"), "late").trying("writing into the volume")?;
    let settings = storage.join("pods/uid/volumes/kubernetes.io~configmap/settings");
    let _settings = Mounted::tmpfs(&settings)?;
    config_map(&settings)?;
    let wanted = Wanted::idle()
        .with_volume(&volume, "/volume", false)
        .with_volume(&settings, "/settings", true);
    let mut container = pod.start(&wanted)?;
    container.stdout()?.line("ready", ORDINARY)?;
    same("the volume", container.shell("cat /volume/seen")?, "late")?;
    same("the ConfigMap", container.shell("cat /settings/key")?, "value")?;
    // This pod's processes begin with copies of the first pod's mounts.
    let other = Pod::run(crio)?;
    let neighbour = other.idle()?;
    container.stop(GRACE)?;
    container.rootfs.unmount()?;
    same("the neighbour's word", neighbour.shell("echo here")?, "here")?;
    pod.end([container])?;
    other.end([neighbour])
}

/// A ConfigMap's volume as the kubelet's `AtomicWriter` leaves it.
fn config_map(volume: &Path) -> Result {
    let made = || {
        fs::create_dir_all(volume.join("..1"))?;
        fs::write(volume.join("..1/key"), "value")?;
        symlink("..1", volume.join("..data"))?;
        symlink("..data/key", volume.join("key"))
    };
    made().trying("making a ConfigMap")
}

/// `readOnly` alone is not recursive (Kubernetes, `recursiveReadOnly`).
fn below_read_only(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let volume = pod.volume("fixed")?;
    let below = volume.join("below");
    let _below = Mounted::tmpfs(&below)?;
    let _deeper = Mounted::tmpfs(&below.join("deeper"))?;
    fs::write(volume.join("seen"), "fixed").trying("writing into the volume")?;
    let container = pod.start(&Wanted::idle().with_volume(&volume, "/fixed", true))?;
    container.stdout()?.line("ready", ORDINARY)?;
    same("the volume", container.shell("cat /fixed/seen")?, "fixed")?;
    let refused = container.exec(&["touch", "/fixed/new"])?;
    contains("the refusal", &refused.errors(), "Read-only file system")?;
    container.shell("echo below >/fixed/below/new && echo deeper >/fixed/below/deeper/new")?;
    for (folder, text) in [(below.clone(), "below\n"), (below.join("deeper"), "deeper\n")] {
        let written = fs::read_to_string(folder.join("new")).trying("reading what the container wrote")?;
        same("what the container wrote", written.as_str(), text)?;
    }
    pod.end([container])
}

/// A file system whose server takes no request: whoever looks at it waits, as with a network file system whose server
/// is gone.
struct Dead {
    /// The server's end; when it is closed, everybody who waits gets an error.
    server: File,
    mounted: Mounted,
}

impl Dead {
    fn mount(path: &Path) -> Result<Dead> {
        fs::create_dir_all(path).trying(format!("making {}", path.display()))?;
        let server = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .trying("opening /dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let options = CString::new(options)
            .map_err(std::io::Error::other)
            .trying("naming the server")?;
        mount(
            Some("dead"),
            path,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_c_str()),
        )
        .trying("mounting a file system of FUSE")?;
        Ok(Dead {
            server,
            mounted: Mounted(path.into()),
        })
    }
}

fn no_answer(crio: &Crio<'_>) -> Result {
    let text = format!(
        "{}[agent.kata]\ncreate_container_timeout = 30\n",
        Guest::Own.configuration()?
    );
    let crio = &Crio::new(crio.node, Runtime::Sandpod)?.configured(&text)?;
    let pod = Pod::run(crio)?;
    let shim = process::only(Kind::Shim, crio)?;
    let path = pod.volume("dead")?;
    let dead = Dead::mount(&path)?;
    // A folder in it: what is mounted there can be bound without a look at it.
    let wanted = Wanted::idle().with_volume(&path.join("data"), "/data", false);
    // As often as the kubelet may try: the last is refused for what the first has met, and nobody else waits for it.
    for sentence in [
        "did not answer within 30 s",
        "has not answered since",
        "has not answered since",
    ] {
        let container = pod.prepare(&wanted)?;
        let refusal = container.begin_create()?.refused(BOOT)?;
        contains("the refusal", &refusal.message, sentence)?;
        contains("the refusal", &refusal.message, &path.display().to_string())?;
        container.shutdown()?;
        container.discard()?;
    }
    let healthy = pod.idle()?;
    same("another container's word", healthy.shell("echo here")?, "here")?;
    pod.end([healthy])?;
    // The volume answers nobody yet.
    process::gone("the shim", &[shim], Duration::from_secs(60))?;
    claim(
        Path::new(&format!("/proc/self/fd/{}", dead.server.as_raw_fd())).exists(),
        "the volume is gone",
    )?;
    drop(dead.server);
    drop(dead.mounted);
    Ok(())
}

/// A pod has all of the host as a volume, and with it the files of another's containers, as they are then. Those are
/// removed all the same.
fn whole_host(crio: &Crio<'_>) -> Result {
    let first = Pod::run(crio)?;
    let mut container = first.idle()?;
    let second = Pod::run(crio)?;
    let observer = second.start(&Wanted::idle().with_volume(Path::new("/"), "/host", true))?;
    same("the host", observer.shell("ls -d /host/etc")?.trim(), "/host/etc")?;
    container.stop(GRACE)?;
    // The observer has a copy of this mount, as it would with any runtime.
    container.rootfs.unmount_here()?;
    container.remove()?;
    let again = first.idle()?;
    second.end([observer])?;
    first.end([again])?;
    claim(
        !crio.log().contains("stay mounted"),
        format!("files of a container stay mounted: {}", crio.log()),
    )
}
