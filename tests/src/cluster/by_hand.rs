//! Sandpod on the node without an operator: what an administrator copies, and the objects that the operator would make.

use std::fs;

use serde_json::json;

use super::{Cluster, NODE, RESTART};
use crate::{
    config::{DROP_INS, Guest},
    failure::{Result, Trying},
    places,
    run::{self, succeed},
};

/// Where the drop-in of this repository expects the shim.
const SHIM_FOLDER: &str = "/usr/local/bin";

impl Cluster {
    /// Installs Sandpod as it was built, restarts containerd, and makes the RuntimeClass `kata`.
    ///
    /// # Errors
    /// When something has not been built, or containerd does not come back.
    pub fn install_by_hand(&self) -> Result {
        let node = self.node();
        let configuration = Guest::Own.configuration()?;
        node.write(&node.path("opt/sandpod/current/configuration.toml"), &configuration)?;
        let drop_in = places::workspace().join("deploy/cri/50-kata.containerd-2.toml");
        let drop_in = fs::read_to_string(&drop_in).trying(format!("reading {}", drop_in.display()))?;
        let drop_in = drop_in.replace(SHIM_FOLDER, &places::binaries()?.display().to_string());
        node.write(&node.inside(&format!("{DROP_INS}/50-kata.toml")), &drop_in)?;
        succeed(&mut node.command(RESTART), run::ORDINARY)?;
        let labels = [
            "node-role.kubernetes.io/kata-oc=",
            "katacontainers.io/kata-runtime=true",
        ];
        self.api().kubectl(["label", "node", NODE].into_iter().chain(labels))?;
        // The overhead of processors is less than the operator's, so that more than three pods fit on two processors.
        let class = json!({
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": { "name": "kata" },
            "handler": "kata",
            "overhead": { "podFixed": { "memory": "500Mi", "cpu": "100m" } },
            "scheduling": { "nodeSelector": { "katacontainers.io/kata-runtime": "true" } },
        });
        self.api().apply(&class.to_string())
    }
}
