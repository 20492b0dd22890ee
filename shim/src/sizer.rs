//! The owner of the VM's size: containers come and go, and the VM's memory and vCPUs follow.

use std::{collections::BTreeMap, sync::Arc};

use agent::{client::Client, protocol::agent::OnlineCPUMemRequest};
use tokio::sync::{mpsc, oneshot};
use vmm::Vm;

use crate::{
    error::{Error, Result},
    sizing::{Limits, Sizing},
};

/// Asks the owner for changes.
#[derive(Clone)]
pub struct Sizer {
    changes: mpsc::UnboundedSender<Change>,
}

struct Change {
    container: String,
    /// `None` when the container has gone.
    limits: Option<Limits>,
    done: oneshot::Sender<Result<()>>,
}

impl Sizer {
    /// Starts the owner of this VM's size.
    pub fn new(vm: Arc<Vm>, agent: Client, sizing: Sizing) -> Sizer {
        let (changes, queue) = mpsc::unbounded_channel();
        tokio::spawn(own(vm, agent, sizing, queue));
        Sizer { changes }
    }

    /// Counts a container with these limits; returns when the VM has the size.
    pub async fn set(&self, container: &str, limits: Limits) -> Result<()> {
        let gone = || Error::VmGone("has ended".into());
        self.ask(container, Some(limits)).await.map_err(|_| gone())?
    }

    /// Gives a container's share back. Nobody needs to wait for it.
    pub fn remove(&self, container: &str) {
        drop(self.ask(container, None));
    }

    fn ask(&self, container: &str, limits: Option<Limits>) -> oneshot::Receiver<Result<()>> {
        let (done, answer) = oneshot::channel();
        // When the owner has ended, so has the VM, and the dropped `done` tells whoever waits.
        self.changes.send(Change { container: container.into(), limits, done }).unwrap_or_default();
        answer
    }
}

async fn own(vm: Arc<Vm>, agent: Client, sizing: Sizing, mut queue: mpsc::UnboundedReceiver<Change>) {
    let mut containers = BTreeMap::new();
    let mut vcpus = sizing.boot_vcpus();
    while let Some(change) = queue.recv().await {
        match change.limits {
            Some(limits) => containers.insert(change.container, limits),
            None => containers.remove(&change.container),
        };
        let wanted = sizing.target(containers.values());
        let result = resize(&vm, &agent, &mut vcpus, wanted.memory_mib, wanted.vcpus).await;
        if let Err(error) = &result {
            tracing::warn!(%error, memory_mib = wanted.memory_mib, vcpus = wanted.vcpus, "the VM did not take its new size");
        }
        // Nobody waits for a removal.
        change.done.send(result).unwrap_or_default();
    }
}

async fn resize(vm: &Vm, agent: &Client, vcpus: &mut u32, memory_mib: u64, wanted: u32) -> Result<()> {
    vm.set_memory(memory_mib).await?;
    if wanted == *vcpus {
        return Ok(());
    }
    let before = *vcpus;
    *vcpus = vm.set_vcpus(wanted).await?;
    if *vcpus > before {
        let mut request = OnlineCPUMemRequest::new();
        request.nb_cpus = *vcpus - before;
        request.cpu_only = true;
        agent.online_cpu_mem(request).await?;
    }
    Ok(())
}
