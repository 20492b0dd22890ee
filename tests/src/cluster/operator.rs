//! Sandpod on the node by its operator, as the documentation tells an administrator to install it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::Cluster;
use crate::{
    config::accelerator,
    failure::{Failure, Result},
    places, run,
};

/// Where the operator lives.
pub const NAMESPACE: &str = "openshift-sandboxed-containers-operator";

/// What runs its controller.
pub const CONTROLLER: &str = "deployment/sandpod-operator";

/// The guide's KataConfig.
pub const KATA_CONFIG: &str = "apiVersion: kataconfiguration.openshift.io/v1
kind: KataConfig
metadata:
  name: cluster-kataconfig
spec:
  checkNodeEligibility: false
  logLevel: info
";

/// Its kind and name.
pub const KATA_CONFIG_NAME: &str = "kataconfig/cluster-kataconfig";

/// How the guide watches it.
const WATCH: &str = "kubectl describe kataconfig | sed -n /^Status:/,/^Events/p";

/// How long an installation or a removal may take on a loaded machine.
pub const INSTALLING: Duration = Duration::from_secs(120);

impl Cluster {
    /// Prepares the node for the operator: its images, which no registry serves here, and what an administrator of a
    /// node without KVM writes.
    ///
    /// # Errors
    /// When the images have not been made.
    pub fn prepare(&self) -> Result {
        self.allow_emulation()?;
        self.load_operator_images(&places::operator_images()?)
    }

    /// Writes what an administrator of a node without KVM writes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn allow_emulation(&self) -> Result {
        if accelerator() != "tcg" {
            return Ok(());
        }
        let path = self.node.inside("/etc/sandpod/config.d/10-emulated.toml");
        self.node.write(&path, "[hypervisor.qemu]\naccelerator = \"tcg\"\n")
    }

    /// Applies the operator's manifest, and waits until the controller is there.
    ///
    /// # Errors
    /// When the controller does not start.
    pub fn install_operator(&self) -> Result {
        let manifest = manifest().display().to_string();
        self.api.kubectl(["apply", "--filename", &manifest])?;
        self.explained(self.await_controller())
    }

    /// Puts the images in a folder on the node, in the place of those of the same names.
    ///
    /// # Errors
    /// What containerd's client says.
    pub fn load_operator_images(&self, folder: &Path) -> Result {
        for image in ["operator.tar", "installer.tar"] {
            let archive = folder.join(image).display().to_string();
            self.node.ctr(["-n", "k8s.io", "images", "import", &archive])?;
        }
        Ok(())
    }

    /// Waits until the controller that was last asked for is the one that runs.
    ///
    /// # Errors
    /// When it does not start.
    pub fn await_controller(&self) -> Result {
        let words = [
            "--namespace",
            NAMESPACE,
            "rollout",
            "status",
            CONTROLLER,
            "--timeout=60s",
        ];
        run::succeed(&mut self.api.kubectl_command(words)?, INSTALLING).map(drop)
    }

    /// Creates the guide's KataConfig, and waits until it has made the RuntimeClass.
    ///
    /// # Errors
    /// When there is none in time, with everything that could tell why.
    pub fn create_kata_config(&self) -> Result {
        self.api.create(KATA_CONFIG)?;
        self.explained(self.api.wait_for("create", &["runtimeclass/kata"], INSTALLING))
    }

    /// Waits until nothing is in progress any more.
    ///
    /// # Errors
    /// When something still is at the deadline, with everything that could tell why.
    pub fn await_kata(&self) -> Result {
        let rests = "condition=InProgress=False";
        self.explained(self.api.wait_for(rests, &[KATA_CONFIG_NAME], INSTALLING))
    }

    /// What the guide's command shows of the KataConfig.
    ///
    /// # Errors
    /// When there is none.
    pub fn watched(&self) -> Result<String> {
        let kubectl = places::peers()?.join("kubectl");
        let mut command = Command::new("sh");
        command
            .args(["-c", WATCH])
            .env("PATH", search_path(kubectl.parent().unwrap_or(&kubectl)))
            .env("KUBECONFIG", self.api.kubeconfig());
        run::succeed(&mut command, run::ORDINARY).map(|output| output.text())
    }

    /// Adds to a failure what the operator has to say.
    ///
    /// # Errors
    /// The one that it is given.
    pub fn explained<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|failure| {
            let commands: [&[&str]; 4] = [
                &["describe", "kataconfig"],
                &["--namespace", NAMESPACE, "get", "pods", "--output", "wide"],
                &["--namespace", NAMESPACE, "get", "events"],
                &["--namespace", NAMESPACE, "logs", CONTROLLER, "--tail=40"],
            ];
            let said = commands.map(|words| match self.api.kubectl(words.iter().copied()) {
                Ok(output) => format!("$ kubectl {}\n{}\n", words.join(" "), output.text()),
                Err(failure) => format!("{failure}\n"),
            });
            Failure::Claim(format!("{failure}\n{}", said.concat()))
        })
    }
}

/// The path of the operator's manifest.
#[must_use]
pub fn manifest() -> PathBuf {
    places::workspace().join("deploy/install.yaml")
}

fn search_path(first: &Path) -> String {
    format!("{}:/usr/bin:/bin", first.display())
}
