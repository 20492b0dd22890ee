//! What a pod can do with a kernel of its own, and with that kernel's devices.

use tests::{
    config::Runtime,
    cri::{Access, Container},
    failure::{Result, claim, contains, same},
    node::Node,
    run,
};

use crate::Story;

/// Stories of our own kernel.
pub const OF_A_VM: &[Story] = &[
    (
        "a_privileged_container_has_the_devices_of_its_guest",
        a_privileged_container_has_the_devices_of_its_guest,
    ),
    ("overlay_works_on_a_volume", overlay_works_on_a_volume),
];

/// A privileged container mounts an overlay whose layers are in a volume, as Docker does for an image: changed, removed
/// and replaced files are so, also after another mount of it, and no other container sees or forges its notes.
fn overlay_works_on_a_volume(node: &Node, runtime: Runtime) -> Result {
    let volume = node.path(&format!("layers-{}", node.serial()));
    node.write(&volume.join("lower/folder/old"), "old")?;
    node.write(&volume.join("lower/kept"), "kept")?;
    let pod = node.pod(runtime, "overlay")?.privileged().run()?;
    let container = pod
        .container("docker", &["sleep", "infinity"])
        .privileged()
        .volume(&volume, "/layers", Access::ReadWrite)
        .run()?;
    let mount = "mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay at";
    container.shell(&format!(
        "cd /layers; mkdir upper work at; {mount}; echo more >>at/kept; rm -r at/folder; mkdir at/folder; \
         echo new >at/folder/new; umount at"
    ))?;
    let seen = container.shell(&format!(
        "cd /layers; {mount}; cat at/kept; ls at at/folder; umount at; cat lower/kept"
    ))?;
    same(
        "what is there",
        seen.as_str(),
        "keptmore\nat:\nfolder\nkept\n\nat/folder:\nnew\nkept",
    )?;
    let neighbour = pod
        .container("neighbour", &["sleep", "infinity"])
        .volume(&volume, "/layers", Access::ReadWrite)
        .run()?;
    let name = "user.virtiofs.trusted.overlay.opaque";
    refuses(
        &neighbour,
        &format!("setfattr -n {name} -v y /layers/lower/folder"),
        "Operation not permitted",
    )?;
    pod.remove()
}

/// Makes a file system in a file, mounts it and writes to it; opens what FUSE and VPN programs open.
const USE_DEVICES: &str = "cd /root; truncate -s 16M image; mke2fs -F image >/dev/null 2>&1; mkdir -p at; \
     mount -o loop image at; echo kept >at/file; umount at; \
     mount -o loop,ro image at; cat at/file; umount at; \
     exec 3<>/dev/fuse; exec 4<>/dev/net/tun; readlink /dev/fd; echo gone >/dev/null";

/// A privileged container has loop devices, FUSE and tun as on a node, with the default files in `/dev` and with a
/// `hostPath` of `/dev` at `/dev`, where a device that comes later is seen; and it changes nothing in the guest's own.
/// Another container has none of them.
fn a_privileged_container_has_the_devices_of_its_guest(node: &Node, runtime: Runtime) -> Result {
    let dev = std::path::Path::new("/dev");
    let pod = node.pod(runtime, "devices")?.privileged().run()?;
    let watcher = pod
        .container("watcher", &["sleep", "infinity"])
        .privileged()
        .volume(dev, "/guest", Access::ReadWrite)
        .run()?;
    let before = watcher.shell("ls -l /guest/null /guest/ptmx /guest/full")?;
    let plain = pod.container("plain", &["sleep", "infinity"]).privileged().run()?;
    let with_path = |name| {
        pod.container(name, &["sleep", "infinity"])
            .privileged()
            .volume(dev, "/dev", Access::ReadWrite)
            .run()
    };
    let whole = with_path("whole")?;
    // Another one finds nothing that the first has left.
    let again = with_path("again")?;
    for (name, container) in [("plain", &plain), ("whole", &whole), ("again", &again)] {
        same(name, container.shell(USE_DEVICES)?.as_str(), "kept\n/proc/self/fd")?;
    }
    // There are eight, as on a node. For the ninth file the kernel makes another.
    whole.shell("cd /root; for n in 0 1 2 3 4 5 6 7 8; do truncate -s 1M late$n; losetup -f late$n; done")?;
    same(
        "a late device",
        again.shell("cat /sys/block/loop8/size; test -b /dev/loop8")?.as_str(),
        "2048",
    )?;
    whole.shell("for n in 0 1 2 3 4 5 6 7 8; do losetup -d /dev/loop$n; done; touch /dev/mine")?;
    same(
        "the guest's own devices",
        watcher.shell("ls -l /guest/null /guest/ptmx /guest/full; ls -d /guest/fd /guest/mine 2>/dev/null || true")?,
        before,
    )?;
    let ordinary = pod.container("ordinary", &["sleep", "infinity"]).run()?;
    refuses(&ordinary, "ls /dev/fuse", "No such file")?;
    refuses(
        &ordinary,
        "mknod /root/fuse c 10 229; : <>/root/fuse",
        "Operation not permitted",
    )?;
    pod.remove()
}

fn refuses(container: &Container<'_>, script: &str, because: &str) -> Result {
    let output = container.exec(&["sh", "-c", script], None, run::ORDINARY)?;
    claim(output.code != 0, format!("`{script}` fails"))?;
    contains("refusal", &output.errors(), because)
}
