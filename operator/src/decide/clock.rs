//! The time of a decision. It remembers what it was asked for, so that the decision knows when it would come out
//! otherwise.

use std::cell::Cell;

use jiff::{SignedDuration, Timestamp};

#[derive(Debug)]
pub(super) struct Clock {
    now: Timestamp,
    wake: Cell<Option<Timestamp>>,
}

impl Clock {
    pub(super) fn new(now: Timestamp) -> Clock {
        Clock {
            now,
            wake: Cell::new(None),
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.now
    }

    /// Whether this long after then is now or before. If not, the decision has to be made anew at that time.
    pub(super) fn passed(&self, then: Timestamp, later: SignedDuration) -> bool {
        let when = after(then, later);
        if when <= self.now {
            return true;
        }
        self.wake.set(Some(self.wake.get().map_or(when, |wake| wake.min(when))));
        false
    }

    pub(super) fn wake(&self) -> Option<Timestamp> {
        self.wake.get()
    }
}

/// A time later; the last there is, where it would be after that.
pub(super) fn after(then: Timestamp, later: SignedDuration) -> Timestamp {
    then.checked_add(later).unwrap_or(Timestamp::MAX)
}
