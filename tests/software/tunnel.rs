//! WireGuard.

use serde_json::json;
use tests::{
    config::Runtime,
    cri::{Container, Pod},
    failure::{Result, contains, same},
    images::PAGE,
    node::Node,
};

use crate::{Story, software};

/// The machine's own kernel need not have WireGuard.
pub const OF_A_VM: &[Story] = &[("wireguard_between_two_pods", wireguard_between_two_pods)];

/// Two pods have a tunnel of the kernel's WireGuard between them, and a web server is reached through it.
fn wireguard_between_two_pods(node: &Node, runtime: Runtime) -> Result {
    let (left, right) = (node.pod(runtime, "left")?.run()?, node.pod(runtime, "right")?.run()?);
    let (near, far) = (end(&left, "10.9.0.1/24")?, end(&right, "10.9.0.2/24")?);
    for (here, there, address, pod) in [
        (&near, &far, "10.9.0.2/32", &right),
        (&far, &near, "10.9.0.1/32", &left),
    ] {
        let key = there.shell("wg show wg0 public-key")?;
        let endpoint = format!("{}:51820", pod.ip()?);
        here.shell(&format!(
            "wg set wg0 peer {key} allowed-ips {address} endpoint {endpoint}"
        ))?;
    }
    right
        .container("server", &["httpd", "-f", "-p", "10.9.0.2:8080", "-h", "/www"])
        .run()?;
    let get = || {
        near.shell("curl -sS http://10.9.0.2:8080/")
            .map_err(|failure| failure.to_string())
    };
    let page = node.events().bell.until("the page", tests::run::ORDINARY, get)?;
    same("through the tunnel", page.as_str(), PAGE.trim_end())?;
    let transfer = near.shell("wg show wg0 transfer")?;
    let bytes: Vec<_> = transfer.split_whitespace().skip(1).collect();
    tests::failure::claim(
        bytes.len() == 2 && !bytes.contains(&"0"),
        format!("bytes went both ways through the tunnel: {transfer}"),
    )?;
    contains("its peer", &near.shell("wg show wg0 latest-handshakes")?, "\t")?;
    left.remove()?;
    right.remove()
}

/// An end of the tunnel, with a key of its own.
fn end<'p>(pod: &'p Pod<'p>, address: &str) -> Result<Container<'p>> {
    let end = software(pod, "tunnel", "exec sleep infinity")?
        .security("capabilities", json!({ "add_capabilities": ["NET_ADMIN"] }))
        .run()?;
    end.shell(&format!(
        "set -e; umask 077; wg genkey >/tmp/key; ip link add wg0 type wireguard
         wg set wg0 private-key /tmp/key listen-port 51820; ip address add {address} dev wg0; ip link set wg0 up"
    ))?;
    Ok(end)
}
