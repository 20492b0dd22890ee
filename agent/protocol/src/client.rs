//! A typed client of the agent.
//!
//! Each request runs in a task of its own and carries no deadline on the wire: ttrpc closes a connection on which a
//! frame was abandoned halfway, and a guest behind a virtio-serial port never gets a second one. So a caller may drop
//! any of these futures; only the reply is lost.
//!
//! The guest may be anybody's. Its frames pass a guard, its words are cut to a readable length, and of the calls that
//! nobody waits for any more only so many are left open.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use protobuf::well_known_types::empty::Empty;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};
use ttrpc::{Code, asynchronous::transport::Socket, context::Context};

use crate::{
    exposition::Histogram,
    guard::Guard,
    protocol::{
        agent::*,
        agent_ttrpc::AgentServiceClient,
        csi::VolumeStatsResponse,
        health::{CheckRequest, HealthCheckResponse, VersionCheckResponse},
        health_ttrpc::HealthClient,
        relay::{DialRequest, DialResponse, HangUpRequest, ReceiveRequest, ReceiveResponse, SendRequest},
        relay_ttrpc::RelayClient,
        types,
    },
};

/// How long the agent may take for a call that has an end in sight.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of data that a call may ask for. As much as this may come back in any answer.
pub const LONGEST_READ: u32 = 128 << 10;
/// Bytes of an agent's sentence that are kept.
const LONGEST_SENTENCE: usize = 4 << 10;
/// Open calls that nobody waits for any more. Each holds some kilobytes until its answer comes, which may be never.
const MOST_ABANDONED: i64 = 64;

/// A connection to the agent. Clones share it.
#[derive(Clone)]
pub struct Client(Arc<Connection>);

struct Connection {
    agent: AgentServiceClient,
    health: HealthClient,
    relay: RelayClient,
    patience: Duration,
    abandoned: Abandoned,
    durations: Arc<Mutex<Durations>>,
}

/// How many calls are open that nobody waits for.
type Abandoned = watch::Sender<i64>;

/// Whoever waits for the answer to a call.
struct Caller {
    /// Or the caller has gone: whichever comes first.
    answered: Arc<AtomicBool>,
    abandoned: Abandoned,
}

impl Drop for Caller {
    fn drop(&mut self) {
        if !self.answered.swap(true, Ordering::SeqCst) {
            self.abandoned.send_modify(|open| *open += 1);
        }
    }
}

/// How long calls took, by their names.
pub type Durations = BTreeMap<&'static str, Histogram>;

impl Connection {
    fn durations(&self) -> MutexGuard<'_, Durations> {
        self.durations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The process, or what else was named, is gone.
    #[error("the guest does not have it: {0}")]
    NotFound(String),
    /// The connection is closed, and with it the guest lost.
    #[error("the connection to the guest's agent is closed")]
    Gone,
    /// The agent did not answer in time; it may still do what it was asked.
    #[error("the guest's agent did not answer {0} in time")]
    Deadline(&'static str),
    /// The agent refused.
    #[error("{message} ({method}, {code:?})")]
    Rpc {
        /// The call.
        method: &'static str,
        /// The agent's status.
        code: Code,
        /// Its reason.
        message: String,
    },
}

impl ClientError {
    fn new(method: &'static str, error: ttrpc::Error) -> ClientError {
        let status = match error {
            ttrpc::Error::RpcStatus(status) => status,
            ttrpc::Error::Others(text) if text.starts_with("Unpack") => ttrpc::get_status(Code::INTERNAL, text),
            // What else ttrpc calls `Others` are its queues, which close with the connection.
            _ => return ClientError::Gone,
        };
        match status.code() {
            Code::NOT_FOUND => ClientError::NotFound(sentence(&status.message)),
            Code::DEADLINE_EXCEEDED => ClientError::Deadline(method),
            code => ClientError::Rpc {
                method,
                code,
                message: sentence(&status.message),
            },
        }
    }
}

/// A guest's words as they may appear in a log or an event: on one line, and of bounded length.
fn sentence(words: &str) -> String {
    let mut words = words.replace(char::is_control, " ");
    if words.len() > LONGEST_SENTENCE {
        let end = (0..=LONGEST_SENTENCE).rev().find(|end| words.is_char_boundary(*end));
        words.truncate(end.unwrap_or(0));
        words.push('…');
    }
    words
}

/// Turns a reply into what the caller sees of it: an empty message is nothing.
trait Reply {
    type Value;
    fn value(self) -> Self::Value;
}

impl Reply for Empty {
    type Value = ();
    fn value(self) {}
}

macro_rules! replies {
    ($($message:ty),*) => { $(
        impl Reply for $message {
            type Value = $message;
            fn value(self) -> $message {
                self
            }
        }
    )* };
}

replies!(
    DialResponse,
    GetIPTablesResponse,
    GuestDetailsResponse,
    HealthCheckResponse,
    Interfaces,
    Metrics,
    OOMEvent,
    ReadStreamResponse,
    ReceiveResponse,
    Routes,
    SetIPTablesResponse,
    StatsContainerResponse,
    VersionCheckResponse,
    VolumeStatsResponse,
    WaitProcessResponse,
    WriteStreamResponse,
    types::Interface
);

/// Declares a method per call of a service and its package: name, message, reply, whether it has a deadline.
macro_rules! calls {
    ($service:ident of $package:literal: $($(#[$doc:meta])* $name:ident($request:ty) -> $value:ty, $deadline:expr;)*) => {
        impl Client { $(
            $(#[$doc])*
            pub async fn $name(&self, request: $request) -> Result<$value, ClientError> {
                let connection = Arc::clone(&self.0);
                let deadline = $deadline.then_some(self.0.patience);
                let began = Instant::now();
                let reply = call(stringify!($name), &self.0.abandoned, deadline, async move {
                    connection.$service.$name(Context::default(), &request).await
                })
                .await;
                let action = concat!($package, ".", stringify!($request));
                self.0.durations().entry(action).or_default().observe(began.elapsed());
                reply
            }
        )* }
    };
}

calls! {
    agent of "grpc":
    /// Makes the sandbox: its storages, host name and shared namespaces.
    create_sandbox(CreateSandboxRequest) -> (), true;
    /// Ends everything in the sandbox and writes its data out.
    destroy_sandbox(DestroySandboxRequest) -> (), true;
    /// Makes a container and its init process.
    create_container(CreateContainerRequest) -> (), true;
    /// Lets the init process run its program.
    start_container(StartContainerRequest) -> (), true;
    /// Removes a container with all its processes.
    remove_container(RemoveContainerRequest) -> (), true;
    /// Starts a further process.
    exec_process(ExecProcessRequest) -> (), true;
    /// Signals a process, or with SIGKILL and no exec_id all of a container.
    signal_process(SignalProcessRequest) -> (), true;
    /// Waits for the end of a process; no deadline.
    wait_process(WaitProcessRequest) -> WaitProcessResponse, false;
    /// Reads output; empty data is its end; no deadline.
    read_stdout(ReadStreamRequest) -> ReadStreamResponse, false;
    /// Reads output; empty data is its end; no deadline.
    read_stderr(ReadStreamRequest) -> ReadStreamResponse, false;
    /// Writes input, as much as the reply tells; empty data ends it; no deadline.
    write_stdin(WriteStreamRequest) -> WriteStreamResponse, false;
    /// Ends the input.
    close_stdin(CloseStdinRequest) -> (), true;
    /// Sets the size of a terminal.
    tty_win_resize(TtyWinResizeRequest) -> (), true;
    /// Measures a container.
    stats_container(StatsContainerRequest) -> StatsContainerResponse, true;
    /// Changes the limits of a container.
    update_container(UpdateContainerRequest) -> (), true;
    /// Freezes a container.
    pause_container(PauseContainerRequest) -> (), true;
    /// Thaws a container.
    resume_container(ResumeContainerRequest) -> (), true;
    /// Lets go of mounts below the share that the host has taken away. Go's shim asks for it; ours has no such mounts.
    remove_stale_virtiofs_share_mounts(RemoveStaleVirtiofsShareMountsRequest) -> (), true;
    /// Makes a folder, a link, or a part of a file below the share.
    copy_file(CopyFileRequest) -> (), true;
    /// Configures a network interface.
    update_interface(UpdateInterfaceRequest) -> types::Interface, true;
    /// Adds routes, and tells which there are.
    update_routes(UpdateRoutesRequest) -> Routes, true;
    /// Lists the network interfaces.
    list_interfaces(ListInterfacesRequest) -> Interfaces, true;
    /// Lists the routes.
    list_routes(ListRoutesRequest) -> Routes, true;
    /// Adds permanent neighbours.
    add_arp_neighbors(AddARPNeighborsRequest) -> (), true;
    /// Brings hot-plugged processors and memory into use.
    online_cpu_mem(OnlineCPUMemRequest) -> (), true;
    /// Waits until a container's process is killed for want of memory; no deadline.
    get_oom_event(GetOOMEventRequest) -> OOMEvent, false;
    /// Describes the guest and its agent.
    get_guest_details(GuestDetailsRequest) -> GuestDetailsResponse, true;
    /// Mixes entropy into the guest's random number generator.
    reseed_random_dev(ReseedRandomDevRequest) -> (), true;
    /// Sets the guest's clock.
    set_guest_date_time(SetGuestDateTimeRequest) -> (), true;
    /// Metrics of guest and agent, as Prometheus text.
    get_metrics(GetMetricsRequest) -> Metrics, true;
    /// Changes the options of volumes in the guest's memory.
    update_ephemeral_mounts(UpdateEphemeralMountsRequest) -> (), true;
    /// Measures the file system of a volume.
    get_volume_stats(VolumeStatsRequest) -> VolumeStatsResponse, true;
    /// Makes a volume larger. No agent can.
    resize_volume(ResizeVolumeRequest) -> (), true;
    /// Reads the guest's packet filter, as iptables-save prints it.
    get_ip_tables(GetIPTablesRequest) -> GetIPTablesResponse, true;
    /// Replaces the guest's packet filter by what iptables-restore reads.
    set_ip_tables(SetIPTablesRequest) -> SetIPTablesResponse, true;
    /// Sets what the guest lets the host do. Ours has nothing that would enforce it.
    set_policy(SetPolicyRequest) -> (), true;
}

calls! {
    relay of "sandpod":
    /// Connects to a TCP port of the guest's loopback. Upstream's agent has none of these calls.
    dial(DialRequest) -> DialResponse, true;
    /// Waits for data of a connection; empty data is its end; no deadline.
    receive(ReceiveRequest) -> ReceiveResponse, false;
    /// Sends data into a connection, all of it; empty data ends this direction; no deadline.
    send(SendRequest) -> (), false;
    /// Forgets a connection, whatever its state.
    hang_up(HangUpRequest) -> (), true;
}

impl Client {
    /// Speaks over one stream, for all services. Must be called in a runtime.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static) -> Client {
        let client = ttrpc::r#async::Client::new(Socket::new(Guard::new(stream)));
        Client(Arc::new(Connection {
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client.clone()),
            relay: RelayClient::new(client),
            patience: PATIENCE,
            abandoned: watch::Sender::new(0),
            durations: Arc::default(),
        }))
    }

    /// The same connection, with another deadline for the calls that have one; 60 s if never said.
    pub fn with_deadline(&self, deadline: Duration) -> Client {
        Client(Arc::new(Connection {
            agent: self.0.agent.clone(),
            health: self.0.health.clone(),
            relay: self.0.relay.clone(),
            patience: deadline,
            abandoned: self.0.abandoned.clone(),
            durations: Arc::clone(&self.0.durations),
        }))
    }

    /// How long the calls of this connection took so far.
    pub fn durations(&self) -> Durations {
        self.0.durations().clone()
    }

    /// Waits until the agent serves; it may be asked before its guest has booted.
    pub async fn check(&self, deadline: Duration) -> Result<(), ClientError> {
        let connection = Arc::clone(&self.0);
        let reply = call("check", &self.0.abandoned, Some(deadline), async move {
            connection.health.check(Context::default(), &CheckRequest::new()).await
        });
        reply.await.map(drop)
    }

    /// The agent's version.
    pub async fn version(&self) -> Result<VersionCheckResponse, ClientError> {
        let connection = Arc::clone(&self.0);
        call("version", &self.0.abandoned, Some(self.0.patience), async move {
            connection
                .health
                .version(Context::default(), &CheckRequest::new())
                .await
        })
        .await
    }
}

async fn call<R: Reply + Send + 'static>(
    method: &'static str,
    abandoned: &Abandoned,
    deadline: Option<Duration>,
    request: impl Future<Output = ttrpc::Result<R>> + Send + 'static,
) -> Result<R::Value, ClientError> {
    let asked = Instant::now();
    let exchange = async {
        // The other end lives: it is borrowed.
        let _room = abandoned
            .subscribe()
            .wait_for(|open| *open < MOST_ABANDONED)
            .await
            .is_ok();
        let caller = Caller {
            answered: Arc::default(),
            abandoned: abandoned.clone(),
        };
        let (answered, abandoned) = (Arc::clone(&caller.answered), abandoned.clone());
        let reply = tokio::spawn(async move {
            let reply = request.await;
            if answered.swap(true, Ordering::SeqCst) {
                abandoned.send_modify(|open| *open -= 1);
            }
            reply
        });
        reply.await
    };
    let reply = match deadline {
        Some(deadline) => tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| ClientError::Deadline(method))?,
        None => exchange.await,
    };
    tracing::debug!(method, took = ?asked.elapsed(), "the agent has answered");
    // A task that did not end is one of a runtime that is ending.
    let reply = reply.map_err(|_| ClientError::Gone)?;
    reply.map(Reply::value).map_err(|error| ClientError::new(method, error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A guest that answers nothing, as far as a client knows.
    fn silent() -> (Client, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        (Client::new(ours).with_deadline(Duration::from_millis(5)), theirs)
    }

    #[test]
    fn a_guests_words_are_one_short_line() {
        assert_eq!(sentence("no such\nfile\x1b[2J"), "no such file [2J");
        let long = sentence(&"ä".repeat(LONGEST_SENTENCE));
        assert!(
            long.len() <= LONGEST_SENTENCE + '…'.len_utf8() && long.ends_with("ä…"),
            "{}",
            long.len()
        );
    }

    #[tokio::test]
    async fn calls_that_are_never_answered_stay_few() {
        let (client, _guest) = silent();
        for _ in 0..MOST_ABANDONED + 10 {
            let asked = client.stats_container(StatsContainerRequest::new()).await;
            assert_eq!(asked.unwrap_err(), ClientError::Deadline("stats_container"));
        }
        assert_eq!(*client.0.abandoned.borrow(), MOST_ABANDONED);
        // Also those without a deadline, when their callers go.
        drop(tokio::time::timeout(Duration::from_secs(1), client.wait_process(WaitProcessRequest::new())).await);
        assert_eq!(*client.0.abandoned.borrow(), MOST_ABANDONED);
    }

    #[tokio::test]
    async fn a_late_answer_makes_room() {
        let (client, mut guest) = silent();
        let asked = client.pause_container(PauseContainerRequest::new()).await;
        assert_eq!(asked.unwrap_err(), ClientError::Deadline("pause_container"));
        let mut abandoned = client.0.abandoned.subscribe();
        assert_eq!(*abandoned.borrow_and_update(), 1);
        // The header of the question has the number for the answer's.
        let mut header = [0; 10];
        guest.read_exact(&mut header).await.unwrap();
        header[..4].fill(0);
        header[8] = ttrpc::proto::MESSAGE_TYPE_RESPONSE;
        guest.write_all(&header).await.unwrap();
        abandoned.wait_for(|open| *open == 0).await.unwrap();
    }

    /// Answers the next question with these bytes, as a response or as they are, and hangs up.
    async fn answer(mut guest: tokio::io::DuplexStream, said: &[u8], raw: bool) {
        let mut header = [0; 10];
        guest.read_exact(&mut header).await.unwrap();
        if !raw {
            header[..4].copy_from_slice(&(said.len() as u32).to_be_bytes());
            header[8] = ttrpc::proto::MESSAGE_TYPE_RESPONSE;
            guest.write_all(&header).await.unwrap();
        }
        guest.write_all(said).await.unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn no_answer_makes_a_caller_panic_or_wait(said in prop::collection::vec(any::<u8>(), 0..200), raw: bool) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let answered = runtime.block_on(async {
                let (client, guest) = silent();
                let client = client.with_deadline(Duration::from_secs(10));
                let question = client.stats_container(StatsContainerRequest::new());
                tokio::join!(question, answer(guest, &said, raw)).0
            });
            prop_assert!(!matches!(answered, Err(ClientError::Deadline(_))));
        }
    }
}
