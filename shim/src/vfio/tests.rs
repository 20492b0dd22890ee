use std::os::unix::fs::symlink;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::*;

/// A host's file system with these PCI functions: group, address, class, driver, regions.
fn host(functions: &[(u32, &str, &str, &str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (group, address, class, driver, resource) in functions {
        let device = root.path().join("sys/devices").join(address);
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("class"), format!("{class}\n")).unwrap();
        fs::write(device.join("resource"), resource).unwrap();
        if !driver.is_empty() {
            symlink(format!("../../bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
        }
        let members = root.path().join(format!("sys/kernel/iommu_groups/{group}/devices"));
        fs::create_dir_all(&members).unwrap();
        symlink(&device, members.join(address)).unwrap();
    }
    root
}

/// A card of 256 MiB and 32 MiB above 4 GiB, 16 MiB below, ports and nothing.
const CARD: &str = "0x00000000de000000 0x00000000deffffff 0x0000000000040200\n\
                    0x0000383fe0000000 0x0000383fefffffff 0x000000000014220c\n\
                    0x0000383ff0000000 0x0000383ff1ffffff 0x000000000014220c\n\
                    0x000000000000e000 0x000000000000e07f 0x0000000000040101\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n";

fn asked(devices: &Value, annotations: &Value) -> Asked {
    let mut json: Value = serde_json::from_str(include_str!("../spec/samples/crio-sandbox.json")).unwrap();
    json["linux"]["devices"] = devices.clone();
    json["annotations"] = annotations.clone();
    Asked::of(&serde_json::from_value(json).unwrap())
}

fn group(number: &str) -> Asked {
    let path = format!("/dev/vfio/{number}");
    asked(
        &json!([{"path": path, "type": "c", "major": 240, "minor": 0}]),
        &json!({}),
    )
}

#[test]
fn a_group_is_all_its_functions_without_the_bridges() {
    let root = host(&[
        (12, "0000:3a:00.0", "0x060400", "pcieport", ""),
        (12, "0000:3b:00.0", "0x030000", "vfio-pci", CARD),
        (12, "0000:3b:00.1", "0x040300", "vfio-pci", ""),
        (13, "0000:3c:00.0", "0x020000", "mlx5_core", ""),
    ]);
    let found = group("12").find(root.path()).unwrap();
    assert_eq!(found.groups, BTreeSet::from([12]));
    let expected = ["0000:3b:00.0", "0000:3b:00.1"].map(|text| text.parse().unwrap());
    assert_eq!(found.functions.addresses().collect::<Vec<PciAddress>>(), expected);
    assert_eq!(window(CARD), (256 + 32) << 20);
    assert_eq!(iommu_groups(root.path()).unwrap(), 2);
}

#[test]
fn devices_come_from_the_sandboxs_own_list_and_from_its_annotations() {
    let root = host(&[
        (7, "0000:01:00.0", "0x020000", "vfio-pci", ""),
        (8, "0000:02:00.0", "0x020000", "vfio-pci", ""),
    ]);
    let folder = root.path().join("etc/cdi");
    fs::create_dir_all(&folder).unwrap();
    let nodes = json!([{"path": "/dev/vfio/vfio"}, {"path": "/dev/vfio/8"}]);
    let devices = json!([{"name": "a", "containerEdits": {"deviceNodes": nodes}}]);
    let specification = json!({"cdiVersion": "0.6.0", "kind": "vendor.com/nic", "devices": devices});
    fs::write(folder.join("nic.json"), specification.to_string()).unwrap();

    let char_device = |path: &str| json!({"path": path, "type": "c", "major": 10, "minor": 196});
    let listed = json!([
        char_device("/dev/null"),
        char_device("/dev/vfio/vfio"),
        char_device("/dev/vfio/7")
    ]);
    let annotations = json!({"cdi.k8s.io/devices": " vendor.com/nic=a,", "example.org/devices": "vendor.com/nic=b"});
    let found = asked(&listed, &annotations).find(root.path()).unwrap();
    assert_eq!(found.groups, BTreeSet::from([7, 8]));
    assert_eq!(
        asked(&json!([]), &json!({})).find(root.path()).unwrap(),
        Devices::default()
    );
    assert_eq!(
        files(&found.groups),
        ["/dev/vfio/vfio", "/dev/vfio/7", "/dev/vfio/8"].map(PathBuf::from)
    );
}

#[test]
fn a_group_that_the_guests_kernel_cannot_drive_is_refused_and_a_part_of_one_is_not() {
    let root = host(&[
        (20, "0000:51:00.0", "0x010802", "vfio-pci", ""),
        (21, "0000:52:00.0", "0x030000", "vfio-pci", ""),
        (21, "0000:52:00.1", "0x040300", "vfio-pci", ""),
        (22, "0000:53:00.0", "0x020000", "vfio-pci", ""),
        (22, "0000:53:00.1", "0x040300", "vfio-pci", ""),
    ]);
    let kinds = [
        ("0000:51:00.0", "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"),
        ("0000:52:00.0", "pci:v000010DEd00001EB8sv000010DEsd000012A2bc03sc02i00"),
        ("0000:52:00.1", "pci:v000010DEd000010F8sv000010DEsd000012A2bc04sc03i00"),
        ("0000:53:00.0", "pci:v00008086d000010EDsv00008086sd00000000bc02sc00i00"),
        ("0000:53:00.1", "pci:v000010DEd000010F8sv000010DEsd000012A2bc04sc03i00"),
    ];
    for (address, modalias) in kinds {
        fs::write(
            root.path().join("sys/devices").join(address).join("modalias"),
            format!("{modalias}\n"),
        )
        .unwrap();
    }
    let kernel = Kernel {
        cpus: None,
        pci: Some(vec![
            "pci:v*d*sv*sd*bc01sc08i02".into(),
            "pci:v00008086d000010EDsv*sd*bc*sc*i*".into(),
        ]),
    };
    for number in ["20", "22"] {
        group(number).find(root.path()).unwrap().fit(&kernel).unwrap();
    }
    let card = group("21").find(root.path()).unwrap();
    assert_eq!(
        card.fit(&kernel).unwrap_err().to_string(),
        "VFIO group 21 cannot be given to a pod: the guest's kernel has no driver for 0000:52:00.0 \
         (pci:v000010DEd00001EB8sv000010DEsd000012A2bc03sc02i00), 0000:52:00.1 \
         (pci:v000010DEd000010F8sv000010DEsd000012A2bc04sc03i00); name a kernel that has one in `kernel`"
    );
    // Of another kernel nothing is known.
    card.fit(&Kernel::default()).unwrap();
}

#[test]
fn what_cannot_be_had_is_refused_by_its_group() {
    let many: Vec<_> = (0..33).map(|n| format!("0000:{n:02x}:00.0")).collect();
    let mut functions: Vec<_> = many
        .iter()
        .map(|address| (4, address.as_str(), "0x020000", "vfio-pci", ""))
        .collect();
    functions.extend([
        (1, "0000:41:00.0", "0x030000", "nvidia", ""),
        (2, "0000:42:00.0", "0x030000", "", ""),
        (3, "0000:43:00.0", "0x060400", "pcieport", ""),
        (5, "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "0x000000", "", ""),
    ]);
    let root = host(&functions);
    let cases = [
        (
            "9",
            "VFIO group 9 cannot be given to a pod: the node has no IOMMU group of this number",
        ),
        (
            "1",
            "VFIO group 1 cannot be given to a pod: 0000:41:00.0 has nvidia, and needs to be bound to vfio-pci",
        ),
        (
            "2",
            "VFIO group 2 cannot be given to a pod: 0000:42:00.0 has no driver, and needs to be bound to vfio-pci",
        ),
        ("3", "VFIO group 3 cannot be given to a pod: no device is in it"),
        (
            "5",
            "VFIO group 5 cannot be given to a pod: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 is no PCI function",
        ),
        ("4", "33 PCI functions of the host are more than 32"),
        (
            "devices/vfio0",
            "/dev/vfio/devices/vfio0 cannot be given to a pod: devices are passed by their group, /dev/vfio/<number>",
        ),
    ];
    for (number, sentence) in cases {
        assert_eq!(group(number).find(root.path()).unwrap_err().to_string(), sentence);
    }
}

#[test]
fn without_an_iommu_no_device_can_be_had() {
    let root = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let error = group("12").find(root.path()).unwrap_err().to_string();
        let sentence = "VFIO group 12 cannot be given to a pod: the node has no IOMMU; ";
        assert!(error.starts_with(sentence), "{error}");
        // The folder is there without an IOMMU too, and empty.
        fs::create_dir_all(root.path().join("sys/kernel/iommu_groups")).unwrap();
    }
}

/// `/dev/null` by another name takes the place of a group's file.
#[test]
fn qemu_gets_files_of_its_own_that_the_host_does_not_see() {
    const QEMU: u32 = 0x7000_0123;
    let place = tempfile::tempdir().unwrap();
    let (file, plain, folder) = (place.path().join("7"), place.path().join("8"), place.path().join("own"));
    let null = fs::metadata("/dev/null").unwrap();
    mknod(&file, SFlag::S_IFCHR, Mode::S_IRUSR, null.rdev()).unwrap();
    fs::write(&plain, "").unwrap();
    let (seen, refused) = std::thread::scope(|scope| {
        let lent = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            device_folder(&folder, None).unwrap();
            lend(std::slice::from_ref(&file), &folder, QEMU).unwrap();
            fs::write(&file, "swallowed").unwrap();
            let refused = lend(std::slice::from_ref(&plain), &folder, QEMU).unwrap_err();
            (fs::metadata(&file).unwrap(), refused.to_string())
        });
        lent.join().unwrap()
    });
    assert_eq!((seen.uid(), seen.gid(), seen.mode() & 0o777), (QEMU, QEMU, 0o600));
    assert_eq!(seen.rdev(), null.rdev());
    let sentence = format!("cannot use the device {}: it is no character device", plain.display());
    assert_eq!(refused, sentence);
    let host = fs::metadata(&file).unwrap();
    assert_eq!((host.uid(), host.mode() & 0o777), (0, 0o400));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}
