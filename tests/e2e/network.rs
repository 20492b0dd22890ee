//! Pods on a network.

use tests::{
    config::Runtime,
    failure::{Result, claim, contains, same},
    images,
    network::Network,
    node::Node,
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("a_web_server_on_the_pods_address", a_web_server_on_the_pods_address),
    ("two_pods_talk", two_pods_talk),
    ("a_network_that_was_there_before", a_network_that_was_there_before),
    ("no_network_at_all", no_network_at_all),
];

const SERVER: &[&str] = &["httpd", "-f", "-p", "8080", "-h", "/www"];

/// The address that CNI gave the pod answers from outside of it.
fn a_web_server_on_the_pods_address(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "web")?.run()?;
    pod.container("server", SERVER).run()?;
    same("page", node.get(&pod.ip()?, 8080)?.as_str(), images::PAGE)?;
    pod.remove()
}

/// A pod reaches another pod; containers of one pod share its loopback.
fn two_pods_talk(node: &Node, runtime: Runtime) -> Result {
    let server = node.pod(runtime, "server")?.run()?;
    server.container("server", SERVER).run()?;
    let neighbour = server.container("neighbour", &["sleep", "infinity"]).run()?;
    let ip = server.ip()?;
    node.get(&ip, 8080)?;
    same(
        "over loopback",
        neighbour.shell("wget -qO- http://127.0.0.1:8080/")?.as_str(),
        images::PAGE.trim_end(),
    )?;

    let client = node.pod(runtime, "client")?.run()?;
    let container = client.container("client", &["sleep", "infinity"]).run()?;
    same(
        "from another pod",
        container.shell(&format!("wget -qO- http://{ip}:8080/"))?.as_str(),
        images::PAGE.trim_end(),
    )?;
    client.remove()?;
    server.remove()
}

/// A network namespace that somebody else made is used, and given back as it was.
fn a_network_that_was_there_before(node: &Node, runtime: Runtime) -> Result {
    let network = Network::make(node)?;
    let before = network.look()?;
    let task = node
        .task(runtime, "guest")?
        .flag("--with-ns")
        .flag(&format!("network:{}", network.path()))
        .start(SERVER)?;
    same("page", node.get(&network.ip(), 8080)?.as_str(), images::PAGE)?;
    task.remove()?;
    same("devices and filters afterwards", network.look()?, before)?;
    network.remove()
}

/// Without interfaces in its namespace a container has its loopback, and nothing beyond it.
fn no_network_at_all(node: &Node, runtime: Runtime) -> Result {
    let task = node.task(runtime, "alone")?.start(SERVER)?;
    let devices = task.exec(&["ls", "/sys/class/net"])?;
    same("devices", devices.text().as_str(), "lo")?;
    let beyond = task.exec(&["wget", "-qO-", "http://10.88.0.1:8080/"])?;
    claim(beyond.code != 0, "nothing beyond the loopback answers")?;
    contains("refusal", &beyond.errors(), "unreachable")?;
    task.remove()
}
