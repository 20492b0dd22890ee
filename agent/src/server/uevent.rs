//! What the kernel tells of devices as they come.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::io::Interest;

use super::{namespaces::in_guest_network, sys};

/// The kernel's own group; what comes there is for everyone.
const KERNEL_GROUP: u32 = 1;

/// A queue of device events from its making on. What they say is not read: they are the time to look again.
#[derive(Debug)]
pub(super) struct Uevents(OwnedFd);

impl Uevents {
    /// Starts listening.
    pub(super) fn listen() -> io::Result<Uevents> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockProtocol::NetlinkKObjectUEvent;
        in_guest_network(|| {
            let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, kind)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
            Ok(Uevents(socket))
        })
    }

    /// Waits for `found` to find something, looking again at each event.
    pub(super) async fn until<T>(mut found: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
        // Mostly it is there.
        if let Some(value) = found()? {
            return Ok(value);
        }
        let queue = sys::asynchronous(Uevents::listen()?.0, Interest::READABLE)?;
        loop {
            if let Some(value) = found()? {
                return Ok(value);
            }
            queue.readable().await?.clear_ready();
            drain(queue.get_ref());
        }
    }

    /// Blocks until `found` is true, at most until `deadline`; whether it was.
    pub(super) fn block_until(
        &self,
        deadline: Instant,
        mut found: impl FnMut() -> io::Result<bool>,
    ) -> io::Result<bool> {
        loop {
            if found()? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Ok(false);
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => drain(&self.0),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn drain(queue: &OwnedFd) {
    let mut event = [0; 8192];
    // A queue that overflowed has lost events, but the time to look is now all the same.
    while matches!(
        recv(queue.as_raw_fd(), &mut event, MsgFlags::empty()),
        Ok(_) | Err(Errno::ENOBUFS)
    ) {}
}
