//! Pods on a network.

use tests::{
    config::Runtime,
    failure::{Result, same},
    images,
    node::Node,
    run,
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("a_web_server_on_the_pods_address", a_web_server_on_the_pods_address),
    ("two_pods_talk", two_pods_talk),
    ("a_network_that_was_there_before", a_network_that_was_there_before),
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
    let serial = node.serial();
    let (name, outside) = (format!("before-{serial}"), format!("veth{serial}"));
    let shell =
        |script: &str| run::succeed(node.command("sh").args(["-ec", script]), run::ORDINARY).map(|done| done.text());
    shell(&format!(
        "ip netns add {name}; ip link add {outside} type veth peer name eth0 netns {name}
         ip addr add 10.99.0.1/24 dev {outside}; ip link set {outside} up
         ip -n {name} addr add 10.99.0.2/24 dev eth0; ip -n {name} link set eth0 up; ip -n {name} link set lo up"
    ))?;
    let look = || {
        shell(&format!(
            "ip -n {name} -brief link; tc -n {name} qdisc show; tc -n {name} filter show dev eth0 ingress"
        ))
    };
    let before = look()?;
    let task = node
        .task(runtime, "guest")?
        .flag("--with-ns")
        .flag(&format!("network:/run/netns/{name}"))
        .start(SERVER)?;
    same("page", node.get("10.99.0.2", 8080)?.as_str(), images::PAGE)?;
    task.remove()?;
    let after = look()?;
    shell(&format!("ip link del {outside}; ip netns del {name}"))?;
    same("devices and filters afterwards", after, before)
}
