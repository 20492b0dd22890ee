//! The owner of the VM's size: containers come and go, and the VM's memory and vCPUs follow.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use agent_protocol::{client::Client, protocol::agent::OnlineCPUMemRequest};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use vmm::{MemoryState, QmpError, Vm, VmError};

use crate::{
    error::{Error, Result},
    sizing::{Limits, Sizing, Target},
};

/// A VM shrinks when nothing has changed for so long: a container that is restarted finds its memory still there.
const QUIET: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 1000 });
/// Changes that are looked at together; the rest comes with the next look.
const MOST_CHANGES: usize = 1024;

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
        let vcpus = AtomicU32::new(sizing.boot_vcpus());
        let plugged_mib = AtomicU64::new(0);
        let machine = Arc::new(Machine {
            vm,
            agent,
            vcpus,
            plugged_mib,
        });
        tokio::spawn(own(move |resize| machine.clone().resize(resize), sizing, queue));
        Sizer { changes }
    }

    /// Counts a container with these limits; returns when the VM has room for them. It shrinks later.
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

/// Tells a resize that goes on whether its size is still the one to have.
#[derive(Debug, Clone)]
struct Wanted(Arc<AtomicBool>);

impl Wanted {
    fn new() -> Wanted {
        Wanted(Arc::new(AtomicBool::new(true)))
    }

    fn still(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn no_more(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// What the limits of all containers come to.
struct Book {
    sizing: Sizing,
    containers: BTreeMap<String, Limits>,
    clamped: bool,
}

impl Book {
    fn new(sizing: Sizing) -> Book {
        let book = Book {
            sizing,
            containers: BTreeMap::new(),
            clamped: false,
        };
        if book.sizing.is_cut() {
            book.tell_clamped();
        }
        book
    }

    /// Writes a change down; returns the limits that the container had.
    fn enter(&mut self, container: String, step: &Step) -> Limits {
        let before = self.containers.get(&container).copied().unwrap_or_default();
        match *step {
            Step::Set(limits) => self.containers.insert(container, limits),
            Step::Grow(limits) => self.containers.insert(container, before.larger(limits)),
            Step::Remove => self.containers.remove(&container),
        };
        before
    }

    fn target(&mut self) -> Target {
        let wanted = self.sizing.target(self.containers.values());
        if wanted.clamped && !self.clamped {
            self.tell_clamped();
        }
        self.clamped = wanted.clamped;
        wanted
    }

    fn tell_clamped(&self) {
        let (memory_mib, vcpus) = (self.sizing.memory().max_mib, self.sizing.vcpus().max);
        tracing::warn!(
            memory_mib,
            vcpus,
            "the limits ask for more than the VM may have: it has as much as it may"
        );
    }
}

/// A change of the VM's size.
#[derive(Debug)]
enum Resize {
    /// To this size at least; whoever waits for it goes on when the VM has it.
    Grow(Target),
    /// Down to this size, as long as that is wanted; nobody waits for it.
    Shrink(Target, Wanted),
}

/// Owns the VM's size until nobody asks for changes any more.
///
/// ```text
/// at its size ──a container needs more──▶ growing, while the changes wait ──▶ at its size
///   │  ▲                                       ▲ (a shrink stops where it is)
///   │  └────────────── done ───────────────────┼───┐
///   └──less is needed, and QUIET has passed──▶ shrinking, beside the changes
/// ```
async fn own<F>(resize: impl Fn(Resize) -> F, sizing: Sizing, mut queue: mpsc::UnboundedReceiver<Change>)
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut size = Size {
        now: Target {
            memory_mib: sizing.memory().boot_mib,
            vcpus: sizing.boot_vcpus(),
            clamped: false,
        },
        uncertain: false,
        shrinking: None,
    };
    let mut book = Book::new(sizing);
    let mut shrink_at: Option<Instant> = None;
    loop {
        let quiet = async {
            match shrink_at {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        let mut changes = Vec::new();
        tokio::select! {
            biased;
            count = queue.recv_many(&mut changes, MOST_CHANGES) => if count == 0 { return },
            () = quiet => {
                shrink_at = None;
                size.shrink(book.target(), &resize).await;
                continue;
            }
        }
        let done: Vec<_> = changes
            .into_iter()
            .map(|Change { container, step, done }| (book.enter(container, &step), done))
            .collect();
        let wanted = book.target();
        let grown = size.grow(wanted, &resize).await.map_err(Arc::new);
        for (before, done) in done {
            let answer = grown.as_ref().map(|()| before);
            // Nobody waits for a removal.
            drop(done.send(answer.map_err(|error| Error::Resize(error.clone()))));
        }
        shrink_at = size.now.exceeds(&wanted).then(|| Instant::now() + QUIET);
    }
}

/// The VM's size.
struct Size {
    /// What was last asked for.
    now: Target,
    /// That has failed.
    uncertain: bool,
    shrinking: Option<(Wanted, JoinHandle<()>)>,
}

impl Size {
    /// Makes the VM as large as is wanted, unless it is.
    async fn grow<F>(&mut self, wanted: Target, resize: impl Fn(Resize) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        if !wanted.exceeds(&self.now) && !self.uncertain {
            return Ok(());
        }
        self.stop_shrinking().await;
        self.now.memory_mib = self.now.memory_mib.max(wanted.memory_mib);
        self.now.vcpus = self.now.vcpus.max(wanted.vcpus);
        if self.uncertain {
            self.now = wanted;
        }
        let grown = resize(Resize::Grow(self.now)).await;
        self.uncertain = grown.is_err();
        grown.inspect_err(|error| tell(error, self.now))
    }

    /// Begins to take back what the VM has too much.
    async fn shrink<F>(&mut self, wanted: Target, resize: impl Fn(Resize) -> F)
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.stop_shrinking().await;
        self.now = wanted;
        let going = Wanted::new();
        let shrunk = resize(Resize::Shrink(wanted, going.clone()));
        let shrink = async move { shrunk.await.unwrap_or_else(|error| tell(&error, wanted)) };
        self.shrinking = Some((going, tokio::spawn(shrink)));
    }

    async fn stop_shrinking(&mut self) {
        if let Some((going, task)) = self.shrinking.take() {
            going.no_more();
            // One that panicked has ended as well.
            drop(task.await);
        }
    }
}

impl Target {
    /// Whether it is larger in anything.
    fn exceeds(&self, other: &Target) -> bool {
        self.memory_mib > other.memory_mib || self.vcpus > other.vcpus
    }
}

fn tell(error: &Error, wanted: Target) {
    // The VM has ended, and its containers are taken back.
    if matches!(error, Error::Vm(VmError::Qmp(QmpError::Closed))) {
        return;
    }
    let Target { memory_mib, vcpus, .. } = wanted;
    tracing::warn!(%error, memory_mib, vcpus, "the VM did not take its new size");
}

/// A VM that is resized, once at a time.
struct Machine {
    vm: Arc<Vm>,
    agent: Client,
    vcpus: AtomicU32,
    /// As the agent was last told.
    plugged_mib: AtomicU64,
}

impl Machine {
    async fn resize(self: Arc<Self>, resize: Resize) -> Result<()> {
        match resize {
            Resize::Grow(target) => self.grow(target).await,
            Resize::Shrink(target, wanted) => self.shrink(target, &wanted).await,
        }
    }

    async fn grow(&self, target: Target) -> Result<()> {
        let lacks = |state: &MemoryState| state.total_mib() < target.memory_mib;
        let state = self.vm.set_memory_while(target.memory_mib, lacks).await?;
        self.tell_memory(&state).await;
        if lacks(&state) {
            // It may take the rest later: it is asked to as long as the limits are so.
            tracing::warn!(
                memory_mib = state.total_mib(),
                wanted_mib = target.memory_mib,
                "the guest has taken less memory than the limits of its containers come to"
            );
        }
        let before = self.vcpus.load(Ordering::SeqCst);
        if target.vcpus > before
            && let Err(error) = self.add_vcpus(target.vcpus).await
        {
            // With fewer processors a container is slower, and nothing else: it is not refused for that.
            tracing::warn!(%error, vcpus = target.vcpus, "the VM has fewer processors than the limits ask for");
        }
        Ok(())
    }

    async fn add_vcpus(&self, target: u32) -> Result<()> {
        let vcpus = self.vm.set_vcpus(target).await?;
        if vcpus > self.vcpus.swap(vcpus, Ordering::SeqCst) {
            let mut request = OnlineCPUMemRequest::new();
            // All that are to be in use, not how many are new.
            request.nb_cpus = vcpus;
            request.cpu_only = true;
            self.agent.online_cpu_mem(request).await?;
        }
        Ok(())
    }

    /// The guest uses memory that has come by itself; the agent sees to the limits that follow from its size.
    async fn tell_memory(&self, state: &MemoryState) {
        let plugged_mib = state.plugged_mib;
        let mut request = OnlineCPUMemRequest::new();
        // A piece that virtio-mem is still adding cannot be taken into use by anybody else.
        request.cpu_only = true;
        if self.plugged_mib.swap(plugged_mib, Ordering::SeqCst) != plugged_mib
            && let Err(error) = self.agent.online_cpu_mem(request).await
        {
            tracing::warn!(%error, plugged_mib, "the guest's limits do not follow its memory");
        }
    }

    async fn shrink(&self, target: Target, wanted: &Wanted) -> Result<()> {
        if wanted.still() {
            let state = self.vm.set_memory_while(target.memory_mib, |_| wanted.still()).await?;
            self.tell_memory(&state).await;
        }
        if wanted.still() && target.vcpus < self.vcpus.load(Ordering::SeqCst) {
            let vcpus = self.vm.set_vcpus_while(target.vcpus, || wanted.still()).await?;
            self.vcpus.store(vcpus, Ordering::SeqCst);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
