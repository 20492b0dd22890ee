//! The owner of the VM's size: containers come and go, and the VM's memory and vCPUs follow.

use std::{collections::BTreeMap, sync::Arc};

use agent::{client::Client, protocol::agent::OnlineCPUMemRequest};
use tokio::sync::{mpsc, oneshot};
use vmm::{QmpError, Vm, VmError};

use crate::{
    error::{Error, Result},
    sizing::{Limits, Sizing, Target},
};

/// Asks the owner for changes.
#[derive(Clone)]
pub struct Sizer {
    changes: mpsc::UnboundedSender<Change>,
}

struct Change {
    container: String,
    step: Step,
    /// Gets the limits that counted before.
    done: oneshot::Sender<Result<Limits>>,
}

enum Step {
    /// The container has these limits from now on.
    Set(Limits),
    /// It has the larger of its limits and these: it is between the two.
    Grow(Limits),
    /// It is gone.
    Remove,
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
        answer(self.ask(container, Step::Set(limits))).await.map(drop)
    }

    /// Makes room for a container that is about to get these limits; returns those that it has.
    pub async fn grow(&self, container: &str, limits: Limits) -> Result<Limits> {
        answer(self.ask(container, Step::Grow(limits))).await
    }

    /// Gives a container's share back. Nobody needs to wait for it.
    pub fn remove(&self, container: &str) {
        drop(self.ask(container, Step::Remove));
    }

    fn ask(&self, container: &str, step: Step) -> oneshot::Receiver<Result<Limits>> {
        let (done, answer) = oneshot::channel();
        // When the owner has ended, so has the VM, and the dropped `done` tells whoever waits.
        self.changes
            .send(Change {
                container: container.into(),
                step,
                done,
            })
            .unwrap_or_default();
        answer
    }
}

async fn answer(answer: oneshot::Receiver<Result<Limits>>) -> Result<Limits> {
    answer.await.map_err(|_| Error::VmGone("has ended".into()))?
}

async fn own(vm: Arc<Vm>, agent: Client, sizing: Sizing, mut queue: mpsc::UnboundedReceiver<Change>) {
    let mut containers = BTreeMap::new();
    let mut size = Size {
        vcpus: sizing.boot_vcpus(),
        plugged_mib: 0,
    };
    let (memory, most) = (sizing.memory(), sizing.vcpus());
    let tell_clamped = || {
        let (memory_mib, vcpus) = (memory.max_mib, most.max);
        tracing::warn!(
            memory_mib,
            vcpus,
            "the limits ask for more than the VM may have: it has as much as it may"
        );
    };
    if sizing.is_cut() {
        tell_clamped();
    }
    let mut clamped = false;
    while let Some(change) = queue.recv().await {
        let before: Limits = containers.get(&change.container).copied().unwrap_or_default();
        match change.step {
            Step::Set(limits) => containers.insert(change.container, limits),
            Step::Grow(limits) => containers.insert(change.container, before.larger(limits)),
            Step::Remove => containers.remove(&change.container),
        };
        let wanted = sizing.target(containers.values());
        if wanted.clamped && !clamped {
            tell_clamped();
        }
        clamped = wanted.clamped;
        let result = resize(&vm, &agent, &mut size, wanted).await;
        match &result {
            // The VM has ended, and its containers are taken back.
            Ok(()) | Err(Error::Vm(VmError::Qmp(QmpError::Closed))) => (),
            Err(error) => {
                let Target { memory_mib, vcpus, .. } = wanted;
                tracing::warn!(%error, memory_mib, vcpus, "the VM did not take its new size");
            }
        }
        // Nobody waits for a removal.
        drop(change.done.send(result.map(|()| before)));
    }
}

/// What the VM has.
struct Size {
    vcpus: u32,
    plugged_mib: u64,
}

async fn resize(vm: &Vm, agent: &Client, size: &mut Size, wanted: Target) -> Result<()> {
    let plugged_mib = vm.set_memory(wanted.memory_mib).await?.plugged_mib;
    if plugged_mib != size.plugged_mib {
        size.plugged_mib = plugged_mib;
        // The guest uses it by itself; the agent sees to the limits that follow from its size.
        if let Err(error) = agent.online_cpu_mem(OnlineCPUMemRequest::new()).await {
            tracing::warn!(%error, plugged_mib, "the guest's limits do not follow its memory");
        }
    }
    let vcpus = &mut size.vcpus;
    if wanted.vcpus != *vcpus
        && let Err(error) = set_vcpus(vm, agent, vcpus, wanted.vcpus).await
    {
        // With fewer processors a container is slower, and nothing else: it is not refused for that.
        tracing::warn!(%error, vcpus = wanted.vcpus, "the VM has fewer processors than the limits ask for");
    }
    Ok(())
}

async fn set_vcpus(vm: &Vm, agent: &Client, vcpus: &mut u32, wanted: u32) -> Result<()> {
    let before = *vcpus;
    *vcpus = vm.set_vcpus(wanted).await?;
    if *vcpus > before {
        let mut request = OnlineCPUMemRequest::new();
        // All that are to be in use, not how many are new.
        request.nb_cpus = *vcpus;
        request.cpu_only = true;
        agent.online_cpu_mem(request).await?;
    }
    Ok(())
}
