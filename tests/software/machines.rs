//! Containers within containers.

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, contains, same},
    node::Node,
};

use crate::{Story, at_length, empty_dir, large};

pub const AT_LENGTH: &[Story] = &[("podman_in_a_privileged_pod", podman_in_a_privileged_pod)];

/// An image of a shell, and a container of it. crun needs CAP_SYS_RESOURCE for the rules of devices on cgroup v2, and
/// to raise limits, which the machine of a story need not have.
const PODMAN: &str =
    "mkdir -p /tmp/image/bin; cp /bin/busybox /tmp/image/bin/sh; tar -C /tmp/image -cf /tmp/image.tar .
    podman() {
      command podman --root $STORAGE --runroot /run/podman$STORAGE --storage-driver overlay $OVERLAY \
        --cgroup-manager cgroupfs --events-backend file \"$@\"
    }
    podman import --quiet /tmp/image.tar shell
    podman run --name first --cgroups disabled --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --network none shell /bin/sh -c 'echo kept >/new; echo hello from within'
    podman commit --quiet first second
    podman run --rm --cgroups disabled --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --network none second \
      /bin/sh -c 'read word </new; echo $word; read line </proc/mounts; echo $line'";

/// Podman runs containers and makes images in a privileged pod, on the container's root and on a volume.
fn podman_in_a_privileged_pod(node: &Node, runtime: Runtime) -> Result {
    let data = empty_dir(node, "data")?;
    let pod = node.pod(runtime, "podman")?.privileged().run()?;
    let podman = large(&pod, "podman", "exec sleep infinity")?
        .volume(&data, "/data", Access::ReadWrite)
        .privileged()
        .run()?;
    // On a root file system, which is an overlay itself, the kernel's overlay cannot write, fuse-overlayfs can.
    let with_fuse = "--storage-opt overlay.mount_program=/usr/bin/fuse-overlayfs";
    for (storage, overlay, mounted) in [
        (
            "/var/lib/containers/storage",
            with_fuse,
            "fuse-overlayfs / fuse.fuse-overlayfs",
        ),
        ("/data/storage", "", "overlay / overlay"),
    ] {
        let seen = at_length(&podman, &format!("STORAGE={storage}; OVERLAY='{overlay}'; {PODMAN}"))?;
        for part in ["hello from within", "kept", mounted] {
            contains(storage, &seen, part)?;
        }
    }
    same("on the volume", data.join("storage/overlay").is_dir(), true)?;
    pod.remove()
}
