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

use agent::client::Client;
use tokio::sync::Mutex;
use vmm::Vm;

use crate::{
    boot::{in_thread, open_vhost_net},
    error::{Context, Result},
    forward, net,
};

/// A namespace that had no interface when the VM was started.
#[derive(Debug)]
pub struct Late {
    namespace: OwnedFd,
    connected: Mutex<bool>,
}

impl Late {
    /// Of this namespace.
    pub fn new(namespace: OwnedFd) -> Late {
        Late {
            namespace,
            connected: Mutex::new(false),
        }
    }

    /// Connects what has come meanwhile; once, and nothing to do before. What it changes in the namespace goes with it:
    /// no pod is made in it again.
    ///
    /// # Errors
    /// As for a network that is there at the start, and more than one interface.
    pub async fn connect(&self, vm: &Arc<Vm>, agent: &Client, vhost_net: bool) -> Result<()> {
        let mut connected = self.connected.lock().await;
        if *connected {
            return Ok(());
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.namespace.as_raw_fd()));
        let found = in_thread("look at the pod's network", move || {
            let snapshot = net::snapshot(&path)?;
            match snapshot.is_empty() {
                true => Ok(None),
                false => snapshot.attach().map(Some),
            }
        });
        let Some(mut network) = found.await? else {
            return Ok(());
        };
        let cards = network.nics();
        let taps = network.taps().action("pass the taps to QEMU")?;
        let mut vhost_net = if vhost_net {
            open_vhost_net(cards.len())?
        } else {
            Vec::new()
        }
        .into_iter();
        for (card, tap) in cards.iter().zip(taps) {
            vm.add_nic(card, tap, vhost_net.next()).await?;
        }
        network.set_up(agent).await?;
        if let Some(loopback) = network.take_loopback() {
            forward::serve(loopback, agent.clone(), vm.clone());
        }
        *connected = true;
        Ok(())
    }
}
