//! What the installer asks of the node's CRI over its socket.
//!
//! The messages are the few fields of Kubernetes' CRI (`runtime.v1`, cri-api `api.proto`) that matter here, with the
//! numbers that they have there.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    net::UnixStream,
    runtime::Runtime,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    crio::Configuration,
    daemon::{Daemon, Kind},
    effective::{self, Baseline},
    error::{Context, InstallError, Result},
    files::Host,
    kubelet,
    served::Served,
    step,
};

/// The handler with the settings of the nodes.
pub const HANDLER: &str = crate::handler::KATA;

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// How long a CRI may take to answer after its restart: both recover their pods first.
const COMEBACK: Duration = Duration::from_secs(120);
/// How often it is asked meanwhile.
const PACE: Duration = Duration::from_millis(100);

/// The conditions without which no pod starts (`RuntimeReady` and `NetworkReady` of cri-api's `constants.go`).
const CONDITIONS: &[&str] = &["RuntimeReady", "NetworkReady"];

/// A version of a container runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// As it says it, without a leading `v`.
    pub text: String,
    /// Its first two numbers.
    pub numbers: (u32, u32),
}

impl Version {
    /// Reads what a CRI says.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let text = text.trim().trim_start_matches('v');
        let mut numbers = text.split(|letter: char| !letter.is_ascii_digit()).map(str::parse);
        let mut next = || numbers.next().and_then(std::result::Result::ok).unwrap_or(0);
        Self {
            numbers: (next(), next()),
            text: text.to_owned(),
        }
    }
}

/// What runs pods on this node.
#[derive(Debug)]
pub struct Cri {
    /// Which one it is.
    pub daemon: Daemon,
    /// Its version when it was found.
    pub version: Version,
    socket: PathBuf,
    runtime: Runtime,
}

/// A sandbox that is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadySandbox {
    /// Namespace and name of its pod.
    pub pod: String,
    /// Its handler.
    pub handler: String,
}

impl Cri {
    /// Finds the one that the node's kubelet uses. Where nothing tells, it is the one that an earlier run has found, or
    /// else the first that answers. Of `kind` in any case, if there is one.
    ///
    /// # Errors
    /// None is there, or none that is answers; the kubelet uses one whose layout is not known.
    pub fn find(host: &Host, kind: Option<Kind>, last: Option<Daemon>) -> Result<Self> {
        let fits = |daemon: &Daemon| kind.is_none_or(|kind| daemon.kind() == kind);
        if let Some(socket) = kubelet::socket(host)? {
            let known: Vec<_> = Daemon::all()
                .into_iter()
                .filter(|daemon| same_socket(host, daemon.site().socket, &socket))
                .collect();
            match one_of(host, &known)? {
                Some(daemon) if fits(&daemon) => return Self::connect(host, daemon),
                // Whoever names another kind knows better than what runs here.
                Some(_) => {}
                None => return Err(InstallError::UnknownLayout { socket }),
            }
        }
        let rest = Daemon::all().into_iter().filter(|daemon| Some(*daemon) != last);
        let mut first = None;
        for daemon in last.into_iter().chain(rest).filter(fits) {
            let site = daemon.site();
            if !host.at(site.socket).exists() || !is_configured(host, daemon) {
                continue;
            }
            match Self::connect(host, daemon) {
                Ok(cri) => return Ok(cri),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| InstallError::NoCri {
            crio: Daemon::Crio.site().socket.into(),
            containerd: Daemon::Containerd.site().socket.into(),
        }))
    }

    /// The one that is known to have our handler.
    ///
    /// # Errors
    /// It does not answer.
    pub fn connect(host: &Host, daemon: Daemon) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .action("start the runtime")?;
        let mut cri = Self {
            daemon,
            version: Version::parse(""),
            socket: host.at(daemon.site().socket),
            runtime,
        };
        let answer: wire::VersionResponse = cri.ask("Version", wire::VersionRequest {})?;
        cri.version = Version::parse(&answer.runtime_version);
        Ok(cri)
    }

    /// Name and version, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{} {}", self.daemon.name(), self.version.text)
    }

    /// Waits until it answers after its restart.
    ///
    /// # Errors
    /// It does not within two minutes.
    pub fn await_comeback(&self) -> Result<()> {
        let end = Instant::now() + COMEBACK;
        loop {
            match self.ask::<_, wire::VersionResponse>("Version", wire::VersionRequest {}) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= end => return Err(error),
                // Nobody announces that a socket of somebody else is served again.
                Err(_) => self.runtime.block_on(async { sleep(PACE).await }),
            }
        }
    }

    /// The handlers that it serves: those that its status lists, or where that has none, as CRI-O's before 1.30, those
    /// of CRI-O's configuration; none when it tells of none at all.
    ///
    /// # Errors
    /// It does not answer.
    pub fn handlers(&self) -> Result<Option<Served>> {
        let listed = self.status(false)?.runtime_handlers.into_iter();
        let listed: BTreeSet<_> = listed.map(|handler| handler.name).collect();
        if !listed.is_empty() {
            return Ok(Some(Served::Listed(listed)));
        }
        let configuration = self.configuration();
        Ok(configuration.map(|configuration| Served::Configured(configuration.handlers())))
    }

    /// CRI-O's configuration as it is in force; none of another CRI, and of one that does not tell it.
    fn configuration(&self) -> Option<Configuration> {
        if self.daemon.kind() != Kind::Crio {
            return None;
        }
        let asked = async { timeout(ANSWER, Configuration::of(&self.socket)).await };
        let why = match self.runtime.block_on(asked) {
            Ok(Ok(configuration)) => return Some(configuration),
            Ok(Err(why)) => why.to_string(),
            Err(_) => format!("no answer within {ANSWER:?}"),
        };
        step(format_args!(
            "{} does not tell its configuration: {why}",
            self.daemon.name()
        ));
        None
    }

    /// What it is like now, without our handlers: to be compared with what it is like after a change.
    ///
    /// # Errors
    /// It does not answer.
    pub fn baseline(&self, ours: &BTreeSet<String>) -> Result<Baseline> {
        let answer = self.status(true)?;
        // Each CRI tells what it likes, in a form of its own; what is no JSON cannot be compared.
        let config = answer.info.get("config");
        let config = config.and_then(|text| serde_json::from_str(text).ok());
        let conditions = conditions(answer.status).into_iter();
        Ok(Baseline {
            config: config.map(|config| effective::told(config, ours)),
            handlers: self.configuration().map(|configuration| configuration.others(ours)),
            ready: conditions
                .filter_map(|(name, holds)| holds.is_ok().then_some(name))
                .collect(),
        })
    }

    /// Waits until the conditions that held before its restart hold again.
    ///
    /// # Errors
    /// One of them does not within two minutes.
    pub fn await_conditions(&self, before: &Baseline) -> Result<()> {
        let end = Instant::now() + COMEBACK;
        loop {
            let unmet = before.unmet(&conditions(self.status(false)?.status));
            match unmet {
                None => return Ok(()),
                Some(unmet) if Instant::now() >= end => {
                    return Err(InstallError::NotReady {
                        cri: self.daemon.name(),
                        condition: unmet.condition,
                        why: unmet.why,
                    });
                }
                // A network plugin's configuration is read in the background, which nobody announces either.
                Some(_) => self.runtime.block_on(async { sleep(PACE).await }),
            }
        }
    }

    fn status(&self, verbose: bool) -> Result<wire::StatusResponse> {
        self.ask("Status", wire::StatusRequest { verbose })
    }

    /// The sandboxes of these handlers that are ready.
    ///
    /// # Errors
    /// It does not answer.
    pub fn ready_sandboxes(&self, handlers: &BTreeSet<String>) -> Result<Vec<ReadySandbox>> {
        let answer: wire::ListPodSandboxResponse = self.ask("ListPodSandbox", wire::ListPodSandboxRequest {})?;
        let ours = answer.items.into_iter();
        let ours = ours.filter(|item| handlers.contains(&item.runtime_handler));
        let pod = |metadata: wire::PodSandboxMetadata| format!("{}/{}", metadata.namespace, metadata.name);
        Ok(ours
            .filter(|item| item.state == wire::READY)
            .map(|item| ReadySandbox {
                pod: item.metadata.map(pod).unwrap_or_default(),
                handler: item.runtime_handler,
            })
            .collect())
    }

    fn ask<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let silent = |why: String| InstallError::Silent {
            cri: self.daemon.name(),
            socket: self.daemon.site().socket.into(),
            why,
        };
        let call = async {
            let channel = dial(self.socket.clone())
                .await
                .map_err(|error| silent(sources(&error)))?;
            let mut client = Grpc::new(channel);
            client.ready().await.map_err(|error| silent(sources(&error)))?;
            let path = format!("/runtime.v1.RuntimeService/{method}");
            let path = PathAndQuery::try_from(path).map_err(|error| silent(error.to_string()))?;
            let codec = ProstCodec::<Q, A>::default();
            let answer = client.unary(Request::new(request), path, codec).await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| silent(status.message().to_owned()))
        };
        self.runtime
            .block_on(async { timeout(ANSWER, call).await })
            .unwrap_or_else(|_| Err(silent(format!("no answer to {method} within {ANSWER:?}"))))
    }
}

/// Whether two names of a socket lead to the same one.
fn same_socket(host: &Host, ours: &str, theirs: &Path) -> bool {
    let real = |path: &Path| host.at(path).canonicalize().ok();
    Path::new(ours) == theirs || real(Path::new(ours)).is_some_and(|ours| Some(ours) == real(theirs))
}

/// Of layouts that share a socket, the one whose configuration is there; of several, such as one that was removed and
/// has left its files, the one whose configuration a process was started with.
fn one_of(host: &Host, daemons: &[Daemon]) -> Result<Option<Daemon>> {
    let there: Vec<_> = daemons.iter().filter(|daemon| is_configured(host, **daemon)).collect();
    if let [_, _, ..] = there[..] {
        for daemon in &there {
            if kubelet::is_named(host, daemon.site().main)? {
                return Ok(Some(**daemon));
            }
        }
    }
    Ok(there.first().map(|daemon| **daemon))
}

/// Whether the configuration of a layout is there. Those of packages need none.
fn is_configured(host: &Host, daemon: Daemon) -> bool {
    matches!(daemon, Daemon::Crio | Daemon::Containerd) || host.at(daemon.site().main).exists()
}

/// Of the conditions that matter here, those that hold, and why the others do not.
fn conditions(status: Option<wire::RuntimeStatus>) -> BTreeMap<String, std::result::Result<(), String>> {
    let told = status.map(|status| status.conditions).unwrap_or_default().into_iter();
    told.filter(|condition| CONDITIONS.contains(&condition.r#type.as_str()))
        .map(|condition| {
            let why = format!("{} {}", condition.reason, condition.message);
            let holds = if condition.status {
                Ok(())
            } else {
                Err(why.trim().to_owned())
            };
            (condition.r#type, holds)
        })
        .collect()
}

/// Each call has a connection of its own: the CRI is restarted between them.
async fn dial(socket: PathBuf) -> std::result::Result<Channel, tonic::transport::Error> {
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // A Unix socket has no name; HTTP wants one.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connect)
        .await
}

/// The innermost reason of an error, which tonic's own text leaves out.
fn sources(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

mod wire {
    //! `runtime.v1` of the CRI. Fields that nobody here reads are left out: prost skips them.

    use std::collections::BTreeMap;

    /// `PodSandboxState.SANDBOX_READY`
    pub const READY: i32 = 0;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct VersionRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct VersionResponse {
        #[prost(string, tag = "3")]
        pub runtime_version: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct StatusRequest {
        #[prost(bool, tag = "1")]
        pub verbose: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub status: Option<RuntimeStatus>,
        #[prost(btree_map = "string, string", tag = "2")]
        pub info: BTreeMap<String, String>,
        #[prost(message, repeated, tag = "3")]
        pub runtime_handlers: Vec<RuntimeHandler>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct RuntimeStatus {
        #[prost(message, repeated, tag = "1")]
        pub conditions: Vec<RuntimeCondition>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct RuntimeCondition {
        #[prost(string, tag = "1")]
        pub r#type: String,
        #[prost(bool, tag = "2")]
        pub status: bool,
        #[prost(string, tag = "3")]
        pub reason: String,
        #[prost(string, tag = "4")]
        pub message: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct RuntimeHandler {
        #[prost(string, tag = "1")]
        pub name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ListPodSandboxRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ListPodSandboxResponse {
        #[prost(message, repeated, tag = "1")]
        pub items: Vec<PodSandbox>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct PodSandbox {
        #[prost(message, optional, tag = "2")]
        pub metadata: Option<PodSandboxMetadata>,
        #[prost(int32, tag = "3")]
        pub state: i32,
        #[prost(string, tag = "7")]
        pub runtime_handler: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct PodSandboxMetadata {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "3")]
        pub namespace: String,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_runtimes_say_them() {
        assert_eq!(Version::parse("v2.4.2").numbers, (2, 4));
        assert_eq!(Version::parse("1.33.0-dev\n").numbers, (1, 33));
        assert_eq!(Version::parse("v2.4.2").text, "2.4.2");
        assert_eq!(Version::parse("unknown").numbers, (0, 0));
    }

    fn node(files: &[&str]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        for path in files {
            let path = host.at(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        (root, host)
    }

    #[test]
    fn of_two_layouts_with_one_socket_the_one_that_runs_is_taken() {
        let both = [Daemon::K3s, Daemon::Rke2];
        let [k3s, rke2] = both.map(|daemon| daemon.site().main);
        let (_root, host) = node(&[]);
        assert_eq!(one_of(&host, &both).unwrap(), None);
        let (_root, host) = node(&[rke2]);
        assert_eq!(one_of(&host, &both).unwrap(), Some(Daemon::Rke2));
        let (_root, host) = node(&[k3s, rke2, "/proc/100/cmdline"]);
        std::fs::write(host.at("/proc/100/cmdline"), format!("containerd\0-c\0{rke2}\0")).unwrap();
        assert_eq!(one_of(&host, &both).unwrap(), Some(Daemon::Rke2));
    }

    #[test]
    fn a_kubelet_whose_container_runtime_is_nowhere_known_is_told_of() {
        let (_root, host) = node(&["/proc/100/cmdline", "/run/containerd/containerd.sock", "/run/mine.sock"]);
        let line = "kubelet\0--container-runtime-endpoint=unix:///run/mine.sock\0";
        std::fs::write(host.at("/proc/100/cmdline"), line).unwrap();
        for kind in [None, Some(Kind::Containerd)] {
            assert_eq!(
                Cri::find(&host, kind, None).unwrap_err().to_string(),
                "the node's kubelet uses the container runtime at /run/mine.sock, and where that one has its \
                 configuration is not known: Sandpod knows CRI-O and containerd of packages, k3s, RKE2, k0s and \
                 MicroK8s, with their usual folders"
            );
        }
    }

    #[test]
    fn the_kubelets_container_runtime_is_asked_and_no_other() {
        // Nothing answers; which one was asked is told.
        let (k3s, docker) = (Daemon::K3s.site(), Daemon::Containerd.site());
        let (_root, host) = node(&["/proc/100/cmdline", k3s.socket, k3s.main, docker.socket]);
        let asked = |kind, last| Cri::find(&host, kind, last).unwrap_err().to_string();
        std::fs::write(host.at("/proc/100/cmdline"), "/usr/local/bin/k3s\0agent\0").unwrap();
        let of_k3s = "k3s's containerd does not answer at /run/k3s/containerd/containerd.sock: ";
        for kind in [None, Some(Kind::Containerd)] {
            for last in [None, Some(Daemon::Containerd)] {
                assert!(asked(kind, last).starts_with(of_k3s), "{}", asked(kind, last));
            }
        }
        // Where nothing tells, too; and what was found before goes first then.
        std::fs::write(host.at("/proc/100/cmdline"), "init\0").unwrap();
        assert!(asked(None, None).starts_with(of_k3s), "{}", asked(None, None));
        let last = asked(None, Some(Daemon::Containerd));
        assert!(
            last.starts_with("containerd does not answer at /run/containerd/"),
            "{last}"
        );
        let none = asked(Some(Kind::Crio), None);
        assert!(none.starts_with("no container runtime was found: "), "{none}");
    }

    #[test]
    fn only_the_conditions_without_which_no_pod_starts_are_looked_at() {
        let condition = |name: &str, status| wire::RuntimeCondition {
            r#type: name.into(),
            status,
            reason: "NetworkPluginNotReady".into(),
            message: "cni plugin not initialized".into(),
        };
        let status = wire::RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", true),
                condition("NetworkReady", false),
                condition("ContainerdHasNoDeprecationWarnings", false),
            ],
        };
        let why = "NetworkPluginNotReady cni plugin not initialized".to_owned();
        assert_eq!(
            conditions(Some(status)),
            BTreeMap::from([
                ("NetworkReady".to_owned(), Err(why)),
                ("RuntimeReady".to_owned(), Ok(()))
            ])
        );
        assert!(conditions(None).is_empty());
    }

    #[test]
    fn a_node_without_a_runtime_and_one_whose_runtime_is_down_say_so() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        let none = Cri::find(&host, None, None).unwrap_err().to_string();
        assert_eq!(
            none,
            "no container runtime was found: there is neither /run/crio/crio.sock nor /run/containerd/containerd.sock; \
             start CRI-O or containerd"
        );
        std::fs::create_dir_all(host.at("/run/crio")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(host.at("/run/crio/crio.sock")).unwrap());
        let down = Cri::find(&host, None, None).unwrap_err().to_string();
        assert!(
            down.starts_with("CRI-O does not answer at /run/crio/crio.sock: Connection refused"),
            "{down}"
        );
    }
}
