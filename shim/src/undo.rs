//! What a sandbox has made on the host, written down before it is made.
//!
//! Every set-up step first pushes the action that undoes it. A failed start, an ordinary end, `delete` after the
//! shim's death and the sweep of the next start all unwind the same list, last entry first, so there is one way to
//! clean up and it needs nothing but the state file.

use std::{
    fmt, fs,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup,
    error::{Context, Result, decode},
    net, sys,
};

/// Parent of all sandbox directories.
pub const RUN_DIR: &str = "/run/kata";
/// Bumped when the file's meaning changes.
const VERSION: u32 = 1;
/// How long a sandbox is left alone that could not be removed.
const BACK_OFF: Duration = Duration::from_secs(10);
/// How often a sweep tries before it leaves the rest to the next one.
const TRIES: u32 = 6;

/// How to take back one step. Every action succeeds on what is already gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    /// Unlink a file, such as the shim's socket.
    File(PathBuf),
    /// Remove an (empty) mount point.
    Dir(PathBuf),
    /// Detach a mount of the shim's own mount namespace; for anybody else it vanished with the shim.
    Mount(PathBuf),
    /// Move the shim out of the sandbox cgroup and remove what was made.
    Cgroup(cgroup::Record),
    /// Remove the redirect from the pod's interfaces.
    Network(net::Record),
    /// Kill a process and wait until it is gone.
    Process(ProcessId),
    /// What another version of the shim has written, and only that can undo.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks after boot (field 22 of `/proc/<pid>/stat`).
    pub started: u64,
}

impl ProcessId {
    /// Identifies a live process; `None` when it is gone.
    pub fn of(pid: u32) -> Option<ProcessId> {
        look(pid)
            .filter(|(_, phase)| *phase != Phase::Zombie)
            .map(|(process, _)| process)
    }

    /// Whether this very process still runs.
    pub fn alive(&self) -> bool {
        ProcessId::of(self.pid) == Some(*self)
    }

    /// Waits for the end of a process that is ending, 5 s at most; nothing to wait for otherwise. Whoever is connected
    /// hears of a death before it is over: files are closed first, and a mount namespace is taken down after them.
    fn see_off(&self) -> Result<()> {
        match sys::pidfd_open(self.pid).action("open a pidfd")? {
            Some(pidfd) => match look(self.pid) {
                Some((process, phase)) if process == *self && phase != Phase::Runs => wait_for(&pidfd),
                _ => Ok(()),
            },
            None => Ok(()),
        }
    }
}

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Runs,
    /// Its first thread is on its way out.
    Ends,
    /// Its first thread has ended; others may be on their way.
    Zombie,
}

/// The process of this number.
fn look(pid: u32) -> Option<(ProcessId, Phase)> {
    // `PF_EXITING` of `include/linux/sched.h` of Linux.
    const EXITING: u32 = 0x4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses: fields are counted after the last one.
    let mut fields = stat[stat.rfind(')')? + 2..].split(' ');
    let zombie = matches!(fields.next()?, "Z" | "X");
    let flags: u32 = fields.nth(5)?.parse().ok()?;
    let started = fields.nth(12)?.parse().ok()?;
    let phase = match flags & EXITING {
        _ if zombie => Phase::Zombie,
        0 => Phase::Runs,
        _ => Phase::Ends,
    };
    Some((ProcessId { pid, started }, phase))
}

/// The state file: who serves the sandbox, and how to remove it.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    version: u32,
    sandbox: String,
    /// The shim that serves the sandbox.
    pub shim: ProcessId,
    /// The pod, where a CRI has named it.
    #[serde(default)]
    pub pod: Option<PodName>,
    /// The share's server, from its start on.
    #[serde(default)]
    pub virtiofsd: Option<ProcessId>,
    /// The VM, from its start on.
    #[serde(default)]
    pub qemu: Option<ProcessId>,
    /// When its removal was last tried in vain, in seconds after 1970.
    #[serde(default)]
    failed_at: Option<u64>,
    undo: Vec<Undo>,
}

/// A pod as Kubernetes names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
}

impl fmt::Display for PodName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.namespace, self.name)
    }
}

impl State {
    /// Makes `/run/kata/<sandbox>` (0700) and a list for this process, with what a dead shim of the sandbox still owes.
    pub fn create(sandbox: &str) -> Result<State> {
        let owed = State::load(sandbox)?;
        let dir = dir_of(sandbox);
        fs::create_dir_all(&dir).at("create", &dir)?;
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).at("set the mode of", &dir)?;
        let shim = ProcessId::of(std::process::id())
            .ok_or_else(|| io::Error::other("/proc is not mounted"))
            .action("identify the shim")?;
        let state = State {
            version: VERSION,
            sandbox: sandbox.into(),
            shim,
            pod: owed.as_ref().and_then(|owed| owed.pod.clone()),
            virtiofsd: None,
            qemu: None,
            failed_at: None,
            undo: owed.map(|owed| owed.undo).unwrap_or_default(),
        };
        state.save()?;
        Ok(state)
    }

    /// Reads a sandbox's state; `None` when there is none (any more).
    pub fn load(sandbox: &str) -> Result<Option<State>> {
        let path = dir_of(sandbox).join("state.json");
        match fs::read(&path) {
            Ok(text) => State::parse(sandbox, &text).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).at("read", path),
        }
    }

    fn parse(sandbox: &str, text: &[u8]) -> Result<State> {
        let state: State = serde_json::from_slice(text).map_err(decode("a sandbox's state.json"))?;
        if state.version > VERSION {
            let version = state.version;
            tracing::warn!(
                sandbox,
                version,
                "a newer shim has written state.json: what is known of it is used"
            );
        }
        Ok(state)
    }

    /// Writes an entry down; call it before the step that it undoes.
    pub fn push(&mut self, undo: Undo) -> Result<()> {
        self.undo.push(undo);
        self.save()
    }

    /// Number of entries now; a mark for [`State::unwind_to`].
    pub fn mark(&self) -> usize {
        self.undo.len()
    }

    /// Undoes everything after `mark`, last first. What cannot be undone is logged and kept for a later try.
    pub fn unwind_to(&mut self, mark: usize) {
        let mut failed = Vec::new();
        while self.undo.len() > mark {
            let Some(entry) = self.undo.pop() else { break };
            if let Err(error) = undo(&entry) {
                tracing::warn!(%error, ?entry, "left for a later clean-up");
                failed.push(entry);
            }
        }
        failed.reverse();
        self.undo.append(&mut failed);
    }

    /// Takes entries off the list, for whoever undoes them at once; what [`State::give_back`] is not told of is undone.
    pub fn take(&mut self, which: impl Fn(&Undo) -> bool) -> Vec<Undo> {
        let (taken, kept) = std::mem::take(&mut self.undo).into_iter().partition(which);
        self.undo = kept;
        taken
    }

    /// Puts back what could not be undone, to be undone last.
    pub fn give_back(&mut self, mut owed: Vec<Undo>) -> Result<()> {
        owed.append(&mut self.undo);
        self.undo = owed;
        self.save()
    }

    /// Undoes everything but the sandbox's directory, which tells the next start on the node of the sandbox.
    pub fn unwind(mut self) -> Result<()> {
        self.unwind_to(0);
        self.failed_at = (!self.undo.is_empty()).then(seconds);
        self.save()
    }

    /// Whether somebody has failed to remove it a short while ago.
    fn failed_just_now(&self) -> bool {
        self.failed_at
            .is_some_and(|at| seconds().saturating_sub(at) < BACK_OFF.as_secs())
    }

    /// Undoes everything and removes the sandbox's directory.
    pub fn remove(mut self) -> Result<()> {
        self.unwind_to(0);
        if !self.undo.is_empty() {
            self.failed_at = Some(seconds());
            return self.save();
        }
        let dir = dir_of(&self.sandbox);
        for file in [
            "state.json",
            "state.json.new",
            "tasks.json",
            "tasks.json.new",
            "trace.json",
            "trace.json.new",
        ] {
            gone(fs::remove_file(dir.join(file))).at("remove", dir.join(file))?;
        }
        gone(fs::remove_dir(&dir)).at("remove", dir)
    }

    fn save(&self) -> Result<()> {
        let dir = dir_of(&self.sandbox);
        let text = serde_json::to_vec(self).map_err(decode("the state to write"))?;
        write_renamed(&dir.join("state.json"), &text)
    }
}

/// Writes a file so that a reader sees the old or the new text, never a part.
pub fn write_renamed(path: &Path, text: &[u8]) -> Result<()> {
    let new = path.with_extension("json.new");
    let mut file = fs::File::create(&new).at("create", &new)?;
    file.write_all(text).at("write", &new)?;
    fs::rename(&new, path).at("rename", path)
}

/// A sandbox's directory on the host.
pub fn dir_of(sandbox: &str) -> PathBuf {
    Path::new(RUN_DIR).join(sandbox)
}

/// The names of all sandboxes of this node, in their order; `kata-ctl` and the sweep look at each.
pub fn names() -> Result<Vec<String>> {
    let entries = match fs::read_dir(RUN_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).at("read", RUN_DIR),
    };
    // Files belong to all of them.
    let folders = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let names = folders.map(|entry| entry.file_name().into_string());
    // What is no text is no sandbox: ids are plain names.
    let mut names: Vec<String> = names.flatten().collect();
    names.sort();
    Ok(names)
}

/// Whether a sandbox of this node has lost its shim.
pub fn is_to_sweep() -> bool {
    // What cannot be read is the sweep's to tell.
    let lost = |name: &String| State::load(name).map_or(true, |state| state.is_some_and(|state| !state.shim.alive()));
    names().unwrap_or_default().iter().any(lost)
}

/// Does `clean` for each sandbox of this node, again after a while for what is left, unless another process is at it.
/// It waits for processes that cannot be killed, so nobody should wait for it.
///
/// # Errors
/// The sandboxes cannot be listed. What `clean` cannot do is logged.
pub fn sweep(clean: impl Fn(&str) -> Result<()>) -> Result<()> {
    let folder = fs::File::open(RUN_DIR).at("open", RUN_DIR)?;
    // Until the folder is closed. Two at once would take back what the other has just made in a dead shim's place.
    let Ok(_sweeping) = Flock::lock(folder, FlockArg::LockExclusiveNonblock) else {
        return Ok(());
    };
    for _ in 0..TRIES {
        let mut clean_now = true;
        for name in names()? {
            clean_now &= sweep_one(&name, &clean).unwrap_or_else(|error| {
                tracing::warn!(%error, sandbox = name, "cannot sweep");
                false
            });
        }
        if clean_now {
            break;
        }
        thread::sleep(BACK_OFF);
    }
    Ok(())
}

/// Whether nothing is to be done about a sandbox any more.
fn sweep_one(sandbox: &str, clean: impl Fn(&str) -> Result<()>) -> Result<bool> {
    if State::load(sandbox)?.is_some_and(|state| state.failed_just_now()) {
        return Ok(false);
    }
    clean(sandbox)?;
    Ok(State::load(sandbox)?.is_none_or(|state| state.failed_at.is_none()))
}

fn seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// Removes a sandbox whose shim is dead or about to be; does nothing for a live or an unknown one.
pub fn remove_if_dead(sandbox: &str) -> Result<()> {
    dead(sandbox)?.map_or(Ok(()), State::remove)
}

/// Takes back what a dead shim has made, but for the sandbox's directory; answers whether the shim is dead.
pub fn unwind_if_dead(sandbox: &str) -> Result<bool> {
    let Some(state) = dead(sandbox)? else {
        return Ok(false);
    };
    state.unwind()?;
    Ok(true)
}

/// The state of a sandbox whose shim is dead or about to be.
fn dead(sandbox: &str) -> Result<Option<State>> {
    let Some(state) = State::load(sandbox)? else {
        return Ok(None);
    };
    state.shim.see_off()?;
    Ok((!state.shim.alive()).then_some(state))
}

/// Takes back one step.
pub fn undo(entry: &Undo) -> Result<()> {
    match entry {
        Undo::File(path) => gone(fs::remove_file(path)).at("remove", path),
        Undo::Dir(path) => gone(fs::remove_dir(path)).at("remove", path),
        Undo::Mount(path) => crate::rootfs::detach(path),
        Undo::Cgroup(record) => Ok(record.remove()?),
        Undo::Network(record) => Ok(record.remove()?),
        Undo::Process(process) => kill(process),
        Undo::Unknown(entry) => {
            // Kept, it would be tried again for ever, and hold up what is known.
            tracing::warn!(%entry, "a step of another version of the shim is not undone: look at it by hand");
            Ok(())
        }
    }
}

/// Kills the process and waits for its end, 5 s at most: it may be in the middle of a large unmap.
fn kill(process: &ProcessId) -> Result<()> {
    let Some(pidfd) = sys::pidfd_open(process.pid).action("open a pidfd")? else {
        return Ok(());
    };
    // Checked after the pidfd is held: from here on the pid cannot come to mean another process.
    if !process.alive() {
        return Ok(());
    }
    sys::pidfd_kill(&pidfd).action("kill a process of the sandbox")?;
    wait_for(&pidfd)
}

fn wait_for(pidfd: &OwnedFd) -> Result<()> {
    let mut poll = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
    match nix::poll::poll(&mut poll, 5000u16).action("wait for a dying process")? {
        0 => Err(io::Error::from(io::ErrorKind::TimedOut)).action("see a dying process end"),
        _ => Ok(()),
    }
}

/// "Not there" is what a removal wants.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn who_runs_is_not_waited_for_and_who_has_ended_is_seen_off() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        process.see_off().unwrap();
        assert!(process.alive());
        drop(child.stdin.take());
        // Not reaped: it stays as a zombie.
        let pidfd = sys::pidfd_open(child.id()).unwrap().unwrap();
        wait_for(&pidfd).unwrap();
        process.see_off().unwrap();
        assert!(!process.alive());
        assert_eq!(look(child.id()), Some((process, Phase::Zombie)));
        child.wait().unwrap();
        assert_eq!(look(child.id()), None);
    }

    #[test]
    fn what_another_version_has_written_is_named_and_the_rest_is_undone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("socket");
        fs::write(&file, "").unwrap();
        let text = serde_json::json!({
            "version": VERSION + 1, "sandbox": "s", "shim": {"pid": 1, "started": 1}, "later": true,
            "undo": [{"file": &file}, {"portal": {"depth": 3}}, "pool"],
        });
        let mut state = State::parse("s", text.to_string().as_bytes()).unwrap();
        let unknown = Undo::Unknown(serde_json::json!({"portal": {"depth": 3}}));
        assert_eq!(state.undo[1], unknown);
        assert_eq!(serde_json::to_value(&state.undo).unwrap(), text["undo"]);
        state.unwind_to(0);
        assert!(state.undo.is_empty() && !file.exists());
    }

    #[test]
    fn a_number_that_only_a_session_or_a_thread_has_is_no_processs() {
        let mut leader = Command::new("setsid");
        leader.args(["sh", "-c", "sleep 1000 >/dev/null & echo $!"]);
        let leader = leader.stdout(Stdio::piped()).spawn().unwrap();
        let session = leader.id();
        let member = String::from_utf8(leader.wait_with_output().unwrap().stdout).unwrap();
        let member = sys::pidfd_open(member.trim().parse().unwrap()).unwrap().unwrap();
        let found = sys::pidfd_open(session).unwrap();
        sys::pidfd_kill(&member).unwrap();
        assert!(found.is_none());
        let thread = thread::scope(|scope| {
            let thread = || sys::pidfd_open(nix::unistd::gettid().as_raw().unsigned_abs());
            scope.spawn(thread).join().unwrap()
        });
        assert!(thread.unwrap().is_none());
    }
}
