//! Carries connections to the pod's loopback on the host to the guest's: the host's half of `kubectl port-forward`.

use std::{io, sync::Arc};

use agent_protocol::{
    client::{Client, ClientError},
    protocol::relay::{DialRequest, HangUpRequest, ReceiveRequest, SendRequest},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Semaphore,
};
use vmm::Vm;

use crate::{accept, net::Loopback};

/// Bytes per request.
const CHUNK: usize = 64 << 10;
/// Connections at a time; a guest that answers nothing keeps each for ever. Further ones wait to be accepted.
const MOST_CONNECTIONS: usize = 64;

/// Serves the loopback until the VM ends. Must be called in the runtime.
pub fn serve(loopback: Loopback, agent: Client, vm: Arc<Vm>) {
    tokio::spawn(async move {
        let Loopback { listener, attached } = loopback;
        tokio::select! {
            _ = vm.child().exited() => {}
            Err(error) = accept(listener, agent) => tracing::warn!(%error, "ports are not forwarded any more"),
        }
        drop(attached);
    });
}

async fn accept(listener: std::net::TcpListener, agent: Client) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
        let (mut stream, _) = accept::next(|| listener.accept()).await;
        let agent = agent.clone();
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = carry(&mut stream, &agent).await {
                tracing::debug!(%error, "a forwarded connection ended early");
                // The client is to see that, and not an orderly end.
                let _ = stream.set_zero_linger();
            }
        });
    }
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the client: {0}")]
    Client(#[from] io::Error),
    #[error("the guest: {0}")]
    Guest(#[from] ClientError),
}

async fn carry(stream: &mut TcpStream, agent: &Client) -> Result<(), Broken> {
    let mut request = DialRequest::new();
    // The listener has every port: the client's is the address that it wanted.
    request.port = stream.local_addr()?.port().into();
    let connection = agent.dial(request).await?.connection;
    let (from_client, to_client) = stream.split();
    let carried = tokio::try_join!(
        carry_in(from_client, agent, connection),
        carry_out(to_client, agent, connection),
    );
    let mut request = HangUpRequest::new();
    request.connection = connection;
    agent.hang_up(request).await?;
    carried.map(drop)
}

async fn carry_in(mut client: ReadHalf<'_>, agent: &Client, connection: u64) -> Result<(), Broken> {
    loop {
        let mut request = SendRequest::new();
        request.connection = connection;
        request.data = Vec::with_capacity(CHUNK);
        let count = client.read_buf(&mut request.data).await?;
        agent.send(request).await?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn carry_out(mut client: WriteHalf<'_>, agent: &Client, connection: u64) -> Result<(), Broken> {
    loop {
        let mut request = ReceiveRequest::new();
        request.connection = connection;
        let data = agent.receive(request).await?.data;
        if data.is_empty() {
            return Ok(client.shutdown().await?);
        }
        client.write_all(&data).await?;
    }
}
