//! Connections of the host's to what listens on the guest's loopback: the guest's half of `kubectl port-forward`.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::{io::Interest, net::TcpStream};

use super::error::{Doing, Error, Result};

/// Bytes per answer.
const CHUNK: usize = 64 << 10;

/// The open connections.
#[derive(Debug, Default)]
pub(super) struct Relay(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    last: u64,
    open: HashMap<u64, Arc<TcpStream>>,
}

impl Relay {
    /// Connects to a port of the guest's loopback, of IPv4 or else of IPv6, and names the connection.
    pub(super) async fn dial(&self, port: u32) -> Result<u64> {
        let port = u16::try_from(port).map_err(|_| Error::Invalid(format!("{port} is no TCP port")))?;
        let addresses = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
        ];
        let stream = TcpStream::connect(&addresses[..])
            .await
            .doing(|| format!("connect to port {port} of the guest's loopback"))?;
        let mut connections = self.lock();
        connections.last += 1;
        let name = connections.last;
        connections.open.insert(name, Arc::new(stream));
        Ok(name)
    }

    /// Waits for data; no data is the end.
    pub(super) async fn receive(&self, connection: u64) -> Result<Vec<u8>> {
        let stream = self.get(connection)?;
        let read = || {
            let mut data = Vec::with_capacity(CHUNK);
            stream.try_read_buf(&mut data)?;
            Ok(data)
        };
        let data = stream.async_io(Interest::READABLE, read).await;
        data.doing(|| format!("read from connection {connection}"))
    }

    /// Sends all of the data; no data ends this direction.
    pub(super) async fn send(&self, connection: u64, data: &[u8]) -> Result<()> {
        let stream = self.get(connection)?;
        if data.is_empty() {
            return shutdown(stream.as_raw_fd(), Shutdown::Write)
                .doing(|| format!("end what connection {connection} sends"));
        }
        let mut sent = 0;
        while sent < data.len() {
            let write = stream.async_io(Interest::WRITABLE, || stream.try_write(&data[sent..]));
            sent += write.await.doing(|| format!("write to connection {connection}"))?;
        }
        Ok(())
    }

    /// Forgets a connection; whoever waits on it sees its end.
    pub(super) fn hang_up(&self, connection: u64) {
        if let Some(stream) = self.lock().open.remove(&connection) {
            // A peer that has hung up already is no failure.
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
    }

    fn get(&self, connection: u64) -> Result<Arc<TcpStream>> {
        let stream = self.lock().open.get(&connection).cloned();
        stream.ok_or_else(|| Error::Invalid(format!("connection {connection} does not exist")))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
