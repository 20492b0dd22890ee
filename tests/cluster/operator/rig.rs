//! What a story plays with: nodes, a controller, and the history of what was said.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, Trying, claim},
    run::{self, Output},
    wait::Bell,
};

use super::{
    controller::{Controller, Settings},
    ground::{Ground, NAMESPACE, SOON},
    history::History,
    kubelet::{Image, Kubelet, VERSION},
};

/// The KataConfig's name in most stories, as in the guide's.
pub const NAME: &str = "cluster-kataconfig";

/// A cluster for one story.
pub struct Rig<'g> {
    pub ground: &'g Ground,
    pub history: History,
    kubelets: Vec<Kubelet>,
    controller: Option<Controller>,
    last_words: Vec<String>,
}

impl<'g> Rig<'g> {
    pub fn new(ground: &'g Ground) -> Result<Rig<'g>> {
        let history = History::begin(ground.client.clone(), &ground.runtime);
        Ok(Rig {
            ground,
            history,
            kubelets: Vec::new(),
            controller: None,
            last_words: Vec::new(),
        })
    }

    /// Workers that are Ready, and the controller.
    pub fn start(&mut self, nodes: &[&str]) -> Result {
        for node in nodes {
            self.node(node, &json!({}))?;
        }
        self.start_controller(&Settings::default())
    }

    /// The controller. Whichever ran before has to have ended.
    pub fn start_controller(&mut self, settings: &Settings) -> Result {
        self.start_controller_by(&self.ground.kubeconfig(), settings)
    }

    /// The controller, which finds the API server by this configuration.
    pub fn start_controller_by(&mut self, kubeconfig: &Path, settings: &Settings) -> Result {
        self.keep_words();
        self.controller = Some(Controller::start(kubeconfig, settings)?);
        Ok(())
    }

    pub fn controller(&mut self) -> Result<&mut Controller> {
        let none = || Failure::Claim("no controller was started".into());
        self.controller.as_mut().ok_or_else(none)
    }

    /// A worker that is Ready, with further labels, whose host is an empty folder.
    pub fn node(&mut self, name: &str, labels: &Value) -> Result {
        let folder = self.ground.path(name);
        self.register(name, labels, true)?;
        self.add_kubelet(name, folder, Image::StandIn)
    }

    /// A worker whose kubelet has not been heard of for a while.
    pub fn node_that_is_not_ready(&mut self, name: &str) -> Result {
        let folder = self.ground.path(name);
        self.register(name, &json!({}), false)?;
        self.add_kubelet(name, folder, Image::StandIn)
    }

    /// Makes the Node object, as a kubelet does when it starts.
    pub fn register(&self, name: &str, labels: &Value, ready: bool) -> Result {
        let mut all = json!({"node-role.kubernetes.io/worker": "", "kubernetes.io/hostname": name});
        if let (Some(all), Some(more)) = (all.as_object_mut(), labels.as_object()) {
            all.extend(more.clone());
        }
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": all}});
        self.must(&["create", "-f", "-"], Some(&node.to_string()))?;
        self.node_status(
            name,
            &json!({"nodeInfo": node_info()?, "conditions": [condition(ready)]}),
        )
    }

    /// Starts a kubelet for a node whose host is a folder.
    pub fn add_kubelet(&mut self, name: &str, folder: PathBuf, image: Image) -> Result {
        fs::create_dir_all(&folder).trying("making a node's folder")?;
        fs::write(folder.join("version"), VERSION).trying("writing the stand-in's version")?;
        let client = self.ground.client.clone();
        self.kubelets
            .push(Kubelet::start(name, folder, image, client, &self.ground.runtime));
        Ok(())
    }

    /// Changes the status of a node, as its kubelet would.
    pub fn node_status(&self, name: &str, status: &Value) -> Result {
        let patch = json!({"status": status}).to_string();
        let words = [
            "patch",
            "node",
            name,
            "--subresource",
            "status",
            "--type",
            "merge",
            "--patch",
            &patch,
        ];
        self.must(&words, None).map(drop)
    }

    /// Makes a node Ready or not.
    pub fn ready(&self, name: &str, ready: bool) -> Result {
        self.node_status(name, &json!({"conditions": [condition(ready)]}))
    }

    pub fn kubelet(&self, index: usize) -> Result<&Kubelet> {
        self.kubelets
            .get(index)
            .ok_or_else(|| Failure::Claim(format!("there is no node {index}")))
    }

    /// `kubectl create` of a KataConfig.
    pub fn create(&self, name: &str, spec: &Value) -> Result {
        self.must(&["create", "-f", "-"], Some(&config(name, spec))).map(drop)
    }

    /// `kubectl delete` of a KataConfig, which does not wait.
    pub fn delete(&self, name: &str) -> Result {
        self.must(&["delete", "kataconfig", name, "--wait=false"], None)
            .map(drop)
    }

    /// Changes the spec of a KataConfig.
    pub fn respec(&self, name: &str, spec: &Value) -> Result {
        let patch = json!({"spec": spec}).to_string();
        self.must(
            &["patch", "kataconfig", name, "--type", "merge", "--patch", &patch],
            None,
        )
        .map(drop)
    }

    /// A pod that uses kata, on a node. Nobody starts it.
    pub fn kata_pod(&self, name: &str, node: &str) -> Result<Output> {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"runtimeClassName": "kata", "nodeName": node, "containers": [{"name": "hello", "image": "hello"}]}});
        self.kubectl(&["create", "-f", "-"], Some(&pod.to_string()))
    }

    /// Waits until kata is on so many nodes and nothing is going on.
    pub fn until_installed(&self, name: &str, nodes: usize) -> Result {
        let claim = |row: &super::history::Row| {
            row.condition == ["False", "", ""]
                && row.nodes["nodeCount"] == nodes
                && row.nodes["readyNodeCount"] == nodes
        };
        self.history
            .until_last(name, "the end of the installation", SOON, claim)
            .map(drop)
    }

    /// Runs kubectl as administrator, whatever comes of it.
    pub fn kubectl(&self, words: &[&str], input: Option<&str>) -> Result<Output> {
        let mut command = self.ground.server.kubectl_command(words.iter().copied())?;
        run::finish(&mut command, input.map(|text| text.as_bytes().to_vec()), run::ORDINARY)
    }

    /// Runs kubectl as administrator; it must succeed.
    pub fn must(&self, words: &[&str], input: Option<&str>) -> Result<String> {
        let output = self.kubectl(words, input)?;
        let failed = || {
            Failure::Claim(format!(
                "kubectl {}: {} {}",
                words.join(" "),
                output.text(),
                output.errors()
            ))
        };
        if output.code == 0 {
            Ok(output.text())
        } else {
            Err(failed())
        }
    }

    /// Runs kubectl as the controller's service account.
    pub fn as_controller(&self, words: &[&str], input: Option<&str>) -> Result<Output> {
        let mut command: Command = self.ground.server.kubectl_command([])?;
        command.arg("--kubeconfig").arg(self.ground.kubeconfig()).args(words);
        run::finish(&mut command, input.map(|text| text.as_bytes().to_vec()), run::ORDINARY)
    }

    /// What kubectl prints as JSON.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        self.ground.server.json(words.iter().copied())
    }

    /// Waits until what kubectl prints as JSON is as claimed: for what no watch of the harness tells of.
    pub fn until_json(&self, words: &[&str], what: &str, claim: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline: Duration = SOON;
        Bell::default().until(what, deadline, || {
            let seen = self.json(words).map_err(|error| error.to_string())?;
            if claim(&seen) { Ok(seen) } else { Err(seen.to_string()) }
        })
    }

    /// Nothing of ours is on the node, neither in the API nor on its host.
    pub fn nothing_left(&self, index: usize, name: &str) -> Result {
        let metadata = self.json(&["get", "node", name])?["metadata"].clone();
        let text = format!("{} {}", metadata["labels"], metadata["annotations"]);
        let clean = ["kata-oc", "katacontainers.io", "sandpod.io"]
            .iter()
            .all(|word| !text.contains(word));
        claim(clean, format!("{name} still has {text}"))?;
        let kata = self.kubelet(index)?.folder().join("kata");
        claim(!kata.exists(), format!("{name} still has kata on its host"))
    }

    fn keep_words(&mut self) {
        if let Some(controller) = self.controller.take() {
            self.last_words.extend(controller.said.lines());
        }
    }

    /// What the controllers and the installers said, for whoever has to find out why a story failed.
    pub fn what_was_said(&mut self) -> String {
        self.keep_words();
        let installers = self.kubelets.iter().flat_map(|kubelet| kubelet.said().lines());
        let pods = self.kubectl(&["get", "pods", "--namespace", NAMESPACE, "-o", "wide"], None);
        let pods = pods.map(|output| output.text()).unwrap_or_default();
        let all: Vec<String> = self
            .last_words
            .iter()
            .cloned()
            .chain(installers)
            .chain([pods])
            .collect();
        run::last_of(&all.join("\n"), 12_000)
    }
}

/// A KataConfig as users write it.
pub fn config(name: &str, spec: &Value) -> String {
    json!({"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": name}, "spec": spec}).to_string()
}

/// What a kubelet says of its host.
pub fn node_info() -> Result<Value> {
    // The real installer compares it.
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").trying("reading the boot's identifier")?;
    Ok(json!({
        "architecture": "amd64", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12", "kernelVersion": "6.12",
        "bootID": boot_id.trim(), "containerRuntimeVersion": "containerd://2.4.2", "kubeletVersion": "v1.36.3",
        "kubeProxyVersion": "", "machineID": "", "systemUUID": "",
    }))
}

pub fn condition(ready: bool) -> Value {
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    json!({"type": "Ready", "status": if ready { "True" } else { "False" }, "reason": "Story", "message": "", "lastHeartbeatTime": now, "lastTransitionTime": now})
}
