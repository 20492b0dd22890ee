//! The registry of a node, which stands for every registry that its containerd is sent to.

use tests::{
    config::REGISTRIES,
    failure::Result,
    node::Node,
    registry::{PORT, Registry},
};

use crate::images;

/// The containerd namespace from which images are pushed: the CRI does not see it.
const NAMESPACE: &str = "publish";

/// The name under which the registry serves an image.
pub fn name(image: &str) -> String {
    format!("localhost:{PORT}/{image}")
}

/// Starts the registry of a node, fills it with critest's images, and sends containerd to it for images of every
/// registry.
///
/// # Errors
/// When it has not been built, or does not start.
pub fn start(node: &Node) -> Result<Registry> {
    let archive = images::archive()?.display().to_string();
    let registry = Registry::serve(node)?;
    node.ctr(["-n", NAMESPACE, "images", "import", &archive])?;
    let list = node.ctr(["-n", NAMESPACE, "images", "list", "--quiet"])?.text();
    for image in list.lines() {
        node.ctr(["-n", NAMESPACE, "images", "push", "--plain-http", image, image])?;
    }
    let mut remove = vec!["-n", NAMESPACE, "images", "remove", "--sync"];
    remove.extend(list.lines());
    node.ctr(remove)?;
    let hosts = format!(
        "server = \"http://localhost:{PORT}\"\n[host.\"http://localhost:{PORT}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    let path = format!("{REGISTRIES}/_default/hosts.toml");
    node.write(&node.path(&path), &hosts)?;
    Ok(registry)
}
