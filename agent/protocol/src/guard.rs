//! What a stream from a guest may hold, checked before ttrpc reads it.
//!
//! ```text
//! ┌ length (4) ┬ stream (4) ┬ type (1) ┬ flags (1) ┬ length bytes ┐   numbers big-endian: PROTOCOL.md of containerd/ttrpc
//! ```
//!
//! ttrpc takes frames of up to 4 MiB, and a message of two bytes in one becomes a structure of a hundred in memory; it
//! keeps the books of a call for ever when the answer is a frame of a streaming call. A guest could use either to fill
//! the memory of whoever talks to it. And whoever waits for a frame gets to run before the next is read, so that large
//! answers do not add up.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

use crate::client::LONGEST_READ;

/// The longest frame taken, in bytes: the longest data that is asked for, and what is around it. Other answers have
/// some kilobytes.
const LONGEST_FRAME: u32 = LONGEST_READ + (4 << 10);

/// A stream that fails when its other end breaks the protocol.
pub(crate) struct Guard<S> {
    stream: S,
    place: Place,
    /// A frame has just ended.
    pause: bool,
}

/// Where in a frame the reader is.
enum Place {
    /// So many bytes of the header are there.
    Header([u8; MESSAGE_HEADER_LENGTH], usize),
    /// So many bytes of the body are missing.
    Body(usize),
}

const BEGIN: Place = Place::Header([0; MESSAGE_HEADER_LENGTH], 0);

impl<S> Guard<S> {
    pub(crate) fn new(stream: S) -> Guard<S> {
        Guard {
            stream,
            place: BEGIN,
            pause: false,
        }
    }

    /// Follows the frames through what has just been read.
    fn check(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match &mut self.place {
                Place::Header(header, have) => {
                    let count = data.len().min(MESSAGE_HEADER_LENGTH - *have);
                    header[*have..*have + count].copy_from_slice(&data[..count]);
                    *have += count;
                    data = &data[count..];
                    if *have == MESSAGE_HEADER_LENGTH {
                        self.place = Place::Body(body(&MessageHeader::from(*header))?);
                    }
                }
                Place::Body(left) => {
                    let count = data.len().min(*left);
                    *left -= count;
                    data = &data[count..];
                }
            }
            if let Place::Body(0) = self.place {
                self.place = BEGIN;
                self.pause = true;
            }
        }
        Ok(())
    }
}

/// The length of a body that may follow this header.
fn body(header: &MessageHeader) -> io::Result<usize> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    if header.type_ != MESSAGE_TYPE_RESPONSE {
        return refused(format!("a frame of type {} answers no call", header.type_));
    }
    if header.length > LONGEST_FRAME {
        return refused(format!(
            "a frame of {} bytes; the longest answer has {LONGEST_FRAME}",
            header.length
        ));
    }
    Ok(header.length as usize)
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.pause) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        Poll::Ready(self.check(&buffer.filled()[before..]).inspect_err(|error| {
            tracing::error!(%error, "the guest's agent has broken the protocol: its connection is closed");
        }))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn frame(length: u32, kind: u8) -> Vec<u8> {
        let header = MessageHeader {
            length,
            stream_id: 1,
            type_: kind,
            flags: 0,
        };
        [Vec::from(header), vec![7; length as usize]].concat()
    }

    /// What comes through, piece by piece.
    fn through(said: &[u8], piece: usize) -> io::Result<Vec<u8>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut guard = Guard::new(said);
            let mut heard = Vec::new();
            loop {
                let mut buffer = vec![0; piece];
                match guard.read(&mut buffer).await? {
                    0 => return Ok(heard),
                    count => heard.extend(&buffer[..count]),
                }
            }
        })
    }

    #[test]
    fn a_frame_of_a_stream_or_of_too_many_bytes_is_the_end() {
        let good = [
            frame(0, MESSAGE_TYPE_RESPONSE),
            frame(LONGEST_FRAME, MESSAGE_TYPE_RESPONSE),
        ]
        .concat();
        for (bad, why) in [
            (frame(0, ttrpc::proto::MESSAGE_TYPE_DATA), "type 3"),
            (frame(0, 0), "type 0"),
            (frame(LONGEST_FRAME + 1, MESSAGE_TYPE_RESPONSE), "the longest answer"),
        ] {
            for piece in [1, 9, 4096] {
                assert_eq!(through(&good, piece).unwrap(), good);
                let error = through(&[&good[..], &bad].concat(), piece).unwrap_err();
                assert!(error.to_string().contains(why), "{error}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_let_through_is_what_was_said(said in prop::collection::vec(any::<u8>(), 0..64), piece in 1usize..20) {
            if let Ok(heard) = through(&said, piece) {
                prop_assert_eq!(heard, said);
            }
        }
    }
}
