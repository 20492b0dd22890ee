//! As much of D-Bus as it takes to ask systemd for something: calls, their answers, and the signal that a job is done.
//! Source: <https://dbus.freedesktop.org/doc/dbus-specification.html>.

mod wire;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
pub(super) use wire::Value;
use wire::{Call, Message, START};

/// The system's bus; and where no bus runs yet or at all, systemd itself, for root.
const ADDRESSES: [(&str, Peer); 2] = [
    ("/run/dbus/system_bus_socket", Peer::Bus),
    ("/run/systemd/private", Peer::Systemd),
];

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The socket.
    #[error("the connection to the system bus: {0}")]
    Io(#[from] io::Error),
    /// It does not want us.
    #[error("the system bus does not let this user in: {0}")]
    Auth(String),
    /// The called method's error.
    #[error("{message} ({name})")]
    Refused {
        /// Its name, such as `org.freedesktop.systemd1.UnitExists`.
        name: String,
        /// The sentence that came with it.
        message: String,
    },
    /// A job that did not succeed.
    #[error("its job ended as `{0}`")]
    Job(String),
    /// Not D-Bus.
    #[error("a message of the system bus cannot be understood: {0}")]
    Format(&'static str),
}

type Result<T> = std::result::Result<T, BusError>;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// A daemon that knows systemd by its name, and passes on the signals that are asked for.
    Bus,
    /// systemd, which sends all its signals.
    Systemd,
}

/// What a method belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Object {
    pub service: &'static str,
    pub path: &'static str,
    pub interface: &'static str,
}

const DAEMON: Object = Object {
    service: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
};

/// A connection for one errand.
pub(super) struct Bus {
    stream: UnixStream,
    peer: Peer,
    serial: u32,
    deadline: Instant,
    /// Signals that came while an answer was waited for.
    signals: VecDeque<Message>,
}

impl Bus {
    /// Connects; every wait on this connection ends when `patience` is over.
    pub fn connect(patience: Duration) -> Result<Bus> {
        let mut refusal = None;
        for (address, peer) in ADDRESSES {
            match UnixStream::connect(address) {
                Ok(stream) => return Bus::over(stream, peer, patience),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        Err(refusal.unwrap_or_else(|| io::ErrorKind::NotFound.into()).into())
    }

    fn over(stream: UnixStream, peer: Peer, patience: Duration) -> Result<Bus> {
        let mut bus = Bus {
            stream,
            peer,
            serial: 0,
            deadline: Instant::now() + patience,
            signals: VecDeque::new(),
        };
        bus.authenticate()?;
        if peer == Peer::Bus {
            bus.call(DAEMON, "Hello", &[])?;
        }
        Ok(bus)
    }

    /// Says who we are; the kernel has told the other end already.
    fn authenticate(&mut self) -> Result<()> {
        let uid: String = nix::unistd::geteuid().to_string();
        let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
        self.stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.read(&mut byte)?;
            line.push(byte[0]);
            if line.len() > 1024 {
                break;
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(BusError::Auth(String::from_utf8_lossy(&line).trim().to_owned()));
        }
        Ok(self.stream.write_all(b"BEGIN\r\n")?)
    }

    /// Asks for a signal of an interface, when its arguments match `arguments` (such as `arg2='a.scope'`).
    pub fn listen(&mut self, object: Object, signal: &str, arguments: &str) -> Result<()> {
        if self.peer == Peer::Systemd {
            return Ok(());
        }
        let rule = format!(
            "type='signal',path='{}',interface='{}',member='{signal}',{arguments}",
            object.path, object.interface
        );
        self.call(DAEMON, "AddMatch", &[Value::Text(&rule)]).map(drop)
    }

    /// Calls a method and waits for its answer, of which it returns the strings and paths.
    pub fn call(&mut self, object: Object, method: &str, arguments: &[Value<'_>]) -> Result<Vec<String>> {
        self.serial += 1;
        let call = Call {
            serial: self.serial,
            object,
            method,
            arguments,
        };
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(&call.encode()?)?;
        loop {
            let message = self.receive()?;
            if message.reply_to != Some(self.serial) {
                self.signals.push_back(message);
                continue;
            }
            return match message.error {
                None => Ok(message.texts),
                Some(name) => Err(BusError::Refused {
                    name,
                    // Its first argument is a sentence, if there is one.
                    message: message.texts.into_iter().next().unwrap_or_default(),
                }),
            };
        }
    }

    /// Waits for a signal whose strings and paths are such as `wanted` takes.
    pub fn wait_for<T>(&mut self, signal: &str, wanted: impl Fn(&[String]) -> Option<T>) -> Result<T> {
        loop {
            let message = match self.signals.pop_front() {
                Some(message) => message,
                None => self.receive()?,
            };
            if message.signal.as_deref() == Some(signal)
                && let Some(found) = wanted(&message.texts)
            {
                return Ok(found);
            }
        }
    }

    fn receive(&mut self) -> Result<Message> {
        let mut start = [0; START];
        self.read(&mut start)?;
        let mut message = start.to_vec();
        message.resize(START + wire::rest(&start)?, 0);
        self.read(&mut message[START..])?;
        Message::decode(&message)
    }

    fn read(&mut self, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Tried again, so that what is left tells whether time is up.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn left(&self) -> Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests;
