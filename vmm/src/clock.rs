//! The frequency of the host's time stamp counter, measured without waiting for it.

use std::time::{Duration, Instant};

use crate::sys::time_stamp_counter;

/// The shortest span that tells the frequency to a ten-thousandth.
const SPAN: Duration = Duration::from_millis(2);

/// A moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    counter: u64,
    at: Instant,
}

impl Moment {
    /// Now. Of several readings the one that took least: another thread may get between the two clocks.
    pub fn now() -> Moment {
        let mut best = Moment::read();
        for _ in 0..4 {
            let next = Moment::read();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }

    fn read() -> (u64, Moment) {
        let before = time_stamp_counter();
        let at = Instant::now();
        let took = time_stamp_counter().saturating_sub(before);
        (
            took,
            Moment {
                counter: before + took / 2,
                at,
            },
        )
    }

    /// Frequency in kHz, from this moment to now. A caller that comes too early is held up for the rest of 2 ms.
    pub fn tsc_khz(self) -> u64 {
        while self.at.elapsed() < SPAN {
            std::hint::spin_loop();
        }
        let now = Moment::now();
        let nanoseconds = now.at.duration_since(self.at).as_nanos().max(1);
        let ticks = u128::from(now.counter.saturating_sub(self.counter));
        u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let first = Moment::now().tsc_khz();
        let second = Moment::now().tsc_khz();
        assert!(first > 500_000, "{first} kHz");
        assert!(
            first.abs_diff(second) * 1000 < first,
            "{first} and {second} kHz differ by more than a thousandth"
        );
    }
}
