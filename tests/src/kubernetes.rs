//! A real API server of Kubernetes with its etcd, and what talks to it.
//!
//! An [`ApiServer`] alone is enough for everything that only reads and writes objects; nobody acts on them. The parts
//! of a whole cluster are in [`crate::cluster`].

mod door;
mod part;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::{door::Door, part::Part};
use crate::{
    failure::{Failure, Result, Trying},
    namespaces::Namespaces,
    places,
    run::{self, Output, succeed},
};

/// Where the API server listens, in the network of its own: as a service, at the same port.
const PORT: u16 = 443;

/// Where etcd listens, in the same network.
const ETCD: &str = "http://127.0.0.1:2379";

/// The addresses of services.
const SERVICES: &str = "10.96.0.0/16";

/// The first of `SERVICES`, which is the API server's by convention.
pub const SERVICE: &str = "10.96.0.1";

/// The administrator: as user, and as whom the harness talks.
pub const ADMIN: User = User {
    name: "admin",
    groups: "system:masters",
};

/// The one node of a cluster, as a user.
pub const NODE: User = User {
    name: "system:node:worker-0",
    groups: "system:nodes",
};

/// Furnishes the namespaces of an API server that stands alone. etcd's files are in memory: it waits for the disk at
/// each write otherwise.
const ALONE: &str = "ip link set lo up
mount -t tmpfs tmpfs /run";

/// How long etcd and the API server may take: a few seconds on a machine that does nothing else.
const START: Duration = Duration::from_secs(90);

/// Somebody whom the API server knows by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    name: &'static str,
    groups: &'static str,
}

impl User {
    /// What it shows. Nothing outside the machine reaches the server, so no secret is needed.
    fn token(self) -> String {
        format!("token-of-{}", self.name)
    }
}

/// A running API server; it ends with this value, and everything of it is removed.
#[derive(Debug)]
pub struct ApiServer {
    folder: PathBuf,
    door: Door,
    server: Part,
    _etcd: Part,
    alone: Option<(Namespaces, TempDir)>,
}

impl ApiServer {
    /// Starts one that stands alone: no controller gives a namespace its service account, nothing is garbage-collected,
    /// no pod is scheduled.
    ///
    /// # Errors
    /// When it has not been built, or does not start.
    pub fn start() -> Result<ApiServer> {
        let folder = tempfile::Builder::new()
            .prefix("sandpod-api-")
            .tempdir_in("/var/tmp")
            .trying("making a folder for the API server")?;
        let namespaces = Namespaces::make(ALONE, &[])?;
        let alone = ["--endpoint-reconciler-type=none", "--advertise-address=127.0.0.1"];
        let mut server = ApiServer::start_in(&namespaces, folder.path(), &alone)?;
        server.alone = Some((namespaces, folder));
        Ok(server)
    }

    /// Starts one in namespaces with a /run of their own, its files below `folder`, with further flags.
    ///
    /// # Errors
    /// When it has not been built, or does not start.
    pub fn start_in(namespaces: &Namespaces, folder: &Path, flags: &[&str]) -> Result<ApiServer> {
        let folder = folder.join("kubernetes");
        fs::create_dir_all(folder.join("home")).trying("making folders for the API server")?;
        write(&folder.join("tokens.csv"), &tokens(&[ADMIN, NODE]))?;
        succeed(
            Command::new("openssl")
                .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
                .arg(folder.join("accounts.key")),
            run::ORDINARY,
        )?;
        let etcd = etcd(namespaces, &folder)?;
        let server = Part::start(&mut server(namespaces, &folder, flags)?, &folder)?;
        let door = Door::open(namespaces, PORT)?;
        let api = ApiServer {
            door,
            folder,
            _etcd: etcd,
            server,
            alone: None,
        };
        api.settle()?;
        Ok(api)
    }

    /// Waits until the server says that it is ready, which includes the roles that it comes with.
    fn settle(&self) -> Result {
        // Its certificate, which it makes first, is in the configuration of those who talk to it.
        self.server
            .until("the API server's certificate", START, || match self.certificate() {
                Ok(text) if text.trim_end().ends_with("-----END CERTIFICATE-----") => Ok(()),
                _ => Err("none yet".into()),
            })?;
        let address = format!("https://127.0.0.1:{}", self.port());
        write(
            &self.kubeconfig(),
            &self.kubeconfig_at(&address, &self.certificates(), ADMIN),
        )?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .trying("starting a runtime")?;
        let client = runtime.block_on(self.client())?;
        self.server.until("the API server's readiness", START, || {
            let request = http::Request::get("/readyz")
                .body(Vec::new())
                .map_err(|error| error.to_string())?;
            let answer = runtime.block_on(client.request_text(request));
            answer.map(drop).map_err(|error| error.to_string())
        })
    }

    /// The path of a configuration with which the machine's administrator reaches the server.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    /// A configuration for somebody inside the namespaces of the server.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig_inside(&self, user: User) -> Result<PathBuf> {
        let path = self.folder.join(format!("{}.inside.kubeconfig", user.name));
        let address = format!("https://127.0.0.1:{PORT}");
        write(&path, &self.kubeconfig_at(&address, &self.certificates(), user))?;
        Ok(path)
    }

    /// The key with which tokens of service accounts are signed.
    #[must_use]
    pub fn account_key(&self) -> PathBuf {
        self.folder.join("accounts.key")
    }

    /// The certificates by which the server is known.
    #[must_use]
    pub fn certificates(&self) -> PathBuf {
        self.folder.join("certificates/apiserver.crt")
    }

    /// Completes the end of namespaces that are about to end: who would do that in a cluster is not there.
    ///
    /// # Errors
    /// What kubectl said when it failed.
    pub fn end_namespaces(&self) -> Result {
        const ENDING: &str = "jsonpath={.items[?(@.metadata.deletionTimestamp)].metadata.name}";
        let ending = self.kubectl(["get", "namespaces", "--output", ENDING])?.text();
        for name in ending.split_whitespace() {
            let end = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }).to_string();
            let path = format!("/api/v1/namespaces/{name}/finalize");
            let mut command = self.kubectl_command(["replace", "--raw", &path, "--filename", "-"])?;
            let output = run::finish(&mut command, Some(end.into_bytes()), run::ORDINARY)?;
            if output.code != 0 {
                return Err(run::refusal(&command, &output));
            }
        }
        Ok(())
    }

    /// Another way to the server, for one who is to lose it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn another_door(&self) -> Result<Door> {
        let namespaces = self.alone.as_ref().map(|(namespaces, _)| namespaces);
        let namespaces = namespaces.ok_or_else(|| Failure::Claim("the API server is not alone".into()))?;
        Door::open(namespaces, PORT)
    }

    /// The port of this machine's loopback where the server is.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.door.port()
    }

    fn certificate(&self) -> Result<String> {
        fs::read_to_string(self.certificates()).trying("reading the API server's certificate")
    }

    /// A kubeconfig, as JSON, which is YAML too: for somebody who reaches the server at an address, and has its
    /// certificates in a file.
    #[must_use]
    pub fn kubeconfig_at(&self, address: &str, certificates: &Path, user: User) -> String {
        let configuration = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "sandpod",
            "contexts": [{ "name": "sandpod", "context": { "cluster": "sandpod", "user": user.name } }],
            "clusters": [{ "name": "sandpod", "cluster": {
                "server": address,
                "certificate-authority": certificates,
                "tls-server-name": "localhost",
            } }],
            "users": [{ "name": user.name, "user": { "token": user.token() } }],
        });
        format!("{configuration:#}\n")
    }

    /// A client with every right; it lives in the runtime that it is made in.
    ///
    /// # Errors
    /// When the configuration cannot be read.
    pub async fn client(&self) -> Result<Client> {
        let refused = |error: &dyn std::fmt::Display| Failure::Claim(format!("a client of the API server: {error}"));
        let file = Kubeconfig::read_from(self.kubeconfig()).map_err(|error| refused(&error))?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        Client::try_from(config.map_err(|error| refused(&error))?).map_err(|error| refused(&error))
    }

    /// Runs kubectl as the administrator; it must succeed.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        succeed(&mut self.kubectl_command(arguments)?, run::ORDINARY)
    }

    /// A command of kubectl.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn kubectl_command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Command> {
        let mut command = Command::new(places::peers()?.join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments)
            .env("HOME", self.folder.join("home"));
        Ok(command)
    }

    /// What kubectl prints as JSON; `-o json` is added.
    ///
    /// # Errors
    /// What kubectl said when it failed.
    pub fn json<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let arguments: Vec<_> = arguments.into_iter().chain(["--output", "json"]).collect();
        let text = self.kubectl(arguments.iter().copied())?.text();
        serde_json::from_str(&text).map_err(|source| Failure::Json {
            what: format!("kubectl {}", arguments.join(" ")),
            source,
        })
    }

    /// Applies a manifest: YAML or JSON, one object or many.
    ///
    /// # Errors
    /// What kubectl said when it failed.
    pub fn apply(&self, manifest: &str) -> Result {
        self.feed("apply", manifest)
    }

    /// Creates the objects of a manifest.
    ///
    /// # Errors
    /// What kubectl said when it failed, such as that there are some of that name.
    pub fn create(&self, manifest: &str) -> Result {
        self.feed("create", manifest)
    }

    fn feed(&self, verb: &str, manifest: &str) -> Result {
        let mut command = self.kubectl_command([verb, "--filename", "-"])?;
        let output = run::finish(&mut command, Some(manifest.as_bytes().to_vec()), run::ORDINARY)?;
        match output.code {
            0 => Ok(()),
            _ => Err(run::refusal(&command, &output)),
        }
    }

    /// Waits, as kubectl does, for a condition such as `condition=Ready` or `delete` of objects such as `pod/a`.
    ///
    /// # Errors
    /// What kubectl said when it failed or was not met in time.
    pub fn wait_for(&self, condition: &str, objects: &[&str], deadline: Duration) -> Result {
        let condition = format!("--for={condition}");
        let timeout = format!("--timeout={}s", deadline.as_secs());
        let arguments = ["wait", condition.as_str(), timeout.as_str()].into_iter();
        let mut command = self.kubectl_command(arguments.chain(objects.iter().copied()))?;
        succeed(&mut command, deadline + run::ORDINARY).map(drop)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some((mut namespaces, folder)) = self.alone.take() {
            let ended = namespaces.end();
            let removed = folder.close().trying("removing the folder of the API server");
            if let Err(failure) = ended.and(removed) {
                eprintln!("an API server was not undone: {failure}");
            }
        }
    }
}

/// Starts etcd and waits until it serves.
fn etcd(namespaces: &Namespaces, folder: &Path) -> Result<Part> {
    let mut command = namespaces.command("etcd");
    command.args([
        "--name=default",
        "--data-dir=/run/etcd",
        "--logger=zap",
        "--log-outputs=stderr",
    ]);
    command.args([
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
    ]);
    Part::start(&mut command, folder)
}

fn server(namespaces: &Namespaces, folder: &Path, flags: &[&str]) -> Result<Command> {
    let program = places::peers()?.join("kube-apiserver");
    let mut command = namespaces.command(&program.display().to_string());
    let file = |name: &str| folder.join(name).display().to_string();
    command.args([
        format!("--etcd-servers={ETCD}"),
        format!("--secure-port={PORT}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        format!("--cert-dir={}", file("certificates")),
        format!("--token-auth-file={}", file("tokens.csv")),
        format!("--service-account-key-file={}", file("accounts.key")),
        format!("--service-account-signing-key-file={}", file("accounts.key")),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        "--bind-address=0.0.0.0".into(),
        // Pods' logs and execs look the node's name up in DNS otherwise.
        "--kubelet-preferred-address-types=InternalIP".into(),
    ]);
    command.args(flags);
    Ok(command)
}

/// The format of the API server's --token-auth-file.
fn tokens(users: &[User]) -> String {
    let lines = users
        .iter()
        .map(|user| format!("{},{},{},\"{}\"\n", user.token(), user.name, user.name, user.groups));
    lines.collect()
}

fn write(path: &Path, text: &str) -> Result {
    fs::write(path, text).trying(format!("writing {}", path.display()))
}
