//! Block volumes.

use std::time::Duration;

use tests::{
    config::Runtime,
    cri::Access,
    disk::LoopDevice,
    failure::{Result, claim, same},
    node::Node,
    run::{self, finish},
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("a_block_volume_is_the_pods", a_block_volume_is_the_pods),
    ("a_block_volume_grows", a_block_volume_grows),
];

/// How soon a container sees the new size.
const GROWING: Duration = Duration::from_secs(10);

/// Two containers share a block volume, one of them reads only; the node has what was written, and the device is free
/// afterwards.
fn a_block_volume_is_the_pods(node: &Node, runtime: Runtime) -> Result {
    let disk = LoopDevice::make(&node.path(&format!("disk-{}", node.serial())), 8, "from the node\n")?;
    let pod = node.pod(runtime, "disk")?.run()?;
    let idle = ["sleep", "infinity"];
    let reader = pod
        .container("reader", &idle)
        .device(disk.path(), "/dev/fixed", Access::ReadOnly)
        .run()?;
    let writer = pod
        .container("writer", &idle)
        .device(disk.path(), "/dev/data", Access::ReadWrite)
        .run()?;
    same(
        "what the writer reads",
        writer.shell("head -n 1 /dev/data")?,
        "from the node",
    )?;
    writer.shell("echo from the pod | dd of=/dev/data conv=fsync 2>/dev/null")?;
    same("what the node reads", disk.begins(13)?, "from the pod\n")?;
    let direct = "dd if=/dev/fixed iflag=direct bs=4096 count=1 2>/dev/null | head -n 1";
    same("what the reader reads", reader.shell(direct)?, "from the pod")?;
    let mut forbidden = node.crictl_command(["exec", "--sync", reader.id(), "sh", "-c", "echo no >/dev/fixed"])?;
    let refused = finish(&mut forbidden, None, run::ORDINARY)?;
    claim(refused.code != 0, "the reader cannot write")?;
    // The other one keeps it.
    reader.remove()?;
    same("after the reader", writer.shell("head -n 1 /dev/data")?, "from the pod")?;
    writer.remove()?;
    let again = pod
        .container("again", &idle)
        .device(disk.path(), "/dev/again", Access::ReadWrite)
        .run()?;
    same(
        "a later container",
        again.shell("head -n 1 /dev/again")?,
        "from the pod",
    )?;
    pod.remove()
}

/// A device that grows on the node grows in the container.
fn a_block_volume_grows(node: &Node, runtime: Runtime) -> Result {
    let disk = LoopDevice::make(&node.path(&format!("disk-{}", node.serial())), 8, "growing\n")?;
    let pod = node.pod(runtime, "growing-disk")?.run()?;
    let container = pod
        .container("holder", &["sleep", "infinity"])
        .device(disk.path(), "/dev/data", Access::ReadWrite)
        .run()?;
    let size = || container.shell("blockdev --getsize64 /dev/data");
    same("the size", size()?, (8 << 20).to_string())?;
    disk.grow(32)?;
    node.events().bell.until("the new size", GROWING, || match size() {
        Ok(bytes) if bytes == (32 << 20).to_string() => Ok(()),
        Ok(bytes) => Err(bytes),
        Err(failure) => Err(failure.to_string()),
    })?;
    pod.remove()
}
