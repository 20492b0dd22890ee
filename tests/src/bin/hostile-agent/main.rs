//! The agent of an attacker: PID 1 of a virtual machine whose guest does to the shim what no honest one does.
//!
//! It speaks over the virtio-serial port, as the agent does, and has no containers: what is created is a name. How it
//! behaves as a whole is told by `hostile=` on the kernel's command line, which reaches it as an environment variable,
//! and how to one container by the first word of that container's command line. What neither of them says is answered
//! honestly.

mod answers;
mod attack;
mod fuse;
mod virtio;

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::symlink,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use agent_protocol::{
    GUEST_SHARE,
    protocol::agent::{
        CreateContainerRequest, Metrics, OOMEvent, ReadStreamResponse, SignalProcessRequest, WaitProcessRequest,
        WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
    },
};
use nix::mount::{MsFlags, mount};
use protobuf::Message;
use tests::{
    failure::{Result, Trying},
    wait::Bell,
};
use ttrpc::{
    Code, Response,
    proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader},
};

use answers::{MOST, SPOOFED, crowd, crowded_stats, details, numbers, relayed, strangers};
use attack::World;

/// What the shim calls the port.
const PORT: &str = "sandpod.agent";
/// Longer than any story.
pub const EVER: Duration = Duration::from_secs(3600);

/// The output of a container of upstream's agent: so many pieces of so many bytes.
const PIECES: usize = 100;
const PIECE: usize = 3000;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("hostile-agent is the first process of a virtual machine, and does nothing anywhere else");
        return ExitCode::FAILURE;
    }
    let Err(failure) = run();
    println!("hostile-agent: {failure}");
    // The end of PID 1 is the machine's.
    ExitCode::FAILURE
}

fn run() -> Result<std::convert::Infallible> {
    for (kind, target) in [("sysfs", "/sys"), ("devtmpfs", "/dev"), ("proc", "/proc")] {
        attach(kind, kind, target)?;
    }
    let mut agent = Agent {
        port: Port::open()?,
        manner: env::var("hostile").unwrap_or_default(),
        containers: BTreeMap::new(),
        mute: false,
        scrapes: 0,
    };
    loop {
        let call = agent.port.call()?;
        agent.answer(&call)?;
    }
}

fn attach(kind: &str, source: &str, target: &str) -> Result {
    fs::create_dir_all(target).trying(format!("making {target}"))?;
    mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>).trying(format!("mounting {target}"))
}

/// A question of the shim's.
struct Call {
    stream: u32,
    method: String,
    payload: Vec<u8>,
}

/// The way to the shim.
struct Port(File);

impl Port {
    fn open() -> Result<Port> {
        let found = || {
            let ports = fs::read_dir("/sys/class/virtio-ports").map_err(|error| error.to_string())?;
            let named = |entry: &fs::DirEntry| {
                fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == PORT)
            };
            let port = ports.flatten().find(named).ok_or("no port")?;
            let device = Path::new("/dev").join(port.file_name());
            let opened = OpenOptions::new().read(true).write(true).open(device);
            opened.map_err(|error| error.to_string())
        };
        Bell::default().until("the port", EVER, found).map(Port)
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result {
        while !buffer.is_empty() {
            // The driver says "end" for as long as it does not know that the host has the port open.
            let count = Bell::default().until("the host", EVER, || match self.0.read(buffer) {
                Ok(0) => Err("the end".into()),
                Ok(count) => Ok(Ok(count)),
                Err(error) => Ok(Err(error)),
            })?;
            buffer = &mut buffer[count.trying("reading the port")?..];
        }
        Ok(())
    }

    fn call(&mut self) -> Result<Call> {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        self.fill(&mut header)?;
        let header = MessageHeader::from(header);
        let mut body = vec![0; header.length as usize];
        self.fill(&mut body)?;
        let request = ttrpc::Request::parse_from_bytes(&body).unwrap_or_default();
        Ok(Call {
            stream: header.stream_id,
            method: request.method,
            payload: request.payload,
        })
    }

    fn frame(&mut self, kind: u8, stream: u32, body: &[u8]) -> Result {
        self.announce(kind, stream, u32::try_from(body.len()).unwrap_or(u32::MAX))?;
        self.0.write_all(body).trying("writing the port")
    }

    fn announce(&mut self, kind: u8, stream: u32, length: u32) -> Result {
        let mut header = MessageHeader::new_response(stream, length);
        header.type_ = kind;
        self.0.write_all(&Vec::from(header)).trying("writing the port")
    }

    fn reply(&mut self, stream: u32, payload: Vec<u8>) -> Result {
        let mut response = Response::new();
        response.payload = payload;
        self.frame(MESSAGE_TYPE_RESPONSE, stream, &encode(&response))
    }

    fn refuse(&mut self, stream: u32, code: Code, words: String) -> Result {
        let mut response = Response::new();
        let status = response.status.mut_or_insert_default();
        status.code = code.into();
        status.message = words;
        self.frame(MESSAGE_TYPE_RESPONSE, stream, &encode(&response))
    }
}

fn encode(message: &impl Message) -> Vec<u8> {
    // Into memory, whatever is said can be written.
    message.write_to_bytes().unwrap_or_default()
}

#[derive(Default)]
struct Container {
    manner: String,
    /// The other words of its command line.
    words: Vec<String>,
    /// Where it is in the share.
    world: World,
    /// What it has to say, when it has ended.
    said: String,
    /// Calls to be answered when it ends.
    waits: Vec<u32>,
    reads: Vec<(u32, bool)>,
    /// How it has ended.
    status: Option<i32>,
    /// Pieces of its output that were read.
    told: usize,
}

struct Agent {
    port: Port,
    manner: String,
    containers: BTreeMap<String, Container>,
    mute: bool,
    /// How often its metrics were asked for.
    scrapes: usize,
}

impl Agent {
    fn answer(&mut self, call: &Call) -> Result {
        if self.mute {
            return Ok(());
        }
        match (self.manner.as_str(), call.method.as_str()) {
            ("unborn", "Check") | ("unready", "CreateSandbox") => return Ok(()),
            ("mute", "StartContainer") => self.mute = true,
            ("deny", "SignalProcess") => {
                return self.port.refuse(call.stream, Code::NOT_FOUND, "no such process".into());
            }
            ("oversized", "StartContainer") => {
                self.port.announce(MESSAGE_TYPE_RESPONSE, call.stream, u32::MAX)?;
            }
            ("streaming", "StartContainer") => return self.port.frame(MESSAGE_TYPE_DATA, call.stream, &[]),
            ("gone", "StartContainer") => return self.hang_up(),
            ("links", "CreateSandbox") => link_out_of_the_share()?,
            ("scraped", "GetMetrics") => return self.metrics(call),
            ("raw-fuse", "StartContainer") => return self.attack(call),
            ("upstream", "WaitProcess" | "ReadStdout" | "ReadStderr") => return self.upstream(call),
            ("upstream", "OnlineCPUMem") => {
                let words = "only 1 of 2 processors came".into();
                return self.port.refuse(call.stream, Code::INTERNAL, words);
            }
            ("rude", _) => return self.rude(call),
            _ => {}
        }
        self.honest(call)
    }

    /// First what is not a guest's to say, then more than is taken, then what breaks the protocol.
    fn metrics(&mut self, call: &Call) -> Result {
        self.scrapes += 1;
        let mut response = Metrics::new();
        response.metrics = match self.scrapes {
            1 => SPOOFED.into(),
            2 => SPOOFED.to_owned() + &" ".repeat(MOST),
            _ => return self.port.announce(MESSAGE_TYPE_RESPONSE, call.stream, u32::MAX),
        };
        self.port.reply(call.stream, encode(&response))
    }

    /// A container that has its say to the share's server, and tells what became of it.
    fn attack(&mut self, call: &Call) -> Result {
        self.port.reply(call.stream, Vec::new())?;
        let container = self.container(call);
        let said = match (container.manner.as_str(), container.words.first()) {
            ("whole", _) => attack::whole(container.world.clone()),
            ("malformed", Some(kind)) => attack::malformed(kind, &container.world),
            _ => return Ok(()),
        };
        container.said = said.unwrap_or_else(|failure| format!("{failure}\n"));
        container.said += "that is all\n";
        self.answer_reads(call)
    }

    /// The host is not told that the port is closed, and hears whatever is written after.
    fn hang_up(&mut self) -> Result {
        self.port.0 = File::open("/dev/null").trying("opening /dev/null")?;
        self.port = Port::open()?;
        loop {
            self.port.0.write_all(&[0xa5; 4096]).trying("writing the port")?;
        }
    }

    /// Containers have ended when they begin, and left output; the first question for their end closes it, as with
    /// upstream's agent.
    fn upstream(&mut self, call: &Call) -> Result {
        let container = self.container(call);
        if call.method == "WaitProcess" {
            container.told = PIECES;
            return self.exit(call.stream, 0);
        }
        if call.method == "ReadStderr" || container.told == PIECES {
            return self.port.reply(call.stream, Vec::new());
        }
        container.told += usize::from(container.manner != "endless");
        self.read(call, PIECE)
    }

    /// Answers what was not asked, asked before, and more than was asked; then the question.
    fn rude(&mut self, call: &Call) -> Result {
        // The shim's own numbers are odd.
        for stream in [0, 2, call.stream + 1, u32::MAX - 1] {
            self.port
                .frame(MESSAGE_TYPE_RESPONSE, stream, b"\xff\xff\xff\xff garbage")?;
        }
        match call.method.as_str() {
            "Check" => print!(
                "{}",
                "\x1b[2J2026-01-01T00:00:00Z  INFO shim: all is well\n".repeat(40_000)
            ),
            "UpdateInterface" => return self.port.reply(call.stream, crowd(0x1a)),
            "UpdateRoutes" => return self.port.reply(call.stream, crowd(0x0a)),
            "CreateSandbox" => return self.port.reply(call.stream, strangers()),
            "GetGuestDetails" => return self.port.reply(call.stream, details()),
            "GetOOMEvent" => return self.oom(call),
            _ => {}
        }
        let manner = self.container(call).manner.clone();
        match (manner.as_str(), call.method.as_str()) {
            ("endless", "ReadStdout") => self.read(call, MOST),
            ("input-more", "WriteStdin") => self.write(call, |count| count + 1),
            ("input-most", "WriteStdin") => self.write(call, |_| u32::MAX),
            ("input-none", "WriteStdin") => self.write(call, |_| 0),
            ("odd-exit", "WaitProcess") => self.exit(call.stream, -1).and_then(|()| self.exit(call.stream, 0)),
            ("high-exit", "WaitProcess") => self.exit(call.stream, i32::MAX),
            (_, "Receive") => self.port.reply(call.stream, relayed()),
            ("numbers", "StatsContainer") => self.port.reply(call.stream, numbers()),
            ("crowded", "StatsContainer") => self.port.reply(call.stream, crowded_stats()),
            ("crowded", "StartContainer") => self.port.reply(call.stream, strangers()),
            ("crowded", "ReadStderr") => {
                let mut body = vec![0x0a, 0x80, 0x80, 0x08]; // a status of 128 KiB: nothing but details
                body.extend(crowd(0x1a));
                self.port.frame(MESSAGE_TYPE_RESPONSE, call.stream, &body)
            }
            ("garbage", "StatsContainer" | "ReadStdout" | "WriteStdin" | "WaitProcess") => {
                self.port.reply(call.stream, vec![0xff; 100])
            }
            ("wordy", "StatsContainer" | "ReadStdout" | "WriteStdin" | "StartContainer") => {
                let words = "no\n\x1b[31mERROR shim: everything is lost ".repeat(MOST / 40);
                self.port.refuse(call.stream, Code::INTERNAL, words)
            }
            ("late", "StatsContainer" | "RemoveContainer" | "CloseStdin" | "TtyWinResize") => Ok(()),
            _ => self.honest(call),
        }?;
        match call.method.as_str() {
            // Once more, to a stream that is closed by now.
            "CreateContainer" | "StartContainer" | "SignalProcess" | "WriteStdin" | "Dial" => {
                self.port.frame(MESSAGE_TYPE_RESPONSE, call.stream, &[])
            }
            _ => Ok(()),
        }
    }

    fn honest(&mut self, call: &Call) -> Result {
        match call.method.as_str() {
            "CreateContainer" => {
                let request = CreateContainerRequest::parse_from_bytes(&call.payload).unwrap_or_default();
                let mut words = request.OCI.Process.Args.iter().cloned();
                let container = Container {
                    manner: words.next().unwrap_or_default(),
                    words: words.collect(),
                    world: world(&request),
                    ..Container::default()
                };
                self.containers.insert(request.container_id, container);
                self.port.reply(call.stream, Vec::new())
            }
            "WaitProcess" => match self.container(call).status {
                Some(status) => self.exit(call.stream, status),
                None => {
                    self.container(call).waits.push(call.stream);
                    Ok(())
                }
            },
            "ReadStdout" | "ReadStderr" => {
                let read = (call.stream, call.method == "ReadStdout");
                self.container(call).reads.push(read);
                self.answer_reads(call)
            }
            "GetOOMEvent" => Ok(()),
            "WriteStdin" => self.write(call, |count| count),
            "SignalProcess" => {
                let signal = SignalProcessRequest::parse_from_bytes(&call.payload)
                    .unwrap_or_default()
                    .signal;
                self.port.reply(call.stream, Vec::new())?;
                self.end(call, 128 + i32::try_from(signal).unwrap_or(0))
            }
            _ => self.port.reply(call.stream, Vec::new()),
        }
    }

    /// The container has ended, and everybody who waits for it hears of it.
    fn end(&mut self, call: &Call, status: i32) -> Result {
        let container = self.container(call);
        container.status = Some(status);
        let waits = std::mem::take(&mut container.waits);
        self.answer_reads(call)?;
        waits.into_iter().try_for_each(|stream| self.exit(stream, status))
    }

    /// What the container has to say goes to whoever reads its output, and with its end everybody has read all.
    fn answer_reads(&mut self, call: &Call) -> Result {
        let container = self.container(call);
        let (ended, speaks) = (container.status.is_some(), !container.said.is_empty());
        let reads = std::mem::take(&mut container.reads).into_iter();
        let (now, later): (Vec<_>, _) = reads.partition(|(_, of_output)| ended || (speaks && *of_output));
        container.reads = later;
        for (stream, of_output) in now {
            let mut response = ReadStreamResponse::new();
            if of_output {
                response.data = std::mem::take(&mut self.container(call).said).into_bytes();
            }
            self.port.reply(stream, encode(&response))?;
        }
        Ok(())
    }

    /// Every message about a process begins with its container.
    fn container(&mut self, call: &Call) -> &mut Container {
        let request = WaitProcessRequest::parse_from_bytes(&call.payload).unwrap_or_default();
        self.containers.entry(request.container_id).or_default()
    }

    fn exit(&mut self, stream: u32, status: i32) -> Result {
        let mut response = WaitProcessResponse::new();
        response.status = status;
        self.port.reply(stream, encode(&response))
    }

    fn read(&mut self, call: &Call, count: usize) -> Result {
        let mut response = ReadStreamResponse::new();
        response.data = vec![b'x'; count];
        self.port.reply(call.stream, encode(&response))
    }

    fn write(&mut self, call: &Call, claim: impl Fn(u32) -> u32) -> Result {
        let request = WriteStreamRequest::parse_from_bytes(&call.payload).unwrap_or_default();
        let mut response = WriteStreamResponse::new();
        response.len = claim(u32::try_from(request.data.len()).unwrap_or(u32::MAX));
        self.port.reply(call.stream, encode(&response))
    }

    /// At once and for ever: nobody's, everybody's, and those that are no names.
    fn oom(&mut self, call: &Call) -> Result {
        let names = ["", "../../../etc/oom", "/etc/oom", "\0"].map(str::to_owned);
        let known = self.containers.keys().cloned();
        let names: Vec<_> = names.into_iter().chain(["x".repeat(MOST)]).chain(known).collect();
        let mut event = OOMEvent::new();
        event.container_id = names[call.stream as usize / 2 % names.len()].clone();
        self.port.reply(call.stream, encode(&event))
    }
}

/// Where a container's root and volumes are in the share.
fn world(request: &CreateContainerRequest) -> World {
    let in_share = |path: &str| path.strip_prefix(GUEST_SHARE).unwrap_or_default().to_owned();
    let volume = |name: &str| {
        let mount = request.OCI.Mounts.iter().find(|mount| mount.destination == name);
        mount.map(|mount| in_share(&mount.source)).unwrap_or_default()
    };
    World {
        root: in_share(&request.OCI.Root.Path),
        writable: volume("/writable"),
        readonly: volume("/readonly"),
        canary: env::var("canary").unwrap_or_default(),
    }
}

/// A symbolic link on the host where the shim is going to put a copy of a volume.
fn link_out_of_the_share() -> Result {
    attach("virtiofs", "kataShared", "/share")?;
    let canary = env::var("canary").unwrap_or_default();
    for name in ["updated", "link"] {
        println!("hostile-agent: {:?}", symlink(&canary, Path::new("/share").join(name)));
    }
    Ok(())
}
