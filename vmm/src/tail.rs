//! The last words of a process or a guest.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    sync::watch,
};

/// How much is kept.
const KEPT: usize = 64 * 1024;

/// Keeps the last 64 KiB of a stream. It reads all the time, so the writer never waits.
#[derive(Debug)]
pub(crate) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    ended: watch::Receiver<()>,
}

impl Tail {
    /// Follows `stream` to its end.
    pub fn follow(stream: impl AsyncRead + Unpin + Send + 'static) -> Tail {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        // The sender is dropped with the task.
        let (alive, ended) = watch::channel(());
        let into = kept.clone();
        tokio::spawn(async move {
            drain(stream, &into).await;
            drop(alive);
        });
        Tail { kept, ended }
    }

    /// A pipe: its tail, and the end to write to.
    pub fn pipe() -> io::Result<(Tail, OwnedFd)> {
        let (writer, reader) = pipe::pipe()?;
        // The far side is a program that expects its standard error to block.
        Ok((Tail::follow(reader), writer.into_blocking_fd()?))
    }

    /// What was written last, as text.
    pub fn text(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of a writer that is dead. What it wrote before is in the pipe, and is waited for; a second at most,
    /// because a process of its own may hold the pipe open.
    pub async fn last_words(&self) -> String {
        let mut ended = self.ended.clone();
        let _still_open = tokio::time::timeout(Duration::from_secs(1), ended.changed()).await;
        self.text()
    }
}

async fn drain(mut stream: impl AsyncRead + Unpin, into: &Mutex<VecDeque<u8>>) {
    let mut chunk = vec![0; 4096];
    loop {
        let read = match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
        let excess = (kept.len() + read).saturating_sub(KEPT);
        kept.drain(..excess);
        kept.extend(&chunk[..read]);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn keeps_the_end_of_a_long_story() {
        let (mut writer, reader) = tokio::io::duplex(1024);
        let tail = Tail::follow(reader);
        for line in 0..20_000 {
            writer.write_all(format!("line {line}\n").as_bytes()).await.unwrap();
        }
        drop(writer);
        let text = tail.last_words().await;
        assert_eq!(text.len(), KEPT);
        assert!(text.ends_with("line 19998\nline 19999\n"));
    }
}
