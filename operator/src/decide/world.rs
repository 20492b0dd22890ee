//! What a decision is made from: the cluster as it was read, without anything of the API's own types but our
//! KataConfig.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};

use crate::{
    api::KataConfig,
    report::{Report, Verb},
};

/// The annotation of a KataConfig whose change makes failed nodes be tried again at once.
pub const RETRY: &str = "sandpod.io/retry";
/// The annotation of a KataConfig with the names of nodes, separated by commas, that are to be left alone as they are.
pub const SKIP_NODES: &str = "sandpod.io/skip-nodes";
/// The finalizer that keeps a KataConfig until kata is gone from the nodes.
pub const FINALIZER: &str = "kataconfiguration.openshift.io/finalizer";
/// The name of the RuntimeClass and of the handler.
pub const KATA: &str = crate::handler::KATA;

/// Everything that a decision depends on.
#[derive(Debug, Clone)]
pub struct World {
    /// All KataConfigs.
    pub configs: Vec<KataConfig>,
    /// Those whose `spec` could not be understood, by name, with what is wrong; theirs above is the default. They may
    /// have been stored under the schema of another operator.
    pub invalid_specs: BTreeMap<String, String>,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// The installer's pods.
    pub runs: Vec<Run>,
    /// The installer's pods whose orders cannot be read.
    pub unread_runs: Vec<UnreadRun>,
    /// Pods that use kata and have not ended, listed after everything else; or why they could not be listed. None while
    /// nobody has asked: a decision that depends on them says so ([`super::Decision::awaits_pods`]) and does nothing
    /// that they could forbid.
    pub kata_pods: Option<Result<Vec<KataPod>, String>>,
    /// The RuntimeClasses that are ours, or have a name that ours may have.
    pub runtime_classes: BTreeMap<String, RuntimeClass>,
    /// The installer's pod that the API server did not take, when it was tried last.
    pub refused: Option<Refused>,
    /// What the ConfigMap `osc-feature-gates` says, which OpenShift sandboxed containers reads since 1.6.
    pub feature_gates: BTreeMap<String, String>,
    /// How the controller was started.
    pub settings: Settings,
    /// The texts of the events that are told only once, and have been: see [`ONCE`].
    pub told: BTreeSet<String>,
    /// The time.
    pub now: Timestamp,
}

/// The reasons of the events about what stays as it is: the controller tells each text once in its life.
pub const ONCE: [&str; 3] = ["NodeNotSupported", "RuntimeClassNotOurs", "FeatureGateIgnored"];
/// The name of the ConfigMap with feature gates, in the operator's namespace.
pub const FEATURE_GATES: &str = "osc-feature-gates";

/// How the controller was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The version that the installer's image carries: `<version>-<8 digits of its payload's hash>`.
    pub version: String,
    /// How long after a first failure it is tried again; doubled with each, up to fifteen times as long.
    pub retry_first: SignedDuration,
    /// How long a node has to be Ready after its container runtime was restarted, before the next node's turn. A
    /// kubelet calls a container runtime dead after 30 seconds, and looks every 10.
    pub settle: SignedDuration,
    /// Where on the nodes it is installed.
    pub prefix: String,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Tells it from another one of the same name.
    pub uid: String,
    /// All labels.
    pub labels: BTreeMap<String, String>,
    /// What we noted on it.
    pub record: Record,
    /// Whether the condition Ready is True.
    pub ready: bool,
    /// Since when that is so.
    pub since: Option<Timestamp>,
    /// Cordoned by somebody else.
    pub unschedulable: bool,
    /// The annotation `sandpod.io/cordoned`: we have cordoned it for as long as it is changed.
    pub cordoned: bool,
    /// What it is.
    pub host: Host,
    /// The handlers in its status; empty when its kubelet does not say (before 1.30).
    pub handlers: BTreeSet<String>,
}

/// `status.nodeInfo` of a node. What its kubelet has not said yet is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// `linux`.
    pub operating_system: String,
    /// As Go names it: `amd64`.
    pub architecture: String,
    /// The CRI's name and version: `containerd://2.4.2`.
    pub container_runtime: String,
    /// The kernel's random identifier of this boot.
    pub boot_id: String,
    /// The kubelet's version.
    pub kubelet: String,
    /// The distribution and its version.
    pub os_image: String,
}

impl Host {
    /// What runs its pods: `containerd` or `cri-o`.
    #[must_use]
    pub fn runtime(&self) -> &str {
        self.container_runtime.split("://").next().unwrap_or_default()
    }

    /// What has to be looked at anew when it changes, besides a boot.
    #[must_use]
    pub fn software(&self) -> String {
        format!("{} {} {}", self.kubelet, self.container_runtime, self.os_image)
    }
}

/// What we note on a node, in labels and annotations. All of it is in one patch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// The label `node-role.kubernetes.io/kata-oc`: has or will have kata.
    pub member: bool,
    /// The annotation `sandpod.io/claimed`: something of ours may be on the host. The labels alone do not say so: other
    /// installers of kata use the same.
    pub claim: bool,
    /// The label `katacontainers.io/kata-runtime`: `false` from before the host is touched, `true` after it was
    /// verified.
    pub ready: Option<bool>,
    /// The annotation `sandpod.io/installed-version`.
    pub version: Option<String>,
    /// The annotation `sandpod.io/prefix`: where it is installed.
    pub prefix: Option<String>,
    /// The annotation `sandpod.io/log-level`.
    pub log_level: Option<String>,
    /// The annotation `sandpod.io/configuration`: eight digits that stand for the KataConfig's own settings, those of its
    /// RuntimeClasses among them; none where it has none.
    pub configuration: Option<String>,
    /// The annotation `sandpod.io/boot-id`: the boot in which it was verified last.
    pub boot_id: Option<String>,
    /// The annotation `sandpod.io/verified-on`: the software with which it was verified last.
    pub software: Option<String>,
    /// The annotation `sandpod.io/last-error`.
    pub last_error: Option<String>,
    /// The annotation `sandpod.io/last-run`.
    pub last_run: Option<LastRun>,
}

impl Record {
    /// Whether something of ours may be on the host.
    #[must_use]
    pub fn claimed(&self) -> bool {
        // Version 0.1 had no annotation for it: a node whose first install had not ended has the two labels alone.
        let begun = self.member && self.ready == Some(false);
        self.claim || self.version.is_some() || self.last_run.is_some() || begun
    }

    /// Whether another installer of kata has put its label here.
    #[must_use]
    pub fn foreign(&self) -> bool {
        self.ready.is_some() && !self.claimed()
    }
}

/// How the installer's last run on a node ended; JSON in the annotation `sandpod.io/last-run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    /// The uid of its pod.
    pub run: String,
    /// What it was asked for.
    pub verb: Verb,
    /// How many have failed in a row.
    pub failures: u32,
    /// When it ended.
    pub ended: Time,
    /// When the next may start.
    pub due: Time,
    /// For what it was made: see [`Order::purpose`].
    pub purpose: String,
    /// The installer found the node unfit or in use, and changed nothing: that says nothing about other nodes.
    #[serde(default)]
    pub refused: bool,
}

/// One pod of the installer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// What it was made for.
    pub order: Order,
    /// When the pod was created.
    pub created: Timestamp,
    /// Somebody has deleted the pod, and its kubelet has not confirmed it.
    pub deleted: bool,
    /// How far it is.
    pub progress: Progress,
}

/// A pod of the installer that another version of the operator has made, in words that this one does not know. Nothing
/// is begun on its node before it has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadRun {
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The name of the node that it was made for.
    pub node: String,
    /// It has ended.
    pub ended: bool,
    /// Somebody has deleted the pod, and its kubelet has not confirmed it.
    pub deleted: bool,
}

/// What a run of the installer is made for. The pod carries all of it, so that a controller that starts later can read
/// the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// What to do.
    pub verb: Verb,
    /// On which node.
    pub node: String,
    /// And that node's uid.
    pub node_uid: String,
    /// The version that the installer's image carries.
    pub version: String,
    /// The CRI's log level.
    pub log_level: String,
    /// The KataConfig's own configuration of pods; empty where it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub configuration: String,
    /// The configurations of its RuntimeClasses beside `kata`, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub runtime_classes: BTreeMap<String, String>,
    /// Changes with the KataConfig's spec, its retry annotation and our version: a failure counts only for its own
    /// purpose.
    pub purpose: String,
    /// How many runs before it failed.
    pub failures: u32,
    /// The node's boot when the run was made. A later boot has not been verified by it.
    pub boot_id: String,
    /// The node's software when the run was made.
    pub software: String,
    /// Pods could come to the node until the run was made: what had been verified was there.
    #[serde(default)]
    pub in_service: bool,
    /// What runs the node's pods, as its kubelet says: `containerd` or `cri-o`. Empty when it does not say.
    #[serde(default)]
    pub runtime: String,
    /// Where on the node. Empty for the installer's own default.
    #[serde(default)]
    pub prefix: String,
}

/// A pod of the installer that the API server did not take: by a quota, a policy, or the namespace's pod security.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// For which node.
    pub node: String,
    /// To do what.
    pub verb: Verb,
    /// And for what: see [`Order::purpose`].
    pub purpose: String,
    /// When.
    pub at: Timestamp,
    /// What the API server said.
    pub text: String,
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The container has not started; with what its kubelet says about why.
    Pending(Option<String>),
    /// It runs.
    Running,
    /// It said what it was asked for is done.
    Done {
        /// When its container ended.
        ended: Timestamp,
        /// What it said.
        report: Report,
    },
    /// It did not do what it was asked for.
    Failed {
        /// When its container ended.
        ended: Timestamp,
        /// What it said, if it did.
        report: Option<Report>,
        /// A sentence for people.
        text: String,
    },
}

/// A pod that uses kata and has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KataPod {
    /// Its namespace and name.
    pub name: String,
    /// The node it was given to.
    pub node: Option<String>,
}

/// A RuntimeClass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeClass {
    /// We made it. Another one is left as it is, also at the end.
    pub ours: bool,
    /// Its handler.
    pub handler: String,
    /// The overhead that we wrote last, in its annotation `sandpod.io/overhead`; what somebody else has changed since
    /// stays.
    pub overhead: Option<String>,
}
