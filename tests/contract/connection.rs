//! One ttrpc connection to a shim, spoken as CRI-O speaks it: service `containerd.task.v2.Task`, no metadata, no
//! deadlines on the wire.
//!
//! `containerd-shim-protos` holds the messages of version 3 of the service; those of version 2 are the same field for
//! field.

use std::{
    fmt,
    net::Shutdown,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    sync::{OnceLock, mpsc},
    time::Duration,
};

use containerd_shim_protos::{
    protobuf::Message,
    ttrpc::{
        self, Code,
        r#async::{Client, transport::Socket},
    },
};
use tests::{
    failure::{Failure, Result, Trying},
    wait::patient,
};
use tokio::runtime::{Builder, Runtime};

const SERVICE: &str = "containerd.task.v2.Task";

/// A connection.
pub struct Connection {
    // The one of ttrpc that waits by threads reads on from its descriptor's number after it has closed it: from the
    // fifo that has the number next.
    client: Client,
    socket: UnixStream,
}

/// An answer that is an error.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The status; none when the connection ended.
    pub code: Option<Code>,
    /// The sentence.
    pub message: String,
}

/// A request without its answer.
#[derive(Debug)]
pub struct Pending<A> {
    what: String,
    answer: mpsc::Receiver<std::result::Result<A, Refusal>>,
}

impl Connection {
    /// Dials an address as CRI-O does: what does not begin with `unix://` is an abstract socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn dial(address: &str) -> Result<Connection> {
        let dialling = || format!("dialling the shim at {address:?}");
        let place = match address.strip_prefix("unix://") {
            Some(path) => SocketAddr::from_pathname(path),
            None => SocketAddr::from_abstract_name(address),
        };
        let socket = place
            .and_then(|place| UnixStream::connect_addr(&place))
            .trying(dialling())?;
        let owned = socket.try_clone().trying(dialling())?;
        owned.set_nonblocking(true).trying(dialling())?;
        let _entered = runtime()?.enter();
        let client = Client::new(Socket::try_from(owned).trying(dialling())?);
        Ok(Connection { client, socket })
    }

    /// Sends a request; the answer is collected in the background.
    ///
    /// # Errors
    /// When the request cannot be encoded.
    pub fn ask<A: Message>(&self, method: &str, message: &(impl Message + fmt::Display)) -> Result<Pending<A>> {
        let request = ttrpc::Request {
            service: SERVICE.into(),
            method: method.into(),
            payload: message
                .write_to_bytes()
                .map_err(std::io::Error::other)
                .trying(format!("encoding {method}"))?,
            ..ttrpc::Request::default()
        };
        let client = self.client.clone();
        let (told, answer) = mpsc::channel();
        runtime()?.spawn(async move {
            let reply = client.request(request).await.map_err(Refusal::from);
            let decode = |reply: ttrpc::Response| {
                A::parse_from_bytes(&reply.payload).map_err(|error| Refusal {
                    code: Some(Code::DATA_LOSS),
                    message: format!("undecodable answer: {error}"),
                })
            };
            // A story that is over does not listen any more.
            let _ = told.send(reply.and_then(decode));
        });
        Ok(Pending {
            what: format!("{method} {message}"),
            answer,
        })
    }

    /// Ends the connection, whatever is pending on it.
    pub fn hang_up(&self) {
        // The other side may have ended it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hang_up();
    }
}

impl<A> Pending<A> {
    /// Waits for the answer, whichever it is.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when there is none in time.
    pub fn answer(&self, deadline: Duration) -> Result<std::result::Result<A, Refusal>> {
        let what = format!("the answer to {}", tests::run::last_of(&self.what, 200));
        self.answer
            .recv_timeout(patient(deadline))
            .map_err(|_| Failure::Deadline {
                what,
                deadline,
                detail: String::new(),
            })
    }

    /// Waits for the answer, which must not be a refusal.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when there is none in time, [`Failure::Claim`] when it is a refusal.
    pub fn granted(&self, deadline: Duration) -> Result<A> {
        self.answer(deadline)?
            .map_err(|refusal| Failure::Claim(format!("{} was refused: {refusal}", self.what)))
    }

    /// Waits for the answer, which must be a refusal.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when there is none in time, [`Failure::Claim`] when it is not a refusal.
    pub fn refused(&self, deadline: Duration) -> Result<Refusal> {
        match self.answer(deadline)? {
            Ok(_) => Err(Failure::Claim(format!("{} was granted", self.what))),
            Err(refusal) => Ok(refusal),
        }
    }
}

impl Refusal {
    /// Whether CRI-O takes it as "gone": NotFound, and a closed connection too.
    pub fn means_gone(&self) -> bool {
        matches!(self.code, Some(Code::NOT_FOUND) | None)
    }
}

impl From<ttrpc::Error> for Refusal {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Refusal {
                code: Some(status.code.enum_value_or_default()),
                message: status.message,
            },
            other => Refusal {
                code: None,
                message: other.to_string(),
            },
        }
    }
}

/// What all connections run on.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .trying("starting the connections' runtime")?;
    Ok(RUNTIME.get_or_init(|| runtime))
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(formatter, "{code:?}: {}", self.message),
            None => write!(formatter, "the connection ended: {}", self.message),
        }
    }
}
