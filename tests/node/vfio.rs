//! Devices of the node that VFIO hands over: an NVMe disk and a network card, each behind a port of its own and the
//! node's IOMMU.

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, Trying, claim, contains, same},
    machine::{Container, Machine, ORDINARY, PodSpec, SPARE_MAC},
};

use crate::{
    Story,
    install::{HANDLER, SETTINGS, configure, ensure, pods_are_gone},
};

/// Not by default: no other story needs its node. When QEMU 7.2 emulated that, about one in ten guests with one of
/// these devices died before it had a console, or waited for the disk for ever; with 11.1 two of six waited so.
pub const AT_LENGTH: &[Story] = &[(
    "a_pod_drives_the_nodes_disk_and_card_and_gives_them_back",
    a_pod_drives_the_nodes_disk_and_card_and_gives_them_back,
)];

/// What the node's devices are called, by vendor and class, in [`CDI_FILE`].
const CDI_KIND: &str = "example.com/spare";
const CDI_FILE: &str = "/etc/cdi/spare.json";

/// Where on the disk the pod writes, in sectors, and how long what it writes is.
const SECTOR: u64 = 2048;
const SECTOR_BYTES: usize = 512;

/// The disk's file in a privileged container.
const MAKE_FILE: &str = "[ -e /dev/nvme0n1 ] || mknod /dev/nvme0n1 b $(tr : ' ' </sys/block/nvme0n1/dev)";

/// A device of the node.
struct Device {
    /// Where it is, `0000:01:00.0`.
    address: String,
    /// Its IOMMU group, and so the name of its file below /dev/vfio.
    group: String,
    /// The node's own driver.
    driver: &'static str,
}

fn a_pod_drives_the_nodes_disk_and_card_and_gives_them_back(node: &Machine) -> Result {
    ensure(node)?;
    let disk = device(node, "nvme")?;
    let card = device(node, "e1000e")?;
    // VFIO pins all of the memory.
    configure(node, "cold_plug_vfio = \"root-port\"\ndefault_memory = 512")?;
    node.put(CDI_FILE, specification(&disk, &card).to_string().as_bytes())?;
    let bound = format!("{} has nvme, and needs to be bound to vfio-pci", disk.address);
    refused(asking(node, "early", &["disk"]), &bound)?;

    for device in [&disk, &card] {
        bind(node, device, "vfio-pci")?;
    }
    both_are_driven(node, &disk, &card)?;
    for device in [&disk, &card] {
        are_the_nodes(node, device)?;
    }
    the_next_pod_has_the_disk(node, &card)?;
    for device in [&disk, &card] {
        are_the_nodes(node, device)?;
        bind(node, device, device.driver)?;
    }
    let read = node.until("the node's disk", &of_the_disk(), ORDINARY)?;
    same("what the node reads", read.as_str(), "of the second pod")?;
    node.run(&format!("rm -r {SETTINGS} {CDI_FILE} && rmdir /etc/cdi"))
        .map(drop)
}

/// A pod that has both uses them; meanwhile no other pod gets one of them.
fn both_are_driven(node: &Machine, disk: &Device, card: &Device) -> Result {
    let pod = asking(node, "both", &["disk", "card"]).run()?;
    let user = pod.container_with("user", &["sleep", "infinity"], |container| {
        privileged(container);
        let file = format!("/dev/vfio/{}", disk.group);
        container["devices"] = json!([{ "container_path": file, "host_path": file, "permissions": "rw" }]);
    })?;
    the_disk_is_written(&user, "of the first pod")?;
    same(
        "the container's /dev/vfio",
        user.shell("ls /dev | grep -c vfio || true")?.as_str(),
        "0",
    )?;
    the_card_is_used(node, &user)?;
    // Past the guest and the node: what our file holds.
    let (bytes, from) = (
        std::fs::read(node.spare_disk()).trying("reading the spare disk")?,
        SECTOR as usize * SECTOR_BYTES,
    );
    let sector = bytes.get(from..from + SECTOR_BYTES).unwrap_or_default();
    contains("the disk's file", &String::from_utf8_lossy(sector), "of the first pod")?;
    let taken = format!(
        "VFIO group {} cannot be given to a pod: another program has it",
        card.group
    );
    refused(asking(node, "late", &["card"]), &taken)?;
    user.shell("true")?;
    pod.remove()?;
    pods_are_gone(node)
}

/// A pod that has the disk alone finds on it what the last pod has written; the card is not for its containers.
fn the_next_pod_has_the_disk(node: &Machine, card: &Device) -> Result {
    let pod = asking(node, "next", &["disk"]).run()?;
    let user = pod.container_with("user", &["sleep", "infinity"], privileged)?;
    same(
        "what the first pod wrote",
        disk_text(&user)?.as_str(),
        "of the first pod",
    )?;
    the_disk_is_written(&user, "of the second pod")?;
    let other = pod.container_with("other", &["sleep", "infinity"], |container| {
        let file = format!("/dev/vfio/{}", card.group);
        container["devices"] = json!([{ "container_path": file, "host_path": file, "permissions": "rw" }]);
    });
    let sentence = format!("the VFIO device /dev/vfio/{} cannot be had in a VM", card.group);
    match other {
        Ok(_) => return Err(Failure::Claim("a container has a device that its pod has not".into())),
        Err(failure) => contains("the container's failure", &failure.to_string(), &sentence)?,
    }
    pod.remove()?;
    pods_are_gone(node)
}

/// The device that a driver of the node has.
fn device(node: &Machine, driver: &'static str) -> Result<Device> {
    let said = node.until(
        "the driver's device",
        &format!(
            "cd /sys/bus/pci/drivers/{driver} && for device in 0000:*; do \
             group=$(readlink $device/iommu_group) && echo $device ${{group##*/}}; done"
        ),
        ORDINARY,
    )?;
    match said.split_whitespace().collect::<Vec<_>>()[..] {
        [address, group] => Ok(Device {
            address: address.to_owned(),
            group: group.to_owned(),
            driver,
        }),
        _ => Err(Failure::Claim(format!(
            "{driver} of the node has not one device: {said:?}"
        ))),
    }
}

/// Gives a device to another driver.
fn bind(node: &Machine, device: &Device, driver: &str) -> Result {
    let address = &device.address;
    node.run(&format!(
        "set -e; modprobe {driver}; cd /sys/bus/pci/devices/{address}; echo {driver} >driver_override
         echo {address} >driver/unbind; echo {address} >/sys/bus/pci/drivers_probe
         [ \"$(basename $(readlink driver))\" = {driver} ]"
    ))
    .map(drop)
}

/// What names the devices for pods (CDI 0.6.0).
fn specification(disk: &Device, card: &Device) -> Value {
    let named = |name: &str, device: &Device| {
        let file = format!("/dev/vfio/{}", device.group);
        json!({ "name": name, "containerEdits": { "deviceNodes": [{ "path": file }] } })
    };
    let devices = [named("disk", disk), named("card", card)];
    json!({ "cdiVersion": "0.6.0", "kind": CDI_KIND, "devices": devices })
}

/// A privileged pod that asks for devices of [`CDI_FILE`].
fn asking<'m>(node: &'m Machine, name: &str, devices: &[&str]) -> PodSpec<'m> {
    let words: Vec<_> = devices.iter().map(|device| format!("{CDI_KIND}={device}")).collect();
    node.pod(HANDLER, name).with(|pod| {
        pod["annotations"] = json!({ "cdi.k8s.io/spare": words.join(",") });
        privileged(pod);
    })
}

fn privileged(configuration: &mut Value) {
    configuration["linux"]["security_context"]["privileged"] = true.into();
}

fn refused(pod: PodSpec<'_>, sentence: &str) -> Result {
    match pod.run() {
        Ok(_) => Err(Failure::Claim(format!(
            "a pod runs, and should have been refused: {sentence}"
        ))),
        Err(failure) => contains("the pod's failure", &failure.to_string(), sentence),
    }
}

/// Writes to the guest's disk, which its NVMe driver has, and reads it back from there.
fn the_disk_is_written(user: &Container<'_>, text: &str) -> Result {
    let driver = "basename $(readlink -f /sys/block/nvme0n1/device/device/driver)";
    same("the driver of the guest's disk", user.shell(driver)?.as_str(), "nvme")?;
    user.shell(MAKE_FILE)?;
    user.shell(&format!(
        "printf '%-{SECTOR_BYTES}s' '{text}' | \
         dd of=/dev/nvme0n1 bs={SECTOR_BYTES} seek={SECTOR} oflag=direct iflag=fullblock"
    ))?;
    same("what was written", disk_text(user)?.as_str(), text)
}

fn disk_text(user: &Container<'_>) -> Result<String> {
    user.shell(&format!("{{ {MAKE_FILE}; }} && {}", of_the_disk()))
}

/// Reads what is on a disk, past all caches.
fn of_the_disk() -> String {
    format!("dd if=/dev/nvme0n1 bs={SECTOR_BYTES} skip={SECTOR} count=1 iflag=direct 2>/dev/null | sed 's/ *$//'")
}

/// The guest's driver has the node's card, and whoever is at its other end answers.
fn the_card_is_used(node: &Machine, user: &Container<'_>) -> Result {
    let name = user.shell(&format!(
        "cd /sys/class/net && grep -lx {SPARE_MAC} */address | cut -d/ -f1"
    ))?;
    let driver = format!("basename $(readlink -f /sys/class/net/{name}/device/driver)");
    same(
        "the driver of the guest's card",
        user.shell(&driver)?.as_str(),
        "e1000e",
    )?;
    // As QEMU's user network has it.
    user.shell(&format!(
        "ip address add 10.0.2.15/24 dev {name} && ip link set {name} up"
    ))?;
    let asked = format!(
        "crictl exec --sync {} arping -f -c 1 -w 5 -I {name} 10.0.2.2",
        user.id()
    );
    let answered = node.until("an answer on the card's network", &asked, ORDINARY)?;
    contains("the answer", &answered, "Received 1 response")
}

/// A device is as its administrator has left it, and nobody has it.
fn are_the_nodes(node: &Machine, device: &Device) -> Result {
    let driver = format!("basename $(readlink /sys/bus/pci/devices/{}/driver)", device.address);
    same("the device's driver", node.run(&driver)?.as_str(), "vfio-pci")?;
    let open = node.try_run(&format!("exec 3<>/dev/vfio/{}", device.group))?;
    claim(
        open.code == 0,
        format!("someone has group {} still: {}", device.group, open.errors()),
    )
}
