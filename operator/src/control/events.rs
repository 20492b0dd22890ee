//! Events, `events.k8s.io/v1`. One about a thing without a namespace is kept in `default`, where `kubectl describe`
//! looks for it.

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        core::v1::{Node as ApiNode, ObjectReference},
        events::v1::Event,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, Resource, ResourceExt, api::PostParams};

use super::NAME;
use crate::{
    api::KataConfig,
    decide::{About, Note, World},
};

/// The longest note that the API takes, in bytes.
const LONGEST: usize = 1024;

pub(super) struct Voice {
    events: Api<Event>,
    identity: String,
}

impl Voice {
    pub(super) fn new(client: Client, identity: String) -> Voice {
        Voice {
            events: Api::namespaced(client, "default"),
            identity,
        }
    }

    /// Tells an event. kube's own recorder is not used: it takes two events with the same reason for one, and keeps the
    /// first one's text.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn tell(&self, note: &Note, world: &World) -> Result<(), kube::Error> {
        let Some(regarding) = regarding(&note.about, world) else {
            return Ok(());
        };
        let event = self.event(note, regarding, Timestamp::now());
        self.events.create(&PostParams::default(), &event).await.map(drop)
    }

    fn event(&self, note: &Note, regarding: ObjectReference, now: Timestamp) -> Event {
        let mut text = note.text.clone();
        while text.len() > LONGEST {
            text.pop();
        }
        let name = regarding.name.clone().unwrap_or_default();
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{:x}", now.as_nanosecond())),
                namespace: Some("default".into()),
                ..ObjectMeta::default()
            },
            action: Some(note.reason.to_owned()),
            reason: Some(note.reason.to_owned()),
            note: Some(text),
            type_: Some(if note.warning { "Warning" } else { "Normal" }.into()),
            event_time: Some(MicroTime(now)),
            regarding: Some(regarding),
            reporting_controller: Some(format!("sandpod.io/{NAME}")),
            reporting_instance: Some(self.identity.clone()),
            ..Event::default()
        }
    }
}

/// What was about in the world that was decided on; none when it was not there.
fn regarding(about: &About, world: &World) -> Option<ObjectReference> {
    match about {
        About::Config(name) => {
            let config: &KataConfig = world.configs.iter().find(|config| config.name_any() == *name)?;
            Some(config.object_ref(&()))
        }
        About::Node(name) => {
            let node = world.nodes.iter().find(|node| node.name == *name)?;
            Some(ObjectReference {
                api_version: Some(ApiNode::api_version(&()).into_owned()),
                kind: Some("Node".into()),
                name: Some(name.clone()),
                // kubectl describe looks for a node's events by its name in this field.
                uid: Some(node.uid.clone()),
                ..ObjectReference::default()
            })
        }
    }
}
