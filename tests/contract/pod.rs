//! A pod as CRI-O and kubelet make, stop and remove it.

use std::{fs, net::Ipv4Addr, path::PathBuf, time::Duration};

use containerd_shim_protos::api::Status;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use tests::failure::{Result, Trying};

use crate::{
    bundle::{self, PodFacts, Wanted},
    crio::{Crio, Runtime},
    namespaces::Namespaces,
    node,
    task::{Task, bundle_of, new_id, remove_bundle},
};

/// The nameserver in every pod's resolv.conf.
pub const RESOLVER: &str = "nameserver 10.96.0.10\nsearch contract.svc.cluster.local\noptions ndots:5\n";
/// How long a container may take to end on TERM.
pub const GRACE: Duration = Duration::from_secs(10);

/// What a story may ask for beside an ordinary pod.
#[derive(Debug, Clone, Default)]
pub struct PodWanted {
    /// Uses the host's network.
    pub host_network: bool,
    /// Annotations of the pod.
    pub annotations: Vec<(String, String)>,
    /// The sum of its containers' resources, as kubelet states it.
    pub resources: Value,
    /// Its sysctls.
    pub sysctls: Vec<(String, String)>,
    /// Its network namespace is the runtime's to make, and gets its interface when the sandbox runs: containerd 2.0's
    /// way with user namespaces.
    pub late_network: bool,
}

/// A pod.
pub struct Pod<'c, 'n> {
    /// What its containers have in common.
    pub facts: PodFacts,
    /// The container that stands for the pod.
    pub sandbox: Task<'c, 'n>,
    place: Place,
    crio: &'c Crio<'n>,
}

/// What CRI-O and kubelet make for a pod outside of any container.
pub struct Place {
    /// What the pod's containers have in common.
    pub facts: PodFacts,
    namespaces: Namespaces,
    released: bool,
}

impl Place {
    /// Makes the pod's cgroup, namespaces, network and files.
    ///
    /// # Errors
    /// When any of it fails.
    pub fn make(crio: &Crio<'_>, wanted: &PodWanted) -> Result<Place> {
        let id = new_id()?;
        let serial = crio.node.serial();
        let name = format!("pod-{serial}");
        let uid = id.get(..32).unwrap_or_default().to_owned();
        let mut namespaces = Namespaces::make(&uid, &name, serial)?;
        if !wanted.late_network {
            namespaces.connect(None)?;
        }
        let cgroup = format!("{}/pod{uid}", crio.node.cgroup());
        node::make_cgroup(&cgroup)?;
        let bundle = bundle_of(&id);
        let shm = bundle.join("shm");
        fs::create_dir_all(&shm).trying("making the sandbox's bundle")?;
        fs::write(bundle.join("resolv.conf"), RESOLVER).trying("writing resolv.conf")?;
        fs::write(bundle.join("hostname"), format!("{name}\n")).trying("writing hostname")?;
        let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some("mode=1777,size=67108864")).trying("mounting shm")?;
        let kinds = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
        let kinds = kinds.iter().filter(|(_, file)| !wanted.host_network || *file != "net");
        let mut annotations = wanted.annotations.clone();
        if crio.runtime == Runtime::Reference {
            // Ours groups a pod's containers by CRI-O's own annotations; containerd's has its own.
            annotations.push(("io.containerd.runc.v2.group".into(), id.clone()));
        }
        let facts = PodFacts {
            namespaces: kinds
                .map(|(kind, file)| match wanted.late_network && *file == "net" {
                    true => (*kind, PathBuf::new()),
                    false => (*kind, namespaces.path(file)),
                })
                .collect(),
            address: namespaces.address.to_string(),
            annotations,
            resources: wanted.resources.clone(),
            sysctls: wanted.sysctls.clone(),
            lower_oom_score: crio.runtime != Runtime::Reference,
            id,
            name,
            uid,
            bundle,
            cgroup,
        };
        Ok(Place {
            facts,
            namespaces,
            released: false,
        })
    }

    /// The sandbox, ready for Create.
    ///
    /// # Errors
    /// When the shim does not start.
    pub fn prepare<'c, 'n>(&self, crio: &'c Crio<'n>) -> Result<Task<'c, 'n>> {
        Task::prepare(crio, &self.facts.id, |_, root| bundle::of_sandbox(&self.facts, root))
    }

    /// A container of the pod, ready for Create.
    ///
    /// # Errors
    /// When the shim's `start` fails.
    pub fn prepare_container<'c, 'n>(&self, crio: &'c Crio<'n>, wanted: &Wanted) -> Result<Task<'c, 'n>> {
        let id = new_id()?;
        Task::prepare(crio, &id, |bundle, root| {
            bundle::of_container(&self.facts, &id, bundle, root, wanted)
        })
    }

    /// What CRI-O lets go of when the sandbox is stopped, while its shim still serves: namespaces and shared memory.
    ///
    /// # Errors
    /// When something holds any of it.
    pub fn release(&mut self) -> Result {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        self.namespaces.disconnect()?;
        self.namespaces.remove()?;
        let shm = self.facts.bundle.join("shm");
        umount2(&shm, MntFlags::empty()).trying(format!("unmounting {}", shm.display()))
    }

    /// Removes everything that [`Place::make`] made.
    ///
    /// # Errors
    /// When something holds any of it.
    pub fn remove(mut self) -> Result {
        self.release()?;
        remove_bundle(&self.facts.id)?;
        node::remove_cgroup(&self.facts.cgroup)
    }
}

impl<'c, 'n> Pod<'c, 'n> {
    /// Runs a pod without containers.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn run(crio: &'c Crio<'n>) -> Result<Pod<'c, 'n>> {
        Self::run_with(
            crio,
            &PodWanted {
                resources: json!({"cpu_shares": 2}),
                ..PodWanted::default()
            },
        )
    }

    /// Runs a pod as asked: `start`, Create, Start and State of the sandbox, in one go.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn run_with(crio: &'c Crio<'n>, wanted: &PodWanted) -> Result<Pod<'c, 'n>> {
        let mut place = Place::make(crio, wanted)?;
        let mut sandbox = place.prepare(crio)?;
        sandbox.create()?;
        sandbox.start()?;
        let running = sandbox.is(Status::RUNNING)?;
        if wanted.late_network {
            place.namespaces.connect(Some(running.pid))?;
        }
        Ok(Pod {
            facts: place.facts.clone(),
            sandbox,
            place,
            crio,
        })
    }

    /// The pod's address.
    pub fn address(&self) -> Ipv4Addr {
        self.place.namespaces.address
    }

    /// A container before Create: its bundle is there and its shim dialled.
    ///
    /// # Errors
    /// When the shim's `start` fails.
    pub fn prepare(&self, wanted: &Wanted) -> Result<Task<'c, 'n>> {
        self.place.prepare_container(self.crio, wanted)
    }

    /// A created container.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn create(&self, wanted: &Wanted) -> Result<Task<'c, 'n>> {
        let task = self.prepare(wanted)?;
        task.create()?;
        Ok(task)
    }

    /// A running container.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn start(&self, wanted: &Wanted) -> Result<Task<'c, 'n>> {
        let mut task = self.create(wanted)?;
        task.start()?;
        Ok(task)
    }

    /// A container that runs until it is stopped, and has begun to.
    ///
    /// # Errors
    /// When any step is refused or late.
    pub fn idle(&self) -> Result<Task<'c, 'n>> {
        let task = self.start(&Wanted::idle())?;
        task.stdout()?.line("ready", crate::task::ORDINARY)?;
        Ok(task)
    }

    /// CNI DEL, which comes before anything is stopped.
    ///
    /// # Errors
    /// When the interface is not there.
    pub fn disconnect(&mut self) -> Result {
        self.place.namespaces.disconnect()
    }

    /// Stops the pod in CRI-O's order: network, containers, each one's storage right after it, sandbox, namespaces and
    /// shared memory.
    ///
    /// # Errors
    /// When any step fails or is late.
    pub fn stop(&mut self, containers: &mut [&mut Task<'c, 'n>]) -> Result {
        self.disconnect()?;
        for container in containers {
            container.stop(GRACE)?;
            container.rootfs.unmount()?;
        }
        self.sandbox.stop(GRACE)?;
        self.sandbox.rootfs.unmount()?;
        self.place.release()
    }

    /// Removes a stopped pod whose containers are removed.
    ///
    /// # Errors
    /// When any step fails.
    pub fn remove(self) -> Result {
        self.sandbox.delete()?;
        self.discard()
    }

    /// Removes CRI-O's part of a pod: it asks for the pod no more. The kubelet's cgroup stays.
    ///
    /// # Errors
    /// When something holds any of it.
    pub fn forget(&mut self) -> Result {
        self.place.release()?;
        remove_bundle(&self.facts.id)
    }

    /// Removes CRI-O's and kubelet's part of a pod.
    ///
    /// # Errors
    /// When something holds any of it.
    pub fn discard(self) -> Result {
        self.place.remove()?;
        self.sandbox.discard()
    }

    /// Stops and removes the pod with these containers.
    ///
    /// # Errors
    /// When any step fails or is late.
    pub fn end<const N: usize>(mut self, mut containers: [Task<'c, 'n>; N]) -> Result {
        self.stop(&mut containers.each_mut())?;
        containers.into_iter().try_for_each(Task::remove)?;
        self.remove()
    }

    /// A folder on the node for a volume.
    ///
    /// # Errors
    /// The kernel's.
    pub fn volume(&self, name: &str) -> Result<PathBuf> {
        let path = self
            .crio
            .node
            .folder()
            .join("storage/volumes")
            .join(&self.facts.uid)
            .join(name);
        fs::create_dir_all(&path).trying(format!("making {}", path.display()))?;
        Ok(path)
    }
}
