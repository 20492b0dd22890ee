//! As much of HTTP/1 (RFC 9112) as a scrape takes: one GET per connection, over any stream. The shim serves it on a
//! unix socket, `kata-ctl monitor` on TCP, and what asks a shim is its client.

use std::{io, path::Path, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// The longest head of a request or an answer.
const HEAD: usize = 8 << 10;
/// Fields in a head: more than any scraper sends.
const FIELDS: usize = 64;
/// The longest answer that a client takes.
const ANSWER: u64 = 16 << 20;
/// How long a client may take to say what it wants, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The head of an answer that switches the connection.
const SWITCH: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: console\r\n\r\n";

/// The type of Prometheus' text.
pub const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The type of any other text.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// The type of JSON.
pub const JSON: &str = "application/json";
/// The type of a page.
pub const HTML: &str = "text/html; charset=utf-8";

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// A path, perhaps with a query.
    pub target: String,
    /// Whom it believes to ask: the field `Host`, which HTTP/1.0 has not.
    pub host: Option<String>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    status: &'static str,
    kind: &'static str,
    /// What a browser may load and run for it.
    policy: Option<&'static str>,
    body: String,
}

impl Answer {
    /// What was asked for, with its media type.
    pub fn ok(kind: &'static str, body: String) -> Answer {
        Answer {
            status: "200 OK",
            kind,
            policy: None,
            body,
        }
    }

    /// A page, with its Content-Security-Policy.
    pub fn page(policy: &'static str, body: String) -> Answer {
        Answer {
            policy: Some(policy),
            ..Answer::ok(HTML, body)
        }
    }

    /// Nobody who asks for this name is answered (RFC 9110, section 15.5.20).
    pub fn misdirected(sentence: impl Into<String>) -> Answer {
        Answer::refusal("421 Misdirected Request", sentence)
    }

    /// Nothing of that name.
    pub fn not_found(sentence: impl Into<String>) -> Answer {
        Answer::refusal("404 Not Found", sentence)
    }

    /// It exists and cannot be had now.
    pub fn unavailable(sentence: impl Into<String>) -> Answer {
        Answer::refusal("503 Service Unavailable", sentence)
    }

    fn refusal(status: &'static str, sentence: impl Into<String>) -> Answer {
        Answer {
            status,
            kind: TEXT,
            policy: None,
            body: sentence.into() + "\n",
        }
    }

    fn head(&self) -> String {
        let Answer { status, kind, .. } = self;
        let length = self.body.len();
        let policy = self
            .policy
            .map(|policy| format!("Content-Security-Policy: {policy}\r\n"));
        let policy = policy.unwrap_or_default();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{policy}\
             X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
    }
}

/// Reads one request and answers it by `respond`.
///
/// # Errors
/// The client's: it says or takes nothing in time, or hangs up.
pub async fn serve<F: Future<Output = Answer>>(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    respond: impl FnOnce(Request) -> F,
) -> io::Result<()> {
    let given = match request(&mut stream).await? {
        Ok(request) => respond(request).await,
        Err(refusal) => refusal,
    };
    answer(&mut stream, &given).await
}

/// Writes an answer, and with it ends the connection.
///
/// # Errors
/// As [`serve`].
pub async fn answer(stream: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let write = async {
        stream.write_all(answer.head().as_bytes()).await?;
        stream.write_all(answer.body.as_bytes()).await?;
        stream.shutdown().await
    };
    timeout(PATIENCE, write).await?
}

/// Answers that from here on the stream carries the bytes of a console, both ways (RFC 9110, section 7.8).
///
/// # Errors
/// As [`serve`].
pub async fn switch(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_all(SWITCH).await
}

/// A target without its query.
pub fn path(target: &str) -> &str {
    target.split_once('?').map_or(target, |(path, _)| path)
}

/// The value of a key in a target's query.
pub fn query<'a>(target: &'a str, key: &str) -> Option<&'a str> {
    let (_, query) = target.split_once('?')?;
    query
        .split('&')
        .find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key))
        .map(|(_, value)| value)
}

/// A GET, or the answer to what is none.
///
/// # Errors
/// As [`serve`].
pub async fn request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<Request, Answer>> {
    timeout(PATIENCE, read_request(stream)).await?
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<Request, Answer>> {
    let mut head = Vec::with_capacity(1024);
    loop {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(&head) {
            Ok(httparse::Status::Complete(_)) => {
                return Ok(match (request.method, request.path) {
                    (Some("GET"), Some(target)) => Ok(Request {
                        target: target.to_owned(),
                        host: host(request.headers),
                    }),
                    _ => Err(Answer::refusal("405 Method Not Allowed", "only GET is served here")),
                });
            }
            Ok(httparse::Status::Partial) if head.len() < HEAD => {}
            Ok(httparse::Status::Partial) => {
                return Ok(Err(Answer::refusal(
                    "431 Request Header Fields Too Large",
                    "the request is too long",
                )));
            }
            Err(error) => return Ok(Err(Answer::refusal("400 Bad Request", error.to_string()))),
        }
        if stream.take(HEAD as u64).read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn host(fields: &[httparse::Header]) -> Option<String> {
    let field = fields.iter().find(|field| field.name.eq_ignore_ascii_case("host"))?;
    Some(String::from_utf8_lossy(field.value).into_owned())
}

/// The body of the answer to `GET target` on a unix socket.
///
/// # Errors
/// Nobody listens, no answer within `deadline`, or one other than 200; then with its sentence.
pub async fn get(socket: &Path, target: &str, deadline: Duration) -> io::Result<String> {
    timeout(deadline, ask(socket, target)).await?
}

/// The stream behind the answer to `GET target`, which switches to the bytes of a console.
///
/// # Errors
/// As [`get`].
pub async fn upgrade(socket: &Path, target: &str, deadline: Duration) -> io::Result<UnixStream> {
    let switched = async {
        let mut stream = connect(socket, target, "Connection: Upgrade\r\nUpgrade: console").await?;
        let mut head = [0; SWITCH.len()];
        stream.read_exact(&mut head).await?;
        if head == *SWITCH {
            return Ok(stream);
        }
        // A refusal, which is longer than that.
        body(stream, head.to_vec()).await?;
        Err(io::Error::other("the connection was not switched"))
    };
    timeout(deadline, switched).await?
}

async fn connect(socket: &Path, target: &str, fields: &str) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    Ok(stream)
}

async fn ask(socket: &Path, target: &str) -> io::Result<String> {
    body(connect(socket, target, "Connection: close").await?, Vec::new()).await
}

/// The body of an answer, of which the beginning may have been read; an error with its sentence for anything but 200.
async fn body(stream: UnixStream, mut answer: Vec<u8>) -> io::Result<String> {
    if stream.take(ANSWER).read_to_end(&mut answer).await? as u64 == ANSWER {
        return Err(io::Error::other("the answer is too long"));
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut head = httparse::Response::new(&mut fields);
    let parsed = head.parse(&answer).map_err(io::Error::other)?;
    let (httparse::Status::Complete(length), Some(code)) = (parsed, head.code) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let body = String::from_utf8(answer.split_off(length)).map_err(io::Error::other)?;
    match code {
        200 => Ok(body),
        _ => Err(io::Error::other(body.trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn exchange(request: &str) -> String {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        client.write_all(request.as_bytes()).await.unwrap();
        let respond = |request: Request| async move {
            let Request { target, host } = request;
            Answer::ok(TEXT, format!("you asked {host:?} for {target}"))
        };
        serve(server, respond).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_get_is_answered_and_the_connection_closed() {
        let answer = exchange("GET /metrics?sandbox=a HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("Content-Length: 42"),
            "{head}"
        );
        assert_eq!(body, "you asked Some(\"x\") for /metrics?sandbox=a");
        let of_old = exchange("GET / HTTP/1.0\r\n\r\n").await;
        assert!(of_old.ends_with("\r\n\r\nyou asked None for /"), "{of_old}");
    }

    #[tokio::test]
    async fn anything_else_is_refused_with_a_sentence() {
        assert!(
            exchange("POST /metrics HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 405 ")
        );
        assert!(exchange("nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
        let endless = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(HEAD));
        assert!(exchange(&endless).await.starts_with("HTTP/1.1 431 "));
    }

    #[test]
    fn only_a_page_has_a_policy() {
        let head = Answer::page("default-src 'none'", "<!doctype html>".into()).head();
        assert!(
            head.contains("\r\nContent-Security-Policy: default-src 'none'\r\nX-Content-Type-Options: nosniff\r\n")
        );
        assert!(!Answer::not_found("no").head().contains("Content-Security-Policy"));
    }

    #[test]
    fn a_query_is_searched_by_its_keys() {
        assert_eq!(query("/exec?rows=24&columns=80", "columns"), Some("80"));
        assert_eq!(query("/exec?rows=24", "row"), None);
        assert_eq!(query("/exec", "rows"), None);
    }

    #[tokio::test]
    async fn a_client_that_hangs_up_is_an_error() {
        let (client, server) = tokio::io::duplex(1 << 10);
        drop(client);
        let respond = |_| async { Answer::not_found("nothing") };
        assert!(serve(server, respond).await.is_err());
    }

    #[tokio::test]
    async fn the_client_reads_what_the_server_says() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = stream;
                match request(&mut stream).await.unwrap().unwrap().target.as_str() {
                    "/there" => answer(&mut stream, &Answer::ok(TEXT, "yes".into())).await.unwrap(),
                    "/echo?rows=24" => {
                        switch(&mut stream).await.unwrap();
                        let (mut from, mut to) = stream.split();
                        tokio::io::copy(&mut from, &mut to).await.unwrap();
                    }
                    _ => answer(&mut stream, &Answer::not_found("there is only /there"))
                        .await
                        .unwrap(),
                }
            }
        });
        let deadline = Duration::from_secs(5);
        assert_eq!(get(&socket, "/there", deadline).await.unwrap(), "yes");
        let refused = get(&socket, "/other", deadline).await.unwrap_err();
        assert_eq!(refused.to_string(), "there is only /there");
        let refused = upgrade(&socket, "/other", deadline).await.unwrap_err();
        assert_eq!(refused.to_string(), "there is only /there");
        let mut echo = upgrade(&socket, "/echo?rows=24", deadline).await.unwrap();
        echo.write_all(b"hello").await.unwrap();
        echo.shutdown().await.unwrap();
        let mut heard = String::new();
        echo.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "hello");
    }
}
