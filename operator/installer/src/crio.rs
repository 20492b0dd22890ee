//! What CRI-O tells by HTTP, on the same socket as the CRI: `GET /config` answers with the configuration that is in
//! force, as TOML. `crio status config` asks exactly that (CRI-O, `internal/client` and `server/inspect.go`).
//!
//! CRI-O tells its handlers in the CRI's status from 1.30 on only. In the configuration an earlier one has them, too,
//! and there a handler that it has refused at its start is missing (CRI-O, `ValidateRuntimes`).

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use toml::Table;

/// The longest configuration that is read, in bytes: a usual one is a hundredth of it.
const LONGEST: usize = 4 << 20;

/// Why CRI-O's configuration is not known.
#[derive(Debug, thiserror::Error)]
pub enum NotTold {
    /// The socket.
    #[error("its socket cannot be connected to: {0}")]
    Socket(#[from] std::io::Error),
    /// What is served there is not HTTP, or ended.
    #[error("it does not answer by HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// The answer's body.
    #[error("its answer cannot be read: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// Another answer than 200.
    #[error("it answers to /config with {0}")]
    Status(StatusCode),
    /// The answer has no handlers in it.
    #[error("its answer is no configuration of CRI-O")]
    Form,
}

/// A configuration of CRI-O, or a part of one, that has handlers.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration(Table);

/// What runs the pods of a handler.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runtime {
    /// `runtime_path`, or empty.
    pub path: String,
    /// `runtime_type`, such as `vm` or `oci`, or empty.
    pub kind: String,
}

impl Configuration {
    /// Asks the CRI-O at a socket for the configuration that is in force.
    ///
    /// # Errors
    /// It does not tell.
    pub async fn of(socket: &Path) -> Result<Self, NotTold> {
        let stream = UnixStream::connect(socket).await?;
        let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the client; an error of it is the request's, too.
        let driver = tokio::spawn(connection);
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = hyper::Uri::from_static("/config");
        // A Unix socket has no name; HTTP wants one.
        let name = hyper::header::HeaderValue::from_static("localhost");
        request.headers_mut().insert(HOST, name);
        let answer = client.send_request(request).await?;
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(NotTold::Status(status));
        }
        let body = Limited::new(answer.into_body(), LONGEST).collect().await;
        driver.abort();
        let bytes = body.map_err(NotTold::Body)?.to_bytes();
        Self::parse(&String::from_utf8_lossy(&bytes)).ok_or(NotTold::Form)
    }

    /// Reads TOML; none where it has no handlers: CRI-O itself always has one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let configuration = Self(text.parse().ok()?);
        configuration.section()?.get("runtimes")?.as_table()?;
        Some(configuration)
    }

    fn section(&self) -> Option<&Table> {
        self.0.get("crio")?.get("runtime")?.as_table()
    }

    fn tables(&self) -> impl Iterator<Item = (&String, &toml::Value)> {
        let tables = self.section().and_then(|section| section.get("runtimes")?.as_table());
        tables.into_iter().flatten()
    }

    /// The handlers, and what runs their pods.
    #[must_use]
    pub fn handlers(&self) -> BTreeMap<String, Runtime> {
        let word = |table: &toml::Value, key: &str| table.get(key).and_then(toml::Value::as_str).map(str::to_owned);
        let runtime = |table: &toml::Value| Runtime {
            path: word(table, "runtime_path").unwrap_or_default(),
            kind: word(table, "runtime_type").unwrap_or_default(),
        };
        self.tables()
            .map(|(name, table)| (name.clone(), runtime(table)))
            .collect()
    }

    /// The handlers that are not ours, and which one is the default, at their places in the configuration.
    #[must_use]
    pub fn others(&self, ours: &BTreeSet<String>) -> Value {
        let theirs = self.tables().filter(|(name, _)| !ours.contains(*name));
        let theirs: BTreeMap<_, _> = theirs.collect();
        let default = self.section().and_then(|section| section.get("default_runtime"));
        json!({"crio": {"runtime": {"default_runtime": default, "runtimes": theirs}}})
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;

    const TOLD: &str = r#"
[crio]
root = "/var/lib/containers/storage"
[crio.runtime]
default_runtime = "runc"
[crio.runtime.runtimes]
[crio.runtime.runtimes.kata]
runtime_path = "/opt/sandpod/current/bin/containerd-shim-kata-v2"
runtime_type = "vm"
privileged_without_host_devices = false
[crio.runtime.runtimes.runc]
runtime_path = ""
monitor_env = ["PATH=/usr/bin"]
"#;

    /// What is made of a server's answer, and what it was asked.
    fn asked(answer: &'static [u8]) -> (Result<Configuration, NotTold>, String) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("crio.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            client.write_all(answer).unwrap();
            String::from_utf8(request).unwrap()
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let told = runtime.block_on(Configuration::of(&socket));
        (told, server.join().unwrap())
    }

    #[test]
    fn its_own_interface_is_asked_as_its_own_client_does() {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/toml\r\nContent-Length: {}\r\n\r\n{TOLD}",
            TOLD.len()
        );
        let (told, request) = asked(answer.leak().as_bytes());
        assert_eq!(told.unwrap(), Configuration::parse(TOLD).unwrap());
        let (line, headers) = request.split_once("\r\n").unwrap();
        assert_eq!(line, "GET /config HTTP/1.1");
        assert!(headers.to_lowercase().starts_with("host: localhost\r\n"), "{headers}");
    }

    #[test]
    fn one_that_does_not_tell_is_no_failure_of_another_kind() {
        let why = |answer| asked(answer).0.unwrap_err().to_string();
        assert_eq!(
            why(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            "it answers to /config with 404 Not Found"
        );
        let other = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n[crio]\na=1\n";
        assert_eq!(why(other), "its answer is no configuration of CRI-O");
        let ended = why(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[crio]\n");
        assert!(ended.starts_with("its answer cannot be read: "), "{ended}");
        // As a server that speaks HTTP/2 alone, such as containerd, says at once.
        let other = why(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        assert!(other.starts_with("it does not answer by HTTP: "), "{other}");
    }

    #[test]
    fn handlers_are_read_with_what_runs_them() {
        let handlers = Configuration::parse(TOLD).unwrap().handlers();
        let runtime = |path: &str, kind: &str| Runtime {
            path: path.into(),
            kind: kind.into(),
        };
        let shim = "/opt/sandpod/current/bin/containerd-shim-kata-v2";
        let expected = [("kata", runtime(shim, "vm")), ("runc", runtime("", ""))];
        assert_eq!(
            handlers,
            expected.map(|(name, runtime)| (name.to_owned(), runtime)).into()
        );
        assert_eq!(Configuration::parse("[crio.runtime]\n"), None);
        assert_eq!(Configuration::parse("<html>"), None);
    }

    #[test]
    fn what_others_have_is_compared_and_ours_is_not() {
        let others = |text: &str| Configuration::parse(text).unwrap().others(&["kata".to_owned()].into());
        let before = others(&TOLD.replace("runtimes.kata]", "runtimes.kata]\nruntime_root = \"/run/vc\""));
        assert_eq!(before, others(TOLD));
        let difference = |text: &str| crate::effective::difference(&before, &others(text));
        assert_eq!(
            difference(&TOLD.replace("runtimes.runc]", "runtimes.crun]")).as_deref(),
            Some("crio.runtime.runtimes.crun")
        );
        assert_eq!(
            difference(&TOLD.replace("default_runtime = \"runc\"", "")).as_deref(),
            Some("crio.runtime.default_runtime")
        );
    }
}
