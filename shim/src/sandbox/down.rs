//! The ends of a sandbox: of its VM, of its shim, and of a shim before it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::timeout;

use super::{Sandbox, lock};
use crate::{
    boot::{self, Guest, in_thread},
    container::{Container, Kind},
    error::Result,
    follow::{self, KILLED},
    process::{Exit, Process, Status},
    record,
    undo::{self, State, Undo},
};

/// A shim whose sandbox could not be created stays this long for its caller's Delete and Shutdown.
const FAILED_CREATE_GRACE: Duration = Duration::from_secs(2);
/// How soon a boot is over that was given up; what is left of it then is for the next start's sweep.
const BOOT_ENDS: Duration = Duration::from_secs(5);
/// A shim that nobody asks for anything stays this long: a caller that lives creates its sandbox at once.
const FIRST_CREATE: Duration = Duration::from_secs(30);
/// QEMU and virtiofsd end this long after they were killed, but for those that wait for a device which does not answer.
const DEATH: Duration = Duration::from_secs(10);
/// A SIGTERM was the node's shutdown if the VM ends so soon after it: every process gets one then.
const SHUTDOWN: Duration = Duration::from_secs(60);
/// How often a shim in a dead one's place looks whether CRI-O still knows any of its containers.
const STILL_KNOWN: Duration = Duration::from_secs(10);

impl Sandbox {
    /// Ends the VM and everything in it, once; returns when the host is free of it, or has waited long enough. `status`
    /// is the exit of the sandbox's own task.
    pub async fn bring_down(self: &Arc<Self>, reason: &str, status: u32) {
        let first = self.down.send_if_modified(|down| {
            let first = down.is_none();
            if first {
                *down = Some(reason.to_owned());
            }
            first
        });
        let Some(guest) = self.guest.get() else { return };
        if !first {
            return self.is_down().await;
        }
        tracing::info!(reason, "the virtual machine ends");
        let gone = timeout(DEATH, end(guest)).await.is_ok();
        if gone {
            tracing::info!("the virtual machine has ended");
            if tracing::enabled!(tracing::Level::DEBUG) {
                tracing::debug!("{}", boot::last_words(&guest.vm, &guest.virtiofsd).await);
            }
            // The kubelet kills whoever is in the cgroup of a pod that has ended, and the shim has still to answer for
            // it.
            self.leave_cgroup().await;
        } else {
            tracing::error!(
                "QEMU or virtiofsd has not ended within {DEATH:?} of being killed: the next start tries again"
            );
        }
        guest.mirrors.stop();
        for container in self.all() {
            self.tell_end(guest, &container, status, gone);
        }
        self.keep_record();
        self.brought_down.send_replace(true);
    }

    /// Makes the end of a container known that has ended with its VM.
    fn tell_end(self: &Arc<Self>, guest: &Guest, container: &Arc<Container>, status: u32, gone: bool) {
        if let Err(error) = guest.share.remove(&container.id) {
            tracing::warn!(%error, container = container.id, "the container's files stay mounted");
        }
        let end = |exec: &str, process: &Process, status| {
            let exit = Exit::now(status);
            if process.stop(exit) {
                follow::announce(self, container, exec, exit);
            }
        };
        if container.kind == Kind::Sandbox {
            return end("", &container.init, status);
        }
        for (exec, process) in container.processes() {
            match process.status() {
                // Nobody was told of a start, so nobody is told of an end.
                Status::Creating | Status::Created => drop(process.stop(Exit::now(KILLED))),
                // Who follows or starts it has just lost its agent.
                _ if gone => {}
                _ => end(&exec, &process, KILLED),
            }
        }
    }

    /// Goes back to the cgroup that the shim came from, and removes the pod's folders that it made.
    async fn leave_cgroup(&self) {
        let is_cgroup = |entry: &Undo| matches!(entry, Undo::Cgroup(_));
        let entries = lock(&self.state).as_mut().map(|state| state.take(is_cgroup));
        let leave = || -> Result<Vec<Undo>> {
            let fails = |entry: &Undo| {
                undo::undo(entry)
                    .inspect_err(|error| tracing::warn!(%error, ?entry, "left for a later clean-up"))
                    .is_err()
            };
            Ok(entries.into_iter().flatten().filter(fails).collect())
        };
        let owed = in_thread("leave the pod's cgroup", leave).await;
        let kept = owed.and_then(|owed| lock(&self.state).as_mut().map_or(Ok(()), |state| state.give_back(owed)));
        if let Err(error) = kept {
            tracing::warn!(%error, "the pod's cgroup may stay");
        }
    }

    /// Resolves when the VM has been brought down.
    async fn is_down(&self) {
        let mut down = self.brought_down.subscribe();
        // The sender lives as long as `self`.
        down.wait_for(|down| *down).await.map(drop).unwrap_or_default();
    }

    /// Ends the shim when no container is left, or at once when told so.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> Result<()> {
        if !now && !lock(&self.containers).is_empty() {
            return Ok(());
        }
        self.bring_down("is not needed any more", KILLED).await;
        // A boot that has just been given up takes back what it has made.
        let mut booting = self.booting.subscribe();
        drop(timeout(BOOT_ENDS, booting.wait_for(|booting| !booting)).await);
        self.end(State::remove).await;
        Ok(())
    }

    /// What a SIGTERM means: the shim ends if there is no VM, or if that ends now, as when the node shuts down; else
    /// its pod runs on. What the next start on the node would need to answer for it, should that come, stays.
    pub async fn end_with_the_node(&self) {
        if *self.booting.borrow() {
            // It fails with its VM, and then the shim ends.
            return;
        }
        if self.guest.get().is_some() && timeout(SHUTDOWN, self.is_down()).await.is_err() {
            return;
        }
        tracing::info!("SIGTERM: the shim ends, as there is no virtual machine");
        match lock(&self.containers).is_empty() || !self.under_crio() {
            true => self.end(State::remove),
            false => self.end(State::unwind),
        }
        .await;
    }

    async fn end(&self, how: fn(State) -> Result<()>) {
        let state = lock(&self.state).take();
        let ended = match state {
            Some(state) => in_thread("end the sandbox", move || how(state)).await,
            None => Ok(()),
        };
        if let Err(error) = ended {
            tracing::error!(%error, "something is left of the sandbox");
        }
        self.ended.send_replace(true);
    }

    /// Ends the shim if its caller dies between `start` and the first Create, after which nobody knows of it.
    pub fn expect_create(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let mut booting = sandbox.booting.subscribe();
            let begun = timeout(FIRST_CREATE, booting.wait_for(|booting| *booting))
                .await
                .is_ok();
            if !begun && lock(&sandbox.containers).is_empty() && sandbox.guest.get().is_none() {
                tracing::warn!("nothing was created within {FIRST_CREATE:?}: the shim ends");
                sandbox.end(State::remove).await;
            }
        });
    }

    /// Ends the shim of a sandbox that could not be created, even when nobody calls Shutdown.
    pub(super) fn end_soon(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FAILED_CREATE_GRACE).await;
            if lock(&sandbox.containers).is_empty() {
                sandbox.end(State::remove).await;
            }
        });
    }

    /// Takes the place of a shim that has died: what it served has ended with it, and CRI-O hears so until it has
    /// removed everything.
    pub fn answer_for(self: &Arc<Self>, tasks: Vec<record::Task>) {
        tracing::warn!("the shim of this sandbox died: its containers are told as ended");
        self.crio.store(true, Ordering::SeqCst);
        self.down.send_replace(Some("ended with its shim, which died".into()));
        self.brought_down.send_replace(true);
        let containers = tasks.iter().map(|task| {
            let exit = task.exit.unwrap_or_else(|| Exit::now(KILLED));
            let init = Process::ended_before(task.stdio.clone(), exit);
            let container = Container::new(&task.id, task.kind, task.bundle.clone(), false, init);
            (task.id.clone(), Arc::new(container))
        });
        lock(&self.containers).extend(containers);
        self.keep_record();
        let sandbox = self.clone();
        tokio::spawn(async move {
            while tasks.iter().any(record::Task::is_known) {
                tokio::time::sleep(STILL_KNOWN).await;
            }
            sandbox.end(State::remove).await;
        });
    }

    /// Writes down what CRI-O knows, for a shim that would have to take this one's place.
    pub fn keep_record(&self) {
        if !self.under_crio() {
            return;
        }
        let containers = self.all();
        let created = containers
            .iter()
            .filter(|container| container.init.status() != Status::Creating);
        let tasks: Vec<_> = created.map(|container| record::Task::of(container)).collect();
        if let Err(error) = record::save(&self.id, &tasks) {
            tracing::warn!(%error, "no other shim could answer for this sandbox");
        }
    }

    /// Ends the VM of a single container that could not be created.
    pub(super) async fn not_needed(self: &Arc<Self>) {
        let reason = "is not needed: its only container could not be created";
        self.bring_down(reason, KILLED).await;
        self.end_soon();
    }
}

async fn end(guest: &Guest) {
    guest.virtiofsd.child().kill();
    guest.vm.stop().await;
    guest.virtiofsd.child().exited().await;
}
