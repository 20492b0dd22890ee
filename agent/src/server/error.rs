//! Errors of the services, and the one table that turns them into statuses.

use std::io;

use agent_protocol::oci::OciError;
use ttrpc::Code;

use crate::engine::EngineError;

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host named a container that is not there.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// The host named a process that is not there, or has ended.
    #[error("process {exec:?} of container {container:?} does not exist")]
    NoProcess {
        /// Container id.
        container: String,
        /// Its exec_id.
        exec: String,
    },
    /// The host sent something that cannot be meant.
    #[error("{0}")]
    Invalid(String),
    /// A part of the protocol that is not implemented.
    #[error("{0} is not implemented by this agent")]
    Unimplemented(String),
    /// The host named a volume that is not there.
    #[error("there is no volume at {0:?}")]
    NoVolume(String),
    /// A part of the protocol that takes a program which the guest's image has not.
    #[error("the guest image has no {0}")]
    NoProgram(&'static str),
    /// The guest's kernel refused.
    #[error("cannot {0}: {1}")]
    Io(String, #[source] io::Error),
    /// The time that the host granted is over.
    #[error("{0} took longer than allowed")]
    Late(String),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A specification that cannot be read.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A defect of the agent.
    #[error("the agent panicked: {0}")]
    Panic(String),
    /// Somebody has killed the engine's helper process, or it has a defect: its exit code, or 128 and a signal.
    #[error("the container engine's helper process has ended with {0}, and so does the guest")]
    Helper(i32),
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn code(&self) -> Code {
        match self {
            Error::NoProcess { .. } | Error::NoVolume(_) => Code::NOT_FOUND,
            // What upstream's agent says, and its shims rely on (its `rpc.rs`, the mapping of sandbox errors).
            Error::NoContainer(_) | Error::Engine(EngineError::NotFound(_)) => Code::INVALID_ARGUMENT,
            Error::Invalid(_) | Error::Oci(_) => Code::INVALID_ARGUMENT,
            Error::Unimplemented(_) | Error::NoProgram(_) => Code::UNIMPLEMENTED,
            Error::Io(..) | Error::Engine(_) | Error::Panic(_) | Error::Helper(_) => Code::INTERNAL,
            Error::Late(_) => Code::DEADLINE_EXCEEDED,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// Says what was tried when the kernel refused.
pub(super) trait Doing<T> {
    /// `what` completes "cannot …".
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io(what(), error))
    }
}

impl<T> Doing<T> for nix::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io(what(), error.into()))
    }
}

impl<T> Doing<T> for std::result::Result<T, rtnetlink::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| match error {
            rtnetlink::Error::NetlinkError(refusal) => Error::Io(what(), refusal.to_io()),
            other => Error::Io(what(), io::Error::other(other)),
        })
    }
}
