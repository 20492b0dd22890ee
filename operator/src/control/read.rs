//! Reading the cluster. What of the API's types a decision needs is taken out of them here.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Pod},
    node::v1::RuntimeClass as ApiRuntimeClass,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams},
};

use super::{
    NAME,
    pod::{self, COMPONENT, INSTALLER},
    record,
};
use crate::{
    api::{KataConfig, KataConfigSpec},
    decide::{Host, KATA, KataPod, Node, Refused, RuntimeClass, Settings, World},
    handler::PREFIX,
};

/// The annotation of the RuntimeClass with the overhead that we gave it.
pub(super) const OVERHEAD: &str = "sandpod.io/overhead";
/// The label that says that we made something.
pub(super) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

pub(super) struct Eyes {
    configs: Api<DynamicObject>,
    runs: Api<Pod>,
    runtime_classes: Api<ApiRuntimeClass>,
}

impl Eyes {
    pub(super) fn new(client: Client, namespace: &str) -> Eyes {
        Eyes {
            configs: Api::all_with(client.clone(), &ApiResource::erase::<KataConfig>(&())),
            runs: Api::namespaced(client.clone(), namespace),
            runtime_classes: Api::all(client),
        }
    }

    /// Everything but the pods that use kata; of the nodes, what the watch has told.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn read(
        &self,
        nodes: Vec<Node>,
        settings: &Settings,
        refused: Option<Refused>,
    ) -> Result<World, kube::Error> {
        let all = ListParams::default();
        let installers = ListParams::default().labels(&format!("{COMPONENT}={INSTALLER}"));
        let configs = self.configs.list(&all).await?.items.into_iter().map(config);
        let (configs, wrong): (Vec<_>, Vec<_>) = configs.unzip();
        let invalid_specs = configs.iter().map(KataConfig::name_any).zip(wrong);
        let invalid_specs = invalid_specs.filter_map(|(name, why)| Some((name, why?))).collect();
        let (mut runs, mut unread_runs) = (Vec::new(), Vec::new());
        for made in self.runs.list(&installers).await? {
            match pod::run(&made) {
                Some(run) => runs.push(run),
                None => unread_runs.push(pod::unread(&made)),
            }
        }
        let classes = self.runtime_classes.list(&all).await?.items.into_iter();
        Ok(World {
            configs,
            invalid_specs,
            nodes,
            runs,
            unread_runs,
            kata_pods: None,
            runtime_classes: classes.filter_map(runtime_class).collect(),
            feature_gates: BTreeMap::new(),
            told: BTreeSet::new(),
            refused,
            settings: settings.clone(),
            now: Timestamp::now(),
        })
    }

    /// Those of these pods that use kata, by whichever RuntimeClass.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn with_kata(&self, pods: Vec<ClassPod>) -> Result<Vec<KataPod>, kube::Error> {
        let classes = self.runtime_classes.list(&ListParams::default()).await?.items;
        let handlers = classes.iter().map(|class| (class.name_any(), class.handler.as_str()));
        let handlers: BTreeMap<String, &str> = handlers.collect();
        let ours: BTreeSet<String> = classes
            .iter()
            .filter(|class| is_ours(class))
            .map(ResourceExt::name_any)
            .collect();
        // A pod may outlive its RuntimeClass: one that has had a name as ours have counts.
        let uses = |class: &str| match handlers.get(class) {
            Some(handler) => *handler == KATA || ours.contains(*handler),
            None => class == KATA || class.starts_with(PREFIX),
        };
        let using = pods.into_iter().filter(|pod| uses(&pod.class));
        Ok(using.map(|pod| pod.pod).collect())
    }
}

/// A copy that somebody has made of one of ours has our label, and a handler that is not its name.
fn is_ours(class: &ApiRuntimeClass) -> bool {
    class.labels().get(MANAGED_BY).is_some_and(|value| value == NAME) && class.name_any() == class.handler
}

/// A RuntimeClass that is ours or has a name as ours have, with its name.
fn runtime_class(class: ApiRuntimeClass) -> Option<(String, RuntimeClass)> {
    let (name, ours) = (class.name_any(), is_ours(&class));
    let known = ours || name == KATA || name.starts_with(PREFIX);
    known.then(|| {
        let class = RuntimeClass {
            ours,
            overhead: class.annotations().get(OVERHEAD).cloned(),
            handler: class.handler,
        };
        (name, class)
    })
}

/// A pod that names a RuntimeClass and has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ClassPod {
    class: String,
    pod: KataPod,
}

/// What is kept of a pod; nothing of most. Pods cannot be selected by their RuntimeClass.
pub(super) fn class_pod(pod: &Pod) -> Option<ClassPod> {
    let spec = pod.spec.as_ref()?;
    let class = spec.runtime_class_name.clone().filter(|_| !has_ended(pod))?;
    Some(ClassPod {
        class,
        pod: KataPod {
            name: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
            node: spec.node_name.clone(),
        },
    })
}

/// No container of it runs any more.
pub(super) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// A KataConfig, with the default `spec` and what is wrong with its own where that cannot be understood. A status that
/// cannot be understood is another operator's: it is written anew.
pub(super) fn config(object: DynamicObject) -> (KataConfig, Option<String>) {
    let part = |name: &str| object.data.get(name).cloned().unwrap_or_default();
    let spec: Result<Option<KataConfigSpec>, _> = serde_json::from_value(part("spec"));
    let (spec, why) = match spec {
        Ok(spec) => (spec.unwrap_or_default(), None),
        Err(error) => (KataConfigSpec::default(), Some(error.to_string())),
    };
    let config = KataConfig {
        spec,
        status: serde_json::from_value(part("status")).ok(),
        metadata: object.metadata,
        ..KataConfig::default()
    };
    (config, why)
}

/// What a decision needs of a node.
pub(super) fn node(node: &ApiNode) -> Node {
    let status = node.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let ready = conditions.and_then(|all| all.iter().find(|condition| condition.type_ == "Ready"));
    let handlers: BTreeSet<String> = status
        .and_then(|status| status.runtime_handlers.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|handler| handler.name.clone().filter(|name| !name.is_empty()))
        .collect();
    let unschedulable = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let cordoned = node.annotations().contains_key(record::CORDONED);
    let host = status.and_then(|status| status.node_info.as_ref()).map(|info| Host {
        operating_system: info.operating_system.clone(),
        architecture: info.architecture.clone(),
        container_runtime: info.container_runtime_version.clone(),
        boot_id: info.boot_id.clone(),
        kubelet: info.kubelet_version.clone(),
        os_image: info.os_image.clone(),
    });
    Node {
        name: node.name_any(),
        uid: node.uid().unwrap_or_default(),
        labels: node.labels().clone(),
        record: record::read(&node.metadata),
        ready: ready.is_some_and(|condition| condition.status == "True"),
        since: ready.and_then(|condition| condition.last_transition_time.as_ref().map(|time| time.0)),
        unschedulable: unschedulable && !cordoned,
        cordoned,
        host: host.unwrap_or_default(),
        handlers,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spec_that_cannot_be_understood_keeps_its_config_readable() {
        let read = |spec: serde_json::Value, status: serde_json::Value| {
            let object = json!({"metadata": {"name": "a"}, "spec": spec, "status": status});
            config(serde_json::from_value(object).unwrap())
        };
        let (found, why) = read(json!({"logLevel": "Info"}), json!({"kataNodes": {"nodeCount": 2}}));
        assert_eq!(
            (found.name_any(), found.status.unwrap().kata_nodes.node_count),
            ("a".into(), 2)
        );
        assert!(why.unwrap().contains("Info"));
        // The layout of older operators.
        let (found, why) = read(json!({"logLevel": "debug"}), json!({"kataNodes": 7}));
        assert_eq!((found.status, why), (None, None));
        assert_eq!(found.spec.log_level.name(), "debug");
        assert_eq!(read(json!(null), json!(null)).1, None);
    }
}
