//! Leadership by a Lease, `coordination.k8s.io/v1`: at most one controller acts.
//!
//! ```text
//!  standing by ── the lease is free, ours, or has not been renewed for 30 s by our own clock ──▶ leading ── not renewed for 20 s, or taken ──▶ the process ends
//! ```
//!
//! Clocks of two machines are never compared: a standby measures by its own clock for how long the lease has not
//! changed. The process that leads gives up ten seconds before another one may take over. A process with the identity
//! of the lease's holder is its successor in the same pod, whose predecessor has ended.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, ResourceExt, api::PostParams};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::{NAME, Options, serve::Health};

/// How long a lease is good for after it was renewed.
const LEASE: Duration = Duration::from_secs(30);
/// How often it is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// After how long without success the holder gives up.
const GIVE_UP: Duration = Duration::from_secs(20);
/// How often a standby looks, and how soon a failed renewal is tried again.
const LOOK: Duration = Duration::from_secs(2);

pub(super) struct Leadership {
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
            leases: Api::namespaced(client, &options.namespace),
            identity: options.identity.clone(),
            health,
        }
    }

    /// Waits until this process leads.
    pub(super) async fn acquire(&self) -> Lease {
        let mut seen: Option<Seen> = None;
        loop {
            match timeout(RENEW, self.try_to_acquire(&mut seen)).await {
                Ok(Ok(Some(lease))) => return lease,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => warn!(%error, "the lease cannot be looked at"),
                Err(_) => warn!("the API server does not answer"),
            }
            sleep(LOOK).await;
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
            Some(seen) if seen.version == version && seen.since.elapsed() >= LEASE => {}
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
    pub(super) async fn hold(&self, mut lease: Lease) {
        let mut renewed = Instant::now();
        let mut pause = RENEW;
        loop {
            sleep(pause).await;
            let began = Instant::now();
            pause = LOOK;
            match timeout(RENEW.saturating_sub(LOOK), self.replace(&lease, false)).await {
                Ok(Ok(written)) => {
                    lease = written;
                    renewed = began;
                    pause = RENEW;
                    self.health.contact();
                }
                // An answer may have been lost, so that what is there is newer than what we know and still ours.
                Ok(Err(kube::Error::Api(status))) if status.is_conflict() => match self.ours().await {
                    Some(ours) => lease = ours,
                    None => return,
                },
                Ok(Err(error)) => warn!(%error, "the lease was not renewed"),
                Err(_) => warn!("the lease was not renewed: the API server does not answer"),
            }
            if renewed.elapsed() >= GIVE_UP.saturating_sub(pause) {
                return;
            }
        }
    }

    async fn ours(&self) -> Option<Lease> {
        let lease = timeout(LOOK, self.leases.get(NAME)).await.ok()?.ok()?;
        let holder = lease.spec.as_ref()?.holder_identity.clone()?;
        (holder == self.identity).then_some(lease)
    }

    /// Lets the next one lead at once. Not being able to costs it half a minute, and nothing else.
    pub(super) async fn release(&self) {
        if let Some(mut lease) = self.ours().await {
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
            }
            let released = timeout(LOOK, self.leases.replace(NAME, &PostParams::default(), &lease)).await;
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
                lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(0),
                ..LeaseSpec::default()
            }),
        }
    }
}
