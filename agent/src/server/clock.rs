//! The guest's clock, kept by the host's.
//!
//! ```text
//! /dev/ptp<n> of ptp_kvm ──every 32 s──▶ offset ──▶ step, or slew      (the guest has KVM's clock)
//! SetGuestDateTime of the host ────────▶ offset ──▶ step, or slew      (it has not)
//! ```
//!
//! kvmclock begins right and then follows the host's raw clock: what NTP corrects on the host does not reach the guest,
//! and neither does a pause of the whole host. An emulated guest begins with the second of an RTC.

use std::{
    fs::{self, File},
    io,
    path::Path,
    time::Duration,
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

use super::sys;

/// How often the offset is measured: the shortest time in which the kernel's loop takes all of a correction as one (see
/// [`sys::slew`]).
const PERIOD: Duration = Duration::from_secs(32);
/// From here on the clock is set. Below, the kernel can slew it without a jump for programs to see.
const STEP: i64 = 500_000_000;
/// Up to here an offset says something of the clock's frequency.
const DRIFT: i64 = 10_000_000;
/// Of so many readings of the host's clock the best counts.
pub(super) const SAMPLES: usize = 5;
/// The name of the host's clock (`drivers/ptp/ptp_kvm_common.c` of Linux).
const KVM_CLOCK: &str = "KVM virtual PTP";

/// What is done about an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Correction {
    /// The clock is set.
    Step,
    /// The clock is made faster or slower until the offset, in nanoseconds, is gone.
    Slew {
        offset: i64,
        /// The frequency is corrected too.
        learn: bool,
    },
}

/// What to do about an offset in nanoseconds: the right time, less the clock's. The offset of a `clock` that is read
/// from the host's is exact enough to tell how fast the guest's is.
pub(super) fn correction(offset: i128, clock: bool) -> Correction {
    match i64::try_from(offset) {
        Ok(offset) if (-STEP..=STEP).contains(&offset) => Correction::Slew {
            offset,
            learn: clock && (-DRIFT..=DRIFT).contains(&offset),
        },
        _ => Correction::Step,
    }
}

/// The offset in nanoseconds by readings in turn of the guest's clock, the host's, the guest's and so on: the two of
/// the guest's that are closest together are the most exact. `None` if there are too few.
fn best_offset(readings: &[i64]) -> Option<i64> {
    let samples = readings.windows(3).step_by(2);
    let best = samples.min_by_key(|sample| (sample[2].saturating_sub(sample[0])).unsigned_abs())?;
    let middle = best[0].saturating_add(best[2].saturating_sub(best[0]) / 2);
    Some(best[1].saturating_sub(middle))
}

/// The host's clock, where KVM offers it.
fn host_clock() -> Option<File> {
    let clocks = fs::read_dir("/sys/class/ptp").ok()?;
    let is_hosts = |clock: &fs::DirEntry| {
        fs::read_to_string(clock.path().join("clock_name")).is_ok_and(|name| name.trim_end() == KVM_CLOCK)
    };
    let clock = clocks.flatten().find(is_hosts)?;
    File::open(Path::new("/dev").join(clock.file_name())).ok()
}

/// Whether [`keep`] can do its work.
pub(super) fn is_kept() -> bool {
    host_clock().is_some_and(|clock| measure(&clock).is_ok())
}

/// Keeps the guest's clock, as long as the guest runs, where the host's can be read.
pub(super) async fn keep() {
    let Some(clock) = host_clock() else { return };
    // There is no program yet that would see a jump: the guest has counted ticks while it booted, and may have missed
    // some.
    let mut act: fn(i128) -> io::Result<()> = step;
    let mut failed = false;
    loop {
        let kept = measure(&clock).and_then(|offset| act(i128::from(offset)));
        act = correct;
        if let Err(error) = &kept
            && !failed
        {
            eprintln!("kata-agent: the clock is not kept by the host's: {error}");
        }
        failed = kept.is_err();
        tokio::time::sleep(PERIOD).await;
    }
}

fn measure(clock: &File) -> io::Result<i64> {
    // Both clocks at one moment, where the guest's is kvmclock too; else one after the other.
    if let Ok((host, guest)) = sys::clocks_at_once(clock) {
        return Ok(host.saturating_sub(guest));
    }
    let readings = sys::clocks_in_turn(clock)?;
    best_offset(&readings).ok_or_else(|| io::Error::other("the host's clock tells nothing"))
}

/// Sets the clock to a time since the epoch, or slews it where that is enough.
pub(super) fn set(time: TimeSpec) -> io::Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    match correction(nanoseconds(time) - nanoseconds(now), false) {
        Correction::Step => Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?),
        Correction::Slew { offset, learn } => Ok(sys::slew(offset, learn)?),
    }
}

fn correct(offset: i128) -> io::Result<()> {
    match correction(offset, true) {
        Correction::Step => step(offset),
        Correction::Slew { offset, learn } => Ok(sys::slew(offset, learn)?),
    }
}

fn step(offset: i128) -> io::Result<()> {
    let right = nanoseconds(clock_gettime(ClockId::CLOCK_REALTIME)?) + offset;
    let part = |number: i128| i64::try_from(number).map_err(io::Error::other);
    let (seconds, rest) = (right.div_euclid(1_000_000_000), right.rem_euclid(1_000_000_000));
    let time = TimeSpec::new(part(seconds)?, part(rest)?);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

fn nanoseconds(time: TimeSpec) -> i128 {
    i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec())
}

/// Microseconds of the guest's clock since the epoch.
pub(super) fn now_us() -> io::Result<i128> {
    Ok(nanoseconds(clock_gettime(ClockId::CLOCK_REALTIME)?) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i128 = 1_000_000;

    #[test]
    fn a_clock_that_is_far_off_is_set_and_one_that_is_near_is_slewed() {
        for offset in [501 * MS, -501 * MS, 3600 * 1000 * MS, i128::from(i64::MAX) * 4] {
            assert_eq!(correction(offset, true), Correction::Step, "{offset}");
        }
        for (offset, learn) in [
            (500 * MS, false),
            (-11 * MS, false),
            (10 * MS, true),
            (-MS, true),
            (0, true),
        ] {
            let slew = Correction::Slew {
                offset: offset as i64,
                learn,
            };
            assert_eq!(correction(offset, true), slew, "{offset}");
        }
    }

    #[test]
    fn what_the_host_sends_says_nothing_of_the_frequency() {
        let slew = Correction::Slew {
            offset: 1_000_000,
            learn: false,
        };
        assert_eq!(correction(MS, false), slew);
    }

    #[test]
    fn the_shortest_reading_counts() {
        // Guest, host, guest, host, guest: the first pair is 100 apart, the second 10.
        assert_eq!(best_offset(&[1000, 1500, 1100, 2105, 1110]), Some(1000));
        // The host is behind.
        assert_eq!(best_offset(&[1000, 905, 1010]), Some(-100));
        assert_eq!(best_offset(&[1000, 905]), None);
        assert_eq!(best_offset(&[]), None);
    }
}
