//! The server of the guest's shared folder.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen, socket,
};

use crate::{
    error::VmError,
    process::{Child, ExitReason, Spawner},
    sys::ChildSetup,
    tail::Tail,
};

/// Capabilities that neither of virtiofsd's two processes has a use for, by their numbers (`<linux/capability.h>`). The
/// process that serves drops all but eight by itself; the one that has started it and waits for its end keeps what it
/// was given.
const USELESS: &[u8] = &[
    10, 11, 12, 13, // NET_*
    14, 15, // IPC_*
    16, 17, 19, 20, 22, 23, 25, 26, // SYS_MODULE, RAWIO, PTRACE, PACCT, BOOT, NICE, TIME, TTY_CONFIG
    28, // LEASE
    29, 30, 37, // AUDIT_*
    32, 33, // MAC_*
    34, 35, 36, 38, 39, 40, // SYSLOG, WAKE_ALARM, BLOCK_SUSPEND, PERFMON, BPF, CHECKPOINT_RESTORE
];

/// What virtiofsd serves, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtiofsdSpec {
    /// The virtiofsd program, 1.14.
    pub program: PathBuf,
    /// The folder that the guest sees. What is mounted below it later is seen too, if mounts propagate.
    pub shared_dir: PathBuf,
    /// `auto`, `always`, `never` or `metadata`.
    pub cache: String,
    /// Further arguments, before ours.
    pub extra_args: Vec<String>,
    /// SELinux label to run with; that which the host's policy gives without one.
    pub label: Option<String>,
    /// How readily the OOM killer takes it, -1000 to 1000 (proc_pid_oom_score_adj(5)); as readily as this process
    /// without.
    pub oom_score_adj: Option<i32>,
}

/// A running virtiofsd. When it dies the guest's file system calls hang: end the VM then.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    log: Tail,
}

/// Overlay keeps its notes in `trusted.*`, which the host lets nobody write who is not root of the whole node. So they
/// are kept under another name there, which the guest cannot use by itself.
const XATTRMAP: &str = ":map:trusted.:user.virtiofs.:";

impl Virtiofsd {
    /// Starts virtiofsd; returns it and the connection that QEMU is to have. To be called within a tokio runtime.
    ///
    /// # Errors
    /// When the program cannot be started. One that dies later is seen by [`Virtiofsd::child`].
    pub fn start(spawner: &Spawner, spec: &VirtiofsdSpec) -> Result<(Virtiofsd, OwnedFd), VmError> {
        let (listener, connection) = connected_listener().map_err(VmError::system("make a socket for virtiofsd"))?;
        let (log, writer) = Tail::pipe().map_err(VmError::system("make a pipe for virtiofsd's log"))?;
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.extra_args)
            .arg(format!("--fd={}", listener.as_raw_fd()))
            .arg("--shared-dir")
            .arg(&spec.shared_dir);
        // Each mount below the shared folder is a mount of its own in the guest. Without that two files of two
        // overlays can have one device and inode number there, which tar, cp and rm take for one file.
        command.args(["--sandbox=namespace", "--announce-submounts"]);
        // Programs have capabilities by their extended attributes. The option may be given but once.
        if !spec.extra_args.iter().any(|argument| argument == "--xattr") {
            command.arg("--xattr");
        }
        let says = |word: &str| spec.extra_args.iter().any(|argument| argument.contains(word));
        if !says("xattrmap") && !says("no_xattr") {
            command.arg(format!("--xattrmap={XATTRMAP}"));
        }
        command.arg(format!("--cache={}", spec.cache));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
        let setup = ChildSetup {
            label: spec.label.clone(),
            oom_score_adj: spec.oom_score_adj,
            without: USELESS,
            // It makes files as the user who asked for them. By itself it has no capabilities meanwhile, and the host
            // refuses what the guest has allowed: who is root in a user namespace, or has CAP_DAC_OVERRIDE without
            // being root, may write into folders of others.
            keep_capabilities: true,
            inherit: vec![listener],
            ..ChildSetup::default()
        };
        let spawned = spawner.start(command, setup);
        let child = spawned.map_err(|source| VmError::spawn(&spec.program, spec.label.as_deref(), source))?;
        Ok((Virtiofsd { child, log }, connection))
    }

    /// The process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// The error of a VM that it has left alone by ending with `reason`. What it wrote is waited for, a second at most.
    pub async fn died(&self, reason: ExitReason) -> VmError {
        VmError::died("virtiofsd", reason, &self.log.last_words().await)
    }

    /// The last 64 KiB of what it has written to its standard error.
    pub fn log_tail(&self) -> String {
        self.log.text()
    }
}

/// A listening socket with one connection in its queue. virtiofsd takes the first connection it finds, and this one
/// is there before anybody can know of the socket.
fn connected_listener() -> nix::Result<(OwnedFd, OwnedFd)> {
    let new = || socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let (listener, connection) = (new()?, new()?);
    // Without a name the kernel picks a free one, outside the file system.
    bind(listener.as_raw_fd(), &UnixAddr::new_unnamed())?;
    listen(&listener, Backlog::new(1)?)?;
    connect(connection.as_raw_fd(), &getsockname::<UnixAddr>(listener.as_raw_fd())?)?;
    Ok((listener, connection))
}
