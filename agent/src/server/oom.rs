//! Tells when the kernel kills a container's process for want of memory (`memory.events` of cgroup v2).

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex as AsyncMutex, mpsc},
};

use super::sys;

/// Watches cgroups. Each container is told of once.
#[derive(Debug)]
pub(super) struct Oom {
    inotify: Inotify,
    /// The same, in the runtime.
    ready: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<WatchDescriptor, Watched>>,
    tell: mpsc::UnboundedSender<String>,
    told: AsyncMutex<mpsc::UnboundedReceiver<String>>,
}

#[derive(Debug)]
struct Watched {
    container: String,
    events: PathBuf,
}

impl Oom {
    /// Must be called in the runtime.
    pub(super) fn new() -> io::Result<Arc<Oom>> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let (tell, told) = mpsc::unbounded_channel();
        let oom = Arc::new(Oom {
            ready: sys::asynchronous(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?,
            inotify,
            watched: Mutex::default(),
            tell,
            told: AsyncMutex::new(told),
        });
        tokio::spawn(Arc::clone(&oom).run());
        Ok(oom)
    }

    /// Watches a container until its cgroup is removed.
    pub(super) fn watch(&self, container: &str, cgroup: &Path) -> io::Result<()> {
        let events = cgroup.join("memory.events");
        let descriptor = self.inotify.add_watch(&events, AddWatchFlags::IN_MODIFY)?;
        let container = container.to_owned();
        self.watched().insert(descriptor, Watched { container, events });
        self.look(descriptor);
        Ok(())
    }

    /// Waits for the next container that lost a process. An event waits for a caller.
    pub(super) async fn next(&self) -> String {
        match self.told.lock().await.recv().await {
            Some(container) => container,
            // The sender is a field beside the receiver.
            None => std::future::pending().await,
        }
    }

    async fn run(self: Arc<Self>) -> io::Result<()> {
        loop {
            let read = self
                .ready
                .async_io(Interest::READABLE, |_| Ok(self.inotify.read_events()?));
            for event in read.await? {
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.watched().remove(&event.wd);
                } else {
                    self.look(event.wd);
                }
            }
        }
    }

    fn look(&self, descriptor: WatchDescriptor) {
        let mut watched = self.watched();
        let killed = watched
            .get(&descriptor)
            .is_some_and(|watched| kills(&watched.events) > 0);
        if killed {
            if let Some(Watched { container, .. }) = watched.remove(&descriptor) {
                // The receiver lives as long as the sender.
                let _ = self.tell.send(container);
            }
            // Gone already if the cgroup is.
            let _ = self.inotify.rm_watch(descriptor);
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many processes of a cgroup were killed.
fn kills(events: &Path) -> u64 {
    let text = fs::read_to_string(events).unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}
