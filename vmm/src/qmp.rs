//! QEMU's monitor protocol (QMP) over an inherited socket: JSON objects, one per line.
//!
//! A guest that has broken into its QEMU speaks here, so nothing is believed: lines are bounded, answers must carry
//! the number of a question, and every question has a deadline.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, mpsc, oneshot, watch},
    time::timeout,
};

use crate::spec::Nic;

/// The longest line taken, in bytes. QEMU's longest true answer, the list of 240 vCPUs, has 60 thousand; in memory a
/// line of small objects becomes a hundred times as long.
const LONGEST_LINE: usize = 128 << 10;
/// Characters of QEMU's reason for a refusal that are kept.
const LONGEST_REASON: usize = 1024;
/// Bytes of a device's id. Ours are shorter, and events wait in a queue.
const LONGEST_ID: usize = 128;
/// QEMU answers within milliseconds, unless its host is starved: then it is not QEMU's fault, and the caller's patience
/// is to end first.
const ANSWER_DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 60 });
/// Before its first word QEMU is loaded, and has its memory cleared where it takes all of it at once. Its death is seen
/// at once.
const GREETING_DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 180 });

/// Where QEMU keeps what was plugged under an id.
pub(crate) const PERIPHERAL: &str = "/machine/peripheral/";

/// Why a conversation with QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The connection has ended; mostly because QEMU has.
    #[error("QEMU has closed its monitor")]
    Closed,
    /// QEMU says no.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
    },
    /// A message came without the open file that was sent with it.
    #[error(
        "QEMU did not get a file that was passed to it: the node's SELinux policy does not let QEMU's label have it \
         (the node's audit log tells the file)"
    )]
    Withheld,
    /// QEMU lives and has not said its first word.
    #[error("QEMU did not greet within {GREETING_DEADLINE:?}")]
    NoGreeting,
    /// QEMU says nothing.
    #[error("QEMU did not answer {0} within {ANSWER_DEADLINE:?}")]
    Silent(&'static str),
    /// QEMU talks nonsense.
    #[error("QEMU sent something that is not its protocol: {0}")]
    Garbled(String),
}

/// What QEMU reports unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// `DEVICE_DELETED`: the guest gave the device back.
    DeviceDeleted(String),
    /// `DEVICE_UNPLUG_GUEST_ERROR`: the guest keeps the device.
    DeviceKept(String),
    /// `ACPI_DEVICE_OST` about an insertion or a removal: the guest's kernel has dealt with it.
    GuestReport {
        /// Id of the device.
        device: String,
        /// Whether it did what was asked.
        done: bool,
    },
}

impl Event {
    fn device(&self) -> &str {
        match self {
            Event::DeviceDeleted(device) | Event::DeviceKept(device) | Event::GuestReport { device, .. } => device,
        }
    }
}

/// A vCPU, present or possible: an entry of `query-hotpluggable-cpus`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct CpuSlot {
    /// Name of the CPU's device model.
    #[serde(rename = "type")]
    pub model: String,
    /// Where it sits, as QEMU wants it back.
    pub props: serde_json::Map<String, Value>,
    /// Where the CPU is in QEMU's tree, if it is present.
    pub qom_path: Option<String>,
}

/// A memory device: an entry of `query-memory-devices`. Sizes are in bytes.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub(crate) enum MemoryDevice {
    /// A memory module.
    Dimm {
        /// Id of the device.
        id: Option<String>,
        /// Its size.
        size: u64,
    },
    /// A virtio-mem device.
    #[serde(rename_all = "kebab-case")]
    VirtioMem {
        /// What the guest has taken.
        size: u64,
        /// What it is offered.
        requested_size: u64,
    },
    /// Some other kind.
    #[serde(other, deserialize_with = "ignore")]
    Other,
}

fn ignore<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    serde::de::IgnoredAny::deserialize(deserializer).map(drop)
}

/// A conversation with one QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    questions: mpsc::Sender<Question>,
    /// The conversation holds the sender: when it ends, listeners are told.
    events: broadcast::WeakSender<Event>,
    /// The nonsense that ended the conversation, if any.
    nonsense: watch::Receiver<Option<String>>,
}

#[derive(Debug)]
struct Question {
    command: &'static str,
    arguments: Value,
    /// An open file that goes with it (SCM_RIGHTS).
    file: Option<OwnedFd>,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Takes QEMU's greeting and enters command mode.
    pub async fn connect(stream: UnixStream) -> Result<Qmp, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut lines = Lines::new(reader);
        let greeting = timeout(GREETING_DEADLINE, lines.next())
            .await
            .map_err(|_| QmpError::NoGreeting)??;
        if greeting.greeting.is_none() {
            return Err(QmpError::Garbled("no greeting".into()));
        }
        let (questions, inbox) = mpsc::channel(16);
        let (events, _) = broadcast::channel(256);
        let (told, nonsense) = watch::channel(None);
        let conversation = Conversation {
            lines,
            writer,
            events: events.clone(),
            open: HashMap::new(),
            asked: 0,
            nonsense: told,
        };
        tokio::spawn(conversation.run(inbox));
        let qmp = Qmp {
            questions,
            events: events.downgrade(),
            nonsense,
        };
        qmp.execute::<Value>("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Events from now on. Subscribe before the command that causes them.
    pub fn events(&self) -> Result<broadcast::Receiver<Event>, QmpError> {
        Ok(self.events.upgrade().ok_or(QmpError::Closed)?.subscribe())
    }

    /// Resolves with the reason when the conversation has ended because QEMU talked nonsense: nobody can speak to it
    /// again. Never when QEMU has hung up.
    pub async fn nonsense(&self) -> String {
        let mut nonsense = self.nonsense.clone();
        let told = nonsense.wait_for(Option::is_some).await;
        match told.ok().and_then(|reason| reason.clone()) {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    async fn execute<T: DeserializeOwned>(&self, command: &'static str, arguments: Value) -> Result<T, QmpError> {
        self.execute_with(command, arguments, None).await
    }

    async fn execute_with<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
        file: Option<OwnedFd>,
    ) -> Result<T, QmpError> {
        let (answer, answered) = oneshot::channel();
        let question = Question {
            command,
            arguments,
            file,
            answer,
        };
        let exchange = async {
            self.questions.send(question).await.map_err(|_| QmpError::Closed)?;
            answered.await.map_err(|_| QmpError::Closed)?
        };
        let value = timeout(ANSWER_DEADLINE, exchange)
            .await
            .map_err(|_| QmpError::Silent(command))??;
        serde_json::from_value(value).map_err(|error| QmpError::Garbled(format!("{command} answered {error}")))
    }

    async fn order(&self, command: &'static str, arguments: Value) -> Result<(), QmpError> {
        self.execute::<Value>(command, arguments).await.map(drop)
    }

    /// `qom-set` of a number.
    pub async fn set_property(&self, path: &str, property: &str, value: u64) -> Result<(), QmpError> {
        self.order("qom-set", json!({"path": path, "property": property, "value": value}))
            .await
    }

    /// `object-add` of anonymous shared memory, `size` in bytes.
    pub async fn add_memory(&self, id: &str, size: u64) -> Result<(), QmpError> {
        let memory = json!({"qom-type": "memory-backend-memfd", "id": id, "size": size, "share": true});
        self.order("object-add", memory).await
    }

    /// `object-del`.
    pub async fn delete_object(&self, id: &str) -> Result<(), QmpError> {
        self.order("object-del", json!({"id": id})).await
    }

    /// `device_add` of a memory module backed by `memory`.
    pub async fn add_dimm(&self, id: &str, memory: &str) -> Result<(), QmpError> {
        self.order("device_add", json!({"driver": "pc-dimm", "id": id, "memdev": memory}))
            .await
    }

    /// `device_add` of a vCPU.
    pub async fn add_cpu(&self, id: &str, slot: &CpuSlot) -> Result<(), QmpError> {
        let mut arguments = slot.props.clone();
        arguments.insert("driver".into(), slot.model.clone().into());
        arguments.insert("id".into(), id.into());
        self.order("device_add", arguments.into()).await
    }

    /// `device_del`: asks the guest to give the device back.
    pub async fn delete_device(&self, id: &str) -> Result<(), QmpError> {
        self.order("device_del", json!({"id": id})).await
    }

    /// `device_add` of a virtio-scsi controller.
    pub async fn add_scsi_controller(&self, id: &str, bus: &str) -> Result<(), QmpError> {
        let controller = json!({"driver": "virtio-scsi-pci", "id": id, "bus": bus});
        self.order("device_add", controller).await
    }

    /// `add-fd`: hands over an open file under a number.
    pub async fn add_file(&self, number: u64, file: OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({"fdset-id": number});
        let added = self.execute_with::<Value>("add-fd", arguments, Some(file)).await;
        match added {
            // The kernel drops a file that its receiver may not have, and delivers the rest (unix(7), MSG_CTRUNC).
            Err(QmpError::Refused { reason, .. }) if reason.starts_with("No file descriptor supplied") => {
                Err(QmpError::Withheld)
            }
            added => added.map(drop),
        }
    }

    /// `remove-fd`: closes every file under a number.
    pub async fn remove_file(&self, number: u64) -> Result<(), QmpError> {
        self.order("remove-fd", json!({"fdset-id": number})).await
    }

    /// `blockdev-add` of a host's block device, which is open under a number. Its pages stay out of the host's cache:
    /// the guest has them in its own.
    pub async fn add_block_device(&self, id: &str, file: u64, read_only: bool) -> Result<(), QmpError> {
        let device = json!({
            "driver": "host_device", "node-name": id, "filename": format!("/dev/fdset/{file}"), "read-only": read_only,
            "cache": {"direct": true}, "discard": "unmap",
        });
        self.order("blockdev-add", device).await
    }

    /// `blockdev-del`.
    pub async fn delete_block_device(&self, id: &str) -> Result<(), QmpError> {
        self.order("blockdev-del", json!({"node-name": id})).await
    }

    /// `block_resize`, in bytes.
    pub async fn resize_block_device(&self, id: &str, bytes: u64) -> Result<(), QmpError> {
        self.order("block_resize", json!({"node-name": id, "size": bytes}))
            .await
    }

    /// `device_add` of a disk on a SCSI controller. Others may write to the device, too: it may be in the hands of
    /// several pods.
    pub async fn add_scsi_disk(&self, id: &str, controller: &str, target: u8) -> Result<(), QmpError> {
        let disk = json!({
            "driver": "scsi-hd", "id": id, "drive": id, "bus": format!("{controller}.0"),
            "channel": 0, "scsi-id": target, "lun": 0, "share-rw": true,
        });
        self.order("device_add", disk).await
    }

    /// `getfd` of the files and `netdev_add` of a tap, with vhost-net if there is a file of it.
    pub async fn add_tap(&self, id: &str, tap: OwnedFd, vhost_net: Option<OwnedFd>) -> Result<(), QmpError> {
        let name = |what: &str| format!("{id}-{what}");
        let mut netdev = json!({"type": "tap", "id": id, "fd": name("tap")});
        let mut files = vec![(name("tap"), tap)];
        if let Some(vhost_net) = vhost_net {
            netdev["vhost"] = true.into();
            netdev["vhostfd"] = name("vhost").into();
            files.push((name("vhost"), vhost_net));
        }
        for (name, file) in files {
            let given = self
                .execute_with::<Value>("getfd", json!({"fdname": name}), Some(file))
                .await;
            given.map(drop)?;
        }
        self.order("netdev_add", netdev).await
    }

    /// `netdev_del`.
    pub async fn delete_tap(&self, id: &str) -> Result<(), QmpError> {
        self.order("netdev_del", json!({"id": id})).await
    }

    /// `device_add` of a network card on its tap.
    pub async fn add_nic(&self, netdev: &str, nic: &Nic, bus: &str) -> Result<(), QmpError> {
        let card = json!({
            "driver": "virtio-net-pci", "id": format!("{netdev}-nic"), "netdev": netdev, "bus": bus,
            "mac": nic.mac, "host_mtu": nic.mtu, "romfile": "",
        });
        self.order("device_add", card).await
    }

    /// `query-hotpluggable-cpus`.
    pub async fn cpus(&self) -> Result<Vec<CpuSlot>, QmpError> {
        self.execute("query-hotpluggable-cpus", json!({})).await
    }

    /// `query-memory-devices`.
    pub async fn memory_devices(&self) -> Result<Vec<MemoryDevice>, QmpError> {
        self.execute("query-memory-devices", json!({})).await
    }
}

/// The owner of the connection.
struct Conversation {
    lines: Lines<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    events: broadcast::Sender<Event>,
    open: HashMap<u64, Question>,
    asked: u64,
    nonsense: watch::Sender<Option<String>>,
}

impl Conversation {
    /// Runs until QEMU hangs up, talks nonsense, or nobody has a question any more. Questions that are open then are
    /// dropped, which their askers see.
    async fn run(mut self, mut inbox: mpsc::Receiver<Question>) {
        loop {
            let step = tokio::select! {
                question = inbox.recv() => match question {
                    Some(question) => self.ask(question).await,
                    None => return,
                },
                message = self.lines.next() => message.and_then(|message| self.take(message)),
            };
            match step {
                Ok(()) => {}
                Err(QmpError::Closed) => return,
                Err(error) => {
                    tracing::error!(%error, "the conversation with QEMU is over");
                    self.nonsense.send_replace(Some(error.to_string()));
                    return;
                }
            }
        }
    }

    async fn ask(&mut self, mut question: Question) -> Result<(), QmpError> {
        self.asked += 1;
        let mut line =
            json!({"execute": question.command, "arguments": question.arguments, "id": self.asked}).to_string();
        line.push('\n');
        let file = question.file.take();
        self.open.insert(self.asked, question);
        let sent = match file {
            Some(file) => self.send_with(line.as_bytes(), &file).await,
            None => Ok(0),
        };
        let sent = sent.map_err(|_| QmpError::Closed)?;
        self.writer
            .write_all(&line.as_bytes()[sent..])
            .await
            .map_err(|_| QmpError::Closed)
    }

    /// Sends the beginning of a line, and with it the file; how many bytes that were.
    async fn send_with(&self, line: &[u8], file: &OwnedFd) -> io::Result<usize> {
        let socket: &UnixStream = self.writer.as_ref();
        let send = || {
            let files = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&files)];
            let sent = sendmsg::<()>(
                socket.as_raw_fd(),
                &[IoSlice::new(line)],
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            Ok(sent?)
        };
        socket.async_io(Interest::WRITABLE, send).await
    }

    fn take(&mut self, message: Message) -> Result<(), QmpError> {
        if let Some(name) = message.event {
            if let Some(event) = parse_event(&name, &message.data) {
                // Nobody may be waiting.
                let _listeners = self.events.send(event);
            }
            return Ok(());
        }
        let question = message.id.and_then(|id| self.open.remove(&id));
        let question = question.ok_or_else(|| QmpError::Garbled("an answer to no question".into()))?;
        let answer = match (message.answer, message.error) {
            (Some(value), _) => Ok(value),
            (None, Some(refusal)) => Err(QmpError::Refused {
                command: question.command,
                reason: refusal.desc.chars().take(LONGEST_REASON).collect(),
            }),
            (None, None) => Err(QmpError::Garbled(format!("neither yes nor no to {}", question.command))),
        };
        // The asker may have given up.
        let _asker_gone = question.answer.send(answer);
        Ok(())
    }
}

fn parse_event(name: &str, data: &Value) -> Option<Event> {
    let device = || data["device"].as_str().map(str::to_owned);
    // QEMU 7.2 never says so of a vCPU, only of its interrupt controller, which goes last.
    let vcpu = || {
        Some(
            data["path"]
                .as_str()?
                .strip_prefix(PERIPHERAL)?
                .strip_suffix("/lapic")?
                .to_owned(),
        )
    };
    let event = match name {
        "DEVICE_DELETED" => device().or_else(vcpu).map(Event::DeviceDeleted),
        "DEVICE_UNPLUG_GUEST_ERROR" => device().map(Event::DeviceKept),
        "ACPI_DEVICE_OST" => {
            let info = &data["info"];
            // ACPI 6.3, table 6-238: success is 0; 0x84 (ejection) and 0x200 (insertion) in progress are no end yet.
            let status = info["status"].as_u64()?;
            let device = info["device"].as_str()?.to_owned();
            (status != 0x84 && status != 0x200).then_some(Event::GuestReport {
                device,
                done: status == 0,
            })
        }
        _ => None,
    };
    event.filter(|event| event.device().len() <= LONGEST_ID)
}

/// Lines of bounded length. [`Lines::next`] may be cancelled without loss.
struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    searched: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(reader: R) -> Lines<R> {
        Lines {
            reader,
            buffer: Vec::new(),
            searched: 0,
        }
    }

    async fn next(&mut self) -> Result<Message, QmpError> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                return serde_json::from_slice(&line).map_err(|error| QmpError::Garbled(error.to_string()));
            }
            self.searched = self.buffer.len();
            if self.searched > LONGEST_LINE {
                return Err(QmpError::Garbled(format!("a line of more than {LONGEST_LINE} bytes")));
            }
            self.buffer.reserve(4096);
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(QmpError::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(QmpError::Closed),
            }
        }
    }
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
