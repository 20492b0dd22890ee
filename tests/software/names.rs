//! A service mesh that answers its pods' questions of DNS.

use serde_json::json;
use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, contains, same},
    node::Node,
};

use crate::{PATIENCE, Story, at_length, software};

pub const STORIES: &[Story] = &[("a_mesh_answers_its_names", a_mesh_answers_its_names)];

/// What Istio's init container adds where the proxy answers DNS: what the proxy asks has a zone of its own in the
/// kernel's table of connections, so that it is never taken for what the application asks the same server.
fn rules(resolver: &str) -> String {
    format!(
        "*nat
-A OUTPUT -p udp --dport 53 -m owner --uid-owner 1337 -j RETURN
-A OUTPUT -p udp --dport 53 -m owner --gid-owner 1337 -j RETURN
-A OUTPUT -p udp --dport 53 -d {resolver}/32 -j REDIRECT --to-ports 15053
COMMIT
*raw
-A OUTPUT -p udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1
-A OUTPUT -p udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2
-A OUTPUT -p udp --dport 53 -m owner --gid-owner 1337 -j CT --zone 1
-A OUTPUT -p udp --sport 15053 -m owner --gid-owner 1337 -j CT --zone 2
-A OUTPUT -p udp --dport 53 -d {resolver}/32 -j CT --zone 2
-A PREROUTING -p udp --sport 53 -s {resolver}/32 -j CT --zone 1
COMMIT
"
    )
}

/// Answers each question with its own words.
const RESOLVER: &str = "import socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(('0.0.0.0', 53))
print('the resolver listens', flush=True)
while True:
    question, client = server.recvfrom(512)
    server.sendto(b'the answer to ' + question, client)
";

/// Says what it is asked, and passes it on to the resolver.
const PROXY: &str = "import socket, sys
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(('127.0.0.1', 15053))
upstream = socket.socket(type=socket.SOCK_DGRAM)
upstream.connect((sys.argv[1], 53))
print('the proxy listens', flush=True)
while True:
    question, client = server.recvfrom(512)
    print('asked for ' + question.decode(), flush=True)
    upstream.send(question)
    server.sendto(upstream.recv(512), client)
";

/// Asks for a name.
const QUESTION: &str = "import socket, sys
client = socket.socket(type=socket.SOCK_DGRAM)
client.settimeout(60)
client.connect((sys.argv[1], 53))
client.send(sys.argv[2].encode())
print(client.recv(512).decode())
";

/// What an application asks a server of DNS goes to the proxy of its pod, and from there to the server; the application
/// sees the answer come from the server.
fn a_mesh_answers_its_names(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("names-{}", node.serial()));
    for (name, text) in [
        ("resolver.py", RESOLVER),
        ("proxy.py", PROXY),
        ("question.py", QUESTION),
    ] {
        node.write(&settings.join(name), text)?;
    }
    let other = node.pod(runtime, "resolver")?.run()?;
    let resolver = software(&other, "resolver", "exec python3 /settings/resolver.py")?
        .volume(&settings, "/settings", Access::ReadOnly)
        .run()?;
    resolver.wait_for_log_within("the resolver listens", PATIENCE)?;
    let address = other.ip()?;
    node.write(&settings.join("rules"), &rules(&address))?;
    let pod = node.pod(runtime, "names")?.run()?;
    let here = |name: &str, script: &str| -> Result<_> {
        Ok(software(&pod, name, script)?.volume(&settings, "/settings", Access::ReadOnly))
    };
    let init = here("init", "iptables-restore --noflush /settings/rules")?
        .security(
            "capabilities",
            json!({ "add_capabilities": ["NET_ADMIN", "NET_RAW"], "drop_capabilities": ["ALL"] }),
        )
        .run()?;
    let exit = init.wait_exit_within(PATIENCE)?;
    same(
        &format!("the init container's exit code, {:?}", init.logs()?),
        exit.code,
        0,
    )?;
    let proxy = here("proxy", &format!("exec python3 /settings/proxy.py {address}"))?
        .security("run_as_user", json!({ "value": 1337 }))
        .security("run_as_group", json!({ "value": 1337 }))
        .run()?;
    proxy.wait_for_log_within("the proxy listens", PATIENCE)?;
    let application = here("application", "exec sleep infinity")?.restricted().run()?;
    for name in ["one.test", "another.test"] {
        let answer = at_length(&application, &format!("python3 /settings/question.py {address} {name}"))?;
        same("the answer", answer, format!("the answer to {name}"))?;
        contains("the proxy's log", &proxy.logs()?, &format!("asked for {name}"))?;
    }
    pod.remove()?;
    other.remove()
}
