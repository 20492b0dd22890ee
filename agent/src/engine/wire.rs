//! What PID 1 and the zygote say to each other.
//!
//! A request is one byte on a `SOCK_SEQPACKET` socket that carries descriptors: a socket for the answer, a memfd
//! with the [`Request`] as JSON, then the process's standard streams. A memfd, because a specification may
//! exceed the largest packet. An answer is one packet with an [`Answer`] as JSON and its descriptors.

use std::{
    fs::File,
    io::{self, BufWriter, IoSlice, Read, Seek, Write},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair},
};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

use super::{Stdio, sys};

/// Bytes of JSON in a request; a specification of the largest pod (5,000 services' variables) has 1 MiB.
const MAX_REQUEST: u64 = 16 << 20;
/// Bytes of JSON in an answer.
pub(super) const MAX_ANSWER: usize = 16 << 10;
/// Characters of an error in an answer; JSON may need six bytes for one.
pub(super) const MAX_TEXT: usize = 2_500;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Descriptors: streams.
    Create {
        id: String,
        notify: PathBuf,
        spec: Box<Spec>,
        streams: Streams,
    },
    /// Descriptors: streams.
    Exec {
        id: String,
        init: i32,
        notify: PathBuf,
        process: Box<Process>,
        streams: Streams,
    },
    Update {
        id: String,
        resources: Box<LinuxResources>,
    },
    Hooks {
        id: String,
        init: i32,
        stage: Stage,
    },
    /// A process that only leads a PID namespace.
    Pause {
        /// Whose the namespace is.
        user: Option<PathBuf>,
    },
    /// The container is gone; the answer is empty.
    Forget {
        id: String,
    },
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Stage {
    Poststart,
    Poststop,
}

/// Which descriptors of a request are standard streams.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Streams {
    Pipes { stdin: bool },
    Terminal,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Descriptors for a created container: pidfd, exec status (see `executor`), terminal if any.
    /// For an exec: terminal if any.
    Started {
        pid: i32,
    },
    Done,
    Failed(String),
}

/// A connected pair of packet sockets, closed on exec.
pub(super) fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Splits streams into their description and their descriptors.
pub(super) fn split(stdio: Stdio) -> (Streams, Vec<OwnedFd>) {
    match stdio {
        Stdio::Terminal => (Streams::Terminal, Vec::new()),
        Stdio::Pipes { stdin, stdout, stderr } => {
            let streams = Streams::Pipes { stdin: stdin.is_some() };
            (streams, stdin.into_iter().chain([stdout, stderr]).collect())
        }
    }
}

/// Reverses [`split`]; `None` if the descriptors do not fit the description.
pub(super) fn join(streams: Streams, fds: Vec<OwnedFd>) -> Option<Stdio> {
    let mut fds = fds.into_iter();
    let stdio = match streams {
        Streams::Terminal => Stdio::Terminal,
        Streams::Pipes { stdin } => Stdio::Pipes {
            stdin: if stdin { Some(fds.next()?) } else { None },
            stdout: fds.next()?,
            stderr: fds.next()?,
        },
    };
    fds.next().is_none().then_some(stdio)
}

/// Sends a request; the answer comes to the other end of `answer`.
///
/// Blocks when the zygote's queue (some hundred requests) is full, which drains as fast as it can fork.
pub(super) fn send_request(
    zygote: BorrowedFd<'_>,
    request: &Request,
    answer: &OwnedFd,
    streams: &[OwnedFd],
) -> io::Result<()> {
    let body = File::from(memfd_create("request", MFdFlags::MFD_CLOEXEC)?);
    let mut writer = BufWriter::with_capacity(64 << 10, &body);
    serde_json::to_writer(&mut writer, request)?;
    writer.flush()?;
    drop(writer);
    let fds: Vec<_> = [answer.as_raw_fd(), body.as_raw_fd()]
        .into_iter()
        .chain(streams.iter().map(AsRawFd::as_raw_fd))
        .collect();
    Ok(send(zygote, b"r", &fds)?)
}

/// Waits for a request; `None` when PID 1 is gone.
pub(super) fn receive_request(socket: BorrowedFd<'_>) -> io::Result<Option<(OwnedFd, File, Vec<OwnedFd>)>> {
    let (bytes, fds) = sys::receive(socket, &mut [0; 1])?;
    if bytes == 0 {
        return Ok(None);
    }
    let mut fds = fds.into_iter();
    let (Some(answer), Some(body)) = (fds.next(), fds.next()) else {
        return Err(io::Error::other("a request came without its descriptors"));
    };
    Ok(Some((answer, File::from(body), fds.collect())))
}

/// Reads the body of a request.
pub(super) fn parse_request(mut body: File) -> io::Result<Request> {
    let len = body.metadata()?.len();
    if len > MAX_REQUEST {
        return Err(io::Error::other(format!(
            "the request has {len} bytes, more than {MAX_REQUEST}"
        )));
    }
    let mut json = Vec::with_capacity(len as usize);
    body.rewind()?;
    body.read_to_end(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

/// Sends an answer and its descriptors.
pub(super) fn send_answer(socket: BorrowedFd<'_>, answer: &Answer, fds: &[OwnedFd]) -> io::Result<()> {
    let json = serde_json::to_vec(answer)?;
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    Ok(send(socket, &json, &fds)?)
}

fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[i32]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(data)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}
