//! The KataConfig resource, `kataconfigs.kataconfiguration.openshift.io/v1`, as users write it and as they read it
//! back.
//!
//! Its schema is `deploy/operator/crd.yaml`, written by hand: a derived one cannot say that `spec` may be left out and
//! still has defaults. The tests here hold the two against each other.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{
    ClusterResourceScope,
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
};
use kube::Resource;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{handler, log_level::LogLevel};

/// The API group.
pub const GROUP: &str = "kataconfiguration.openshift.io";
/// Its only version.
pub const VERSION: &str = "v1";
/// The kind.
pub const KIND: &str = "KataConfig";
/// The guide's condition.
pub const IN_PROGRESS: &str = "InProgress";
/// Pods can use kata on some node.
pub const AVAILABLE: &str = "Available";
/// Nodes are being changed.
pub const PROGRESSING: &str = "Progressing";
/// An administrator has to act.
pub const DEGRADED: &str = "Degraded";

/// What an administrator asks for, and how far it is. Cluster-scoped; one is in force at a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KataConfig {
    /// Always `kataconfiguration.openshift.io/v1`.
    #[serde(default = "api_version")]
    pub api_version: String,
    /// Always `KataConfig`.
    #[serde(default = "kind")]
    pub kind: String,
    /// Name, annotations, finalizers.
    pub metadata: ObjectMeta,
    /// What is asked for. Left out and null both mean the defaults.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: KataConfigSpec,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<KataConfigStatus>,
}

/// `spec` of a KataConfig.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KataConfigSpec {
    /// Only nodes with the NFD label `feature.node.kubernetes.io/runtime.kata=true`.
    #[serde(deserialize_with = "or_default")]
    pub check_node_eligibility: bool,
    /// Pods in cloud VMs, which Sandpod does not run: `true` is refused in the status.
    #[serde(deserialize_with = "or_default")]
    pub enable_peer_pods: bool,
    /// How much the nodes' container runtime and our shim log.
    #[serde(deserialize_with = "or_default")]
    pub log_level: LogLevel,
    /// Which nodes; all workers when absent or null.
    pub kata_config_pool_selector: Option<LabelSelector>,
    /// How changes go from node to node.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_default")]
    pub rollout: Rollout,
    /// What a pod takes on its node besides its containers, as the RuntimeClass `kata` tells the scheduler.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_default")]
    pub overhead: Overhead,
    /// Its memory in MiB, as later versions of OpenShift sandboxed containers name it.
    #[serde(rename = "memoryOverheadMB", skip_serializing_if = "Option::is_none")]
    pub memory_overhead_mb: Option<i64>,
    /// TOML that is laid over the installed configuration of the nodes' pods, before the files of a node's own
    /// administrator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
    /// More RuntimeClasses beside `kata`, each with settings of its own.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub runtime_classes: Vec<ClassSpec>,
}

/// One of `spec.runtimeClasses` of a KataConfig.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClassSpec {
    /// Its name, which is its handler's, too: `kata-...`.
    pub name: String,
    /// TOML that is laid over all other settings for its pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
    /// What its pods take on their node besides their containers; what is left out is as for `kata`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_default")]
    pub overhead: Overhead,
}

/// A RuntimeClass with settings of its own, as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class {
    /// TOML for its pods, or empty.
    pub configuration: String,
    /// What it tells the scheduler.
    pub overhead: PodOverhead,
}

impl KataConfigSpec {
    /// What a pod takes on its node besides its containers: what is asked for, or else the guide's figures.
    ///
    /// # Errors
    /// Two fields contradict each other.
    pub fn pod_overhead(&self) -> Result<PodOverhead, String> {
        let megabytes = self.memory_overhead_mb.map(|number| format!("{number}Mi"));
        let memory = match (&self.overhead.memory, megabytes) {
            (Some(_), Some(_)) => {
                return Err("overhead.memory and memoryOverheadMB are the same; leave one of them out".to_owned());
            }
            (memory, megabytes) => memory.clone().or(megabytes),
        };
        let cpu = self.overhead.cpu.clone();
        Ok(PodOverhead {
            asked_for: cpu.is_some() || memory.is_some(),
            cpu: cpu.unwrap_or_else(|| "500m".to_owned()),
            memory: memory.unwrap_or_else(|| "500Mi".to_owned()),
        })
    }

    /// The RuntimeClasses beside `kata`, by their names.
    ///
    /// # Errors
    /// One has a name that it cannot have, or that another one has.
    pub fn classes(&self) -> Result<BTreeMap<String, Class>, String> {
        let common = self.pod_overhead()?;
        let mut classes = BTreeMap::new();
        for ClassSpec {
            name,
            configuration,
            overhead,
        } in &self.runtime_classes
        {
            if let Some(why) = handler::refusal(name) {
                return Err(format!("runtimeClasses: {why}"));
            }
            let class = Class {
                configuration: configuration.clone().unwrap_or_default(),
                overhead: PodOverhead {
                    asked_for: common.asked_for || overhead.cpu.is_some() || overhead.memory.is_some(),
                    cpu: overhead.cpu.as_ref().unwrap_or(&common.cpu).clone(),
                    memory: overhead.memory.as_ref().unwrap_or(&common.memory).clone(),
                },
            };
            if classes.insert(name.clone(), class).is_some() {
                return Err(format!("runtimeClasses: {name} is there twice; leave one of them out"));
            }
        }
        Ok(classes)
    }
}

/// `spec.overhead` of a KataConfig.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Overhead {
    /// Processors; half of one when absent.
    pub cpu: Option<String>,
    /// Bytes; 500 MiB when absent.
    pub memory: Option<String>,
}

/// `overhead.podFixed` of the RuntimeClass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodOverhead {
    /// A KataConfig says so; else it is only what a new RuntimeClass gets.
    pub asked_for: bool,
    /// Processors.
    pub cpu: String,
    /// Bytes.
    pub memory: String,
}

impl std::fmt::Display for PodOverhead {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "cpu {}, memory {}", self.cpu, self.memory)
    }
}

/// `spec.rollout` of a KataConfig.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rollout {
    /// How many nodes may be changed, or be down after a change, at once: a number, or a part of the nodes that have or
    /// will have kata in percent, rounded down; at least 1, which is the default.
    pub max_unavailable: Option<IntOrString>,
    /// No node is begun. Nodes that are being changed are finished, and a deletion goes on.
    #[serde(deserialize_with = "or_default")]
    pub paused: bool,
    /// Only nodes with all of these labels are installed or upgraded.
    pub canary: Option<BTreeMap<String, String>>,
    /// No new pods come to a node while it is changed.
    #[serde(deserialize_with = "or_default")]
    pub cordon: bool,
}

impl Rollout {
    /// How many of so many nodes may be changed at once.
    ///
    /// # Errors
    /// What is wrong with `maxUnavailable`.
    pub fn most(&self, nodes: usize) -> Result<usize, String> {
        let wrong = |value: String| {
            format!("rollout.maxUnavailable: {value} is neither a number from 1 on nor a percentage from 1% to 100%")
        };
        match &self.max_unavailable {
            None => Ok(1),
            Some(IntOrString::Int(number)) => match usize::try_from(*number) {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(wrong(number.to_string())),
            },
            Some(IntOrString::String(text)) => {
                let percent = text.strip_suffix('%').and_then(|digits| digits.parse::<usize>().ok());
                let percent = percent.filter(|percent| (1..=100).contains(percent));
                let percent = percent.ok_or_else(|| wrong(format!("{text:?}")))?;
                Ok((nodes.saturating_mul(percent) / 100).max(1))
            }
        }
    }
}

/// `status` of a KataConfig.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KataConfigStatus {
    /// The RuntimeClasses that can be used.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runtime_classes: Vec<String>,
    /// `InProgress`, for people, and `Available`, `Progressing` and `Degraded`, for machines.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Which node is in which state.
    pub kata_nodes: KataNodes,
    /// Always false here: there is no MachineConfigOperator to wait for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub waiting_for_mco_to_start: bool,
}

impl KataConfigStatus {
    /// The condition `InProgress`.
    #[must_use]
    pub fn in_progress(&self) -> Option<&Condition> {
        self.condition(IN_PROGRESS)
    }

    /// The condition of this type.
    #[must_use]
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }
}

/// A condition. Unlike a metav1.Condition, `InProgress` has no observedGeneration, and its `reason` may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `InProgress`, `Available`, `Progressing` or `Degraded`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    /// When `status` changed last.
    pub last_transition_time: Time,
    /// One word, or nothing.
    pub reason: String,
    /// A sentence, or nothing.
    pub message: String,
    /// The `metadata.generation` that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Node names by state, each list sorted and absent when empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KataNodes {
    /// Nodes that have or will have kata.
    pub node_count: i64,
    /// Nodes that have it.
    pub ready_node_count: i64,
    /// Those that have it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub installed: Vec<String>,
    /// Those that the installer works on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub installing: Vec<String>,
    /// Those whose turn comes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waiting_to_install: Vec<String>,
    /// Those on which the installer failed; it is tried again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_to_install: Vec<String>,
    /// Those that kata is being removed from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uninstalling: Vec<String>,
    /// Those that kata will be removed from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waiting_to_uninstall: Vec<String>,
    /// Those that kata could not be removed from; it is tried again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_to_uninstall: Vec<String>,
}

impl Resource for KataConfig {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "kataconfigs".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

fn api_version() -> String {
    format!("{GROUP}/{VERSION}")
}

fn kind() -> String {
    KIND.to_owned()
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Null means the same as absent.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
