//! One sandbox: its life, and the containers in it.
//!
//! ```text
//! Empty ──Create(sandbox or single)──▶ Up ──stop, or VM or virtiofsd died──▶ Down ──last Delete, Shutdown──▶ ended
//!   │ boot failed: everything is undone, and the shim ends when its caller lets go
//! ```
//!
//! In `Down` every verb still answers: what ran has exits, Kill and Delete succeed, and nothing waits for the guest. A
//! shim that takes a dead one's place begins there. Bookkeeping is behind short locks that are never held across an
//! await; each container's exit has one task that follows it.

mod create;
mod down;
mod files;
mod verbs;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use agent_protocol::client::Durations;
use config::Config;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use files::Stuck;
use oci_spec::runtime::Spec;
use tokio::sync::watch;
use vmm::Spawner;

use crate::{
    boot::{self, Guest, Plan},
    container::Container,
    error::{Context, Error, Result},
    events::Events,
    follow, log, options,
    pod::Pod,
    trace::Trace,
    undo::State,
};

/// One sandbox and its containers.
pub struct Sandbox {
    id: String,
    events: Events,
    spawner: Spawner,
    guest: OnceLock<Guest>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// `None` once everything is undone.
    state: Mutex<Option<State>>,
    trace: Mutex<Trace>,
    /// What the log has said once for all containers.
    noted: Mutex<HashSet<&'static str>>,
    /// Whether Create has the state.
    booting: watch::Sender<bool>,
    /// How long the calls of the task API took, by their names.
    durations: Mutex<Durations>,
    /// Volumes that do not answer.
    files: Stuck,
    /// Whether the caller is CRI-O, once that is known.
    crio: AtomicBool,
    /// Why the VM has ended.
    down: watch::Sender<Option<String>>,
    /// It has, and whoever waited was told.
    brought_down: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

impl Sandbox {
    /// An empty sandbox. Must be called in the runtime.
    pub fn new(id: &str, events: Events, state: State) -> Result<Arc<Sandbox>> {
        Ok(Arc::new(Sandbox {
            id: id.into(),
            events,
            spawner: Spawner::new().action("start the thread that owns children")?,
            guest: OnceLock::new(),
            containers: Mutex::default(),
            state: Mutex::new(Some(state)),
            trace: Mutex::default(),
            noted: Mutex::default(),
            booting: watch::Sender::new(false),
            durations: Mutex::default(),
            files: Stuck::default(),
            crio: AtomicBool::new(false),
            down: watch::Sender::new(None),
            brought_down: watch::Sender::new(false),
            ended: watch::Sender::new(false),
        }))
    }

    /// Resolves when the shim may end.
    pub fn ended(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.subscribe();
        async move {
            // An error means that the sandbox itself is gone: ended as well.
            ended.wait_for(|ended| *ended).await.map(drop).unwrap_or_default();
        }
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The process that stands for every task: QEMU, which lives in the pod's network namespace. 0 without a VM.
    pub fn pid(&self) -> u32 {
        self.guest.get().map_or(0, |guest| guest.vm.child().pid())
    }

    /// Notes how long a call took.
    pub fn took(&self, call: &'static str, duration: Duration) {
        lock(&self.durations).entry(call).or_default().observe(duration);
    }

    /// How long calls took, by their names.
    pub fn durations(&self) -> Durations {
        lock(&self.durations).clone()
    }

    /// Finds a container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// All containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// The guest, while it lives.
    pub fn guest(&self) -> Result<&Guest> {
        if let Some(reason) = self.down.borrow().as_ref() {
            return Err(Error::VmGone(reason.clone()));
        }
        self.guest
            .get()
            .ok_or_else(|| Error::Precondition(format!("sandbox {} is not created yet", self.id)))
    }

    /// Whether the host's kernel has killed the VM, or what serves it, for want of memory.
    pub fn out_of_memory(&self) -> bool {
        let kills = self.guest.get().and_then(|guest| guest.host_kills.as_ref());
        kills.is_some_and(|kills| kills.any())
    }

    /// Whether the caller is CRI-O, which has contracts of its own.
    pub fn under_crio(&self) -> bool {
        self.crio.load(Ordering::SeqCst)
    }

    async fn boot(self: &Arc<Self>, spec: &Spec, options: Option<&Any>) -> Result<()> {
        let Some(mut state) = lock(&self.state).take() else {
            return Err(Error::Precondition(format!(
                "sandbox {} is being created or has ended",
                self.id
            )));
        };
        self.booting.send_replace(true);
        let mut trace = Trace::load(&self.id).unwrap_or_default();
        let mark = state.mark();
        let result = async {
            let pod = Pod::of(spec)?;
            state.pod = pod.identity.name();
            self.crio.store(pod.is_crio(), Ordering::SeqCst);
            let config = Config::load(options::config_path(options)?.as_deref())?.with_annotations(&pod.annotations)?;
            if config.hypervisor.debug || config.agent.debug || config.runtime.debug {
                log::verbose();
            }
            for sentence in &config.report {
                tracing::info!("configuration: {sentence}");
            }
            let plan = Plan {
                sandbox: &self.id,
                config,
                pod,
                given_up: self.down.subscribe(),
            };
            boot::boot(plan, &self.spawner, &mut state, &mut trace).await
        }
        .await;
        let booted = self.booted(result, state, mark, trace);
        self.booting.send_replace(false);
        booted
    }

    /// Keeps the guest, or takes back what was made for it.
    fn booted(self: &Arc<Self>, result: Result<Guest>, mut state: State, mark: usize, trace: Trace) -> Result<()> {
        match result {
            Ok(guest) => {
                // Whoever gave up on the sandbox while it booted found no VM to end.
                if let Some(reason) = self.down.borrow().clone() {
                    drop(guest);
                    state.unwind_to(mark);
                    *lock(&self.state) = Some(state);
                    return Err(Error::VmGone(reason));
                }
                *lock(&self.state) = Some(state);
                *lock(&self.trace) = trace;
                self.guest
                    .set(guest)
                    .map_err(|_| Error::AlreadyExists(format!("sandbox {}", self.id)))?;
                follow::watch_guest(self.clone());
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the sandbox could not be started");
                state.unwind_to(mark);
                *lock(&self.state) = Some(state);
                self.end_soon();
                Err(error)
            }
        }
    }
}

/// A lock whose holder panicked is still good: every critical section is one map operation.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
