//! The ways from the host to the agent: a virtio-serial port, and vsock.
//!
//! ```text
//! virtio-serial   the port "sandpod.agent": one stream for the life of the VM
//! vsock           port 1024: any number of connections, the host's only; then the host's ready port is told
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{FutureExt, Stream, StreamExt, stream};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::{read, write},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, Interest, ReadBuf, unix::AsyncFd},
    sync::{mpsc, watch},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::asynchronous::transport::Socket;

use super::{sys, uevent::Uevents};

/// What the host calls the port.
const PORT: &str = "sandpod.agent";
/// The port of the protocol (`src/agent/src/config.rs` of kata-containers).
const VSOCK_PORT: u32 = 1024;
/// What the kernel hands over at a time: a port's buffer is a page.
const PORT_BUFFER: usize = 4096;
/// Id of a virtio socket device (virtio 1.2, section 5).
const VIRTIO_VSOCK: &str = "virtio:d00000013";

/// Connections from the host, over all channels that are there or come. `ready_port` is the port of the host that is
/// told when vsock is served; `ready` becomes true when the guest is set up.
pub(super) fn connections(
    ready_port: Option<u32>,
    ready: watch::Receiver<bool>,
) -> impl Stream<Item = io::Result<Socket>> + Send + 'static {
    let (sender, receiver) = mpsc::channel(1);
    for (name, served) in [
        ("the virtio-serial port", serial(sender.clone()).boxed()),
        ("vsock", vsock(sender, ready_port, ready).boxed()),
    ] {
        tokio::spawn(async move {
            if let Err(error) = served.await {
                eprintln!("kata-agent: cannot serve {name}: {error}");
            }
        });
    }
    stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|socket| (Ok(socket), receiver))
    })
    // ttrpc lets go of its connections when the listener ends.
    .chain(stream::pending())
}

type Connections = mpsc::Sender<Socket>;

async fn serial(connections: Connections) -> io::Result<()> {
    let device = Uevents::until(find_port).await?;
    let port = open_port(&device)?;
    if !host_is_there(&port)? {
        let port = port.try_clone()?;
        tokio::task::spawn_blocking(move || wait_for_host(&port)).await??;
    }
    let port = BufReader::with_capacity(
        PORT_BUFFER,
        Port(sys::asynchronous(port.into(), Interest::READABLE | Interest::WRITABLE)?),
    );
    connections.send(Socket::new(port)).await.map_err(io::Error::other)
}

fn find_port() -> io::Result<Option<String>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(None); // the driver is not loaded yet
    };
    for port in ports {
        let port = port?;
        // A port gets its name after its folder.
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT {
            return Ok(Some(port.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn open_port(device: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open(Path::new("/dev").join(device))
}

/// Whether the host's end is open: the driver learns it just after the port's name.
fn host_is_there(port: &File) -> io::Result<bool> {
    let mut ports = [PollFd::new(port.as_fd(), PollFlags::POLLIN)];
    poll(&mut ports, PollTimeout::ZERO)?;
    Ok(!ports[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

/// Blocks until the host's end is open. Edge-triggered, because the hang-up is reported for as long as it lasts.
fn wait_for_host(port: &File) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll.add(port, EpollEvent::new(wanted, 0))?;
    while !host_is_there(port)? {
        epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE)?;
    }
    Ok(())
}

/// A virtio-serial port as a stream.
struct Port(AsyncFd<OwnedFd>);

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            if let Ok(count) = guard.try_io(|port| Ok(read(port, unfilled)?)) {
                buffer.advance(count?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(count) = guard.try_io(|port| Ok(write(port, data)?)) {
                return Poll::Ready(count);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn vsock(connections: Connections, ready_port: Option<u32>, mut ready: watch::Receiver<bool>) -> io::Result<()> {
    if ready_port.is_none() {
        // Nothing says that there is a device: looking for one does not delay the first answer over the other channel.
        // When nobody can say so any more, the agent is ending.
        let _ending = ready.wait_for(|ready| *ready).await;
    }
    Uevents::until(find_vsock).await?;
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT))?;
    if let Some(port) = ready_port {
        // The connection is the message. A host that does not hear it tries by itself.
        if let Err(error) = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await {
            eprintln!("kata-agent: cannot tell the host's port {port} that the agent serves: {error}");
        }
    }
    let incoming = stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await;
        Some((accepted, listener))
    });
    accept(incoming, &connections).await
}

/// How long to wait after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Hands on the connections that the host has made. Others are closed: where the kernel has the loopback transport,
/// every process of a container could connect to the guest's own CID, and who speaks to the agent is the guest's root.
async fn accept<S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static>(
    incoming: impl Stream<Item = io::Result<(S, VsockAddr)>>,
    connections: &Connections,
) -> io::Result<()> {
    let mut incoming = pin!(incoming);
    let mut told = false;
    while let Some(accepted) = incoming.next().await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            // Its client has gone already, or there are too many open files for now: no reason not to take others.
            Err(error) => {
                eprintln!("kata-agent: a connection cannot be accepted: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if peer.cid() == VMADDR_CID_HOST {
            connections.send(Socket::new(stream)).await.map_err(io::Error::other)?;
        } else if !told {
            // Once: whoever tries could fill the console.
            told = true;
            eprintln!(
                "kata-agent: a connection from inside the guest (CID {}) is refused",
                peer.cid()
            );
        }
    }
    Ok(())
}

fn find_vsock() -> io::Result<Option<()>> {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else {
        return Ok(None); // the driver is not loaded yet
    };
    let is_vsock = |device: fs::DirEntry| {
        let alias = fs::read_to_string(device.path().join("modalias")).unwrap_or_default();
        // The device is there before its driver.
        alias.starts_with(VIRTIO_VSOCK) && device.path().join("driver").exists()
    };
    Ok(devices.flatten().any(is_vsock).then_some(()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio_vsock::{VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL};

    use super::*;

    #[tokio::test]
    async fn over_vsock_the_agent_speaks_to_nobody_but_the_host() {
        // The guest's own CID, and the one that means "this machine", are what the loopback transport answers to.
        let own = 1234;
        let others = [own, VMADDR_CID_LOCAL, VMADDR_CID_HYPERVISOR, VMADDR_CID_ANY];
        let failed = io::Error::from_raw_os_error(libc::ECONNABORTED);
        let (mut incoming, mut clients) = (vec![Err(failed)], Vec::new());
        for cid in others.into_iter().chain([VMADDR_CID_HOST]) {
            let (client, server) = duplex(64);
            clients.push(client);
            incoming.push(Ok((server, VsockAddr::new(cid, 5000))));
        }
        let (sender, mut receiver) = mpsc::channel(8);
        accept(stream::iter(incoming), &sender).await.unwrap();
        drop(sender);
        let mut host = clients.pop().unwrap();
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "a connection that is closed");
        }
        let mut served = receiver.recv().await.unwrap();
        host.write_all(b"a question").await.unwrap();
        let mut heard = [0; 10];
        served.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"a question");
        assert!(receiver.recv().await.is_none(), "another connection is served");
    }
}
