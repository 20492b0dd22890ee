//! The controller's command line.

use std::{net::SocketAddr, time::Duration};

use clap::Parser;
use jiff::SignedDuration;

use crate::report::DEFAULT_PREFIX;

/// Installs kata on the nodes that a KataConfig asks for.
#[derive(Debug, Clone, Parser)]
#[command(name = "sandpod-operator")]
pub struct Options {
    /// The namespace of this controller, its lease and the installer's pods
    #[arg(
        long,
        env = "SANDPOD_NAMESPACE",
        default_value = "openshift-sandboxed-containers-operator"
    )]
    pub namespace: String,
    /// The image with the installer and what it installs
    #[arg(long, env = "SANDPOD_INSTALLER_IMAGE")]
    pub installer_image: String,
    /// The version that this image carries, as `sandpod-installer --version` prints it
    #[arg(long, env = "SANDPOD_VERSION")]
    pub version: String,
    /// Where on the nodes to install
    #[arg(long, env = "SANDPOD_PREFIX", default_value = DEFAULT_PREFIX)]
    pub prefix: String,
    /// What restarts a node's container runtime [default: the installer's own, by systemctl]
    #[arg(long, env = "SANDPOD_RESTART_COMMAND")]
    pub restart_command: Option<String>,
    /// Add the line that imports the drop-ins to a node's containerd configuration where it is missing
    #[arg(long, env = "SANDPOD_ADD_IMPORTS")]
    pub add_imports: bool,
    /// The names of Secrets in the namespace with which the installer's image is pulled, separated by commas
    #[arg(long, env = "SANDPOD_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    pub image_pull_secrets: Vec<String>,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, env = "SANDPOD_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Who this is among several controllers: the pod's name
    #[arg(long, env = "POD_NAME")]
    pub identity: String,
    /// How long after a node's first failure it is tried again; doubled each time, up to 15 times as long
    #[arg(long, env = "SANDPOD_RETRY_FIRST", default_value = "60s")]
    pub retry_first: SignedDuration,
    /// How long a node has to be Ready after its container runtime was restarted, before it is the next one's turn
    #[arg(long, env = "SANDPOD_SETTLE", default_value = "45s")]
    pub settle: SignedDuration,
    /// How long one look at the cluster, with what follows from it, may take, and how long a watch may last: a
    /// connection that is silently dead holds the controller no longer
    #[arg(long, env = "SANDPOD_API_TIMEOUT", default_value = "120s", value_parser = at_least_a_second)]
    pub api_timeout: Duration,
}

fn at_least_a_second(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    let duration = Duration::try_from(duration).map_err(|error| error.to_string())?;
    match duration.as_secs() {
        0 => Err("give it a second or more, such as 120s".to_owned()),
        _ => Ok(duration),
    }
}
