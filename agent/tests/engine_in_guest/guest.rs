//! In the guest: PID 1, which mounts, reaps, and runs the cases.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    io::Write,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use agent::engine::{Create, Engine, EngineError, Exec, Started, Stdio};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::pipe2,
};
use oci_spec::runtime::{Process, Spec};
use serde_json::Value;
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};

/// A test in the guest.
#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub run: fn(Arc<Guest>) -> Outcome,
}

type Outcome = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Names an async function as a case.
#[macro_export]
macro_rules! case {
    ($name:ident) => {
        $crate::guest::Case {
            name: stringify!($name),
            run: |guest| Box::pin($name(guest)),
        }
    };
}

const APPLETS: &str = "awk cat chmod cut dd echo env false grep hostname id kill ln ls mkdir mknod mount ps pwd \
     readlink rm sh sleep stat stty tail test touch true tty umount uname unshare wc yes";
/// For anything in a case that could hang.
const PATIENCE: Duration = Duration::from_secs(300);

/// The guest that a case works in.
pub struct Guest {
    pub engine: Engine,
    exits: Mutex<HashMap<i32, i32>>,
    exited: Notify,
}

/// Runs the cases and powers off.
pub fn main(cases: &[Case]) -> ! {
    set_up().expect("the guest's mounts");
    let engine = Engine::spawn(Path::new("/run/kata-containers/engine")).expect("the engine");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let guest = Arc::new(Guest {
            engine,
            exits: Mutex::default(),
            exited: Notify::new(),
        });
        tokio::spawn(reap(Arc::clone(&guest)));
        for case in cases {
            run(*case, Arc::clone(&guest)).await;
        }
    });
    say("done");
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    unreachable!("a machine that rebooted");
}

async fn run(case: Case, guest: Arc<Guest>) {
    let began = Instant::now();
    let panicked = Arc::new(Mutex::new(String::new()));
    let message = Arc::clone(&panicked);
    std::panic::set_hook(Box::new(move |info| {
        *message.lock().unwrap() = info.to_string().replace('\n', " | ")
    }));
    let outcome = tokio::time::timeout(2 * PATIENCE, tokio::spawn((case.run)(Arc::clone(&guest)))).await;
    // What a failed case left must not fail the next one.
    let _ = guest.engine.delete("c").await;
    let _ = std::panic::take_hook();
    match outcome {
        Ok(Ok(())) => say(&format!("ok {}", case.name)),
        Ok(Err(_)) => say(&format!("failed {}: {}", case.name, panicked.lock().unwrap())),
        Err(_) => say(&format!(
            "failed {}: it takes longer than {:?}",
            case.name,
            2 * PATIENCE
        )),
    }
    say(&format!("{} took {} ms", case.name, began.elapsed().as_millis()));
}

/// Writes a line for the host.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "@ {line}");
}

fn set_up() -> nix::Result<()> {
    let none = None::<&str>;
    let new = |kind: &str, path: &str, data: Option<&str>| {
        let _ = fs::create_dir_all(path);
        mount(Some(kind), path, Some(kind), MsFlags::empty(), data)
    };
    // Off the initial RAM disk, which pivot_root(2) refuses to leave.
    new("tmpfs", "/root", Some("mode=755"))?;
    for folder in ["/root/rootfs/bin", "/root/rootfs/etc", "/root/rootfs/tmp"] {
        fs::create_dir_all(folder).expect("a folder");
    }
    fs::copy("/busybox", "/root/rootfs/bin/busybox").expect("busybox");
    for applet in APPLETS.split_whitespace() {
        symlink("busybox", format!("/root/rootfs/bin/{applet}")).expect("an applet");
    }
    // This program, for cases that make system calls of their own.
    fs::copy("/init", "/root/rootfs/bin/caller").expect("this program");
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/srv/web:/bin/sh\n";
    fs::write("/root/rootfs/etc/passwd", passwd).expect("passwd");
    std::env::set_current_dir("/root").expect("the new root");
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    nix::unistd::chroot(".")?;
    new("proc", "/proc", None)?;
    new("sysfs", "/sys", None)?;
    new("devtmpfs", "/dev", None)?;
    new("devpts", "/dev/pts", None)?;
    new("tmpfs", "/run", None)?;
    new("cgroup2", "/sys/fs/cgroup", None)
}

/// PID 1's duty: the exits of all orphans.
async fn reap(guest: Arc<Guest>) {
    let mut children = signal(SignalKind::child()).expect("SIGCHLD");
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => guest.exited(pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => guest.exited(pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                _ => {}
            }
        }
        children.recv().await;
    }
}

/// A process with its output.
pub struct Running {
    pub pid: i32,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    pub pty: Option<OwnedFd>,
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code, or 128 + signal.
    pub code: i32,
    pub out: String,
    pub err: String,
}

struct Pipes {
    stdio: Stdio,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

fn pipes(terminal: bool) -> Pipes {
    if terminal {
        return Pipes {
            stdio: Stdio::Terminal,
            stdout: None,
            stderr: None,
        };
    }
    let pipe = || {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("a pipe");
        nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).expect("a blocking end");
        (pipe::Receiver::from_owned_fd(read).expect("a pipe"), write)
    };
    let ((stdout, out), (stderr, err)) = (pipe(), pipe());
    let stdio = Stdio::Pipes {
        stdin: None,
        stdout: out,
        stderr: err,
    };
    Pipes {
        stdio,
        stdout: Some(stdout),
        stderr: Some(stderr),
    }
}

impl Guest {
    /// Creates a container from a specification (see `spec::base`).
    pub async fn create(&self, id: &str, spec: Value) -> Result<Running, EngineError> {
        let spec: Spec = serde_json::from_value(spec).expect("a specification");
        let pipes = pipes(spec.process().as_ref().and_then(Process::terminal) == Some(true));
        let started = self
            .engine
            .create(Create {
                id: id.to_owned(),
                spec,
                stdio: pipes.stdio,
            })
            .await?;
        Ok(running(started, pipes.stdout, pipes.stderr))
    }

    /// Creates and starts a container.
    pub async fn start(&self, id: &str, spec: Value) -> Running {
        let running = self.create(id, spec).await.expect("a container");
        self.engine.start(id).await.expect("a start");
        running
    }

    /// Runs a container from creation to deletion.
    pub async fn run(&self, id: &str, spec: Value) -> Ended {
        let running = self.start(id, spec).await;
        let ended = self.end(running).await;
        self.engine.delete(id).await.expect("a deletion");
        ended
    }

    /// Starts a process in a container.
    pub async fn try_exec(&self, id: &str, process: Value) -> Result<Running, EngineError> {
        let process: Process = serde_json::from_value(process).expect("a process");
        let pipes = pipes(process.terminal() == Some(true));
        let started = self
            .engine
            .exec(Exec {
                id: id.to_owned(),
                process,
                stdio: pipes.stdio,
            })
            .await?;
        Ok(running(started, pipes.stdout, pipes.stderr))
    }

    /// Runs a process in a container to its end.
    pub async fn exec(&self, id: &str, process: Value) -> Ended {
        let running = self.try_exec(id, process).await.expect("an exec");
        self.end(running).await
    }

    /// Waits for a process and for the end of its output.
    pub async fn end(&self, running: Running) -> Ended {
        let Running {
            pid, stdout, stderr, ..
        } = running;
        let read = |pipe: Option<pipe::Receiver>| async move {
            let mut text = String::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_string(&mut text).await.expect("output");
            }
            text
        };
        let all = async { tokio::join!(read(stdout), read(stderr), self.exit(pid)) };
        let (out, err, code) = tokio::time::timeout(PATIENCE, all).await.expect("an end");
        Ended {
            code,
            out: out.trim_end().to_owned(),
            err: err.trim_end().to_owned(),
        }
    }

    /// Waits for a process: exit code, or 128 + signal.
    pub async fn exit(&self, pid: i32) -> i32 {
        loop {
            let exited = self.exited.notified();
            if let Some(code) = self.exits.lock().unwrap().remove(&pid) {
                return code;
            }
            exited.await;
        }
    }

    /// Kills a container's init, waits for it and deletes the container.
    pub async fn kill(&self, id: &str, running: Running) -> Ended {
        let pid = nix::unistd::Pid::from_raw(running.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("a live process");
        let ended = self.end(running).await;
        self.engine.delete(id).await.expect("a deletion");
        ended
    }

    fn exited(&self, pid: i32, code: i32) {
        self.exits.lock().unwrap().insert(pid, code);
        self.exited.notify_waiters();
    }
}

fn running(started: Started, stdout: Option<pipe::Receiver>, stderr: Option<pipe::Receiver>) -> Running {
    Running {
        pid: started.pid,
        stdout,
        stderr,
        pty: started.pty,
    }
}
