//! Pods on a network.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpStream},
    os::unix::process::CommandExt,
    process::{Child, Stdio},
    thread,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::json;
use tests::{
    config::Runtime,
    failure::{Failure, Result, Trying, claim, contains, same},
    images,
    network::Network,
    node::Node,
    run,
};

use crate::{Story, stdio};

pub const STORIES: &[Story] = &[
    ("a_web_server_on_the_pods_address", a_web_server_on_the_pods_address),
    ("two_pods_talk", two_pods_talk),
    ("a_network_that_was_there_before", a_network_that_was_there_before),
    ("a_network_has_what_cni_has_set", a_network_has_what_cni_has_set),
    ("no_network_at_all", no_network_at_all),
    ("a_port_is_forwarded", a_port_is_forwarded),
    ("the_loopback_of_the_pods_network", the_loopback_of_the_pods_network),
];

const SERVER: &[&str] = &["httpd", "-f", "-p", "8080", "-h", "/www"];

/// The address that CNI gave the pod answers from outside of it.
fn a_web_server_on_the_pods_address(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "web")?.run()?;
    pod.container("server", SERVER).run()?;
    same("page", node.get(&pod.ip()?, 8080, "/")?.as_str(), images::PAGE)?;
    pod.remove()
}

/// A pod reaches another pod; containers of one pod share its loopback.
fn two_pods_talk(node: &Node, runtime: Runtime) -> Result {
    let server = node.pod(runtime, "server")?.run()?;
    server.container("server", SERVER).run()?;
    let neighbour = server.container("neighbour", &["sleep", "infinity"]).run()?;
    let ip = server.ip()?;
    node.get(&ip, 8080, "/")?;
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
    same("page", node.get(&network.ip(), 8080, "/")?.as_str(), images::PAGE)?;
    task.remove()?;
    same("devices and filters afterwards", network.look()?, before)?;
    network.remove()
}

/// What CNI's plugins change in a pod's network namespace is so for its containers: sysctls, flags, rules and routes of
/// other tables.
fn a_network_has_what_cni_has_set(node: &Node, runtime: Runtime) -> Result {
    let network = Network::make(node)?;
    let settings = json!({
        "sysctl": {
            "net.core.somaxconn": "500",
            "net.ipv4.tcp_keepalive_time": "60",
            "net.ipv4.ip_local_port_range": "20000 30000",
            "net.ipv4.conf.all.forwarding": "1",
            "net.ipv4.conf.eth0.arp_filter": "1",
            "net.ipv4.neigh.eth0.gc_stale_time": "61",
            "net.ipv6.conf.all.disable_ipv6": "1",
        },
        "promisc": true,
    });
    network.changed_by("tuning", settings)?;
    network.changed_by("sbr", json!({}))?;
    let task = node.task(runtime, "tuned")?.flag("--with-ns");
    let task = task.flag(&format!("network:{}", network.path()));
    let task = task.start(&["sleep", "infinity"])?;
    let script = "cd /proc/sys/net && cat core/somaxconn ipv4/tcp_keepalive_time ipv4/ip_local_port_range \
        ipv4/ip_forward ipv4/conf/eth0/arp_filter ipv4/neigh/eth0/gc_stale_time ipv4/tcp_fin_timeout && \
        ip -6 address show dev eth0 | wc -l; echo $(($(cat /sys/class/net/eth0/flags) & 0x100))";
    let seen = task.exec(&["sh", "-c", script])?.text();
    let seen: Vec<_> = seen.split_whitespace().collect();
    let expected = ["500", "60", "20000", "30000", "1", "1", "61", "60", "0", "256"];
    same("sysctls, addresses of IPv6 and the promiscuous flag", seen, expected)?;
    let rules = task.exec(&["ip", "rule"])?.text();
    contains("rules", &rules, &format!("from {} lookup 100", network.ip()))?;
    let routes = task.exec(&["ip", "route", "show", "table", "100"])?.text();
    contains("routes of the source", &routes, "default via 10.99.")?;
    task.remove()?;
    network.remove()
}

/// Without interfaces in its namespace a container has its loopback, and nothing beyond it.
fn no_network_at_all(node: &Node, runtime: Runtime) -> Result {
    let task = node.task(runtime, "alone")?.start(SERVER)?;
    let devices = task.exec(&["sh", "-c", images::INTERFACES])?;
    same("devices", devices.text().as_str(), "lo")?;
    let beyond = task.exec(&["wget", "-qO-", "http://10.88.0.1:8080/"])?;
    claim(beyond.code != 0, "nothing beyond the loopback answers")?;
    contains("refusal", &beyond.errors(), "unreachable")?;
    task.remove()
}

/// What listens on nothing but the pod's loopback is reached through the CRI, any number of times.
fn a_port_is_forwarded(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "forward")?.run()?;
    let server = pod.container("server", &["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"]);
    // crictl ends at the first connection that is refused.
    server
        .run()?
        .shell("until wget -qO /dev/null http://127.0.0.1:8080/; do :; done")?;
    let mut client = node.crictl_command(["port-forward", pod.id(), "18080:8080"])?;
    let client = client.process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
    let client = Background(client.spawn().trying("starting crictl")?);
    for _ in 0..3 {
        same("page", node.get("127.0.0.1", 18080, "/")?.as_str(), images::PAGE)?;
    }
    drop(client);
    pod.remove()
}

/// The loopback of the network that a pod was given leads to what listens on the pod's: both ways, whole, with each end
/// of the conversation on its own.
fn the_loopback_of_the_pods_network(node: &Node, runtime: Runtime) -> Result {
    let network = Network::make(node)?;
    let task = node
        .task(runtime, "echo")?
        .flag("--with-ns")
        .flag(&format!("network:{}", network.path()))
        .start(&["sh", "-c", "nc -ll -p 7000 -e wc -c & nc -ll -p 7001 -e cat & wait"])?;
    let sent = stdio::noise(5 << 20);
    node.in_network_at(&network.path(), || {
        let heard = || {
            let count = converse(7000, &sent).map_err(|failure| failure.to_string())?;
            String::from_utf8(count).map_err(|error| error.to_string())
        };
        let count = node.events().bell.until("a count of bytes", run::ORDINARY, heard)?;
        same("what came in, counted", count.trim(), "5242880")?;
        for _ in 0..3 {
            claim(converse(7001, &sent)? == sent, "every byte comes back")?;
        }
        claim(
            converse(7002, b"x").map_or(true, |said| said.is_empty()),
            "a port that nobody listens on says nothing",
        )
    })?;
    task.remove()?;
    network.remove()
}

/// Says something to a port of the loopback, then no more, and takes down all of the answer.
fn converse(port: u16, words: &[u8]) -> Result<Vec<u8>> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).trying("connecting")?;
    stream
        .set_read_timeout(Some(run::ORDINARY))
        .trying("setting a deadline")?;
    thread::scope(|scope| {
        let speaker = scope.spawn(|| {
            (&stream).write_all(words).trying("speaking")?;
            stream.shutdown(Shutdown::Write).trying("saying the last word")
        });
        let mut answer = Vec::new();
        (&stream).read_to_end(&mut answer).trying("listening")?;
        speaker
            .join()
            .unwrap_or_else(|_| Err(Failure::Claim("the speaker panicked".into())))?;
        Ok(answer)
    })
}

/// A client that is ended when the story is.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        // It leads its own process group.
        let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}
