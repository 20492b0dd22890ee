//! What can go wrong in a story, one sentence each.

use std::{fmt::Debug, time::Duration};

/// A story's result: `Ok` when everything it claims was seen.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// Why a story (or the harness below it) failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something the harness needs is not on this machine.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// The thing.
        what: String,
        /// How to get it.
        remedy: String,
    },
    /// A program ended unsuccessfully.
    #[error("`{command}` ended with {status}: {output}")]
    Command {
        /// The command line.
        command: String,
        /// "code 1", "a signal".
        status: String,
        /// The last of what it printed.
        output: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {deadline:?}{detail}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        deadline: Duration,
        /// What was seen instead, empty or starting with "; ".
        detail: String,
    },
    /// Something was not as claimed.
    #[error("{0}")]
    Claim(String),
    /// The node is not as it was before.
    #[error("left behind: {}", .0.join(" | "))]
    LeftBehind(Vec<String>),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A peer answered with something that is not the JSON it promises.
    #[error("{what} is not the expected JSON: {source}")]
    Json {
        /// Whose answer.
        what: String,
        /// What the parser said.
        source: serde_json::Error,
    },
}

/// Names what was tried when an I/O operation fails.
pub trait Trying<T> {
    /// Turns the error into a [`Failure::Io`] that says what was tried.
    ///
    /// # Errors
    /// The operation's own.
    fn trying(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Trying<T> for std::result::Result<T, E> {
    fn trying(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|error| Failure::Io {
            what: what.into(),
            source: error.into(),
        })
    }
}

/// Fails with `claim` unless `holds`.
///
/// # Errors
/// [`Failure::Claim`] when it does not hold.
pub fn claim(holds: bool, claim: impl Into<String>) -> Result {
    if holds {
        Ok(())
    } else {
        Err(Failure::Claim(claim.into()))
    }
}

/// Fails unless `got` equals `want`, saying both.
///
/// # Errors
/// [`Failure::Claim`] when they differ.
#[expect(
    clippy::needless_pass_by_value,
    reason = "claims read better without references, and their values are small"
)]
pub fn same<T: PartialEq<U> + Debug, U: Debug>(what: &str, got: T, want: U) -> Result {
    claim(got == want, format!("{what}: expected {want:?}, got {got:?}"))
}

/// Fails unless `text` contains `part`, saying both.
///
/// # Errors
/// [`Failure::Claim`] when it does not.
pub fn contains(what: &str, text: &str, part: &str) -> Result {
    claim(text.contains(part), format!("{what}: expected {part:?} in {text:?}"))
}
