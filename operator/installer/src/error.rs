//! Why an install, a verification or an uninstall did not succeed: one sentence each, and its code for the report.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::report::{Code, Problem};

/// The result of everything in the installer.
pub type Result<T> = std::result::Result<T, InstallError>;

/// Why a run did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// No hardware virtualization, and nobody asked for emulation.
    #[error(
        "{0}; to emulate every pod instead, write `accelerator = \"tcg\"` under [hypervisor.qemu] into a file /etc/sandpod/config.d/*.toml"
    )]
    NoKvm(String),
    /// A part of the node with which no pod runs.
    #[error("{0}")]
    NotFit(String),
    /// There is no CRI.
    #[error("no container runtime was found: there is neither {crio} nor {containerd}; start CRI-O or containerd")]
    NoCri {
        /// CRI-O's socket.
        crio: PathBuf,
        /// containerd's socket.
        containerd: PathBuf,
    },
    /// The kubelet uses a container runtime that no layout has.
    #[error(
        "the node's kubelet uses the container runtime at {socket}, and where that one has its configuration is not \
         known: Sandpod knows CRI-O and containerd of packages, k3s, RKE2, k0s and MicroK8s, with their usual folders"
    )]
    UnknownLayout {
        /// Its socket.
        socket: PathBuf,
    },
    /// The CRI is there and does not answer.
    #[error("{cri} does not answer at {socket}: {why}")]
    Silent {
        /// Its name.
        cri: &'static str,
        /// Where it was asked.
        socket: PathBuf,
        /// What it, or the kernel, said.
        why: String,
    },
    /// The CRI is too old.
    #[error("{cri} {version} is too old: {remedy}")]
    CriTooOld {
        /// Its name.
        cri: &'static str,
        /// What it says of itself.
        version: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Somebody else's handler.
    #[error(
        "{path} already defines a handler `{handler}`, which Sandpod did not write: remove it from there and install again"
    )]
    ForeignHandler {
        /// The file, as the node sees it.
        path: PathBuf,
        /// The handler.
        handler: String,
    },
    /// Somebody else's file where ours belongs.
    #[error("{path} exists and is not Sandpod's: move it away and install again")]
    ForeignFile {
        /// The file, as the node sees it.
        path: PathBuf,
    },
    /// Something that others could change, or have made, where the installer's own folder belongs.
    #[error("{path} {how}: remove it and try again")]
    UnsafeFolder {
        /// The folder, as the node sees it.
        path: PathBuf,
        /// What is wrong with it.
        how: String,
    },
    /// Others could change what root would run.
    #[error(
        "{path} {how}, who could replace what root runs in {prefix}: give it to root and take the others' right to \
         write (`chown root`, `chmod go-w`), or choose another --prefix"
    )]
    UnsafePrefix {
        /// The prefix or a folder above it, as the node sees it.
        path: PathBuf,
        /// What is wrong with it.
        how: String,
        /// The prefix.
        prefix: PathBuf,
    },
    /// The handler is ours, below another prefix.
    #[error("Sandpod is installed in {prefix}: uninstall it there first, or use --prefix {prefix}")]
    OtherPrefix {
        /// The other prefix.
        prefix: PathBuf,
    },
    /// containerd does not read its drop-ins.
    #[error("{cri} does not read {folder}: {cure} and install again")]
    NotImported {
        /// Which containerd.
        cri: &'static str,
        /// The folder of drop-ins.
        folder: &'static str,
        /// A clause that says what to do.
        cure: String,
    },
    /// containerd's configuration says nothing of its version, or is of the first one, of which containerd 2 takes only
    /// the names.
    #[error(
        "{main} has no `version`, or the version 1: write into it what `containerd config migrate` prints and install \
         again"
    )]
    Unversioned {
        /// containerd's configuration.
        main: &'static str,
    },
    /// Files that mean something else together with ours.
    #[error("{cri} would not have the same `{path}` with {drop_in} as without it: {cure} and install again")]
    WouldDiffer {
        /// Which containerd.
        cri: &'static str,
        /// The first thing that would be another one.
        path: String,
        /// Our file.
        drop_in: String,
        /// A clause that says what to do.
        cure: String,
    },
    /// A restart with ours has changed more than the handler.
    #[error(
        "{cri} had not the same `{path}` after its restart as before: if its configuration was edited since its last \
         start, install again, else its log says which key it ignores"
    )]
    Differs {
        /// Which CRI.
        cri: &'static str,
        /// The first thing that was another one.
        path: String,
    },
    /// The CRI is back and pods would not start.
    #[error("`{condition}` of {cri} held before its restart and did not after it: {why}")]
    NotReady {
        /// Which CRI.
        cri: &'static str,
        /// The condition.
        condition: String,
        /// What it says of it.
        why: String,
    },
    /// A configuration that its reader would refuse.
    #[error("{what} is not valid: {why}")]
    ConfigInvalid {
        /// Which configuration.
        what: String,
        /// What its reader said.
        why: String,
    },
    /// The prefix cannot be written.
    #[error("{path} cannot be written: {source}; choose another place with --prefix")]
    ReadOnlyPrefix {
        /// The prefix, or the nearest folder above it that exists.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Too little space.
    #[error(
        "{path} has {free_mib} MiB free and the installation needs {needed_mib} MiB: make room, or choose another place with --prefix"
    )]
    DiskFull {
        /// The prefix, or the nearest folder above it that exists.
        path: PathBuf,
        /// What is free, MiB.
        free_mib: u64,
        /// What is needed, MiB.
        needed_mib: u64,
    },
    /// A label that an enforcing SELinux or the file system refuses.
    #[error(
        "SELinux is enforcing and {path} cannot have the label {label}: {source}; choose a place on a file system with labels with --prefix"
    )]
    Label {
        /// The file.
        path: PathBuf,
        /// The label.
        label: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The payload is not what its manifest says.
    #[error("the payload is not usable: {0}")]
    Payload(String),
    /// A program of the payload does not start on this node.
    #[error("{program} does not start on this node: {why}")]
    DoesNotStart {
        /// Which.
        program: PathBuf,
        /// What the kernel or the program said.
        why: String,
    },
    /// Two at once.
    #[error("another installer is at work on this node; wait for its end")]
    Busy,
    /// The restart itself.
    #[error("`{command}` {how}; the log of {cri} says more")]
    Restart {
        /// The command line.
        command: String,
        /// How it ended.
        how: String,
        /// Which CRI.
        cri: &'static str,
    },
    /// The handler is not there although everything was done for it.
    #[error("{cri} runs and does not list the handler `{handler}`; its log says why")]
    HandlerAbsent {
        /// Which CRI.
        cri: &'static str,
        /// Which handler.
        handler: String,
    },
    /// CRI-O has not taken the handler, and goes on without it.
    #[error(
        "{cri} runs and has left out the handler `{handler}`, as it does with one whose program it does not find or \
         whose keys it refuses; its log says why"
    )]
    HandlerLeftOut {
        /// Which CRI.
        cri: &'static str,
        /// Which handler.
        handler: String,
    },
    /// A handler of our name is there, and not as we wrote it.
    #[error(
        "{cri} runs pods of the handler `{handler}` by {path:?} of the `runtime_type` {kind:?}, as Sandpod did not write \
         it: another part of its configuration must say so"
    )]
    HandlerOfOthers {
        /// Which CRI.
        cri: &'static str,
        /// Which handler.
        handler: String,
        /// The program.
        path: String,
        /// How it is run.
        kind: String,
    },
    /// The handler is still there although its file is gone.
    #[error(
        "{cri} still lists a handler `{handler}` after its restart; another file of its configuration must define one"
    )]
    HandlerPresent {
        /// Which CRI.
        cri: &'static str,
        /// Which handler.
        handler: String,
    },
    /// Pods run.
    #[error("pods with the handler `{handler}` still run ({count}, such as {example}): delete them first")]
    SandboxesExist {
        /// How many.
        count: usize,
        /// Namespace and name of one.
        example: String,
        /// Its handler.
        handler: String,
    },
    /// Shims run that the CRI does not know.
    #[error("shims of version {version} still run: remove their pods or tasks first")]
    InUse {
        /// The version's folder.
        version: String,
    },
    /// The run was made for a boot that is over, or for another node of the same name.
    #[error("the node's boot is {now}, and the run is for the boot {asked}: it has been booted or replaced since")]
    OtherBoot {
        /// This boot.
        now: String,
        /// The one that was asked for.
        asked: String,
    },
    /// Nothing is there.
    #[error("Sandpod is not installed in {prefix}")]
    NotInstalled {
        /// The prefix.
        prefix: PathBuf,
    },
    /// Something is not as it was installed.
    #[error("{path} {how}: install again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        how: &'static str,
    },
    /// The command line lacks something.
    #[error("{0}")]
    Usage(&'static str),
    /// A system call on a path failed.
    #[error("cannot {action} {path}: {source}")]
    Path {
        /// What was tried, such as "write".
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call without a path failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Two errors: one that had to be undone, and one while undoing it.
    #[error("{first}; putting back what was there before failed too: {then}")]
    NotUndone {
        /// What went wrong.
        first: Box<InstallError>,
        /// What went wrong after that.
        then: Box<InstallError>,
    },
}

impl InstallError {
    /// The kind of this error in the report.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NoKvm(_) => Code::NoKvm,
            Self::NotFit(_) | Self::DoesNotStart { .. } => Code::NotFit,
            Self::NoCri { .. } | Self::Silent { .. } | Self::UnknownLayout { .. } => Code::NoCri,
            Self::CriTooOld { .. } => Code::CriTooOld,
            Self::ForeignHandler { .. } | Self::HandlerPresent { .. } => Code::ForeignHandler,
            Self::ForeignFile { .. } | Self::UnsafeFolder { .. } => Code::ForeignFile,
            Self::OtherPrefix { .. } => Code::OtherPrefix,
            Self::NotImported { .. } => Code::DropInNotRead,
            Self::ConfigInvalid { .. } | Self::Unversioned { .. } | Self::WouldDiffer { .. } | Self::Differs { .. } => {
                Code::ConfigInvalid
            }
            Self::ReadOnlyPrefix { .. } => Code::ReadOnlyPrefix,
            Self::UnsafePrefix { .. } => Code::UnsafePrefix,
            Self::DiskFull { .. } => Code::DiskFull,
            Self::Label { .. } => Code::SeLinux,
            Self::Payload(_) => Code::Payload,
            Self::Busy => Code::Busy,
            Self::Restart { .. } | Self::NotReady { .. } => Code::RestartFailed,
            Self::HandlerAbsent { .. } | Self::HandlerLeftOut { .. } | Self::HandlerOfOthers { .. } => {
                Code::HandlerAbsent
            }
            Self::SandboxesExist { .. } | Self::InUse { .. } => Code::SandboxesExist,
            Self::OtherBoot { .. } => Code::OtherBoot,
            Self::NotInstalled { .. } => Code::NotInstalled,
            Self::Damaged { .. } => Code::Damaged,
            Self::Usage(_) => Code::Usage,
            Self::Path { source, .. } | Self::System { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::DiskFull,
                io::ErrorKind::ReadOnlyFilesystem => Code::ReadOnlyPrefix,
                _ => Code::Io,
            },
            Self::NotUndone { first, .. } => first.code(),
        }
    }

    /// What the report says of this error.
    #[must_use]
    pub fn problem(&self) -> Problem {
        Problem {
            code: self.code(),
            text: self.to_string(),
        }
    }
}

/// Says what was tried on which path when the kernel refuses it.
pub trait Context<T> {
    /// Names the operation and its path.
    ///
    /// # Errors
    /// The operation's own.
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;

    /// Names an operation without a path.
    ///
    /// # Errors
    /// The operation's own.
    fn action(self, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| InstallError::Path {
            action,
            path: path.as_ref().to_owned(),
            source: source.into(),
        })
    }

    fn action(self, action: &'static str) -> Result<T> {
        self.map_err(|source| InstallError::System {
            action,
            source: source.into(),
        })
    }
}
