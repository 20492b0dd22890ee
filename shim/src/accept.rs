//! Connections that come to a socket.

use std::{future::Future, io, time::Duration};

/// How long to wait after a failure: what was the cause may need as long to end.
const PAUSE: Duration = Duration::from_millis(100);

/// The next connection. One that cannot be had is no reason not to take others: its client has gone already, or this
/// process has too many files open for now (accept(2)).
pub async fn next<C, F: Future<Output = io::Result<C>>>(mut accept: impl FnMut() -> F) -> C {
    loop {
        match accept().await {
            Ok(connection) => return connection,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_cannot_be_had_is_not_the_last() {
        let mut answers = vec![Ok(7), Err(io::Error::other("too many open files"))];
        assert_eq!(next(|| std::future::ready(answers.pop().unwrap())).await, 7);
    }
}
