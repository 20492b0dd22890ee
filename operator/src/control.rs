//! The controller: reads the cluster, lets [`crate::decide`] decide, and does what it says.
//!
//! ```text
//!  watches ──ring──▶ read everything ──▶ decide ──▶ write statuses, act, tell events ──▶ again, until nothing is left to do ──▶ wait for a ring or the time
//!                         ▲                                      │ an error: wait a little
//!                         └──────────────────────────────────────┘
//! ```
//!
//! What it decides on is read anew each time, so that it never decides on a cluster that does not show yet what it has
//! done itself. Of nodes and pods there are too many for that: see the module `cache`.

mod act;
mod cache;
mod client;
mod events;
#[cfg(test)]
mod fake;
mod lease;
mod metrics;
mod options;
mod pod;
mod read;
mod record;
mod serve;
#[cfg(test)]
mod unkind;
mod watch;

use std::{collections::BTreeSet, process::ExitCode, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use kube::{Client, ResourceExt, client::ClientBuilder};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{error, info, warn};

pub use self::options::Options;
use self::{
    act::{ActError, Hands},
    client::Wish,
    lease::Leadership,
    metrics::Metrics,
    read::Eyes,
    serve::Health,
    watch::Watches,
};
use crate::decide::{About, Action, Decision, KataPod, Note, ONCE, Refused, Settings, Step, World, decide};

/// The name under which we write: field manager, reporting controller, lease, managed-by label.
const NAME: &str = "sandpod-operator";
/// How long after a first error, in a row twice as long each time.
const PATIENCE: Duration = Duration::from_millis(500);
/// And at most.
const LONGEST: Duration = Duration::from_secs(30);
/// How long it rests at most: a watch may have missed something.
const RESYNC: Duration = Duration::from_secs(600);
/// Passes in a row that found something to do, after which one pauses: many more than any story needs.
const BUSY: u32 = 50;
/// How long after a look something is looked at again of which no watch tells.
const SOON: SignedDuration = SignedDuration::from_secs(5);
/// How many events are kept that could not be told.
const KEPT: usize = 100;

/// Why the controller ends.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No cluster is configured.
    #[error("no way to the API server: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The client cannot be made.
    #[error("the client of the API server cannot be made: {0}")]
    Client(#[source] Box<kube::Error>),
    /// Its address cannot be listened on.
    #[error("--listen {address}: {source}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel does not deliver signals.
    #[error("signals cannot be waited for: {0}")]
    Signal(#[source] std::io::Error),
    /// Another one leads.
    #[error("the lease was lost to another controller or could not be renewed in time")]
    Lost,
}

/// Runs the controller until SIGTERM, or until it does not lead any more.
///
/// # Errors
/// What keeps it from starting, and [`ControlError::Lost`]: whoever sees that has to end the process, because another
/// controller acts from then on.
pub async fn run(options: Options) -> Result<ExitCode, ControlError> {
    let config = client::configuration().await?;
    let metrics = Arc::new(Metrics::new(&options.version));
    let builder = ClientBuilder::try_from(config).map_err(|error| ControlError::Client(Box::new(error)))?;
    let (client, wish) = client::counted(builder, &metrics);
    let health = Arc::new(Health::default());
    let leadership = Leadership::new(client.clone(), &options, Arc::clone(&health));
    let mut terminate = signal(SignalKind::terminate()).map_err(ControlError::Signal)?;
    let served = serve::serve(options.listen, Arc::clone(&metrics), Arc::clone(&health)).await?;
    let work = async {
        let held = leadership.acquire().await;
        info!(identity = options.identity, "leading");
        metrics.leader.set(1);
        select! {
            () = leadership.hold(held) => {}
            () = Controller::new(client, wish, options, metrics).go() => {}
        }
    };
    let ended = select! {
        () = work => Err(ControlError::Lost),
        _ = terminate.recv() => Ok(ExitCode::SUCCESS),
    };
    served.abort();
    if ended.is_ok() {
        leadership.release().await;
    }
    ended
}

struct Controller {
    eyes: Eyes,
    hands: Hands,
    watches: Watches,
    metrics: Arc<Metrics>,
    settings: Settings,
    /// Known to this process alone: the next one would hear it again.
    refused: Option<Refused>,
    /// What the API server has not let through, likewise.
    denied: Option<String>,
    /// Known to this process alone, likewise.
    told: BTreeSet<String>,
    /// Events that the API server had no time for.
    untold: Vec<Note>,
    wish: Arc<Wish>,
    api_timeout: Duration,
    /// When the pass has to be over.
    end: Instant,
}

/// What a pass came to.
enum Pass {
    /// It did something: what comes next is to be seen.
    Busy,
    /// There is nothing to do before this time.
    Rest(Option<Timestamp>),
}

impl Controller {
    fn new(client: Client, wish: Arc<Wish>, options: Options, metrics: Arc<Metrics>) -> Controller {
        let watches = Watches::new(client.clone(), &options.namespace, options.api_timeout);
        Controller {
            eyes: Eyes::new(client.clone(), &options.namespace),
            settings: Settings {
                version: options.version.clone(),
                retry_first: options.retry_first,
                settle: options.settle,
                prefix: options.prefix.clone(),
            },
            refused: None,
            denied: None,
            told: BTreeSet::new(),
            untold: Vec::new(),
            wish,
            api_timeout: options.api_timeout,
            end: Instant::now() + options.api_timeout,
            hands: Hands::new(client, watches.nodes(), Arc::clone(&metrics), options),
            watches,
            metrics,
        }
    }

    async fn go(mut self) {
        let mut errors = 0_u32;
        let mut busy = 0_u32;
        loop {
            self.metrics.passes.inc();
            let pause = match self.pass().await {
                Ok(Pass::Busy) if busy < BUSY => {
                    (errors, busy) = (0, busy + 1);
                    continue;
                }
                Ok(Pass::Busy) => {
                    error!("{BUSY} passes in a row found something to do; pausing");
                    PATIENCE
                }
                Ok(Pass::Rest(wake)) => {
                    errors = 0;
                    wake.map_or(RESYNC, |wake| until(wake).min(RESYNC))
                }
                Err(error) => {
                    self.metrics.reconcile_errors.inc();
                    errors = errors.saturating_add(1);
                    warn!(%error, "a pass failed");
                    let factor = 1_u32 << errors.saturating_sub(1).min(6);
                    let pause = PATIENCE.saturating_mul(factor).min(LONGEST);
                    sleep(pause.max(self.wish.left())).await;
                    continue;
                }
            };
            busy = 0;
            select! {
                () = self.watches.rung() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Once for each thing that the API server says: the pod is tried again and again.
    async fn tell_of_refusal(&mut self, refused: &Refused, world: &World) {
        if self.refused.as_ref().is_some_and(|before| before.text == refused.text) {
            return;
        }
        let verb = refused.verb.as_str();
        let text = format!(
            "The API server does not take the installer's pod to {verb} on node {}: {}",
            refused.node, refused.text
        );
        let node = About::Node(refused.node.clone());
        self.warn_all(world, Some(node), "InstallerPodRefused", &text).await;
    }

    /// Once for each thing that the API server says, until something goes through.
    async fn tell_of_denial(&mut self, action: &str, text: &str, world: &World) {
        let text = format!("The API server does not let the operator go on: {action}: {text}");
        if self.denied.as_ref() != Some(&text) {
            self.warn_all(world, None, "ActionRefused", &text).await;
            self.denied = Some(text);
        }
    }

    /// Tells the KataConfigs, and somebody else.
    async fn warn_all(&mut self, world: &World, and: Option<About>, reason: &'static str, text: &str) {
        let configs = world.configs.iter().map(|config| About::Config(config.name_any()));
        let notes = configs.chain(and).map(|about| Note {
            about,
            warning: true,
            reason,
            text: text.to_owned(),
            after: Step::Statuses(0),
        });
        self.tell(notes.collect(), world).await;
    }

    /// Tells events, those first that could not be told before. After one that fails for now no other is tried: all are
    /// kept for the next pass. An event is news, not state, so that one that is not let in stops nothing.
    async fn tell(&mut self, notes: Vec<Note>, world: &World) {
        self.untold.extend(notes);
        while let Some(note) = self.untold.first() {
            let told = match self.end.saturating_duration_since(Instant::now()) {
                left if left.is_zero() || !self.wish.left().is_zero() => break,
                left => timeout(left, self.hands.tell(note, world)).await,
            };
            match told {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    warn!(%error, reason = note.reason, "an event could not be told");
                    if passes(&error) {
                        break;
                    }
                }
                Err(_) => {
                    warn!(
                        reason = note.reason,
                        "an event could not be told: the API server does not answer"
                    );
                    break;
                }
            }
            self.untold.remove(0);
        }
        self.untold.truncate(KEPT);
    }

    /// The pods that use kata, or why nobody knows.
    async fn kata_pods(&mut self) -> Result<Vec<KataPod>, String> {
        let pods = self.watches.pods().all().await?;
        self.eyes.with_kata(pods).await.map_err(|error| error.to_string())
    }

    /// What is there, and what to do about it.
    async fn look(&mut self) -> Result<(World, Decision), ActError> {
        let nodes = self.watches.nodes().all().await.map_err(ActError::Nodes)?;
        let mut world = self.eyes.read(nodes, &self.settings, self.refused.clone()).await?;
        world.told.clone_from(&self.told);
        world.feature_gates = self.watches.feature_gates().await;
        let mut decision = decide(&world);
        if decision.awaits_pods {
            world.kata_pods = Some(self.kata_pods().await);
            decision = decide(&world);
        } else {
            self.watches.leave_pods();
        }
        Ok((world, decision))
    }

    /// Looks once and does what there is to do. A connection that is silently dead would hold this up for as long as the
    /// kernel sends again, or for ever; so it has an end, before which what was done is still known.
    async fn pass(&mut self) -> Result<Pass, ActError> {
        let end = Instant::now() + self.api_timeout;
        self.end = end;
        let looked = timeout_at(end, self.look()).await;
        let (world, decision) = looked.unwrap_or(Err(ActError::Silent))?;
        self.metrics.show(&decision.nodes, !world.configs.is_empty());
        let mut done = Step::Statuses(0);
        let carried_out = timeout_at(end, self.hands.carry_out(&world, &decision, &mut done)).await;
        let carried_out = carried_out.unwrap_or(Err(ActError::Silent));
        // What was done is not decided again, so that nobody would tell of it later.
        let notes: Vec<_> = decision.told(done).cloned().collect();
        let once = notes.iter().filter(|note| ONCE.contains(&note.reason));
        self.told.extend(once.map(|note| note.text.clone()));
        self.tell(notes, &world).await;
        match carried_out {
            Err(ActError::Refused(refused)) => {
                warn!(node = refused.node, "the installer's pod is refused: {}", refused.text);
                self.tell_of_refusal(&refused, &world).await;
                self.refused = Some(refused);
                return Ok(Pass::Busy);
            }
            Err(ActError::Denied { action, text }) => {
                self.tell_of_denial(&action, &text, &world).await;
                return Err(ActError::Denied { action, text });
            }
            done => done?,
        }
        self.denied = None;
        if decision
            .actions
            .iter()
            .any(|action| matches!(action, Action::StartRun { .. }))
        {
            self.refused = None;
        }
        if decision.statuses.is_empty() && decision.actions.is_empty() {
            // A RuntimeClass that could not be listed rings no bell, nor does an event that could not be told.
            let left = matches!(world.kata_pods, Some(Err(_))) || !self.untold.is_empty();
            let wish = SignedDuration::try_from(self.wish.left()).unwrap_or(SOON);
            let soon = left.then(|| Timestamp::now() + SOON.max(wish));
            return Ok(Pass::Rest(soon.into_iter().chain(decision.wake).min()));
        }
        Ok(Pass::Busy)
    }
}

/// Whether the API server may take the same request later.
fn passes(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        _ => true,
    }
}

fn until(time: Timestamp) -> Duration {
    // A little later, so that the time has really passed then.
    let wait = time.duration_since(Timestamp::now());
    Duration::try_from(wait).unwrap_or_default() + Duration::from_millis(10)
}
