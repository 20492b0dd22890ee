//! What wakes the controller. Nodes and pods that name a RuntimeClass are kept from what the watches tell; all else is
//! read anew, whatever rings.

use std::{collections::BTreeMap, fmt::Debug, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node as ApiNode, Pod},
    node::v1::RuntimeClass,
};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject},
    runtime::{
        WatchStreamExt,
        watcher::{self, Config, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Notify,
    task::{AbortHandle, JoinSet},
    time::sleep,
};
use tracing::warn;

use super::{
    cache::{Cache, sources},
    pod::{COMPONENT, INSTALLER},
    read::{self, ClassPod},
};
use crate::{
    api::KataConfig,
    decide::{FEATURE_GATES, Node},
};

/// The longest watch that the client allows, in seconds.
const LONGEST: u32 = 290;
/// How long until a watch is begun anew with a list.
const ANEW: Duration = Duration::from_secs(1);
/// HTTP's code of what the API server has forgotten.
const GONE: u16 = 410;

pub(super) struct Watches {
    client: Client,
    every: Config,
    bell: Arc<Notify>,
    nodes: Arc<Cache<Node>>,
    feature_gates: Arc<Cache<BTreeMap<String, String>>>,
    /// Only while their end is waited for: every pod of the cluster comes by here.
    pods: Option<(Arc<Cache<ClassPod>>, AbortHandle)>,
    /// They end with this.
    tasks: JoinSet<()>,
}

impl Watches {
    /// No watch lasts longer than `longest`: one whose connection is silently dead is begun again then.
    pub(super) fn new(client: Client, namespace: &str, longest: Duration) -> Watches {
        let bell = Arc::new(Notify::new());
        let nodes = Arc::<Cache<Node>>::default();
        let mut tasks = JoinSet::new();
        let every = Config::default().timeout(u32::try_from(longest.as_secs()).unwrap_or(u32::MAX).min(LONGEST));
        let all = || every.clone();
        tasks.spawn(follow(
            // One whose spec cannot be understood rings, too.
            Api::<DynamicObject>::all_with(client.clone(), &ApiResource::erase::<KataConfig>(&())),
            all(),
            Arc::clone(&bell),
            |told| told.is_ok(),
        ));
        tasks.spawn(follow(
            Api::<RuntimeClass>::all(client.clone()),
            all(),
            Arc::clone(&bell),
            |told| told.is_ok(),
        ));
        tasks.spawn(follow(
            Api::<Pod>::namespaced(client.clone(), namespace),
            all().labels(&format!("{COMPONENT}={INSTALLER}")),
            Arc::clone(&bell),
            |told| told.is_ok(),
        ));
        // Most changes of nodes are heartbeats, of which nothing is kept.
        let known = Arc::clone(&nodes);
        tasks.spawn(follow(
            Api::<ApiNode>::all(client.clone()),
            all(),
            Arc::clone(&bell),
            move |told| known.hear(told, &|node| Some(read::node(node))),
        ));
        let feature_gates = Arc::<Cache<BTreeMap<String, String>>>::default();
        let known = Arc::clone(&feature_gates);
        tasks.spawn(follow(
            Api::<ConfigMap>::namespaced(client.clone(), namespace),
            all().fields(&format!("metadata.name={FEATURE_GATES}")),
            Arc::clone(&bell),
            move |told| known.hear(told, &|map: &ConfigMap| map.data.clone()),
        ));
        Watches {
            client,
            every,
            bell,
            nodes,
            feature_gates,
            pods: None,
            tasks,
        }
    }

    /// The nodes.
    pub(super) fn nodes(&self) -> Arc<Cache<Node>> {
        Arc::clone(&self.nodes)
    }

    /// What the ConfigMap with feature gates says: nothing where it is not there or cannot be read.
    pub(super) async fn feature_gates(&self) -> BTreeMap<String, String> {
        let maps = self.feature_gates.all().await.unwrap_or_default();
        maps.into_iter().next().unwrap_or_default()
    }

    /// Waits until something rings, or has rung since the last time.
    pub(super) async fn rung(&self) {
        self.bell.notified().await;
    }

    /// The pods that name a RuntimeClass and have not ended; it rings for their ends from now on.
    pub(super) fn pods(&mut self) -> Arc<Cache<ClassPod>> {
        let (client, every, bell, tasks) = (&self.client, &self.every, &self.bell, &mut self.tasks);
        let (cache, _) = self.pods.get_or_insert_with(|| {
            let cache = Arc::<Cache<ClassPod>>::default();
            let pods = Api::<Pod>::all(client.clone());
            let known = Arc::clone(&cache);
            let task = follow(pods, every.clone(), Arc::clone(bell), move |told| {
                known.hear(told, &read::class_pod)
            });
            (cache, tasks.spawn(task))
        });
        Arc::clone(cache)
    }

    /// Stops that.
    pub(super) fn leave_pods(&mut self) {
        if let Some((_, task)) = self.pods.take() {
            task.abort();
        }
    }
}

/// Hands on what a watch tells, and rings when that is worth a look. After an error the watcher goes on by itself; but
/// one that could not be begun where the list ended, because the API server has forgotten that version, would ask for
/// the same one for ever, so that it is begun anew with a list.
async fn follow<K>(
    api: Api<K>,
    config: Config,
    bell: Arc<Notify>,
    rings: impl Fn(Result<Event<K>, watcher::Error>) -> bool,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    loop {
        let mut events = pin!(watcher(api.clone(), config.clone()).default_backoff());
        while let Some(told) = events.next().await {
            if let Err(error) = &told {
                warn!(error = sources(error), "a watch was interrupted");
            }
            let forgotten = told.as_ref().is_err_and(is_forgotten);
            if rings(told) {
                bell.notify_one();
            }
            if forgotten {
                break;
            }
        }
        sleep(ANEW).await;
    }
}

/// Whether a watch could not begin because its version is too old.
fn is_forgotten(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == GONE)
}
