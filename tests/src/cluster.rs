//! A whole cluster of one node: Kubernetes, containerd and CNI as they are, in namespaces of their own.
//!
//! The node is bare: whatever is to run pods besides runc is installed on it, below its own /opt and /etc. There is no
//! systemd; a [`SYSTEMCTL`] of the harness's restarts containerd, and does nothing else.

pub mod operator;
mod restarter;

use std::{fs, process::Command, sync::Arc, time::Duration};

use serde_json::json;

use self::restarter::Restarter;
use crate::{
    census,
    failure::{Result, Trying},
    kubernetes::{self, ApiServer, Part, User},
    node::{Containerd, Node, NodeSpec},
    places,
    run::{self, succeed},
};

/// The name of the node.
pub const NODE: &str = "worker-0";

/// What stands for systemd's command, a path on the node.
pub const SYSTEMCTL: &str = "/usr/local/sbin/systemctl";

/// The only thing that it does: it is back when the node's containerd serves again.
pub const RESTART: &[&str] = &["restart", "containerd"];

/// The socket on the node by which it asks the harness.
pub const RESTART_SOCKET: &str = "/run/restart-containerd.sock";

/// The node's address. Pods have others.
const ADDRESS: &str = "10.89.0.1";

/// How long the node may take to be ready.
const START: Duration = Duration::from_secs(120);

/// Furnishes a node for a kubelet: a network card with a default route, which leads nowhere; the API server's address
/// as a service, which makes kube-proxy unnecessary; logs of its own; and kernel settings that the kubelet insists on,
/// as files that look so, since they are the whole machine's.
const FURNISH: &str = "set -e
ip link add node0 type veth peer name node0-peer
ip addr add \"$ADDRESS/24\" dev node0
ip link set node0 up
ip link set node0-peer up
ip route add default dev node0
ip addr add \"$SERVICE/32\" dev lo
mkdir -p \"$FOLDER/log\" \"$FOLDER/settings\"
mount --bind \"$FOLDER/log\" /var/log
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
  file=$FOLDER/settings/$(basename \"${setting%=*}\")
  echo \"${setting#*=}\" >\"$file\"
  mount --bind \"$file\" \"/proc/sys/${setting%=*}\"
done";

/// A running cluster; it ends with this value, and everything of it is removed.
#[derive(Debug)]
pub struct Cluster {
    // In this order they end.
    kubelet: Part,
    _others: [Part; 2],
    api: ApiServer,
    _restarter: Restarter,
    node: Arc<Node>,
}

impl Cluster {
    /// Starts a cluster and waits until its node is ready.
    ///
    /// # Errors
    /// When something it needs is missing, or does not start.
    pub fn start() -> Result<Cluster> {
        let node = Arc::new(Node::start(&NodeSpec {
            bare: true,
            ..NodeSpec::new(Containerd::Newest)
        })?);
        let mut furnish = node.command("sh");
        furnish
            .args(["-c", FURNISH])
            .env("ADDRESS", ADDRESS)
            .env("SERVICE", kubernetes::SERVICE)
            .env("FOLDER", node.path("machine"));
        succeed(&mut furnish, run::ORDINARY)?;
        let restarter = Restarter::start(&node)?;
        let advertise = format!("--advertise-address={ADDRESS}");
        let api = ApiServer::start_in(node.namespaces(), &node.path(""), &[&advertise])?;
        let logs = node.path("kubernetes");
        let cluster = Cluster {
            _others: [
                Part::start(&mut controller_manager(&node, &api)?, &logs)?,
                Part::start(&mut scheduler(&node, &api)?, &logs)?,
            ],
            kubelet: Part::start(&mut kubelet(&node, &api)?, &logs)?,
            api,
            _restarter: restarter,
            node,
        };
        cluster.settle()?;
        Ok(cluster)
    }

    /// Waits until the kubelet has made the node an object, and says that it is ready.
    fn settle(&self) -> Result {
        let name = format!("node/{NODE}");
        let ready = self
            .api
            .wait_for("create", &[&name], START)
            .and_then(|()| self.api.wait_for("condition=Ready", &[&name], START));
        // Why a node is not ready, its kubelet tells.
        self.kubelet
            .until("the node's readiness", Duration::ZERO, || match &ready {
                Ok(()) => Ok(()),
                Err(failure) => Err(failure.to_string()),
            })?;
        self.api
            .kubectl(["label", &name, "node-role.kubernetes.io/worker="])
            .map(drop)
    }

    /// The cluster's API server.
    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// The cluster's node.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }
}

fn controller_manager(node: &Node, api: &ApiServer) -> Result<Command> {
    let mut command = program(node, "kube-controller-manager")?;
    command.args([
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
        format!("--kubeconfig={}", api.kubeconfig_inside(kubernetes::ADMIN)?.display()),
        format!("--cert-dir={}", node.path("kubernetes/controller-manager").display()),
        format!("--service-account-private-key-file={}", api.account_key().display()),
        format!("--root-ca-file={}", api.certificates().display()),
    ]);
    Ok(command)
}

fn scheduler(node: &Node, api: &ApiServer) -> Result<Command> {
    let mut command = program(node, "kube-scheduler")?;
    command.args([
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
        format!("--kubeconfig={}", api.kubeconfig_inside(kubernetes::ADMIN)?.display()),
        format!("--cert-dir={}", node.path("kubernetes/scheduler").display()),
    ]);
    Ok(command)
}

fn kubelet(node: &Node, api: &ApiServer) -> Result<Command> {
    // The kubelet makes the groups of pods below one that is there.
    for hierarchy in census::hierarchies() {
        let own = hierarchy.join(node.cgroup().trim_start_matches('/'));
        fs::create_dir_all(&own).trying(format!("making {}", own.display()))?;
    }
    let configuration = node.path("kubernetes/kubelet.yaml");
    node.write(&configuration, &kubelet_configuration(node))?;
    let user: User = kubernetes::NODE;
    let mut command = program(node, "kubelet")?;
    command.args([
        format!("--config={}", configuration.display()),
        format!("--kubeconfig={}", api.kubeconfig_inside(user)?.display()),
        format!("--hostname-override={NODE}"),
        format!("--node-ip={ADDRESS}"),
        format!("--root-dir={}", node.path("kubelet").display()),
        format!("--cert-dir={}", node.path("kubelet/pki").display()),
    ]);
    Ok(command)
}

/// The API server is the only one that reaches the kubelet, so that one need not ask who it is.
fn kubelet_configuration(node: &Node) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "podLogsDir": "/var/log/pods",
        "volumePluginDir": node.path("kubelet/plugins"),
        // Groups of pods as on any node, below one of this node's own.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup(),
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": ["pods"],
        "failCgroupV1": false,
        // The machine's disk and swap are other people's.
        "evictionHard": {},
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false,
        "makeIPTablesUtilChains": false,
        // Only who may lower it below its parent's can have another than 0.
        "oomScoreAdj": 0,
        // How soon a pod's volumes follow its ConfigMaps and the node's status its runtimes: by default within a
        // minute, and ten seconds.
        "syncFrequency": "5s",
        "nodeStatusUpdateFrequency": "4s",
    })
    .to_string()
}

fn program(node: &Node, name: &str) -> Result<Command> {
    Ok(node.command(&places::peers()?.join(name).display().to_string()))
}
