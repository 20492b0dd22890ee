//! One error type for the shim, and the one table from errors to RPC status.

use std::path::PathBuf;

use containerd_shim_protos::ttrpc;
use ttrpc::Code;

/// What can go wrong while serving a pod. Each variant prints one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container or exec is not known; callers take it as "gone".
    #[error("{0} not found")]
    NotFound(String),
    /// The container or exec exists already.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The object is not in a state that allows the request.
    #[error("{0}")]
    Precondition(String),
    /// The request itself cannot be honoured; the sentence names the field.
    #[error("{0}")]
    Invalid(String),
    /// A verb that this runtime does not have.
    #[error("{0} is not supported by this runtime")]
    Unsupported(&'static str),
    /// The virtual machine has ended; the sentence says why.
    #[error("the virtual machine {0}")]
    VmGone(String),
    /// The guest did not come up; its console may say why.
    #[error("{error}; its console says: {line}")]
    Boot {
        /// What went wrong.
        error: Box<Error>,
        /// The line of the console that tells most.
        line: String,
    },
    /// A system call on a path failed.
    #[error("cannot {action} {path}: {source}")]
    Path {
        /// What was tried, such as "mount".
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Configuration refused.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The container's specification asks for something this runtime refuses.
    #[error(transparent)]
    Spec(#[from] crate::spec::SpecError),
    /// The CRI's annotations contradict themselves.
    #[error(transparent)]
    Annotation(#[from] crate::annotations::AnnotationError),
    /// The pod's network cannot be attached.
    #[error(transparent)]
    Net(#[from] crate::net::NetError),
    /// The host cgroup cannot be made or used.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
    /// The host's size cannot be told.
    #[error(transparent)]
    Host(#[from] crate::sizing::HostError),
    /// A device of the host cannot be had.
    #[error(transparent)]
    Vfio(#[from] crate::vfio::VfioError),
    /// The host's policy refused a program's label.
    #[error("{0}; `disable_selinux = true` in [hypervisor.qemu] starts it without one")]
    Label(vmm::VmError),
    /// The host's policy refused the label of the pod's files.
    #[error(
        "cannot mount {} with the SELinux label {label:?} of the pod's files: {source}; `disable_selinux = true` in \
         [hypervisor.qemu] does without one", path.display()
    )]
    FilesLabel {
        /// Where.
        path: PathBuf,
        /// Which label.
        label: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The virtual machine could not be resized for several requests at once.
    #[error(transparent)]
    Resize(std::sync::Arc<Error>),
    /// The virtual machine refused.
    #[error(transparent)]
    Vm(#[from] vmm::VmError),
    /// The guest agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] agent_protocol::client::ClientError),
    /// A message could not be read or written.
    #[error("cannot decode {what}: {source}")]
    Decode {
        /// Which message.
        what: &'static str,
        /// The decoder's words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Anything else that the system refused.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// The shim's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds what was tried, and where, to a system error.
pub trait Context<T> {
    /// Names the action.
    fn action(self, action: &'static str) -> Result<T>;
    /// Names the action and the path.
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn action(self, action: &'static str) -> Result<T> {
        self.map_err(|e| Error::Os {
            action,
            source: e.into(),
        })
    }

    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| Error::Path {
            action,
            path: path.into(),
            source: e.into(),
        })
    }
}

/// A decoder's error with the name of what was decoded.
pub fn decode<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Decode { what, source: e.into() }
}

impl Error {
    /// containerd maps these to gRPC codes; `UNIMPLEMENTED` on Create would make it retry with an older API, and
    /// "gone" must be `NOT_FOUND` or a pod can never be removed.
    fn code(&self) -> Code {
        match self {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::Precondition(_) | Error::VmGone(_) | Error::Vfio(_) => Code::FAILED_PRECONDITION,
            Error::Invalid(_) | Error::Config(_) | Error::Spec(_) | Error::Annotation(_) | Error::Decode { .. } => {
                Code::INVALID_ARGUMENT
            }
            Error::Unsupported(_) => Code::UNIMPLEMENTED,
            Error::Agent(agent_protocol::client::ClientError::NotFound(_)) => Code::NOT_FOUND,
            Error::Boot { error, .. } => error.code(),
            Error::Resize(error) => error.code(),
            _ => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
