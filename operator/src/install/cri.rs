//! What the installer asks of the node's CRI over its socket.
//!
//! The messages are the few fields of Kubernetes' CRI (`runtime.v1`, cri-api `api.proto`) that matter here, with the
//! numbers that they have there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
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
    effective::{self, Baseline},
    error::{Context, InstallError, Result},
    files::Host,
};

/// Our handler's name.
pub const HANDLER: &str = "kata";

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// How long a CRI may take to answer after its restart: both recover their pods first.
const COMEBACK: Duration = Duration::from_secs(120);
/// How often it is asked meanwhile.
const PACE: Duration = Duration::from_millis(100);

/// The conditions without which no pod starts (`RuntimeReady` and `NetworkReady` of cri-api's `constants.go`).
const CONDITIONS: &[&str] = &["RuntimeReady", "NetworkReady"];

/// A container runtime that serves the CRI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// CRI-O.
    Crio,
    /// containerd.
    Containerd,
}

impl Kind {
    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Crio => "CRI-O",
            Self::Containerd => "containerd",
        }
    }

    /// The name of its systemd unit and of its program.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Crio => "crio",
            Self::Containerd => "containerd",
        }
    }

    /// Its socket on the node.
    #[must_use]
    pub fn socket(self) -> &'static Path {
        Path::new(match self {
            Self::Crio => "/run/crio/crio.sock",
            Self::Containerd => "/run/containerd/containerd.sock",
        })
    }
}

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
    pub kind: Kind,
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
}

impl Cri {
    /// Finds the one that was asked for, or else the one that answers; CRI-O before containerd, which may be there for
    /// other purposes.
    ///
    /// # Errors
    /// None is there, or none that is answers.
    pub fn find(host: &Host, wanted: Option<Kind>) -> Result<Self> {
        let kinds = wanted.map_or(vec![Kind::Crio, Kind::Containerd], |kind| vec![kind]);
        let mut first = None;
        for kind in kinds {
            let socket = host.at(kind.socket());
            if !socket.exists() {
                continue;
            }
            match Self::connect(kind, socket) {
                Ok(cri) => return Ok(cri),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| InstallError::NoCri {
            crio: Kind::Crio.socket().into(),
            containerd: Kind::Containerd.socket().into(),
        }))
    }

    fn connect(kind: Kind, socket: PathBuf) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .action("start the runtime")?;
        let mut cri = Self {
            kind,
            version: Version::parse(""),
            socket,
            runtime,
        };
        let answer: wire::VersionResponse = cri.ask("Version", wire::VersionRequest {})?;
        cri.version = Version::parse(&answer.runtime_version);
        Ok(cri)
    }

    /// Name and version, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{} {}", self.kind.name(), self.version.text)
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

    /// Whether it lists our handler; none when it lists no handlers at all, as CRI-O does before 1.30.
    ///
    /// # Errors
    /// It does not answer.
    pub fn lists_handler(&self) -> Result<Option<bool>> {
        let answer = self.status(false)?;
        let ours = |handler: &wire::RuntimeHandler| handler.name == HANDLER;
        Ok((!answer.runtime_handlers.is_empty()).then(|| answer.runtime_handlers.iter().any(ours)))
    }

    /// What it is like now, without our handler: to be compared with what it is like after a change.
    ///
    /// # Errors
    /// It does not answer.
    pub fn baseline(&self) -> Result<Baseline> {
        let answer = self.status(true)?;
        // Each CRI tells what it likes, in a form of its own; what is no JSON cannot be compared.
        let config = answer.info.get("config");
        let config = config.and_then(|text| serde_json::from_str(text).ok());
        let conditions = conditions(answer.status).into_iter();
        Ok(Baseline {
            config: config.map(effective::told),
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
                        cri: self.kind.name(),
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

    /// The sandboxes of our handler that are ready.
    ///
    /// # Errors
    /// It does not answer.
    pub fn ready_sandboxes(&self) -> Result<Vec<ReadySandbox>> {
        let answer: wire::ListPodSandboxResponse = self.ask("ListPodSandbox", wire::ListPodSandboxRequest {})?;
        let ours = answer.items.into_iter().filter(|item| item.runtime_handler == HANDLER);
        let pod = |metadata: wire::PodSandboxMetadata| format!("{}/{}", metadata.namespace, metadata.name);
        Ok(ours
            .filter(|item| item.state == wire::READY)
            .map(|item| ReadySandbox {
                pod: item.metadata.map(pod).unwrap_or_default(),
            })
            .collect())
    }

    fn ask<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let silent = |why: String| InstallError::Silent {
            cri: self.kind.name(),
            socket: self.kind.socket().into(),
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
        let none = Cri::find(&host, None).unwrap_err().to_string();
        assert_eq!(
            none,
            "no container runtime was found: there is neither /run/crio/crio.sock nor /run/containerd/containerd.sock; \
             start CRI-O or containerd"
        );
        std::fs::create_dir_all(host.at("/run/crio")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(host.at("/run/crio/crio.sock")).unwrap());
        let down = Cri::find(&host, None).unwrap_err().to_string();
        assert!(
            down.starts_with("CRI-O does not answer at /run/crio/crio.sock: Connection refused"),
            "{down}"
        );
    }
}
