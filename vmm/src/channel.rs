//! The stream to the agent.
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tokio_vsock::VsockStream;

/// A byte stream between host and agent.
#[derive(Debug)]
pub struct AgentStream(Kind);

#[derive(Debug)]
enum Kind {
    Unix(UnixStream),
    Vsock(VsockStream),
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
