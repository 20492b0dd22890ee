//! What the controller keeps of objects of which a cluster has many: a small part of each, kept current by a watch.
//!
//! A list of all nodes is 100 MiB in a large cluster, and one of all pods ten times as much: they are read once, a page
//! at a time, and not at each pass. A watch tells late of what the controller has written itself, so that is put into
//! the cache as well ([`Cache::wrote`]), and an older version never replaces a newer one. Versions of resources are
//! decimal numbers that grow (Kubernetes' API conventions since 1.35, and etcd's revisions before).

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::{
    Resource,
    runtime::watcher::{self, Event},
};
use tokio::sync::Notify;

/// The kept parts of all objects of a kind.
#[derive(Debug)]
pub(super) struct Cache<T> {
    held: Mutex<Held<T>>,
    /// What is held has changed, or could not be listed.
    news: Notify,
}

#[derive(Debug)]
struct Held<T> {
    objects: BTreeMap<String, Entry<T>>,
    /// What a list that has not ended yet has told so far.
    listing: BTreeMap<String, Entry<T>>,
    /// Nothing is missing.
    listed: bool,
    /// Why the list failed.
    trouble: Option<String>,
}

#[derive(Debug, Clone)]
struct Entry<T> {
    uid: String,
    version: u64,
    kept: T,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Cache {
            held: Mutex::new(Held {
                objects: BTreeMap::new(),
                listing: BTreeMap::new(),
                listed: false,
                trouble: None,
            }),
            news: Notify::new(),
        }
    }
}

impl<T: Clone + PartialEq> Cache<T> {
    /// All that is kept, once everything has been listed.
    ///
    /// # Errors
    /// Why it could not be listed; the watch lists again by itself.
    pub(super) async fn all(&self) -> Result<Vec<T>, String> {
        loop {
            let mut news = pin!(self.news.notified());
            // What comes between the look and the wait is not missed.
            news.as_mut().enable();
            {
                let held = self.held();
                if held.listed {
                    return Ok(held.objects.values().map(|entry| entry.kept.clone()).collect());
                }
                if let Some(trouble) = &held.trouble {
                    return Err(trouble.clone());
                }
            }
            news.await;
        }
    }

    /// Takes in what the API server has answered to a change of ours. Its watch will tell of it later.
    pub(super) fn wrote<K: Resource>(&self, object: &K, kept: T) {
        let (key, entry) = (key(object), entry(object, kept));
        let mut held = self.held();
        let held = &mut *held;
        // One that is not there has been deleted meanwhile, or will be told of.
        for objects in [&mut held.objects, &mut held.listing] {
            if objects.contains_key(&key) {
                put(objects, key.clone(), entry.clone());
            }
        }
    }

    /// Takes in what the watch tells, and what went wrong with it. Tells whether anything has changed.
    pub(super) fn hear<K: Resource>(
        &self,
        told: Result<Event<K>, watcher::Error>,
        keep: &impl Fn(&K) -> Option<T>,
    ) -> bool {
        match told {
            Ok(event) => self.take(event, keep),
            Err(error) => {
                self.trouble(sources(&error));
                true
            }
        }
    }

    fn take<K: Resource>(&self, event: Event<K>, keep: &impl Fn(&K) -> Option<T>) -> bool {
        let mut held = self.held();
        let held = &mut *held;
        let changed = match event {
            Event::Init => {
                held.listing.clear();
                held.listed = false;
                false
            }
            Event::InitApply(object) => {
                // Of most pods nothing is kept, and a list of their names alone is large.
                if let Some(kept) = keep(&object) {
                    put(&mut held.listing, key(&object), entry(&object, kept));
                }
                false
            }
            Event::InitDone => {
                let mut listed = std::mem::take(&mut held.listing);
                for (key, entry) in std::mem::take(&mut held.objects) {
                    // Written by us after its page had been read.
                    if listed.get(&key).is_some_and(|now| now.uid == entry.uid) {
                        put(&mut listed, key, entry);
                    }
                }
                held.objects = listed;
                (held.listed, held.trouble) = (true, None);
                true
            }
            Event::Apply(object) => match keep(&object) {
                Some(kept) => put(&mut held.objects, key(&object), entry(&object, kept)),
                None => held.objects.remove(&key(&object)).is_some(),
            },
            Event::Delete(object) => held.objects.remove(&key(&object)).is_some(),
        };
        self.news.notify_waiters();
        changed
    }

    fn trouble(&self, trouble: String) {
        self.held().trouble = Some(trouble);
        self.news.notify_waiters();
    }

    fn held(&self) -> MutexGuard<'_, Held<T>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key<K: Resource>(object: &K) -> String {
    let meta = object.meta();
    let (namespace, name) = (meta.namespace.as_deref(), meta.name.as_deref());
    format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default())
}

fn entry<K: Resource, T>(object: &K, kept: T) -> Entry<T> {
    let meta = object.meta();
    let version = meta.resource_version.as_deref();
    Entry {
        uid: meta.uid.clone().unwrap_or_default(),
        // What is no number is taken in the order in which it comes.
        version: version.and_then(|version| version.parse().ok()).unwrap_or(u64::MAX),
        kept,
    }
}

/// Puts an entry in unless a newer one of the same object is there. Tells whether what is kept has changed.
fn put<T: PartialEq>(objects: &mut BTreeMap<String, Entry<T>>, key: String, entry: Entry<T>) -> bool {
    match objects.get(&key) {
        Some(there) if there.uid == entry.uid && there.version > entry.version => false,
        there => {
            let changed = there.is_none_or(|there| there.kept != entry.kept);
            objects.insert(key, entry);
            changed
        }
    }
}

/// An error with the reasons that it carries.
pub(super) fn sources(error: &dyn std::error::Error) -> String {
    let reasons = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = reasons.map(ToString::to_string).collect();
    // Some say what their source says once more.
    texts.dedup_by(|inner, outer| outer.contains(inner.as_str()));
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::ResourceExt;
    use serde_json::json;
    use tokio::time::{Duration, timeout};

    use super::*;

    /// A node at a version of its own, with a label.
    fn node(name: &str, version: &str, label: &str) -> Node {
        let metadata = json!({"name": name, "uid": name, "resourceVersion": version, "labels": {"is": label}});
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    /// Keeps the label of all but those that are dull.
    fn keep(node: &Node) -> Option<String> {
        node.labels().get("is").filter(|label| *label != "dull").cloned()
    }

    fn cache(events: impl IntoIterator<Item = Event<Node>>) -> Cache<String> {
        let cache = Cache::default();
        for event in events {
            cache.take(event, &keep);
        }
        cache
    }

    async fn all(cache: &Cache<String>) -> Vec<String> {
        cache.all().await.unwrap()
    }

    #[tokio::test]
    async fn nothing_is_told_before_everything_is_listed() {
        let cache = cache([Event::Init, Event::InitApply(node("a", "1", "old"))]);
        let waits = timeout(Duration::from_millis(1), cache.all()).await;
        assert!(waits.is_err());
        cache.trouble("the list failed".into());
        assert_eq!(cache.all().await, Err("the list failed".into()));
        assert!(cache.take(Event::InitDone, &keep));
        assert_eq!(all(&cache).await, ["old"]);
    }

    #[tokio::test]
    async fn what_we_wrote_is_not_forgotten_for_what_was_before() {
        let cache = cache([Event::Init, Event::InitApply(node("a", "1", "old")), Event::InitDone]);
        cache.wrote(&node("a", "7", "ours"), "ours".into());
        assert!(!cache.take(Event::Apply(node("a", "3", "between")), &keep));
        assert!(!cache.take(Event::Apply(node("a", "7", "ours")), &keep));
        assert_eq!(all(&cache).await, ["ours"]);
        assert!(cache.take(Event::Apply(node("a", "9", "later")), &keep));
        // A list whose page was read before we wrote.
        cache.take(Event::Init, &keep);
        cache.wrote(&node("a", "12", "ours"), "ours".into());
        cache.take(Event::InitApply(node("a", "9", "later")), &keep);
        cache.take(Event::InitDone, &keep);
        assert_eq!(all(&cache).await, ["ours"]);
    }

    #[tokio::test]
    async fn what_is_gone_does_not_come_back_by_what_we_wrote() {
        let cache = cache([Event::Init, Event::InitApply(node("a", "1", "old")), Event::InitDone]);
        assert!(cache.take(Event::Delete(node("a", "2", "old")), &keep));
        cache.wrote(&node("a", "1", "ours"), "ours".into());
        assert!(all(&cache).await.is_empty());
        // Another one of the same name, of which an older version is newer than ours.
        let mut other = node("a", "1", "other");
        other.metadata.uid = Some("b".into());
        cache.take(Event::Apply(other), &keep);
        assert_eq!(all(&cache).await, ["other"]);
    }

    #[tokio::test]
    async fn what_is_of_no_interest_is_not_kept_and_rings_nobody() {
        let cache = cache([Event::Init, Event::InitApply(node("a", "1", "dull")), Event::InitDone]);
        assert!(!cache.take(Event::Apply(node("a", "2", "dull")), &keep));
        assert!(cache.take(Event::Apply(node("a", "3", "new")), &keep));
        assert!(!cache.take(Event::Apply(node("a", "4", "new")), &keep));
        assert!(cache.take(Event::Apply(node("a", "5", "dull")), &keep));
        assert!(all(&cache).await.is_empty());
        assert!(!cache.take(Event::Delete(node("a", "6", "dull")), &keep));
    }
}
