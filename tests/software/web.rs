//! Web servers and what stands before them.

use std::path::Path;

use serde_json::json;
use tests::{
    config::Runtime,
    cri::{Access, Container, Pod},
    failure::{Result, contains, same},
    images::PAGE,
    node::Node,
};

use crate::{PATIENCE, Story, empty_dir, software};

pub const STORIES: &[Story] = &[
    (
        "nginx_before_an_application_with_a_unix_socket",
        nginx_before_an_application_with_a_unix_socket,
    ),
    ("a_mesh_sees_all_traffic", a_mesh_sees_all_traffic),
];

const NGINX: &str = "daemon off;
error_log stderr notice;
events {}
http {
  access_log off;
  client_body_temp_path /run/app/bodies;
  client_body_buffer_size 16k;
  client_max_body_size 64m;
  sendfile on;
  server {
    listen 80;
    location /static/ { alias /run/app/static/; }
    location / { proxy_pass http://unix:/run/app/app.sock; }
  }
}
";

/// Answers with the length and the digest of what it was sent.
const APPLICATION: &str = "import hashlib
def app(environ, start_response):
    body = environ['wsgi.input'].read()
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [f'{len(body)} {hashlib.sha256(body).hexdigest()}\\n'.encode()]
";

/// nginx passes requests on to an application by a Unix socket on a volume, keeps a large one in a file there
/// meanwhile, and serves files that the application made.
fn nginx_before_an_application_with_a_unix_socket(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("web-settings-{}", node.serial()));
    node.write(&settings.join("nginx.conf"), NGINX)?;
    node.write(&settings.join("app.py"), APPLICATION)?;
    let run = empty_dir(node, "run")?;
    let pod = node.pod(runtime, "web")?.run()?;
    let make = "mkdir -p /run/app/static && seq 1 200000 >/run/app/static/numbers && cd /settings && \
        exec gunicorn --workers 2 --bind unix:/run/app/app.sock app:app";
    let application = software(&pod, "application", make)?
        .volume(&settings, "/settings", Access::ReadOnly)
        .volume(&run, "/run/app", Access::ReadWrite)
        .security("run_as_username", "www-data".into())
        .run()?;
    application.wait_for_log_within("Listening at: unix:/run/app/app.sock", PATIENCE)?;
    let nginx = software(&pod, "nginx", "exec nginx -c /settings/nginx.conf")?
        .volume(&settings, "/settings", Access::ReadOnly)
        .volume(&run, "/run/app", Access::ReadWrite)
        .run()?;
    nginx.wait_for_log_within("start worker process ", PATIENCE)?;

    let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    same("from outside", node.get(&pod.ip()?, 80, "/")?, format!("0 {nothing}\n"))?;
    let upload = "head -c 5000000 /dev/urandom >/tmp/body && curl -sS --data-binary @/tmp/body http://127.0.0.1/ && \
        echo 5000000 $(sha256sum </tmp/body | cut -d ' ' -f 1)";
    let upload = nginx.shell(upload)?;
    let (answer, sent) = upload.split_once('\n').unwrap_or_default();
    same("a large request", answer, sent)?;
    let numbers = "curl -sS http://127.0.0.1/static/numbers | cmp - /run/app/static/numbers && echo same";
    same("a file", nginx.shell(numbers)?.as_str(), "same")?;
    nginx.kill("SIGQUIT")?;
    same("nginx's exit code", nginx.wait_exit()?.code, 0)?;
    pod.remove()
}

/// Serves [`PAGE`].
const SERVER: &[&str] = &["httpd", "-f", "-p", "8080", "-h", "/www"];

/// As Istio's init container has them (`istio-iptables`), with the user and the ports of its proxy.
const REDIRECTION: &str = "*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_REDIRECT - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -o lo -s 127.0.0.6/32 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -p tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp -m multiport ! --dports 53,15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -p tcp ! --dport 53 -m owner ! --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
";

/// Stands for Envoy: says where each connection was to go, and takes it there; what comes from outside, by the address
/// 127.0.0.6 to the pod's loopback.
const PROXY: &str = "import socket, struct, sys, threading
def say(text):
    sys.stdout.write(text + '\\n')  # in one piece
def pump(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
def meant(client):
    address = client.getsockopt(socket.SOL_IP, 80, 16)  # SO_ORIGINAL_DST
    port, host = struct.unpack('!2xH4s8x', address)
    return socket.inet_ntoa(host), port
def carry(client, inbound):
    host, port = meant(client)
    say(f'{\"inbound\" if inbound else \"outbound\"} {host}:{port}')
    server = socket.socket()
    if inbound:
        server.bind(('127.0.0.6', 0))
    server.connect(('127.0.0.1' if inbound else host, port))
    threading.Thread(target=pump, args=(client, server), daemon=True).start()
    pump(server, client)
def serve(port, inbound):
    listener = socket.create_server(('0.0.0.0', port))
    say(f'listening at {port}')
    while True:
        client, _ = listener.accept()
        threading.Thread(target=carry, args=(client, inbound), daemon=True).start()
threading.Thread(target=serve, args=(15006, True)).start()
serve(15001, False)
";

/// What an application sends and is sent goes through the proxy of its pod, by rules that an init container made, with
/// either of the kernel's two ways to have them; what the proxy itself sends does not.
fn a_mesh_sees_all_traffic(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("mesh-{}", node.serial()));
    node.write(&settings.join("rules"), REDIRECTION)?;
    node.write(&settings.join("proxy.py"), PROXY)?;
    let other = node.pod(runtime, "other")?.run()?;
    other.container("server", SERVER).run()?;
    for iptables in ["iptables-nft", "iptables-legacy"] {
        let pod = node.pod(runtime, "mesh")?.run()?;
        redirect(&pod, &settings, iptables)?;
        let proxy = software(&pod, "proxy", "exec python3 -u /settings/proxy.py")?
            .volume(&settings, "/settings", Access::ReadOnly)
            .security("run_as_user", json!({ "value": 1337 }))
            .security("run_as_group", json!({ "value": 1337 }))
            .run()?;
        for port in [15001, 15006] {
            proxy.wait_for_log_within(&format!("listening at {port}"), PATIENCE)?;
        }
        pod.container("server", SERVER).run()?;
        let application = software(&pod, "application", "exec sleep infinity")?
            .restricted()
            .run()?;
        let get = |container: &Container<'_>, ip: &str| container.shell(&format!("curl -sS http://{ip}:8080/"));
        let (own, others) = (pod.ip()?, other.ip()?);
        same("the application's", get(&application, &others)?, PAGE.trim_end())?;
        contains(iptables, &proxy.logs()?, &format!("outbound {others}:8080"))?;
        same("from outside", node.get(&own, 8080, "/")?, PAGE)?;
        contains(iptables, &proxy.logs()?, &format!("inbound {own}:8080"))?;
        same("the proxy's own", get(&proxy, &others)?, PAGE.trim_end())?;
        same("by the loopback", get(&application, "127.0.0.1")?, PAGE.trim_end())?;
        let carried = proxy.logs()?.lines().filter(|line| line.contains("bound ")).count();
        same("connections that the proxy carried", carried, 2)?;
        pod.remove()?;
    }
    other.remove()
}

/// The init container.
fn redirect(pod: &Pod<'_>, settings: &Path, iptables: &str) -> Result {
    let init = software(
        pod,
        "init",
        &format!("{iptables}-restore --noflush /settings/rules && {iptables}-save -t nat"),
    )?
    .volume(settings, "/settings", Access::ReadOnly)
    .security(
        "capabilities",
        json!({ "add_capabilities": ["NET_ADMIN", "NET_RAW"], "drop_capabilities": ["ALL"] }),
    )
    .run()?;
    let exit = init.wait_exit()?;
    same(
        &format!("the init container's exit code, {:?}", init.logs()?),
        exit.code,
        0,
    )?;
    contains("the rules", &init.logs()?, "--uid-owner 1337 -j RETURN")
}
