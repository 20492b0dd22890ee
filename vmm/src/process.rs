//! Child processes that cannot outlive their parent.
//!
//! ```text
//! this process ──┬── keeper, PID 1 of a PID namespace
//!                └── children, in that namespace
//!
//! spawn ──▶ running ──(exits, is killed, is dropped, parent or keeper dies)──▶ ended ──▶ reaped by our task
//! ```
//!
//! The keeper ends with this process, and the kernel ends the namespace with the keeper. A death signal alone would not
//! do: the kernel clears it when a program is executed in another SELinux domain. The children also have one, which
//! spares them the detour where it holds.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread,
};

use nix::sys::signal::Signal;
use rustix::process::{WaitId, WaitIdOptions, waitid};
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
    keeper: Arc<Mutex<Keeper>>,
    /// The soft and the hard limit of open files that this process had.
    open_files: (u64, u64),
    born: Moment,
}

/// The keeper of the latest children, if there have been any.
#[derive(Debug, Default)]
struct Keeper {
    /// Held by its children, and so ended with the last of them.
    process: Weak<Child>,
    end: Option<watch::Receiver<Option<ExitReason>>>,
}

#[derive(Debug)]
struct Request {
    /// The program to start; without one, a keeper.
    command: Option<Command>,
    reply: mpsc::SyncSender<io::Result<(u32, OwnedFd)>>,
}

impl Spawner {
    /// Starts the thread. Every child costs this process some open files, so its soft limit of them is raised to the
    /// hard one; the children have the former.
    ///
    /// # Errors
    /// When the system has no thread to give, or the limit cannot be raised.
    pub fn new() -> io::Result<Spawner> {
        let open_files = sys::raise_open_files()?;
        let (requests, inbox) = mpsc::channel::<Request>();
        // The thread holds a sender of its own, so that its queue never closes.
        let open = requests.clone();
        thread::Builder::new()
            .name("spawner".into())
            .stack_size(128 * 1024)
            .spawn(move || {
                for Request { command, reply } in &inbox {
                    let started = match command {
                        // Our copies of the child's files go with the command: the child alone must hold them.
                        Some(mut command) => command.spawn().map(|child| child.id()),
                        None => sys::fork_keeper(),
                    };
                    // Nobody waits for it yet, so the number is still its own.
                    let held = started.and_then(|pid| Ok((pid, sys::pidfd_open(pid)?)));
                    let _requester_gone = reply.send(held);
                }
                drop(open);
            })?;
        Ok(Spawner {
            requests,
            keeper: Arc::default(),
            open_files,
            born: Moment::now(),
        })
    }

    /// When it was made: from then to a VM's start the time stamp counter's frequency is measured.
    pub(crate) fn born(&self) -> Moment {
        self.born
    }

    /// The soft and the hard limit of open files (`RLIMIT_NOFILE` of getrlimit(2)) that this process was started with.
    pub fn open_files(&self) -> (u64, u64) {
        self.open_files
    }

    /// The process whose end ends all children; there is one as long as there are children.
    pub fn keeper(&self) -> Option<u32> {
        self.kept().process.upgrade().map(|keeper| keeper.pid())
    }

    /// Ends all children and waits until none of them is left, nor what they started.
    pub async fn end(&self) {
        let (keeper, end) = {
            let kept = self.kept();
            (kept.process.upgrade(), kept.end.clone())
        };
        if let Some(keeper) = keeper {
            keeper.kill();
        }
        if let Some(mut end) = end {
            // An error means that the runtime is shutting down.
            drop(end.wait_for(Option::is_some).await);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command` with nothing of our environment. To be called within a tokio runtime, which reaps the child.
    pub(crate) fn start(&self, mut command: Command, setup: ChildSetup) -> io::Result<Child> {
        command.env_clear().current_dir("/");
        let setup = ChildSetup {
            open_files: Some(self.open_files.0),
            ..setup
        };
        sys::prepare(&mut command, setup);
        let keeper = self.keep()?;
        let (pid, pidfd) = self.ask(Some(command))?;
        Child::watch(pid, pidfd, Some(keeper))
    }

    /// The keeper of the next child.
    fn keep(&self) -> io::Result<Arc<Child>> {
        let mut kept = self.kept();
        if let Some(keeper) = kept.process.upgrade().filter(|keeper| keeper.runs()) {
            return Ok(keeper);
        }
        let forked = self.ask(None).and_then(|(pid, pidfd)| Child::watch(pid, pidfd, None));
        let explain = |error: io::Error| io::Error::new(error.kind(), format!("no PID namespace: {error}"));
        let keeper = Arc::new(forked.map_err(explain)?);
        *kept = Keeper {
            process: Arc::downgrade(&keeper),
            end: Some(keeper.end.clone()),
        };
        Ok(keeper)
    }

    fn ask(&self, command: Option<Command>) -> io::Result<(u32, OwnedFd)> {
        let (reply, answer) = mpsc::sync_channel(1);
        let gone = || io::Error::other("the thread that starts children is gone");
        self.requests.send(Request { command, reply }).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

/// A child process. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    end: watch::Receiver<Option<ExitReason>>,
}

impl Child {
    /// `keeper` is held until the child has been reaped.
    fn watch(pid: u32, pidfd: OwnedFd, keeper: Option<Arc<Child>>) -> io::Result<Child> {
        let pidfd = Arc::new(pidfd);
        let (tell, end) = watch::channel(None);
        let watched = sys::readiness(pidfd.clone())?;
        tokio::spawn(async move {
            if let Ok(mut ready) = watched.readable().await {
                ready.retain_ready();
            }
            tell.send_replace(Some(reap(&watched)));
            drop(keeper);
        });
        Ok(Child { pid, pidfd, end })
    }

    /// Process id; stays the child's own until [`Child::exited`] returns.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not been reaped yet, and so keeps its number.
    pub fn runs(&self) -> bool {
        self.end.borrow().is_none()
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
    // The signal may be a real-time one, which nix has no name for.
    let waited = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    let reason = waited.as_ref().ok().and_then(Option::as_ref).and_then(|status| {
        let code = status.exit_status().map(ExitReason::Code);
        code.or_else(|| status.terminating_signal().map(ExitReason::Signal))
    });
    reason.unwrap_or_else(|| {
        tracing::error!(
            ?waited,
            "a child's exit status is lost: something else in this process waited for it"
        );
        ExitReason::Code(255)
    })
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
    use std::{fs, path::Path, process::Stdio, time::Duration};

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
    async fn a_child_keeps_its_capabilities_as_another_user_where_it_is_told_to() {
        let spawner = Spawner::new().unwrap();
        for (keep_capabilities, seen) in [(true, 0), (false, 1)] {
            let setup = ChildSetup {
                keep_capabilities,
                ..ChildSetup::default()
            };
            let child = spawner
                .start(shell("setpriv --dump | grep -q no_setuid_fixup"), setup)
                .unwrap();
            assert_eq!(child.exited().await, ExitReason::Code(seen));
        }
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

    /// A limit of the calling process as proc_pid_limits(5) shows it: soft and hard.
    fn open_files(pid: u32) -> (String, String) {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let mut words = line.split_whitespace().skip(3).map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    }

    #[tokio::test]
    async fn this_process_has_all_the_open_files_it_may_and_its_children_have_what_it_had() {
        let spawner = Spawner {
            open_files: (345, u64::MAX),
            ..Spawner::new().unwrap()
        };
        let (soft, hard) = open_files(std::process::id());
        assert_eq!(soft, hard);
        let child = spawner.start(shell("exec sleep 1000"), ChildSetup::default()).unwrap();
        assert_eq!(open_files(child.pid()), ("345".into(), hard));
    }

    /// The kernel takes a child's death signal away at an exec in another SELinux domain; `setpriv` does so here.
    #[tokio::test]
    async fn a_keepers_death_ends_the_children_and_what_they_have_started() {
        let spawner = Spawner::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let script = format!("(exec sleep 1000 >{}/held) & wait", folder.path().display());
        let mut deathless = Command::new("/usr/bin/setpriv");
        deathless.args(["--pdeathsig", "clear", "/bin/sh", "-c", &script]);
        let deathless = spawner.start(deathless, ChildSetup::default()).unwrap();
        let other = spawner.start(shell("exec sleep 1000"), ChildSetup::default()).unwrap();
        while !folder.path().join("held").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let keeper = spawner.keeper().unwrap();
        sys::pidfd_send_signal(sys::pidfd_open(keeper).unwrap().as_fd(), Signal::SIGKILL).unwrap();
        assert_eq!(deathless.exited().await, ExitReason::Signal(9));
        assert_eq!(other.exited().await, ExitReason::Signal(9));
        spawner.end().await;
        assert_eq!(fs::read_link(format!("/proc/{keeper}/exe")).ok(), None);
        let next = spawner.start(shell("exit 3"), ChildSetup::default()).unwrap();
        assert_eq!(next.exited().await, ExitReason::Code(3));
    }

    #[tokio::test]
    async fn a_keeper_has_a_name_and_no_files_and_ends_with_the_last_child() {
        // A copy of this process that kept it would hold as much.
        let held = vec![1_u8; 16 << 20];
        let spawner = Spawner::new().unwrap();
        assert_eq!(spawner.keeper(), None);
        let child = spawner.start(shell("exec sleep 1000"), ChildSetup::default()).unwrap();
        let keeper = spawner.keeper().unwrap();
        let of = |file: &str| format!("/proc/{keeper}/{file}");
        // It names itself first of all, and closes its files then.
        while fs::read_dir(of("fd")).unwrap().count() != 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let line = fs::read_to_string(of("cmdline")).unwrap();
        assert_eq!(line.trim_end_matches('\0'), "vm-keeper");
        assert_eq!(fs::read_to_string(of("comm")).unwrap(), "vm-keeper\n");
        assert_eq!(fs::read_link(of("fd/0")).unwrap().to_str(), Some("anon_inode:[pidfd]"));
        let status = fs::read_to_string(of("status")).unwrap();
        let written = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let written: usize = written.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(written << 10 < held.len() / 2, "the keeper holds {written} KiB");
        let second = spawner.start(shell("exit 0"), ChildSetup::default()).unwrap();
        assert_eq!(second.exited().await, ExitReason::Code(0));
        assert_eq!(spawner.keeper(), Some(keeper));
        child.kill();
        child.exited().await;
        spawner.end().await;
        assert_eq!(spawner.keeper(), None);
    }

    #[tokio::test]
    async fn a_child_with_a_proc_of_its_own_sees_its_namespace_only() {
        let spawner = Spawner::new().unwrap();
        let setup = ChildSetup {
            own_proc: true,
            ..ChildSetup::default()
        };
        // The keeper is the first process there, and this shell the second.
        let script = format!(
            "set -- /proc/[0-9]*; [ \"$*\" = '/proc/1 /proc/2' ] && [ $$ = 2 ] && ! kill -0 {}",
            std::process::id()
        );
        let child = spawner.start(shell(&script), setup).unwrap();
        assert_eq!(child.exited().await, ExitReason::Code(0));
        assert!(Path::new(&format!("/proc/{}", std::process::id())).exists());
    }

    #[tokio::test]
    async fn a_child_has_its_score_for_the_oom_killer_if_it_may() {
        let spawner = Spawner::new().unwrap();
        let score = |score| ChildSetup {
            oom_score_adj: Some(score),
            ..ChildSetup::default()
        };
        let raised = spawner
            .start(shell("[ $(cat /proc/self/oom_score_adj) = 876 ]"), score(876))
            .unwrap();
        assert_eq!(raised.exited().await, ExitReason::Code(0));
        // It takes a privilege that this machine may not give, and starts all the same.
        let lowered = spawner.start(shell("exit 0"), score(-1000)).unwrap();
        assert_eq!(lowered.exited().await, ExitReason::Code(0));
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
