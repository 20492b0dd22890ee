//! Child processes that cannot outlive their parent.
//!
//! ```text
//! spawn ──▶ running ──(exits, is killed, is dropped, parent dies)──▶ ended ──▶ reaped by our task
//! ```

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::{Arc, mpsc},
    thread,
};

use nix::sys::{
    signal::Signal,
    wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::{
    clock::Moment,
    sys::{self, ChildSetup},
};

/// The thread that starts every child, and never ends.
///
/// Children ask the kernel to kill them when their parent is gone, and the kernel takes the *thread* that forked them
/// for the parent. Start it after the process has entered its mount namespace: the thread stays in the one it is
/// started in.
#[derive(Debug, Clone)]
pub struct Spawner {
    requests: mpsc::Sender<Request>,
    born: Moment,
}

#[derive(Debug)]
struct Request {
    command: Command,
    reply: mpsc::SyncSender<io::Result<(u32, OwnedFd)>>,
}

impl Spawner {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn new() -> io::Result<Spawner> {
        let (requests, inbox) = mpsc::channel::<Request>();
        // The thread holds a sender of its own, so that its queue never closes.
        let open = requests.clone();
        thread::Builder::new()
            .name("spawner".into())
            .stack_size(128 * 1024)
            .spawn(move || {
                for Request { mut command, reply } in &inbox {
                    let started = spawn(&mut command);
                    // Our copies of the child's files go with the command: the child alone must hold them.
                    drop(command);
                    let _requester_gone = reply.send(started);
                }
                drop(open);
            })?;
        Ok(Spawner {
            requests,
            born: Moment::now(),
        })
    }

    /// When it was made: from then to a VM's start the time stamp counter's frequency is measured.
    pub(crate) fn born(&self) -> Moment {
        self.born
    }

    /// Starts `command` with nothing of our environment. To be called within a tokio runtime, which reaps the child.
    pub(crate) fn start(&self, mut command: Command, setup: ChildSetup) -> io::Result<Child> {
        command.env_clear().current_dir("/");
        sys::prepare(&mut command, setup);
        let (reply, answer) = mpsc::sync_channel(1);
        let gone = || io::Error::other("the thread that starts children is gone");
        self.requests.send(Request { command, reply }).map_err(|_| gone())?;
        let (pid, pidfd) = answer.recv().map_err(|_| gone())??;
        Child::watch(pid, pidfd)
    }
}

fn spawn(command: &mut Command) -> io::Result<(u32, OwnedFd)> {
    let child = command.spawn()?;
    // Nobody waits for it yet, so the number is still its own.
    Ok((child.id(), sys::pidfd_open(child.id())?))
}

/// A child process. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    end: watch::Receiver<Option<ExitReason>>,
}

impl Child {
    fn watch(pid: u32, pidfd: OwnedFd) -> io::Result<Child> {
        let pidfd = Arc::new(pidfd);
        let (tell, end) = watch::channel(None);
        let watched = sys::readiness(pidfd.clone())?;
        tokio::spawn(async move {
            if let Ok(mut ready) = watched.readable().await {
                ready.retain_ready();
            }
            tell.send_replace(Some(reap(&watched)));
        });
        Ok(Child { pid, pidfd, end })
    }

    /// Process id; stays the child's own until [`Child::exited`] returns.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until the child has ended. Any number of tasks may wait, before and after.
    pub async fn exited(&self) -> ExitReason {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.ok().and_then(|reason| *reason) {
            Some(reason) => reason,
            // The runtime is shutting down, and whoever asks with it.
            None => std::future::pending().await,
        }
    }

    /// Sends SIGKILL; a child that has ended already does not mind.
    pub fn kill(&self) {
        // The descriptor means this child and no other process, whoever has its number by now. The one error left
        // is that it is dead.
        let _dead_already = sys::pidfd_send_signal(self.pidfd.as_fd(), Signal::SIGKILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

fn reap(pidfd: &AsyncFd<Arc<OwnedFd>>) -> ExitReason {
    match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED) {
        Ok(WaitStatus::Exited(_, code)) => ExitReason::Code(code),
        Ok(WaitStatus::Signaled(_, signal, _)) => ExitReason::Signal(signal as i32),
        other => {
            tracing::error!(
                ?other,
                "a child's exit status is lost: something else in this process waited for it"
            );
            ExitReason::Code(255)
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::Code(code) => write!(f, "exited with code {code}"),
            ExitReason::Signal(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    #[tokio::test]
    async fn many_wait_for_one_end() {
        let spawner = Spawner::new().unwrap();
        let child = spawner.start(shell("exit 7"), ChildSetup::default()).unwrap();
        let (first, second) = tokio::join!(child.exited(), child.exited());
        assert_eq!((first, second), (ExitReason::Code(7), ExitReason::Code(7)));
        assert_eq!(child.exited().await.to_string(), "exited with code 7");
        child.kill();
    }

    #[tokio::test]
    async fn a_kill_is_told_as_such() {
        let spawner = Spawner::new().unwrap();
        let child = spawner.start(shell("exec sleep 1000"), ChildSetup::default()).unwrap();
        child.kill();
        assert_eq!(child.exited().await.to_string(), "was killed by signal 9");
    }

    #[tokio::test]
    async fn dropping_a_child_ends_it_and_the_spawner_outlives_its_handle() {
        let spawner = Spawner::new().unwrap();
        let child = spawner.start(shell("exec sleep 1000"), ChildSetup::default()).unwrap();
        drop(spawner);
        assert!(child.end.borrow().is_none());
        let mut end = child.end.clone();
        drop(child);
        assert_eq!(
            *end.wait_for(Option::is_some).await.unwrap(),
            Some(ExitReason::Signal(9))
        );
    }

    #[tokio::test]
    async fn a_child_may_lock_as_much_memory_as_it_is_told() {
        let spawner = Spawner::new().unwrap();
        let setup = ChildSetup {
            locked_memory: Some(52 << 10),
            ..ChildSetup::default()
        };
        // The shell counts in KiB.
        let child = spawner.start(shell("[ $(ulimit -l) = 52 ]"), setup).unwrap();
        assert_eq!(child.exited().await, ExitReason::Code(0));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let spawner = Spawner::new().unwrap();
        let error = spawner
            .start(Command::new("/nonexistent"), ChildSetup::default())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
