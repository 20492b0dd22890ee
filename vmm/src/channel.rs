//! The stream to the agent.
//!
//! * virtio-serial: a socket pair, one end of which is the port in the guest. One stream for the VM's life; what is
//!   written early waits in the socket.
//! * vhost-vsock: the agent listens; we connect as soon as it has told us that it serves, or, for agents that do not
//!   know how to tell, as soon as a connection succeeds.

use std::{
    hash::{BuildHasher, RandomState},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use nix::errno::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::{
    args::ChannelFd,
    error::VmError,
    spec::{Channel, SpecError},
    sys,
};

/// The agent's port (Kata's `vsock://-1:1024`).
const AGENT_VSOCK_PORT: u32 = 1024;
/// VMADDR_PORT_ANY of <linux/vm_sockets.h>: the kernel picks a free port.
const ANY_PORT: u32 = u32::MAX;
/// How long to leave an agent alone that did not accept a connection.
const RETRY: Duration = Duration::from_millis(20);

/// A byte stream between the host and the agent.
#[derive(Debug)]
pub struct AgentStream(Kind);

#[derive(Debug)]
enum Kind {
    Unix(UnixStream),
    Vsock(VsockStream),
}

/// Our side of a VM's channel.
#[derive(Debug)]
pub(crate) enum Link {
    /// The stream, until it is taken.
    VirtioSerial(Mutex<Option<StdUnixStream>>),
    /// The guest's context id, and where it reports that it is ready, until it has.
    VhostVsock {
        cid: u32,
        ready: tokio::sync::Mutex<Option<VsockListener>>,
    },
}

/// A channel that is ready for QEMU.
pub(crate) struct Prepared {
    /// Our side.
    pub link: Link,
    /// What goes into QEMU's arguments.
    pub wiring: ChannelFd,
    /// The open file that the arguments speak of.
    pub inherit: OwnedFd,
}

impl Link {
    /// Makes the channel that `channel` describes; `vhost` is the open device if it has one.
    pub fn prepare(channel: &Channel, vhost: Option<OwnedFd>) -> Result<Prepared, VmError> {
        match (channel, vhost) {
            (Channel::VirtioSerial, _) => {
                let (ours, theirs) = StdUnixStream::pair().map_err(VmError::system("make the agent's socket pair"))?;
                let wiring = ChannelFd::VirtioSerial(theirs.as_raw_fd());
                Ok(Prepared {
                    link: Link::VirtioSerial(Mutex::new(Some(ours))),
                    wiring,
                    inherit: theirs.into(),
                })
            }
            (Channel::VhostVsock, None) => Err(VmError::Files {
                device: "vhost-vsock",
                devices: 1,
                files: 0,
            }),
            (Channel::VhostVsock, Some(vhost)) => {
                let cid = lease_cid(&vhost).map_err(VmError::system("lease a vsock context id"))?;
                let ready = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ANY_PORT));
                let ready = ready.map_err(VmError::system("listen on vsock"))?;
                let ready_port = ready.local_addr().map_err(VmError::system("listen on vsock"))?.port();
                let wiring = ChannelFd::VhostVsock {
                    fd: vhost.as_raw_fd(),
                    cid,
                    ready_port,
                };
                let link = Link::VhostVsock {
                    cid,
                    ready: tokio::sync::Mutex::new(Some(ready)),
                };
                Ok(Prepared {
                    link,
                    wiring,
                    inherit: vhost,
                })
            }
            (Channel::VhostUserVsock, _) => Err(SpecError::VhostUserVsock.into()),
        }
    }

    /// A stream to the agent.
    pub async fn open(&self, deadline: Duration) -> Result<AgentStream, VmError> {
        match self {
            Link::VirtioSerial(stream) => {
                let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
                let stream = taken.ok_or(VmError::StreamTaken)?;
                let action = "use the agent's socket pair";
                stream.set_nonblocking(true).map_err(VmError::system(action))?;
                Ok(AgentStream(Kind::Unix(
                    UnixStream::from_std(stream).map_err(VmError::system(action))?,
                )))
            }
            Link::VhostVsock { cid, ready } => {
                let connected = tokio::time::timeout(deadline, connect_vsock(*cid, ready)).await;
                Ok(AgentStream(Kind::Vsock(
                    connected.map_err(|_| VmError::Unreachable(deadline))?,
                )))
            }
        }
    }
}

/// Takes a random free context id; the kernel gives each to one open `/dev/vhost-vsock` only.
fn lease_cid(vhost: &OwnedFd) -> nix::Result<u32> {
    // 0 to 2 are the hypervisor, the local host and the host; the last is the wildcard.
    const CIDS: std::ops::Range<u32> = 3..u32::MAX;
    let random = RandomState::new();
    for attempt in 0..64 {
        let cid = CIDS.start + (random.hash_one(attempt) % u64::from(CIDS.end - CIDS.start)) as u32;
        match sys::vhost_vsock_set_guest_cid(vhost.as_fd(), cid.into()) {
            Err(Errno::EADDRINUSE) => {}
            done => return done.map(|()| cid),
        }
    }
    Err(Errno::EADDRINUSE)
}

/// Connects as soon as the agent has said that it is ready. One that does not speak up is tried every 20 ms.
async fn connect_vsock(cid: u32, ready: &tokio::sync::Mutex<Option<VsockListener>>) -> VsockStream {
    loop {
        if let Ok(stream) = VsockStream::connect(VsockAddr::new(cid, AGENT_VSOCK_PORT)).await {
            // Any guest of the node could fill the queue of what nobody accepts any more.
            *ready.lock().await = None;
            return stream;
        }
        let _either = tokio::time::timeout(RETRY, said_ready(cid, ready)).await;
    }
}

async fn said_ready(cid: u32, ready: &tokio::sync::Mutex<Option<VsockListener>>) {
    let ready = ready.lock().await;
    let Some(ready) = &*ready else {
        return std::future::pending().await;
    };
    loop {
        match std::future::poll_fn(|cx| ready.poll_accept(cx)).await {
            Ok((_, peer)) if peer.cid() == cid => return,
            // Some other guest has found the port.
            Ok(_) => {}
            Err(_) => return std::future::pending().await,
        }
    }
}

impl AsyncRead for AgentStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for AgentStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Kind::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Kind::Vsock(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Vsock(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
