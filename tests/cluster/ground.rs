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
    suite,
};

/// How long a pod may take to be ready: more than an emulated machine on a loaded node.
pub const READY: Duration = Duration::from_secs(120);

/// The processors that a pod takes besides its containers': a user's change of the RuntimeClass.
pub const CPU_OVERHEAD: &str = "100m";

/// A story on the node.
pub type Story = (&'static str, fn(&Ground) -> Result);

/// A node with everything installed.
pub struct Ground {
    /// The cluster.
    pub cluster: Cluster,
    neighbour: Neighbour,
}

/// An ordinary pod beside.
pub struct Neighbour(Value);

/// Where the ground will be, once a story needs it.
#[derive(Default)]
pub struct Site(OnceLock<Result<Ground>>);

impl Site {
    /// A story as a trial; it fails also when it has touched the pod that is none of its business.
    pub fn trial(self: &Arc<Self>, (name, tell): Story) -> Trial {
        let site = Arc::clone(self);
        suite::trial(format!("real-node/{name}"), move || {
            let ground = site.0.get_or_init(Ground::prepare).as_ref();
            let ground = ground.map_err(|failure| Failure::Claim(format!("there is no node: {failure}")))?;
            tell(ground)?;
            ground.neighbour.is_untouched(&ground.cluster)
        })
    }
}

impl Neighbour {
    /// Starts it.
    pub fn settle(cluster: &Cluster) -> Result<Neighbour> {
        let server = json!({ "name": "main", "image": images::HELLO, "imagePullPolicy": "Never" });
        let api = cluster.api();
        api.apply(&manifest("neighbour", json!({ "containers": [server] })))?;
        api.wait_for("condition=Ready", &["pod/neighbour"], READY)?;
        container(api, "neighbour").map(Neighbour)
    }

    /// Fails when its container is another now, or was restarted.
    pub fn is_untouched(&self, cluster: &Cluster) -> Result {
        let now = container(cluster.api(), "neighbour")?;
        same("the ordinary pod's container", now, self.0.clone())
    }
}

impl Ground {
    fn prepare() -> Result<Ground> {
        let cluster = Cluster::start()?;
        let api = cluster.api();
        let neighbour = Neighbour::settle(&cluster)?;
        cluster.prepare()?;
        cluster.install_operator()?;
        cluster.create_kata_config()?;
        cluster.await_kata()?;
        // Five pods fit on two processors when each takes less than the half of one: the guide's way to change the
        // overhead.
        let overhead = json!({ "overhead": { "podFixed": { "memory": "500Mi", "cpu": CPU_OVERHEAD } } }).to_string();
        api.kubectl(["patch", "runtimeclass", "kata", "--patch", &overhead])?;
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
