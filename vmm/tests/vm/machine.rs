//! What stories are told with: a kit of files, and a machine that one can talk to.

use std::{
    env, fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use vmm::{
    AgentStream, Placement, Spawner, Vm, VmFds,
    spec::{Memory, VmSpec},
};

use crate::{newc::ram_disk, spec::pod};

/// The user that QEMU runs as; has no account.
pub const USER: u32 = 64620;
/// For the guest to boot or to answer.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Files that every machine needs.
pub struct Kit {
    kernel: PathBuf,
    /// This program as a RAM disk.
    pub initrd: PathBuf,
    pub virtiofsd: PathBuf,
    _folder: Option<TempDir>,
}

impl Kit {
    /// Finds or builds them.
    pub fn gather() -> Result<Kit, String> {
        let said = |error: std::io::Error| error.to_string();
        let folder = tempfile::tempdir().map_err(said)?;
        let initrd = folder.path().join("initrd");
        let init = fs::read(env::current_exe().map_err(said)?).map_err(said)?;
        let mut kit = Kit::with(initrd)?;
        let modules = modules(&kit.kernel).map_err(said)?;
        fs::write(&kit.initrd, ram_disk(&init, &modules)).map_err(said)?;
        kit._folder = Some(folder);
        Ok(kit)
    }

    /// Finds or builds the others.
    pub fn with(initrd: PathBuf) -> Result<Kit, String> {
        Ok(Kit {
            kernel: found("SANDPOD_TEST_KERNEL", "guest/build-kernel.sh", "vmlinux")?,
            initrd,
            virtiofsd: found("SANDPOD_TEST_VIRTIOFSD", "build-virtiofsd.sh", "bin/virtiofsd")?,
            _folder: None,
        })
    }

    /// A pod's VM, without a shared folder.
    pub fn spec(&self) -> VmSpec {
        VmSpec {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            memory: Memory {
                max_mib: 8192,
                ..pod().memory
            },
            fs: None,
            ..pod()
        }
    }
}

/// The modules of a kernel that does not have everything built in, in the order in which they are to be loaded.
fn modules(kernel: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let folder = kernel.parent().unwrap_or(Path::new("/"));
    let list = folder.join("modules-load.list");
    if !list.exists() {
        return Ok(Vec::new());
    }
    let list = fs::read_to_string(list)?;
    list.lines()
        .map(|path| fs::read(folder.join("modules").join(path.trim_start_matches('/'))))
        .collect()
}

/// The file that a variable names, or else `inside` what a script below `deploy/` prints.
fn found(variable: &str, script: &str, inside: &str) -> Result<PathBuf, String> {
    let given = match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(script);
            let printed = Command::new(&script).output();
            let printed = printed.map_err(|error| format!("{}: {error}", script.display()))?;
            PathBuf::from(String::from_utf8_lossy(&printed.stdout).trim())
        }
    };
    let file = if given.is_dir() { given.join(inside) } else { given };
    if file.is_file() {
        return Ok(file);
    }
    Err(format!(
        "there is no {file:?}: run deploy/{script}, or name the file in {variable}"
    ))
}

/// The unprivileged place that QEMU gets.
pub fn placement() -> Placement {
    Placement {
        netns: None,
        uid: USER,
        gid: USER,
        label: None,
        oom_score_adj: None,
    }
}

/// A VM whose guest is up.
pub struct Machine {
    pub vm: Vm,
    agent: BufReader<AgentStream>,
}

impl Machine {
    /// Starts a VM and waits for its guest.
    pub async fn boot(spec: &VmSpec) -> Machine {
        Machine::boot_with(&Spawner::new().unwrap(), spec, None).await
    }

    /// The same with a connection to virtiofsd.
    pub async fn boot_with(spawner: &Spawner, spec: &VmSpec, fs: Option<OwnedFd>) -> Machine {
        let fds = VmFds { fs, ..VmFds::default() };
        let vm = Vm::start(spawner, spec, fds, &placement()).await.unwrap();
        let stream = vm.agent_stream(PATIENCE).await.unwrap();
        let mut machine = Machine {
            vm,
            agent: BufReader::new(stream),
        };
        let first = machine.heard().await;
        assert!(first == "up", "{first:?} {}", machine.last_words());
        machine
    }

    /// A machine that has not been waited for.
    pub fn of(vm: Vm, stream: AgentStream) -> Machine {
        Machine {
            vm,
            agent: BufReader::new(stream),
        }
    }

    /// The guest's answer to a question.
    pub async fn ask(&mut self, question: &str) -> String {
        self.tell(question).await;
        self.heard().await
    }

    /// Asks without waiting for the answer.
    pub async fn tell(&mut self, question: &str) {
        self.agent.write_all(format!("{question}\n").as_bytes()).await.unwrap();
    }

    /// The guest's next line; empty when QEMU has ended.
    pub async fn heard(&mut self) -> String {
        let mut line = String::new();
        let read = tokio::time::timeout(PATIENCE, self.agent.read_line(&mut line)).await;
        if !matches!(read, Ok(Ok(_))) {
            panic!("{read:?} {}", self.last_words());
        }
        line.trim_end().to_owned()
    }

    fn last_words(&self) -> String {
        let (console, log) = (self.vm.console_tail(), self.vm.log_tail());
        format!("instead of an answer; QEMU: {log:?}, the guest's console:\n{console}")
    }

    /// A field of the guest's /proc/meminfo, in MiB.
    pub async fn meminfo(&mut self, field: &str) -> u64 {
        self.ask(&format!("meminfo {field}")).await.parse().unwrap()
    }

    /// Drops the VM and keeps the stream.
    pub fn into_stream(self) -> BufReader<AgentStream> {
        self.agent
    }

    /// Ends a VM that has not ended by itself.
    pub async fn end(self) {
        let ended = self.vm.stop().await;
        assert_eq!(ended.to_string(), "was killed by signal 9", "{}", self.vm.log_tail());
    }
}

/// Waits for something that gives no sign of its own.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    let mut look = tokio::time::interval(Duration::from_millis(5));
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        look.tick().await;
    }
}

/// Sends a signal to a process of this story.
pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Process ids of this process's children that live.
pub fn children() -> Vec<String> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let lists = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids = lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    // One that has ended and that nobody has waited for is no process any more.
    pids.filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
        .collect()
}
