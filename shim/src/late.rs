//! The network of a pod that comes after its VM.
//!
//! containerd makes no network namespace for a pod with a user namespace: it takes that of the sandbox's process, here
//! QEMU's, and has its interfaces made when the sandbox runs (`internal/cri/server/sandbox_run.go` of containerd).
//! Docker does the like. So the pod is looked at again when a container is made, and its interface plugged into the
//! running VM.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use agent_protocol::client::Client;
use tokio::sync::Mutex;
use vmm::Vm;

use crate::{
    boot::{in_thread, open_vhost_net},
    error::{Context, Result},
    forward,
    net::{self, Network},
};

/// A namespace that had no interface when the VM was started.
#[derive(Debug)]
pub struct Late {
    namespace: OwnedFd,
    progress: Mutex<Progress>,
}

/// How far the network has come: what fails is tried again with the pod's next container, from there on.
#[derive(Debug)]
enum Progress {
    /// There was none yet.
    Waiting,
    /// It ends in taps, of which the VM has so many.
    Attached(Box<Network>, usize),
    /// The guest has it.
    Connected,
}

impl Late {
    /// Of this namespace.
    pub fn new(namespace: OwnedFd) -> Late {
        Late {
            namespace,
            progress: Mutex::new(Progress::Waiting),
        }
    }

    /// Connects what has come meanwhile; once, and nothing to do before. What it changes in the namespace goes with it:
    /// no pod is made in it again.
    ///
    /// # Errors
    /// As for a network that is there at the start, and more than one interface.
    pub async fn connect(&self, vm: &Arc<Vm>, agent: &Client, vhost_net: bool) -> Result<()> {
        let mut progress = self.progress.lock().await;
        if matches!(*progress, Progress::Waiting) {
            let path = PathBuf::from(format!("/proc/self/fd/{}", self.namespace.as_raw_fd()));
            let found = in_thread("look at the pod's network", move || {
                let snapshot = net::snapshot(&path)?;
                match snapshot.is_empty() {
                    true => Ok(None),
                    false => snapshot.attach().map(Some),
                }
            });
            if let Some(network) = found.await? {
                *progress = Progress::Attached(Box::new(network), 0);
            }
        }
        let Progress::Attached(network, plugged) = &mut *progress else {
            return Ok(());
        };
        let cards = network.nics();
        let taps = network.taps().action("pass the taps to QEMU")?;
        let mut vhost_net = if vhost_net {
            open_vhost_net(cards.len() - *plugged)?
        } else {
            Vec::new()
        }
        .into_iter();
        for (card, tap) in cards.iter().zip(taps).skip(*plugged) {
            vm.add_nic(card, tap, vhost_net.next()).await?;
            *plugged += 1;
        }
        network.set_up(agent).await?;
        if let Some(loopback) = network.take_loopback() {
            forward::serve(loopback, agent.clone(), vm.clone());
        }
        *progress = Progress::Connected;
        Ok(())
    }
}
