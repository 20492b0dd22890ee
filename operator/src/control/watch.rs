//! What wakes the controller. Watches carry no state: whatever rings, everything is read anew.

use std::{collections::BTreeMap, fmt::Debug, pin::pin, sync::Arc};

use futures::StreamExt;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Pod},
    node::v1::RuntimeClass,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject},
    runtime::{
        WatchStreamExt,
        watcher::{Config, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Notify,
    task::{JoinHandle, JoinSet},
};
use tracing::debug;

use super::{
    pod::{COMPONENT, INSTALLER},
    read,
};
use crate::{
    api::KataConfig,
    decide::{KATA, Node},
};

pub(super) struct Watches {
    client: Client,
    bell: Arc<Notify>,
    /// They end with this.
    _always: JoinSet<()>,
    pods: Option<JoinHandle<()>>,
}

impl Watches {
    pub(super) fn new(client: Client, namespace: &str) -> Watches {
        let bell = Arc::new(Notify::new());
        let mut always = JoinSet::new();
        let all = Config::default;
        always.spawn(follow(
            // One whose spec cannot be understood rings, too.
            Api::<DynamicObject>::all_with(client.clone(), &ApiResource::erase::<KataConfig>(&())),
            all(),
            Arc::clone(&bell),
            |_| true,
        ));
        always.spawn(follow(
            Api::<RuntimeClass>::all(client.clone()),
            all().fields(&format!("metadata.name={KATA}")),
            Arc::clone(&bell),
            |_| true,
        ));
        always.spawn(follow(
            Api::<Pod>::namespaced(client.clone(), namespace),
            all().labels(&format!("{COMPONENT}={INSTALLER}")),
            Arc::clone(&bell),
            |_| true,
        ));
        always.spawn(follow(
            Api::<ApiNode>::all(client.clone()),
            all(),
            Arc::clone(&bell),
            news_of_nodes(),
        ));
        Watches {
            client,
            bell,
            _always: always,
            pods: None,
        }
    }

    /// Waits until something rings, or has rung since the last time.
    pub(super) async fn rung(&self) {
        self.bell.notified().await;
    }

    /// Rings for the ends of pods that name a RuntimeClass, too. Only while their end is waited for: every pod of the
    /// cluster comes by here.
    pub(super) fn watch_pods(&mut self) {
        if self.pods.is_none() {
            let pods = Api::<Pod>::all(self.client.clone());
            let task = follow(pods, Config::default(), Arc::clone(&self.bell), |event| match event {
                // Those that ended before the watch began are missing from the list.
                Event::InitDone => true,
                Event::Delete(pod) => read::class(pod).is_some(),
                Event::Apply(pod) => read::class(pod).is_some() && read::has_ended(pod),
                Event::Init | Event::InitApply(_) => false,
            });
            self.pods = Some(tokio::spawn(task));
        }
    }

    /// Stops that.
    pub(super) fn leave_pods(&mut self) {
        if let Some(task) = self.pods.take() {
            task.abort();
        }
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.leave_pods();
    }
}

/// Rings for nodes that come, go, or change in what decisions are made from. Most changes are heartbeats.
fn news_of_nodes() -> impl FnMut(&Event<ApiNode>) -> bool {
    let mut known: BTreeMap<String, Node> = BTreeMap::new();
    move |event| match event {
        Event::Init => {
            known.clear();
            false
        }
        Event::InitApply(node) => {
            known.insert(node.name_any(), read::node(node));
            false
        }
        Event::InitDone => true,
        Event::Apply(node) => {
            let now = read::node(node);
            known.insert(now.name.clone(), now.clone()) != Some(now)
        }
        Event::Delete(node) => {
            known.remove(&node.name_any());
            true
        }
    }
}

async fn follow<K>(api: Api<K>, config: Config, bell: Arc<Notify>, mut rings: impl FnMut(&Event<K>) -> bool)
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut events = pin!(watcher(api, config).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(event) if rings(&event) => bell.notify_one(),
            Ok(_) => {}
            // The watcher starts again by itself, and lists everything then.
            Err(error) => debug!(%error, "a watch was interrupted"),
        }
    }
}
