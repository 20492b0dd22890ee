//! The one real node that the stories share, with Sandpod on it and an ordinary pod beside.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use libtest_mimic::Trial;
use serde_json::{Value, json};
use tests::{
    cluster::Cluster,
    failure::{Failure, Result, same},
    images,
    kubernetes::ApiServer,
    node::Node,
};

/// How long a pod may take to be ready: more than an emulated machine on a loaded node.
pub const READY: Duration = Duration::from_secs(120);

/// A story on the node.
pub type Story = (&'static str, fn(&Ground) -> Result);

/// A node with everything installed.
pub struct Ground {
    /// The cluster.
    pub cluster: Cluster,
    neighbour: Value,
}

/// Where the ground will be, once a story needs it.
#[derive(Default)]
pub struct Site(OnceLock<Result<Ground>>);

impl Site {
    /// A story as a trial; it fails also when it has touched the pod that is none of its business.
    pub fn trial(self: &Arc<Self>, (name, tell): Story) -> Trial {
        let site = Arc::clone(self);
        Trial::test(format!("real-node/{name}"), move || {
            let ground = site.0.get_or_init(Ground::prepare).as_ref();
            let ground = ground.map_err(|failure| Failure::Claim(format!("there is no node: {failure}")))?;
            tell(ground)?;
            Ok(ground.neighbour_is_untouched()?)
        })
    }
}

impl Ground {
    fn prepare() -> Result<Ground> {
        let cluster = Cluster::start()?;
        let api = cluster.api();
        api.apply(&manifest(
            "neighbour",
            json!({
                "containers": [{ "name": "main", "image": images::HELLO, "imagePullPolicy": "Never" }],
            }),
        ))?;
        cluster.install_by_hand()?;
        api.wait_for("condition=Ready", &["pod/neighbour"], READY)?;
        let neighbour = container(api, "neighbour")?;
        Ok(Ground { cluster, neighbour })
    }

    /// The API server.
    pub fn api(&self) -> &ApiServer {
        self.cluster.api()
    }

    /// The node.
    pub fn node(&self) -> &Node {
        self.cluster.node()
    }

    fn neighbour_is_untouched(&self) -> Result {
        same(
            "the ordinary pod's container",
            container(self.api(), "neighbour")?,
            self.neighbour.clone(),
        )
    }

    /// Makes a pod with this specification, runs it as kata, and waits until it is ready.
    pub fn run(&self, name: &str, mut specification: Value) -> Result {
        self.begin(name, &mut specification)?;
        self.api().wait_for("condition=Ready", &[&format!("pod/{name}")], READY)
    }

    /// Makes a pod with this specification that runs as kata.
    pub fn begin(&self, name: &str, specification: &mut Value) -> Result {
        specification["runtimeClassName"] = json!("kata");
        self.api().apply(&manifest(name, specification.clone()))
    }

    /// The output of a shell's script in a pod's container.
    pub fn shell(&self, pod: &str, script: &str) -> Result<String> {
        let words = ["exec", pod, "--", "sh", "-c", script];
        self.api().kubectl(words).map(|output| output.text())
    }

    /// Removes pods and other objects, and waits until they are gone.
    pub fn remove(&self, objects: &[&str]) -> Result {
        let words = ["delete", "--cascade=foreground", "--timeout=60s"];
        let command = words.into_iter().chain(objects.iter().copied());
        self.api().kubectl(command).map(drop)
    }
}

/// A pod as a manifest.
pub fn manifest(name: &str, specification: Value) -> String {
    let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } } });
    pod["spec"] = specification;
    pod.to_string()
}

/// The identifier of a pod's container, and how often it was restarted.
pub fn container(api: &ApiServer, pod: &str) -> Result<Value> {
    let pod = api.json(["get", "pod", pod])?;
    let container = &pod["status"]["containerStatuses"][0];
    Ok(json!([container["containerID"], container["restartCount"]]))
}
