//! Stands in for a CRI-O before 1.30: on its socket it speaks as much of the CRI as an installer asks, without handlers
//! in its status, and answers to `GET /config` with its configuration, as that one does.
//!
//! ```text
//! stand-in-crio restart     ends the one that runs, if any, and is back when another one serves
//! stand-in-crio stop        ends it
//! stand-in-crio serve       serves until it is killed
//! ```
//!
//! It reads `/etc/crio/crio.conf.d` when it starts and leaves out a handler whose program it does not find. Two files
//! beside its socket change that: with `blind` it finds no program below /opt, and with `mute` it has no `/config`.

use std::{
    convert::Infallible,
    env,
    error::Error,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::{Bytes, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{MsgFlags, recv},
    },
    unistd::Pid,
};
use tokio::net::{UnixListener, UnixStream};
use toml::{Table, Value};

const FOLDER: &str = "/run/crio";
const SOCKET: &str = "/run/crio/crio.sock";
const PID: &str = "/run/crio/crio.pid";
const DROP_INS: &str = "/etc/crio/crio.conf.d";
const VERSION: &str = "1.28.4";

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["serve"] => serve(),
        ["stop"] => stop(),
        ["restart"] => stop().and_then(|()| start()),
        _ => Err("usage: stand-in-crio serve | restart | stop".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stand-in-crio: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result {
    let mut server = Command::new(env::current_exe()?)
        .arg("serve")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Whoever waits for all that this command says would wait for the server.
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    match line.trim() {
        "serving" => Ok(()),
        said => Err(format!("the server said {said:?} and not that it serves").into()),
    }
}

/// A connection to it ends when it has ended.
fn stop() -> Result {
    let Ok(mut connection) = std::os::unix::net::UnixStream::connect(SOCKET) else {
        return Ok(());
    };
    let pid = fs::read_to_string(PID)?.trim().parse()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    match connection.read(&mut [0]) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => Err(format!("its end was not seen: {other:?}").into()),
    }
}

fn serve() -> Result {
    let configuration = toml::to_string(&configuration()?)?;
    fs::create_dir_all(FOLDER)?;
    drop(fs::remove_file(SOCKET));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = UnixListener::bind(SOCKET)?;
        fs::write(PID, std::process::id().to_string())?;
        println!("serving");
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(converse(stream, configuration.clone()));
        }
    })
}

/// What is in force: the handlers of all files whose program is there.
fn configuration() -> Result<Table> {
    let mut names: Vec<_> = match fs::read_dir(DROP_INS) {
        Ok(found) => found.collect::<std::io::Result<Vec<_>>>()?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    names.sort_by_key(fs::DirEntry::file_name);
    let mut runtimes = Table::from_iter([("runc".to_owned(), Value::Table(Table::new()))]);
    for name in names {
        let read: Table = fs::read_to_string(name.path())?.parse()?;
        let told = read.get("crio").and_then(|crio| crio.get("runtime")?.get("runtimes"));
        runtimes.extend(told.and_then(Value::as_table).cloned().unwrap_or_default());
    }
    let blind = Path::new(FOLDER).join("blind").exists();
    runtimes.retain(|_, runtime| match runtime.get("runtime_path").and_then(Value::as_str) {
        Some(program) => Path::new(program).exists() && !(blind && program.starts_with("/opt/")),
        None => true,
    });
    let runtime = Table::from_iter([
        ("default_runtime".to_owned(), Value::from("runc")),
        ("runtimes".to_owned(), Value::Table(runtimes)),
    ]);
    let crio = Table::from_iter([("runtime".to_owned(), Value::Table(runtime))]);
    Ok(Table::from_iter([("crio".to_owned(), Value::Table(crio))]))
}

/// Whoever begins with HTTP/2 speaks gRPC.
async fn converse(stream: UnixStream, configuration: String) {
    let mut first = [0; 3];
    let begun = async {
        loop {
            stream.readable().await?;
            let peek = || Ok(recv(stream.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK)?);
            match stream.try_io(tokio::io::Interest::READABLE, peek) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // Fewer are as good: no other word of HTTP/1 begins so.
                told => return told,
            }
        }
    };
    if begun.await.is_err() {
        return;
    }
    let answer = service_fn(move |request: Request<Incoming>| {
        let configuration = configuration.clone();
        async move { Ok::<_, Infallible>(answer(request, &configuration).await) }
    });
    let stream = TokioIo::new(stream);
    // A client that goes away in the middle is not this one's fault.
    if first == *b"PRI" {
        drop(
            http2::Builder::new(TokioExecutor::new())
                .serve_connection(stream, answer)
                .await,
        );
    } else {
        drop(http1::Builder::new().serve_connection(stream, answer).await);
    }
}

async fn answer(request: Request<Incoming>, configuration: &str) -> Response<BoxBody<Bytes, Infallible>> {
    let path = request.uri().path().to_owned();
    // gRPC wants its question heard.
    drop(request.into_body().collect().await);
    let mute = Path::new(FOLDER).join("mute").exists();
    let (kind, body, status) = match path.as_str() {
        "/config" if !mute => (
            "application/toml",
            Full::from(configuration.to_owned()).boxed(),
            StatusCode::OK,
        ),
        "/runtime.v1.RuntimeService/Version" => grpc(&text(3, VERSION)),
        "/runtime.v1.RuntimeService/Status" => {
            let conditions =
                ["RuntimeReady", "NetworkReady"].map(|name| part(1, &[text(1, name), vec![2 << 3, 1]].concat()));
            grpc(&part(1, &conditions.concat()))
        }
        "/runtime.v1.RuntimeService/ListPodSandbox" => grpc(&[]),
        _ => (
            "text/plain",
            Full::from("404 page not found\n").boxed(),
            StatusCode::NOT_FOUND,
        ),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// An answer of gRPC: one message with its length before it, and a good end.
fn grpc(message: &[u8]) -> (&'static str, BoxBody<Bytes, Infallible>, StatusCode) {
    let length = u32::try_from(message.len()).unwrap_or_default().to_be_bytes();
    let framed = [&[0], &length[..], message].concat();
    let end = HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let body = Full::from(framed).with_trailers(async { Some(Ok(end)) });
    ("application/grpc", body.boxed(), StatusCode::OK)
}

/// A field of a protobuf message whose value is another message or a text, of at most 127 bytes.
fn part(number: u8, value: &[u8]) -> Vec<u8> {
    let length = u8::try_from(value.len()).unwrap_or_default();
    [&[number << 3 | 2, length], value].concat()
}

fn text(number: u8, value: &str) -> Vec<u8> {
    part(number, value.as_bytes())
}
