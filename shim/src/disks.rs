//! The block volumes of a pod (`volumeDevices`): plugged with the first container that has one, unplugged with the
//! last, and as large as the host's device.
//!
//! ```text
//! (absent) ──first container──▶ plugged ⟲ further containers, the host's device grows
//!     ▲                            │
//!     └───────last container───────┘
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use agent_protocol::protocol::agent::Device;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_KOBJECT_UEVENT};
use nix::{
    errno::Errno,
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use tokio::{
    sync::{Mutex, Notify},
    task::AbortHandle,
};
use vmm::{Disk, QmpError, Vm, VmError};

use crate::{
    error::{Context, Result},
    spec::{BlockDevice, Numbers},
};

/// The kernel's own group of device events; what comes there is for everyone (`lib/kobject_uevent.c` of Linux).
const UEVENTS: u32 = 1;
/// `size` of a block device in sysfs counts these, whatever the device's own sectors are (sysfs-block).
const SECTOR: u64 = 512;

/// The block volumes of a pod.
pub struct Disks {
    vm: Arc<Vm>,
    /// Where device files may be made.
    folder: PathBuf,
    plugged: Arc<Mutex<Plugged>>,
    /// Wakes the follower of sizes: there is one more disk.
    more: Arc<Notify>,
}

#[derive(Default)]
struct Plugged {
    /// By device, and whether the guest may only read it.
    disks: BTreeMap<(Numbers, bool), Entry>,
    /// Follows the sizes of all devices, as long as there are any.
    follower: Option<AbortHandle>,
}

struct Entry {
    disk: Disk,
    containers: BTreeSet<String>,
    /// What the guest sees, in bytes.
    size: u64,
}

impl Disks {
    /// None yet. `folder` is one of [`crate::vfio::device_folder`].
    pub fn new(vm: Arc<Vm>, folder: PathBuf) -> Disks {
        Disks {
            vm,
            folder,
            plugged: Arc::default(),
            more: Arc::default(),
        }
    }

    /// Plugs what a container has and is not there yet; returns what the agent is to make of it.
    ///
    /// # Errors
    /// When a device cannot be opened or plugged. What was plugged until then goes with [`Disks::remove`].
    pub async fn add(&self, container: &str, devices: &[BlockDevice]) -> Result<Vec<Device>> {
        let mut plugged = self.plugged.lock().await;
        let mut added = Vec::new();
        for device in devices {
            let key = (device.numbers, device.read_only);
            let disk = match plugged.disks.get_mut(&key) {
                Some(entry) => {
                    entry.containers.insert(container.into());
                    entry.disk
                }
                None => {
                    let size = size_of(device.numbers).at("measure the block device", &device.path)?;
                    let disk = self.vm.add_disk(open(device, &self.folder)?, device.read_only).await?;
                    let containers = BTreeSet::from([container.to_owned()]);
                    let entry = Entry { disk, containers, size };
                    plugged.disks.insert(key, entry);
                    if plugged.follower.as_ref().is_none_or(AbortHandle::is_finished) {
                        let follower = follow(self.vm.clone(), self.plugged.clone(), self.more.clone());
                        plugged.follower = Some(tokio::spawn(follower).abort_handle());
                    }
                    self.more.notify_one();
                    disk
                }
            };
            let mut request = Device::new();
            request.type_ = "scsi".into();
            request.id = disk.address();
            request.container_path = device.path.display().to_string();
            added.push(request);
        }
        Ok(added)
    }

    /// Unplugs what only this container had. Nobody needs to wait for it.
    pub fn remove(&self, container: &str) {
        let (vm, plugged, container) = (self.vm.clone(), self.plugged.clone(), container.to_owned());
        tokio::spawn(async move {
            let mut plugged = plugged.lock().await;
            let mut unused = Vec::new();
            plugged.disks.retain(|_, entry| {
                let used = !(entry.containers.remove(&container) && entry.containers.is_empty());
                if !used {
                    unused.push(entry.disk);
                }
                used
            });
            if plugged.disks.is_empty()
                && let Some(follower) = plugged.follower.take()
            {
                follower.abort();
            }
            for disk in unused {
                if let Err(error) = vm.remove_disk(disk).await {
                    tracing::warn!(%error, container, "a block device stays plugged");
                }
            }
        });
    }
}

/// Opens a device by its numbers, wherever in the container it is to be and whatever the node calls it. The file for
/// that is made in `folder`, so it has the SELinux label of the pod's files there: the kernel hands QEMU no other one.
fn open(device: &BlockDevice, folder: &Path) -> Result<OwnedFd> {
    let file = folder.join(device.numbers.to_string());
    let opened = || -> io::Result<OwnedFd> {
        let (major, minor) = (device.numbers.major, device.numbers.minor);
        let number = |number: i64| u64::try_from(number).map_err(io::Error::other);
        let (mode, number) = (Mode::S_IRUSR | Mode::S_IWUSR, makedev(number(major)?, number(minor)?));
        mknod(&file, SFlag::S_IFBLK, mode, number)?;
        let opened = OpenOptions::new().read(true).write(!device.read_only).open(&file);
        fs::remove_file(&file)?;
        Ok(opened?.into())
    };
    opened().at("open the host's side of the block device", &device.path)
}

/// Tells the guest of each new size of a device, which CSI grows under a running pod. Ends with the VM.
async fn follow(vm: Arc<Vm>, plugged: Arc<Mutex<Plugged>>, more: Arc<Notify>) {
    let followed = async {
        let mut events = TokioSocket::new(NETLINK_KOBJECT_UEVENT)?;
        events.socket_mut().bind(&SocketAddr::new(0, UEVENTS))?;
        while resize(&vm, &mut plugged.lock().await.disks).await {
            // What an event says is not read: it is the time to look again. The error of a queue that overflowed is
            // one, too.
            let received = tokio::select! {
                received = events.recv_from_full() => received.map(drop),
                () = more.notified() => Ok(()),
            };
            match received {
                Err(error) if error.raw_os_error() != Some(Errno::ENOBUFS as i32) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    let followed: io::Result<()> = followed.await;
    if let Err(error) = followed {
        tracing::warn!(%error, "the sizes of block devices are not followed any more");
    }
}

/// Tells the guest of the devices that have another size than it sees; whether there is still a VM. What cannot be told
/// now is told with the next event: the device may change again, or QEMU be freer.
async fn resize(vm: &Vm, disks: &mut BTreeMap<(Numbers, bool), Entry>) -> bool {
    for ((numbers, _), entry) in disks {
        match size_of(*numbers) {
            Ok(size) if size == entry.size => {}
            Ok(size) => {
                tracing::info!(%numbers, bytes = size, "a block device has another size");
                match vm.resize_disk(entry.disk, size).await {
                    Ok(()) => entry.size = size,
                    Err(VmError::Qmp(QmpError::Closed)) => return false,
                    Err(error) => tracing::warn!(%error, %numbers, "the guest does not see the new size yet"),
                }
            }
            Err(error) => tracing::warn!(%error, %numbers, "a block device cannot be measured"),
        }
    }
    true
}

/// In bytes.
fn size_of(numbers: Numbers) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/sys/dev/block/{numbers}/size"))?;
    let sectors: u64 = text.trim().parse().map_err(io::Error::other)?;
    Ok(sectors * SECTOR)
}
