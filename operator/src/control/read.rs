//! Reading the cluster. What of the API's types a decision needs is taken out of them here.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Pod},
    node::v1::RuntimeClass as ApiRuntimeClass,
};
use kube::{Api, Client, ResourceExt, api::ListParams};

use super::{
    NAME,
    pod::{self, COMPONENT, INSTALLER},
    record,
};
use crate::{
    api::KataConfig,
    decide::{Host, KATA, KataPod, Node, Refused, RuntimeClass, Settings, World},
};

/// The label that says that we made something.
pub(super) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// How many pods are asked for at a time.
const PAGE: u32 = 500;

pub(super) struct Eyes {
    configs: Api<KataConfig>,
    nodes: Api<ApiNode>,
    runs: Api<Pod>,
    pods: Api<Pod>,
    runtime_classes: Api<ApiRuntimeClass>,
}

impl Eyes {
    pub(super) fn new(client: Client, namespace: &str) -> Eyes {
        Eyes {
            configs: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            runs: Api::namespaced(client.clone(), namespace),
            pods: Api::all(client.clone()),
            runtime_classes: Api::all(client),
        }
    }

    /// Everything but the pods that use kata.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn read(&self, settings: &Settings, refused: Option<Refused>) -> Result<World, kube::Error> {
        let all = ListParams::default();
        let installers = ListParams::default().labels(&format!("{COMPONENT}={INSTALLER}"));
        let configs = self.configs.list(&all).await?.items;
        let runs = self.runs.list(&installers).await?.items;
        let nodes = self.nodes.list(&all).await?.items;
        let runtime_class = self.runtime_classes.get_opt(KATA).await?;
        Ok(World {
            configs,
            nodes: nodes.iter().map(node).collect(),
            runs: runs.iter().filter_map(pod::run).collect(),
            kata_pods: None,
            runtime_class: runtime_class.map(|class| RuntimeClass {
                ours: class.labels().get(MANAGED_BY).is_some_and(|value| value == NAME),
            }),
            refused,
            settings: settings.clone(),
            now: Timestamp::now(),
        })
    }

    /// The pods that use kata now, of all namespaces. They cannot be selected by that field.
    ///
    /// # Errors
    /// The API server's.
    pub(super) async fn kata_pods(&self) -> Result<Vec<KataPod>, kube::Error> {
        let mut found = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = self.pods.list(&page).await?;
            found.extend(list.items.iter().filter(|pod| uses_kata(pod)).map(|pod| KataPod {
                name: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
                node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            }));
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(found),
            }
        }
    }
}

/// It names the RuntimeClass and has not ended.
pub(super) fn uses_kata(pod: &Pod) -> bool {
    let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref());
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    class == Some(KATA) && !matches!(phase, Some("Succeeded" | "Failed"))
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
        unschedulable: node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false),
        host: host.unwrap_or_default(),
        handlers,
    }
}
