//! The one place that waits for what nobody announces.
//!
//! Most waits of the harness are on events: the end of a process, a line of a log, an event of containerd. Some states
//! have no event: that a pod's last mount is gone, or that the CRI has taken note of an exit that it was told of. Those
//! are asked for again whenever containerd says that something happened, and otherwise at a fixed pace, up to a
//! deadline.

use std::{
    env,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::failure::{Failure, Result};

/// The variable with the number by which deadlines are multiplied where everything is slower, as in an emulated node.
pub const SLOWNESS: &str = "SANDPOD_SLOWNESS";

/// A deadline for the place where this program runs.
#[must_use]
pub fn patient(deadline: Duration) -> Duration {
    let slowness = env::var(SLOWNESS).ok().and_then(|number| number.parse().ok());
    deadline * slowness.unwrap_or(1)
}

/// How soon an unannounced change is noticed.
const PACE: Duration = Duration::from_millis(50);

/// Rings when something may have changed.
#[derive(Debug, Default)]
pub struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    /// Wakes everyone who waits.
    pub fn ring(&self) {
        *self.rings() += 1;
        self.rung.notify_all();
    }

    fn rings(&self) -> MutexGuard<'_, u64> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `look` until it answers with a value, at each ring and at the pace of this module.
    ///
    /// `look` returns `Err(what it saw instead)` to be asked again.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with the last thing seen.
    pub fn until<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut look: impl FnMut() -> std::result::Result<T, String>,
    ) -> Result<T> {
        let start = Instant::now();
        let deadline = patient(deadline);
        loop {
            let heard = *self.rings();
            let seen = match look() {
                Ok(value) => return Ok(value),
                Err(seen) => seen,
            };
            if start.elapsed() >= deadline {
                return Err(Failure::Deadline {
                    what: what.into(),
                    deadline,
                    detail: format!("; last seen: {seen}"),
                });
            }
            let silent = |rings: &mut u64| *rings == heard;
            // Both a ring and the end of the pause mean the same: look again.
            drop(self.rung.wait_timeout_while(self.rings(), PACE, silent));
        }
    }
}
