//! The shared folder, served by a real virtiofsd.

use std::{fs, sync::Arc};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::time::timeout;
use vmm::{Spawner, Virtiofsd, VirtiofsdSpec, spec::FsDevice};

use crate::{
    Story,
    machine::{Kit, Machine, PATIENCE, signal},
    stories,
};

pub fn stories() -> impl IntoIterator<Item = Story> {
    stories![
        guest_and_host_share_a_folder,
        a_virtiofsd_that_dies_is_seen_and_the_vm_can_still_be_ended,
        a_virtiofsd_ends_with_its_qemu,
    ]
}

struct Shared {
    machine: Machine,
    virtiofsd: Virtiofsd,
    folder: TempDir,
}

async fn shared(kit: &Kit) -> Shared {
    let folder = tempfile::tempdir().unwrap();
    let spawner = Spawner::new().unwrap();
    let server = VirtiofsdSpec {
        program: kit.virtiofsd.clone(),
        shared_dir: folder.path().into(),
        cache: "auto".into(),
        extra_args: Vec::new(),
        label: None,
        oom_score_adj: None,
    };
    let (virtiofsd, connection) = Virtiofsd::start(&spawner, &server).unwrap();
    let mut spec = kit.spec();
    spec.fs = Some(FsDevice {
        tag: "share".into(),
        queue_size: 1024,
    });
    spec.memory.boot_mib = 256;
    let mut machine = Machine::boot_with(&spawner, &spec, Some(connection)).await;
    assert_eq!(machine.ask("mount share").await, "done");
    Shared {
        machine,
        virtiofsd,
        folder,
    }
}

async fn guest_and_host_share_a_folder(kit: Arc<Kit>) {
    let Shared {
        mut machine,
        virtiofsd,
        folder,
    } = shared(&kit).await;
    fs::write(folder.path().join("host"), "from the host").unwrap();
    assert_eq!(machine.ask("read /mnt/host").await, "from the host");
    assert_eq!(machine.ask("write /mnt/guest from the guest").await, "done");
    assert_eq!(
        fs::read_to_string(folder.path().join("guest")).unwrap(),
        "from the guest"
    );

    // Memory that is plugged later is shared with the server too.
    machine.vm.set_memory(768).await.unwrap();
    assert_eq!(machine.ask("hold 400").await, "done");
    assert_eq!(machine.ask("read /mnt/host").await, "from the host");
    machine.end().await;
    virtiofsd.child().exited().await;
}

async fn a_virtiofsd_that_dies_is_seen_and_the_vm_can_still_be_ended(kit: Arc<Kit>) {
    let Shared {
        mut machine,
        virtiofsd,
        folder,
    } = shared(&kit).await;
    fs::write(folder.path().join("host"), "from the host").unwrap();
    signal(virtiofsd.child().pid(), Signal::SIGKILL);
    let ended = timeout(PATIENCE, virtiofsd.child().exited()).await.unwrap();
    assert_eq!(ended.to_string(), "was killed by signal 9");
    // Nothing tells the guest: whoever uses the folder now waits for ever.
    machine.tell("read /mnt/host").await;
    assert_eq!(machine.vm.stop().await.to_string(), "was killed by signal 9");
}

async fn a_virtiofsd_ends_with_its_qemu(kit: Arc<Kit>) {
    let Shared { machine, virtiofsd, .. } = shared(&kit).await;
    signal(machine.vm.child().pid(), Signal::SIGKILL);
    assert_eq!(machine.vm.child().exited().await.to_string(), "was killed by signal 9");
    let ended = timeout(PATIENCE, virtiofsd.child().exited()).await.unwrap();
    assert_eq!(ended.to_string(), "exited with code 0", "{}", virtiofsd.log_tail());
}
