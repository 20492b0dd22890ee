//! Leadership by a Lease, `coordination.k8s.io/v1`: at most one controller acts.
//!
//! ```text
//!  standing by ── the lease is free, ours, or has not been renewed for 30 s by our own clock ──▶ leading ── not renewed for 20 s, or taken ──▶ the process ends
//! ```
//!
//! Clocks of two machines are never compared: a standby measures by its own clock for how long the lease has not
//! changed. The process that leads gives up ten seconds before another one may take over, whatever it waits for then:
//! it counts from when it sent what was answered last. A process with the identity of the lease's holder is its
//! successor in the same pod, whose predecessor has ended.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, ResourceExt, api::PostParams};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use super::{NAME, Options, serve::Health};

/// The times of a lease.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// How long it is good for after it was renewed.
    lease: Duration,
    /// How often it is renewed.
    renew: Duration,
    /// After how long without success the holder gives up.
    give_up: Duration,
    /// How often a standby looks, and how soon a failed renewal is tried again.
    look: Duration,
}

const TIMES: Times = Times {
    lease: Duration::from_secs(30),
    renew: Duration::from_secs(10),
    give_up: Duration::from_secs(20),
    look: Duration::from_secs(2),
};

/// A lease that this process has written, and when it began to.
#[derive(Debug)]
pub(super) struct Held {
    lease: Lease,
    since: Instant,
}

pub(super) struct Leadership {
    times: Times,
    leases: Api<Lease>,
    identity: String,
    health: Arc<Health>,
}

/// A lease as somebody else holds it, and since when it has not changed.
struct Seen {
    version: Option<String>,
    since: Instant,
}

impl Leadership {
    pub(super) fn new(client: Client, options: &Options, health: Arc<Health>) -> Leadership {
        Leadership {
            times: TIMES,
            leases: Api::namespaced(client, &options.namespace),
            identity: options.identity.clone(),
            health,
        }
    }

    /// Waits until this process leads.
    pub(super) async fn acquire(&self) -> Held {
        let mut seen: Option<Seen> = None;
        loop {
            let since = Instant::now();
            match timeout(self.times.renew, self.try_to_acquire(&mut seen)).await {
                Ok(Ok(Some(lease))) => return Held { lease, since },
                Ok(Ok(None)) => {}
                Ok(Err(error)) => warn!(%error, "the lease cannot be looked at"),
                Err(_) => warn!("the API server does not answer"),
            }
            sleep(self.times.look).await;
        }
    }

    async fn try_to_acquire(&self, seen: &mut Option<Seen>) -> Result<Option<Lease>, kube::Error> {
        let Some(lease) = self.leases.get_opt(NAME).await? else {
            self.health.contact();
            return self.won(self.leases.create(&PostParams::default(), &self.fresh()).await);
        };
        self.health.contact();
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let free = holder.is_none_or(|holder| holder.is_empty() || holder == self.identity);
        let version = lease.resource_version();
        match seen {
            Some(seen) if seen.version == version && seen.since.elapsed() >= self.times.lease => {}
            _ if free => {}
            Some(seen) if seen.version == version => return Ok(None),
            _ => {
                debug!(holder, "standing by");
                *seen = Some(Seen {
                    version,
                    since: Instant::now(),
                });
                return Ok(None);
            }
        }
        self.won(self.replace(&lease, true).await)
    }

    /// A conflict means that another one was faster.
    fn won(&self, written: Result<Lease, kube::Error>) -> Result<Option<Lease>, kube::Error> {
        match written {
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(None),
            other => other.map(Some),
        }
    }

    /// Renews the lease until that is not possible any more; then another one may lead.
    pub(super) async fn hold(&self, mut held: Held) {
        let Times {
            renew, give_up, look, ..
        } = self.times;
        let mut pause = renew;
        loop {
            let end = held.since + give_up;
            let renewal = async {
                sleep(pause).await;
                self.renew(&mut held).await
            };
            match timeout_at(end, renewal).await {
                Ok(Some(true)) => pause = renew,
                Ok(Some(false)) => pause = look,
                Ok(None) => return,
                Err(_) => {
                    warn!("the lease is given up: it could not be renewed in time");
                    return;
                }
            }
        }
    }

    /// Renews the lease once. Whether that went well; none when it is another one's, or may be soon: whoever finds none
    /// makes one.
    async fn renew(&self, held: &mut Held) -> Option<bool> {
        let Times { renew, look, .. } = self.times;
        let since = Instant::now();
        match timeout(renew.saturating_sub(look), self.replace(&held.lease, false)).await {
            Ok(Ok(lease)) => {
                *held = Held { lease, since };
                self.health.contact();
                return Some(true);
            }
            // An answer may have been lost, so that what is there is newer than what we know and still ours.
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() => match self.look().await {
                Ok(Some(lease)) if self.is_ours(&lease) => held.lease = lease,
                Ok(_) => return None,
                Err(why) => warn!(why, "the lease was changed, and cannot be looked at"),
            },
            Ok(Err(kube::Error::Api(status))) if status.is_not_found() => return None,
            Ok(Err(error)) => warn!(%error, "the lease was not renewed"),
            Err(_) => warn!("the lease was not renewed: the API server does not answer"),
        }
        Some(false)
    }

    async fn look(&self) -> Result<Option<Lease>, String> {
        match timeout(self.times.look, self.leases.get_opt(NAME)).await {
            Ok(found) => found.map_err(|error| error.to_string()),
            Err(_) => Err("the API server does not answer".to_owned()),
        }
    }

    fn is_ours(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref());
        holder == Some(&self.identity)
    }

    /// Lets the next one lead at once. Not being able to costs it half a minute, and nothing else.
    pub(super) async fn release(&self) {
        let found = self.look().await.ok().flatten();
        if let Some(mut lease) = found.filter(|lease| self.is_ours(lease)) {
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
            }
            let released = timeout(
                self.times.look,
                self.leases.replace(NAME, &PostParams::default(), &lease),
            )
            .await;
            if !matches!(released, Ok(Ok(_))) {
                warn!("the lease was not released");
            }
        }
    }

    /// Writes that we hold it; the API server refuses that if it is not as we know it.
    async fn replace(&self, lease: &Lease, takes_over: bool) -> Result<Lease, kube::Error> {
        let before = lease.spec.clone().unwrap_or_default();
        let LeaseSpec {
            acquire_time,
            lease_transitions,
            ..
        } = before.clone();
        let fresh = self.fresh().spec.unwrap_or_default();
        let spec = LeaseSpec {
            acquire_time: if takes_over {
                fresh.acquire_time.clone()
            } else {
                acquire_time
            },
            lease_transitions: Some(lease_transitions.unwrap_or(0).saturating_add(i32::from(takes_over))),
            ..fresh
        };
        let next = Lease {
            spec: Some(spec),
            ..lease.clone()
        };
        self.leases.replace(NAME, &PostParams::default(), &next).await
    }

    fn fresh(&self) -> Lease {
        let now = MicroTime(Timestamp::now());
        Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(self.times.lease.as_secs()).ok(),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(0),
                ..LeaseSpec::default()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use kube::Client;
    use serde_json::json;

    use super::{
        super::{
            fake::{Answer, DEADLINE, Fake},
            metrics::Metrics,
        },
        *,
    };

    const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases";

    /// A tenth of the real times.
    const QUICK: Times = Times {
        lease: Duration::from_secs(3),
        renew: Duration::from_secs(1),
        give_up: Duration::from_secs(2),
        look: Duration::from_millis(200),
    };

    fn leadership(client: Client) -> Leadership {
        let words = "sandpod-operator --installer-image i --version 1 --identity me --namespace ns";
        let options = Options::parse_from(words.split(' '));
        Leadership {
            times: QUICK,
            ..Leadership::new(client, &options, Arc::default())
        }
    }

    /// Holds a lease that is new, with these answers to renewals. Whether it was given up, and after how long.
    async fn held(fake: &Fake, answers: &[Answer], renewals: usize) -> Option<Duration> {
        let (client, _) = fake.client(&Arc::new(Metrics::new("1")));
        let leadership = leadership(client);
        let renewal = format!("PUT {LEASES}/{NAME}");
        fake.answers(&renewal, answers.iter().cloned());
        let held = timeout(DEADLINE, leadership.acquire()).await.unwrap();
        let since = held.since;
        let renewed = fake.await_asked(&renewal, renewals);
        tokio::select! {
            _ = renewed => None,
            () = leadership.hold(held) => Some(since.elapsed()),
        }
    }

    #[tokio::test]
    async fn a_lease_is_given_up_before_another_one_may_take_it_whatever_is_waited_for() {
        let fake = Fake::default();
        let refusal = Answer::Refusal(500, "InternalError");
        let answers = [&vec![refusal; 4][..], &[Answer::Silence]].concat();
        let after = held(&fake, &answers, usize::MAX).await.unwrap();
        assert!(after >= QUICK.give_up - QUICK.look, "{after:?}");
        assert!(after < QUICK.give_up + QUICK.look * 2, "{after:?}");
    }

    #[tokio::test]
    async fn a_conflict_that_cannot_be_looked_into_is_not_the_end() {
        let fake = Fake::default();
        let path = format!("{LEASES}/{NAME}");
        let lease = json!({"metadata": {"name": NAME, "resourceVersion": "7"}, "spec": {"holderIdentity": "me"}});
        let looks = [
            Answer::Refusal(404, "NotFound"),
            Answer::Later(1),
            Answer::Is(lease.clone()),
        ];
        fake.answers(&format!("GET {path}"), looks);
        let conflict = Answer::Refusal(409, "Conflict");
        let answers = [conflict.clone(), conflict, Answer::Is(lease)];
        assert_eq!(held(&fake, &answers, 4).await, None);
        let versions = fake.asked(&format!("PUT {path}"));
        let versions: Vec<_> = versions
            .iter()
            .map(|put| &put.body["metadata"]["resourceVersion"])
            .collect();
        assert_eq!(versions, [&json!(null), &json!(null), &json!("7"), &json!("7")]);
    }

    #[tokio::test]
    async fn a_lease_that_is_anothers_or_was_deleted_is_left_at_once() {
        let theirs = json!({"metadata": {"name": NAME}, "spec": {"holderIdentity": "you"}});
        for (refusal, found) in [
            (Answer::Refusal(409, "Conflict"), Answer::Is(theirs)),
            (Answer::Refusal(409, "Conflict"), Answer::Refusal(404, "NotFound")),
            (Answer::Refusal(404, "NotFound"), Answer::Refusal(404, "NotFound")),
        ] {
            let fake = Fake::default();
            let looks = [Answer::Refusal(404, "NotFound"), found];
            fake.answers(&format!("GET {LEASES}/{NAME}"), looks);
            let after = held(&fake, &[refusal], usize::MAX).await.unwrap();
            assert!(after < QUICK.give_up - QUICK.look, "{after:?}");
        }
    }
}
