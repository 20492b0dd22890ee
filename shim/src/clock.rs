//! The guest's clock, where the guest cannot keep it by itself: it has no clock of KVM's.
//!
//! ```text
//! GetGuestDetails ──▶ the guest's time, and how long the question took ──▶ is it off? ──▶ SetGuestDateTime
//! ```
//!
//! Once a minute, which costs two short calls. What stops the guest's clock, a QEMU that was stopped among others, is
//! nothing that the shim would hear of: the next look finds it, so a guest is wrong for a minute at most.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::{
    client::{Client, ClientError},
    protocol::agent::{GuestDetailsRequest, SetGuestDateTimeRequest},
};

use crate::boot::About;

/// How often the guest's clock is looked at.
const PERIOD: Duration = Duration::from_secs(60);
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of so many looks the shortest counts.
const LOOKS: usize = 4;
/// Microseconds that a clock may be off beside what the look itself leaves open.
const TOLERANCE: i64 = 5_000;
/// What our agent calls the guest's time, in microseconds since the epoch.
const WALL: &str = "sandpod.wall_us=";

/// One look at the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    /// The guest's time less the host's, in microseconds; `None` of an agent that does not tell it.
    offset: Option<i64>,
    /// How long the question took: the offset is wrong by half of it at most.
    took: Duration,
}

/// Keeps the guest's clock in the background, until the agent is gone. A foreign agent under KVM is left alone: its
/// image has a program for that.
pub fn keep(agent: &Client, about: &About, emulated: bool) {
    if about.keeps_clock || !(about.own || emulated) {
        return;
    }
    let agent = agent.with_deadline(PATIENCE);
    tokio::spawn(async move {
        let mut failed = false;
        loop {
            match correct(&agent).await {
                Err(ClientError::Gone) => return,
                Err(error) if !failed => {
                    tracing::warn!(%error, "the guest's clock is not kept");
                    failed = true;
                }
                Err(_) => {}
                Ok(()) => failed = false,
            }
            tokio::time::sleep(PERIOD).await;
        }
    });
}

async fn correct(agent: &Client) -> Result<(), ClientError> {
    let mut best = look(agent).await?;
    for _ in 1..LOOKS {
        let look = look(agent).await?;
        if look.took < best.took {
            best = look;
        }
    }
    if !best.is_off() {
        return Ok(());
    }
    // It arrives about half an answer from now.
    let arrival = since_epoch(SystemTime::now()) + best.took / 2;
    let mut request = SetGuestDateTimeRequest::new();
    request.Sec = i64::try_from(arrival.as_secs()).unwrap_or(i64::MAX);
    request.Usec = i64::from(arrival.subsec_micros());
    agent.set_guest_date_time(request).await?;
    tracing::debug!(offset_us = best.offset, took = ?best.took, "the guest's clock was off");
    Ok(())
}

async fn look(agent: &Client) -> Result<Look, ClientError> {
    let (asked, began) = (since_epoch(SystemTime::now()), Instant::now());
    let details = agent.get_guest_details(GuestDetailsRequest::new()).await?;
    let features = &details.agent_details.extra_features;
    let told = features
        .iter()
        .find_map(|feature| feature.strip_prefix(WALL)?.parse().ok());
    Ok(Look::new(asked, told, began.elapsed()))
}

impl Look {
    fn new(asked: Duration, told: Option<i64>, took: Duration) -> Look {
        let middle = i64::try_from((asked + took / 2).as_micros()).unwrap_or(i64::MAX);
        Look {
            offset: told.map(|told| told.saturating_sub(middle)),
            took,
        }
    }

    /// Whether the clock is off by more than the look leaves open. One that is not told may be.
    fn is_off(&self) -> bool {
        let open = i64::try_from(self.took.as_micros() / 2).unwrap_or(i64::MAX);
        self.offset
            .is_none_or(|offset| offset.saturating_abs() > open.saturating_add(TOLERANCE))
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Duration = Duration::from_secs(1_700_000_000);

    fn look(told: i64, took_ms: u64) -> Look {
        Look::new(
            ASKED,
            Some(ASKED.as_micros() as i64 + told),
            Duration::from_millis(took_ms),
        )
    }

    #[test]
    fn an_answer_is_of_the_middle_of_its_question() {
        assert_eq!(look(10_000, 20).offset, Some(0));
        assert_eq!(look(0, 20).offset, Some(-10_000));
        assert_eq!(look(3_600_010_000, 20).offset, Some(3_600_000_000));
    }

    #[test]
    fn a_clock_is_off_by_more_than_the_question_leaves_open() {
        assert!(!look(10_000, 20).is_off() && !look(0, 20).is_off() && !look(25_000, 20).is_off());
        assert!(look(25_001, 20).is_off() && look(-5_001, 20).is_off());
        // A slow machine knows less.
        assert!(!look(-5_000, 1000).is_off() && !look(1_005_000, 1000).is_off() && look(1_005_001, 1000).is_off());
        // What a guest says may be anything.
        for told in [i64::MIN, i64::MAX] {
            assert!(Look::new(ASKED, Some(told), Duration::from_secs(1)).is_off());
        }
        assert!(Look::new(ASKED, None, Duration::ZERO).is_off());
    }
}
