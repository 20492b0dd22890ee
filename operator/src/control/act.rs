//! Doing what was decided. Everything that is there already, or gone already, is done.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Pod},
    node::v1::RuntimeClass as ApiRuntimeClass,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tracing::info;

use super::{
    NAME, Options,
    cache::Cache,
    events::Voice,
    metrics::Metrics,
    pod,
    read::{self, MANAGED_BY, OVERHEAD},
    record::{self, CORDONED, MEMBER, READY},
};
use crate::{
    api::{GROUP, KIND, KataConfig, KataConfigStatus, PodOverhead, VERSION},
    decide::{Action, Decision, FINALIZER, Node, Note, Refused, Step, World},
};

/// Why not everything was done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActError {
    /// The installer's pod is not let in: that is for an administrator to see.
    #[error("the installer's pod for node {} is refused: {}", .0.node, .0.text)]
    Refused(Refused),
    /// Something else is not let in: likewise.
    #[error("{action} is refused: {text}")]
    Denied {
        /// What was to be done.
        action: String,
        /// What the API server said.
        text: String,
    },
    /// A connection is dead, and nobody has said so.
    #[error("the API server does not answer")]
    Silent,
    /// The nodes could not be listed.
    #[error("the nodes cannot be listed: {0}")]
    Nodes(String),
    /// Anything else passes.
    #[error(transparent)]
    Api(#[from] kube::Error),
}

pub(super) struct Hands {
    /// Not by their type: another operator may have stored what ours does not know.
    configs: Api<DynamicObject>,
    nodes: Api<ApiNode>,
    known_nodes: Arc<Cache<Node>>,
    runs: Api<Pod>,
    runtime_classes: Api<ApiRuntimeClass>,
    voice: Voice,
    metrics: Arc<Metrics>,
    options: Options,
}

impl Hands {
    /// `known_nodes` hears of what is written on nodes.
    pub(super) fn new(client: Client, known_nodes: Arc<Cache<Node>>, metrics: Arc<Metrics>, options: Options) -> Hands {
        Hands {
            configs: Api::all_with(client.clone(), &ApiResource::erase::<KataConfig>(&())),
            nodes: Api::all(client.clone()),
            known_nodes,
            runs: Api::namespaced(client.clone(), &options.namespace),
            runtime_classes: Api::all(client.clone()),
            voice: Voice::new(client, options.identity.clone()),
            metrics,
            options,
        }
    }

    /// Writes the statuses and takes the actions in their order, as far as `done` says then; what ends with a step is
    /// counted with it.
    ///
    /// # Errors
    /// The API server's first one; what comes after it is left out.
    pub(super) async fn carry_out(&self, world: &World, decision: &Decision, done: &mut Step) -> Result<(), ActError> {
        let mut configs: BTreeMap<String, KataConfig> = world
            .configs
            .iter()
            .map(|config| (config.name_any(), config.clone()))
            .collect();
        for (number, (name, status)) in decision.statuses.iter().enumerate() {
            let reason = status.in_progress().map_or("", |condition| condition.reason.as_str());
            info!(config = name, reason, "writing the status");
            if let Some(written) = self.write_status(name, status).await? {
                configs.insert(name.clone(), written);
            }
            *done = Step::Statuses(number + 1);
        }
        for (number, action) in decision.actions.iter().enumerate() {
            info!("acting: {action}");
            self.act(action, &configs)
                .await
                .map_err(|error| failed(action, error))?;
            *done = Step::Actions(number + 1);
            self.metrics.count(decision.ends_with(*done));
        }
        Ok(())
    }

    /// Tells an event.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn tell(&self, note: &Note, world: &World) -> Result<(), kube::Error> {
        self.voice.tell(note, world).await
    }

    /// By server-side apply: lists that we leave out are removed, and nobody else's fields are touched.
    async fn write_status(&self, name: &str, status: &KataConfigStatus) -> Result<Option<KataConfig>, kube::Error> {
        let apply = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": KIND,
            "metadata": {"name": name},
            "status": status,
        });
        let manager = PatchParams::apply(NAME).force();
        let written = self.configs.patch_status(name, &manager, &Patch::Apply(&apply)).await;
        let written = unless_gone(written)?;
        Ok(written.map(|object| read::config(object).0))
    }

    async fn act(&self, action: &Action, configs: &BTreeMap<String, KataConfig>) -> Result<(), kube::Error> {
        match action {
            Action::AddFinalizer(name) => {
                let with = |finalizers: &mut Vec<String>| finalizers.push(FINALIZER.to_owned());
                self.finalizers(configs.get(name), with).await
            }
            Action::RemoveFinalizer(name) => {
                let without = |finalizers: &mut Vec<String>| finalizers.retain(|finalizer| finalizer != FINALIZER);
                self.finalizers(configs.get(name), without).await
            }
            Action::Mark { node, record } => self.patch_node(node, &record::patch(record)).await,
            Action::Cordon { node, on } => {
                let note = on.then_some("true");
                let patch = json!({"metadata": {"annotations": {CORDONED: note}}, "spec": {"unschedulable": on.then_some(true)}});
                self.patch_node(node, &patch).await
            }
            Action::StartRun { name, order } => {
                let pod = pod::pod(name, order, &self.options);
                self.create(&self.runs, pod).await
            }
            Action::DeleteRun { name, uid } => {
                let this = Preconditions {
                    uid: Some(uid.clone()),
                    ..Preconditions::default()
                };
                let deleted = self
                    .runs
                    .delete(name, &DeleteParams::default().preconditions(this))
                    .await;
                unless_gone(deleted).map(drop)
            }
            Action::CreateRuntimeClass { name, owner, overhead } => match configs.get(owner) {
                Some(owner) => {
                    let class = runtime_class(name, owner, overhead);
                    self.create(&self.runtime_classes, class).await
                }
                None => Ok(()),
            },
            Action::SetOverhead { name, overhead } => {
                let patch = json!({
                    "metadata": {"annotations": {OVERHEAD: overhead.to_string()}},
                    "overhead": pod_fixed(overhead),
                });
                let patch = Patch::Merge(&patch);
                let patched = self.runtime_classes.patch(name, &PatchParams::default(), &patch).await;
                unless_gone(patched).map(drop)
            }
            Action::DeleteRuntimeClass(name) => {
                let deleted = self.runtime_classes.delete(name, &DeleteParams::default()).await;
                unless_gone(deleted).map(drop)
            }
        }
    }

    async fn patch_node(&self, node: &str, patch: &Value) -> Result<(), kube::Error> {
        let patched = self
            .nodes
            .patch(node, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        if let Some(patched) = unless_gone(patched)? {
            self.known_nodes.wrote(&patched, read::node(&patched));
        }
        Ok(())
    }

    /// Changes the finalizers of the KataConfig as it was read: an error, if somebody has changed it since.
    async fn finalizers(
        &self,
        config: Option<&KataConfig>,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<(), kube::Error> {
        let Some(config) = config else {
            return Ok(());
        };
        let mut finalizers = config.finalizers().to_vec();
        change(&mut finalizers);
        let patch = json!({"metadata": {"resourceVersion": config.resource_version(), "finalizers": finalizers}});
        let name = config.name_any();
        unless_gone(
            self.configs
                .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await,
        )
        .map(drop)
    }

    async fn create<K>(&self, api: &Api<K>, object: Value) -> Result<(), kube::Error>
    where
        K: Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
    {
        let object: K = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
        let manager = PostParams {
            field_manager: Some(NAME.to_owned()),
            ..PostParams::default()
        };
        match api.create(&manager, &object).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            created => created.map(drop),
        }
    }
}

/// The RuntimeClass `kata`: an overhead, which is the administrator's to change from here on, and only nodes that have
/// kata and are seen to run it.
fn runtime_class(name: &str, owner: &KataConfig, overhead: &PodOverhead) -> Value {
    json!({
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {
            "name": name,
            "labels": {MANAGED_BY: NAME},
            "annotations": {OVERHEAD: overhead.to_string()},
            "ownerReferences": [{
                "apiVersion": format!("{GROUP}/{VERSION}"),
                "kind": KIND,
                "name": owner.name_any(),
                "uid": owner.uid().unwrap_or_default(),
            }],
        },
        "handler": name,
        "overhead": pod_fixed(overhead),
        "scheduling": {"nodeSelector": {MEMBER: "", READY: "true"}},
    })
}

/// The RuntimeClass's field `overhead`.
fn pod_fixed(overhead: &PodOverhead) -> Value {
    json!({"podFixed": {"cpu": overhead.cpu, "memory": overhead.memory}})
}

/// Tells a pod that is not let in from what passes by itself.
fn failed(action: &Action, error: kube::Error) -> ActError {
    match (action, error) {
        (Action::StartRun { order, .. }, kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 422) => {
            ActError::Refused(Refused {
                node: order.node.clone(),
                verb: order.verb,
                purpose: order.purpose.clone(),
                at: Timestamp::now(),
                text: status.message.clone(),
            })
        }
        (_, kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 422) => ActError::Denied {
            action: action.to_string(),
            text: status.message.clone(),
        },
        (_, error) => ActError::Api(error),
    }
}

/// What is gone needs no change.
fn unless_gone<T>(result: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_class_is_the_guides() {
        let owner: KataConfig =
            serde_json::from_value(json!({"metadata": {"name": "cluster-kataconfig", "uid": "u"}})).unwrap();
        let made = runtime_class("kata", &owner, &owner.spec.pod_overhead().unwrap());
        let expected = json!({
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {
                "name": "kata",
                "labels": {"app.kubernetes.io/managed-by": "sandpod-operator"},
                "annotations": {"sandpod.io/overhead": "cpu 500m, memory 500Mi"},
                "ownerReferences": [{"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "name": "cluster-kataconfig", "uid": "u"}],
            },
            "handler": "kata",
            "overhead": {"podFixed": {"cpu": "500m", "memory": "500Mi"}},
            "scheduling": {"nodeSelector": {"node-role.kubernetes.io/kata-oc": "", "katacontainers.io/kata-runtime": "true"}},
        });
        assert_eq!(made, expected);
        let typed: ApiRuntimeClass = serde_json::from_value(made.clone()).unwrap();
        assert_eq!(
            serde_json::to_value(typed).unwrap(),
            made,
            "a field that the API does not know"
        );
    }
}
