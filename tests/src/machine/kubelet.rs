//! A kubelet of an emulated node, as systemd runs it, with a real API server on this machine.
//!
//! Nothing else of Kubernetes runs: a pod names its node itself. The kubelet reaches the API server through the node's
//! only network, which leads nowhere else.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use super::{Machine, ORDINARY};
use crate::{
    cluster::NODE,
    failure::{Failure, Result, Trying},
    kubernetes::{self, ApiServer},
    places,
    wait::Bell,
};

/// What the runtime class says that a pod's VM takes beside its containers' memory.
pub const OVERHEAD_MIB: u64 = 350;

/// Where the node's network has the API server.
const API_SERVER: &str = "10.0.2.100:6443";

/// The node's own address there; the network has it by default.
const ADDRESS: &str = "10.0.2.15";

/// The file below a node's folder that says where the API server is on this machine.
const PORT: &str = "api-server";

/// The program below a node's folder that joins a connection of the node to the API server.
const DOOR: &str = "to-api-server";

/// Gives the node's card its address, once a boot.
const NETWORK: &str = "set -e
card=$(basename /sys/bus/virtio/drivers/virtio_net/virtio*/net/*)
ip address replace \"$ADDRESS/24\" dev \"$card\"
ip link set \"$card\" up
ip route replace default via 10.0.2.2 dev \"$card\"";

/// A running kubelet and its API server; they end with this value, pods are removed before ([`Kubelet::delete`]).
#[derive(Debug)]
pub struct Kubelet<'m> {
    machine: &'m Machine,
    api: ApiServer,
}

/// QEMU's words for the node's network: closed, but for the door to an API server.
///
/// # Errors
/// When the door cannot be made.
pub(super) fn network(folder: &Path) -> Result<[String; 4]> {
    let door = folder.join(DOOR);
    let script = format!(
        "#!/bin/sh\nexec busybox nc 127.0.0.1 \"$(cat {})\"\n",
        folder.join(PORT).display()
    );
    fs::write(&door, script).trying("writing the door to an API server")?;
    fs::set_permissions(&door, fs::Permissions::from_mode(0o755)).trying("opening the door to an API server")?;
    Ok([
        "-netdev".into(),
        format!(
            "user,id=api,restrict=on,guestfwd=tcp:{API_SERVER}-cmd:{}",
            door.display()
        ),
        "-device".into(),
        "virtio-net-pci,netdev=api".into(),
    ])
}

impl Machine {
    /// Starts an API server, and the kubelet as a service of the node with the cgroup driver `systemd`; `options` are
    /// further fields of its `KubeletConfiguration`. The runtime class `kata` is there.
    ///
    /// # Errors
    /// When something it needs is missing, or the node does not become ready; with the kubelet's journal then.
    pub fn kubelet(&self, options: &Value) -> Result<Kubelet<'_>> {
        let api = ApiServer::start()?;
        fs::write(self.folder.path().join(PORT), api.port().to_string()).trying("telling where the API server is")?;
        let kubelet = Kubelet { machine: self, api };
        kubelet.start(options)?;
        Ok(kubelet)
    }
}

impl Kubelet<'_> {
    fn start(&self, options: &Value) -> Result {
        let (machine, api) = (self.machine, &self.api);
        // The account is the controller manager's to make.
        api.kubectl(["create", "serviceaccount", "default"])?;
        api.create(
            &json!({
                "apiVersion": "node.k8s.io/v1",
                "kind": "RuntimeClass",
                "metadata": { "name": "kata" },
                "handler": "kata",
                "overhead": { "podFixed": { "memory": format!("{OVERHEAD_MIB}Mi") } },
            })
            .to_string(),
        )?;
        let certificates = fs::read(api.certificates()).trying("reading the API server's certificate")?;
        let address = format!("https://{API_SERVER}");
        let kubeconfig = api.kubeconfig_at(&address, Path::new("/run/kubelet/api.crt"), kubernetes::NODE);
        machine.put("/run/kubelet/api.crt", &certificates)?;
        machine.put("/run/kubelet/kubeconfig", kubeconfig.as_bytes())?;
        machine.put("/run/kubelet/config.yaml", configuration(options).as_bytes())?;
        machine.run(&format!("ADDRESS={ADDRESS}\n{NETWORK}"))?;
        // Its state speaks of pods that another API server knew.
        machine.run(&format!(
            "rm -f /var/lib/kubelet/*_state && systemd-run --quiet --unit kubelet --collect --property OOMScoreAdjust=-999 \
             {program} --config /run/kubelet/config.yaml --kubeconfig /run/kubelet/kubeconfig --hostname-override {NODE} \
             --node-ip {ADDRESS}",
            program = places::peers()?.join("kubelet").display()
        ))?;
        let name = format!("node/{NODE}");
        let ready = api
            .wait_for("create", &[&name], ORDINARY)
            .and_then(|()| api.wait_for("condition=Ready", &[&name], ORDINARY));
        ready.map_err(|failure| self.with_journal(&failure))
    }

    /// The API server.
    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// Creates a pod of one container on this node, with the runtime class `kata`: its `command` runs in the test
    /// image; `change` makes more of the `PodSpec`.
    ///
    /// # Errors
    /// What the API server answers.
    pub fn create(&self, name: &str, command: &[&str], change: impl FnOnce(&mut Value)) -> Result {
        let mut spec = json!({
            "nodeName": NODE,
            "runtimeClassName": "kata",
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": crate::images::TEST, "imagePullPolicy": "Never", "command": command,
            }],
        });
        change(&mut spec);
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name }, "spec": spec });
        self.api.create(&pod.to_string())
    }

    /// Waits for a condition of a pod, as `kubectl wait` names it; a failure comes with the kubelet's journal.
    ///
    /// # Errors
    /// When it is not met in time.
    pub fn wait_for(&self, condition: &str, pod: &str) -> Result {
        let waited = self.api.wait_for(condition, &[&format!("pod/{pod}")], ORDINARY);
        waited.map_err(|failure| self.with_journal(&failure))
    }

    /// Asks `look` until it answers, up to [`ORDINARY`]; a failure comes with the kubelet's journal.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with its last answer.
    pub fn until<T>(&self, what: &str, look: impl FnMut() -> std::result::Result<T, String>) -> Result<T> {
        let seen = Bell::default().until(what, ORDINARY, look);
        seen.map_err(|failure| self.with_journal(&failure))
    }

    /// A pod as the API server knows it.
    ///
    /// # Errors
    /// What the API server answers.
    pub fn pod(&self, name: &str) -> Result<Value> {
        self.api.json(["get", "pod", name])
    }

    /// The identifier of a pod's sandbox; ended ones count.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub fn sandbox(&self, name: &str) -> Result<String> {
        let found = self.machine.crictl(&[
            "pods",
            "--quiet",
            "--no-trunc",
            "--label",
            &format!("io.kubernetes.pod.name={name}"),
        ])?;
        match found.lines().collect::<Vec<_>>()[..] {
            [id] => Ok(id.to_owned()),
            _ => Err(Failure::Claim(format!("sandboxes of the pod {name}: {found:?}"))),
        }
    }

    /// What the kubelet answers at its port for reading, such as `stats/summary`.
    ///
    /// # Errors
    /// When it does not answer, or not with JSON.
    pub fn says(&self, path: &str) -> Result<Value> {
        let text = self
            .machine
            .run(&format!("busybox wget -q -O - http://127.0.0.1:10255/{path}"))?;
        serde_json::from_str(&text).map_err(|source| Failure::Json {
            what: format!("the kubelet's {path}"),
            source,
        })
    }

    /// Deletes pods and waits until the API server has forgotten them.
    ///
    /// # Errors
    /// When they do not go in time.
    pub fn delete(&self, pods: &[&str]) -> Result {
        self.api.kubectl(
            ["delete", "pod", "--wait=false"]
                .into_iter()
                .chain(pods.iter().copied()),
        )?;
        pods.iter().try_for_each(|pod| self.wait_for("delete", pod))
    }

    fn with_journal(&self, failure: &Failure) -> Failure {
        let journal = self
            .machine
            .journal("kubelet")
            .unwrap_or_else(|error| error.to_string());
        Failure::Claim(format!("{failure}\n--- the kubelet's journal:\n{journal}"))
    }
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        if let Err(failure) = self.machine.run("systemctl stop kubelet") {
            eprintln!("a kubelet was not stopped: {failure}");
        }
    }
}

/// Nobody outside the node reaches the kubelet, so it need not ask who it is.
fn configuration(options: &Value) -> String {
    let mut configuration = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "address": "127.0.0.1",
        "readOnlyPort": 10255,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "systemd",
        "makeIPTablesUtilChains": false,
        // Everything is some ten times slower here.
        "runtimeRequestTimeout": "10m",
        "syncFrequency": "5s",
        "imageGCHighThresholdPercent": 100,
    });
    if let (Some(all), Some(options)) = (configuration.as_object_mut(), options.as_object()) {
        all.extend(options.clone());
    }
    configuration.to_string()
}
