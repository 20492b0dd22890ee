//! Conversations with a QEMU that a script plays.

use std::future::Future;

use proptest::prelude::*;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
/// For a whole story; longer than a question may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// QEMU's part of the conversation.
struct Peer(BufReader<UnixStream>);

impl Peer {
    /// Sends one line.
    async fn say(&mut self, line: impl AsRef<str>) {
        let line = format!("{}\r\n", line.as_ref());
        self.0.write_all(line.as_bytes()).await.unwrap();
    }

    /// The next question, which must be `command`: its number and its arguments.
    async fn expect(&mut self, command: &str) -> (u64, Value) {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        let mut question: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(question["execute"], command, "{line}");
        (question["id"].as_u64().unwrap(), question["arguments"].take())
    }

    /// Says yes to the next question, which must be `command`.
    async fn grant(&mut self, command: &str) -> Value {
        let (id, arguments) = self.expect(command).await;
        self.say(json!({"return": {}, "id": id}).to_string()).await;
        arguments
    }
}

/// A conversation that has not begun: our end, and the peer.
fn strangers() -> (UnixStream, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Peer(BufReader::new(theirs)))
}

/// A conversation in command mode.
async fn acquainted() -> (Qmp, Peer) {
    let (ours, mut peer) = strangers();
    let play = async {
        peer.say(GREETING).await;
        peer.grant("qmp_capabilities").await;
    };
    let (qmp, ()) = tokio::join!(Qmp::connect(ours), play);
    (qmp.unwrap(), peer)
}

/// Runs a story, which may not take for ever.
fn story(story: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(async { timeout(PATIENCE, story).await })
        .expect("the end of the story");
}

async fn next(events: &mut broadcast::Receiver<Event>) -> Event {
    events.recv().await.unwrap()
}

#[test]
fn after_the_greeting_questions_are_answered() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let script = async {
            let asked = peer.grant("object-add").await;
            let memory = json!({"qom-type": "memory-backend-memfd", "id": "m", "size": 4096, "share": true});
            assert_eq!(asked, memory);
            let asked = peer.grant("qom-set").await;
            assert_eq!(asked, json!({"path": "/machine", "property": "p", "value": 7}));
        };
        let questions = async {
            qmp.add_memory("m", 4096).await.unwrap();
            qmp.set_property("/machine", "p", 7).await.unwrap();
        };
        tokio::join!(script, questions);
    });
}

#[test]
fn answers_find_their_questions_in_any_order() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let script = async {
            let (first, _) = peer.expect("device_del").await;
            let (second, _) = peer.expect("object-del").await;
            let refusal = json!({"error": {"class": "GenericError", "desc": "object 'm' is in use"}, "id": second});
            peer.say(refusal.to_string()).await;
            peer.say(json!({"return": {}, "id": first}).to_string()).await;
        };
        let (device, object, ()) = tokio::join!(qmp.delete_device("d"), qmp.delete_object("m"), script);
        device.unwrap();
        assert_eq!(
            object.unwrap_err().to_string(),
            "QEMU refused object-del: object 'm' is in use"
        );
    });
}

#[test]
fn a_refusal_is_told_in_qemus_words_and_ends_nothing() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let script = async {
            let (id, _) = peer.expect("device_add").await;
            let refusal = json!({"id": id, "error": {"class": "GenericError", "desc": "Duplicate device ID 'dimm0'"}});
            peer.say(refusal.to_string()).await;
            peer.grant("device_del").await;
        };
        let questions = async {
            let refused = qmp.add_dimm("dimm0", "dimm0-ram").await.unwrap_err();
            assert_eq!(
                refused.to_string(),
                "QEMU refused device_add: Duplicate device ID 'dimm0'"
            );
            qmp.delete_device("d").await.unwrap();
        };
        tokio::join!(script, questions);
    });
}

#[test]
fn what_qemu_reports_unasked_reaches_every_listener() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let (mut one, mut other) = (qmp.events().unwrap(), qmp.events().unwrap());
        let stamp = r#""timestamp": {"seconds": 1764028800, "microseconds": 12}"#;
        let ost = |status: u64| {
            format!(
                r#"{{{stamp}, "event": "ACPI_DEVICE_OST", "data": {{"info": {{"device": "dimm0", "source": 1, "status": {status}, "slot": "0", "slot-type": "DIMM"}}}}}}"#
            )
        };
        for line in [
            format!(r#"{{{stamp}, "event": "NIC_RX_FILTER_CHANGED", "data": {{"path": "/machine"}}}}"#),
            // Insertion in progress: no end yet.
            ost(0x200),
            ost(0),
            ost(1),
            format!(r#"{{{stamp}, "event": "MEMORY_DEVICE_SIZE_CHANGE", "data": {{"size": 2097152}}}}"#),
            format!(
                r#"{{{stamp}, "event": "DEVICE_DELETED", "data": {{"path": "/machine/peripheral/virtio0/virtio-backend"}}}}"#
            ),
            format!(
                r#"{{{stamp}, "event": "DEVICE_DELETED", "data": {{"device": "dimm0", "path": "/machine/dimm0"}}}}"#
            ),
            format!(
                r#"{{{stamp}, "event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {{"device": "d", "path": "/machine/d"}}}}"#
            ),
            format!(
                r#"{{{stamp}, "event": "DEVICE_DELETED", "data": {{"path": "/machine/peripheral/cpu-0-2-0/lapic"}}}}"#
            ),
            format!(r#"{{{stamp}, "event": "RESUME"}}"#),
            // No device of ours.
            format!(
                r#"{{{stamp}, "event": "DEVICE_DELETED", "data": {{"device": "{}"}}}}"#,
                "d".repeat(LONGEST_ID + 1)
            ),
            format!(r#"{{{stamp}, "event": "DEVICE_DELETED", "data": {{"device": "last"}}}}"#),
        ] {
            peer.say(line).await;
        }
        let report = |done| Event::GuestReport {
            device: "dimm0".into(),
            done,
        };
        for listener in [&mut one, &mut other] {
            assert_eq!(next(listener).await, report(true));
            assert_eq!(next(listener).await, report(false));
            assert_eq!(next(listener).await, Event::DeviceDeleted("dimm0".into()));
            assert_eq!(next(listener).await, Event::DeviceKept("d".into()));
            assert_eq!(next(listener).await, Event::DeviceDeleted("cpu-0-2-0".into()));
            assert_eq!(next(listener).await, Event::DeviceDeleted("last".into()));
        }
    });
}

#[test]
fn lists_are_taken_with_what_we_do_not_know_of() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let script = async {
            let (id, _) = peer.expect("query-memory-devices").await;
            let devices = r#"[{"type": "dimm", "data": {"id": "dimm0", "size": 134217728, "slot": 0, "hotplugged": true}},
                {"type": "virtio-mem", "data": {"id": "vmem0", "size": 2097152, "requested-size": 4194304, "max-size": 9}},
                {"type": "nvdimm", "data": {"id": "n", "size": 5}}, {"type": "sgx-epc", "data": {"numa": [1, {}]}}]"#;
            let devices = devices.replace('\n', " ");
            peer.say(format!(r#"{{"return": {devices}, "id": {id}}}"#)).await;
            let (id, _) = peer.expect("query-hotpluggable-cpus").await;
            let cpus = r#"[{"props": {"core-id": 1, "thread-id": 0, "socket-id": 0}, "vcpus-count": 1, "type": "max-x86_64-cpu"},
                {"props": {"core-id": 0, "thread-id": 0, "socket-id": 0}, "vcpus-count": 1,
                 "qom-path": "/machine/unattached/device[0]", "type": "max-x86_64-cpu"}]"#;
            let cpus = cpus.replace('\n', " ");
            peer.say(format!(r#"{{"return": {cpus}, "id": {id}}}"#)).await;
        };
        let questions = async {
            let devices = qmp.memory_devices().await.unwrap();
            let sizes: Vec<_> = devices
                .iter()
                .map(|device| match device {
                    MemoryDevice::Dimm { id, size } => (id.as_deref(), *size, 0),
                    MemoryDevice::VirtioMem { size, requested_size } => (None, *size, *requested_size),
                    MemoryDevice::Other => (None, 0, 0),
                })
                .collect();
            let dimm = (Some("dimm0"), 128 << 20, 0);
            assert_eq!(sizes, [dimm, (None, 2 << 20, 4 << 20), (None, 0, 0), (None, 0, 0)]);
            let cpus = qmp.cpus().await.unwrap();
            assert_eq!(
                cpus.iter().map(|cpu| cpu.qom_path.is_some()).collect::<Vec<_>>(),
                [false, true]
            );
        };
        tokio::join!(script, questions);
    });
}

#[test]
fn an_answer_of_another_shape_fails_that_question_alone() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let script = async {
            let (id, _) = peer.expect("query-memory-devices").await;
            peer.say(json!({"return": "none", "id": id}).to_string()).await;
            let (id, _) = peer.expect("device_del").await;
            peer.say(json!({"id": id}).to_string()).await;
            peer.grant("device_del").await;
        };
        let questions = async {
            assert!(matches!(qmp.memory_devices().await, Err(QmpError::Garbled(_))));
            let neither = qmp.delete_device("d").await.unwrap_err().to_string();
            assert!(neither.ends_with("neither yes nor no to device_del"), "{neither}");
            qmp.delete_device("d").await.unwrap();
        };
        tokio::join!(script, questions);
    });
}

#[test]
fn whoever_does_not_greet_is_not_qemu() {
    for (said, error) in [
        (r#"{"event": "RESUME"}"#, "no greeting"),
        ("hello", "expected value"),
        ("[1, 2", "EOF"),
    ] {
        story(async {
            let (ours, mut peer) = strangers();
            peer.say(said).await;
            let told = Qmp::connect(ours).await.unwrap_err().to_string();
            assert!(told.contains(error), "{told}");
        });
    }
}

#[test]
fn a_qemu_that_ends_before_it_greets_has_closed_its_monitor() {
    story(async {
        let (ours, peer) = strangers();
        drop(peer);
        assert!(matches!(Qmp::connect(ours).await, Err(QmpError::Closed)));
    });
}

#[test]
fn a_qemu_that_says_nothing_is_not_waited_for() {
    story(async {
        let (ours, _peer) = strangers();
        assert!(matches!(Qmp::connect(ours).await, Err(QmpError::NoGreeting)));
        let (qmp, mut peer) = acquainted().await;
        let (silent, _) = tokio::join!(qmp.delete_device("d"), peer.expect("device_del"));
        assert!(matches!(silent, Err(QmpError::Silent("device_del"))));
    });
}

/// Has a question open while the peer does `last` and checks that everybody is told. Returns the conversation.
async fn ends_with(last: impl AsyncFnOnce(Peer)) -> Qmp {
    let (qmp, mut peer) = acquainted().await;
    let mut events = qmp.events().unwrap();
    let script = async {
        peer.expect("device_del").await;
        last(peer).await;
    };
    let (open, ()) = tokio::join!(qmp.delete_device("d"), script);
    assert!(matches!(open, Err(QmpError::Closed)), "{open:?}");
    assert_eq!(events.recv().await, Err(broadcast::error::RecvError::Closed));
    assert!(matches!(qmp.delete_device("d").await, Err(QmpError::Closed)));
    assert!(matches!(qmp.events(), Err(QmpError::Closed)));
    qmp
}

/// The same, with nonsense, which is told.
async fn ends_with_nonsense(last: impl AsyncFnOnce(Peer)) {
    let told = ends_with(last).await.nonsense().await;
    assert!(
        told.starts_with("QEMU sent something that is not its protocol: "),
        "{told}"
    );
}

/// The same, with a death, of which others tell.
async fn ends_with_a_death(last: impl AsyncFnOnce(Peer)) {
    let qmp = ends_with(last).await;
    assert!(timeout(Duration::ZERO, qmp.nonsense()).await.is_err());
}

#[test]
fn a_qemu_that_dies_in_mid_question_leaves_nobody_waiting() {
    story(ends_with_a_death(async |peer| drop(peer)));
    story(ends_with_a_death(async |mut peer| {
        peer.0.write_all(br#"{"return": {}, "#).await.unwrap();
    }));
}

#[test]
fn nonsense_ends_the_conversation() {
    // An answer that nobody asked for, one without a number, and things that are no messages.
    for line in [r#"{"return": {}, "id": 77}"#, r#"{"return": {}}"#, "{}", "\0\0", "7"] {
        story(ends_with_nonsense(async |mut peer| {
            peer.say(line).await;
            // Hanging up is not what ends it.
            let mut rest = String::new();
            peer.0.read_line(&mut rest).await.unwrap();
        }));
    }
}

#[test]
fn a_line_without_end_ends_the_conversation() {
    story(ends_with_nonsense(async |mut peer| {
        // The conversation may hang up on us in the middle of it.
        while peer.0.write_all(&[b'x'; 64 * 1024]).await.is_ok() {}
    }));
}

#[test]
fn a_message_may_come_in_pieces_while_questions_are_asked() {
    story(async {
        let (qmp, mut peer) = acquainted().await;
        let mut events = qmp.events().unwrap();
        let event = br#"{"event": "DEVICE_DELETED", "data": {"device": "d"}}"#;
        let script = async {
            for piece in event.chunks(7) {
                peer.0.write_all(piece).await.unwrap();
                peer.expect("device_del").await;
            }
            peer.0.write_all(b"\n").await.unwrap();
            next(&mut events).await
        };
        let ask = async {
            // Each question interrupts the reader; its answer does not matter.
            let questions = (0..event.len().div_ceil(7)).map(|_| qmp.delete_device("d"));
            let mut open = Vec::from_iter(questions.map(Box::pin));
            for question in &mut open {
                assert!(timeout(Duration::from_millis(5), question).await.is_err());
            }
        };
        assert_eq!(tokio::join!(script, ask).0, Event::DeviceDeleted("d".into()));
    });
}

/// Words of the protocol between other bytes, so that some lines get past the parser.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let words = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        prop::sample::select(vec![
            GREETING,
            "\n",
            r#"{"return": {}, "id": 1}"#,
            r#"{"return": [], "id": 2}"#,
            r#"{"id": 2, "error": {"desc": "no"}}"#,
            r#"{"id": 2, "error": null}"#,
            r#"{"event": "ACPI_DEVICE_OST", "data": {"info": []}}"#,
            r#"{"event": "ACPI_DEVICE_OST", "data": {"info": {"device": 1, "status": -1}}}"#,
            r#"{"event": "DEVICE_DELETED", "data": 3}"#,
            r#"{"event": 1}"#,
            r#"{"id": 18446744073709551616}"#,
        ])
        .prop_map(|word| [word.as_bytes(), b"\n"].concat()),
    ];
    prop::collection::vec(words, 0..8).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn no_bytes_make_us_panic_or_wait(before in noise(), after in noise()) {
        story(async {
            let (ours, mut peer) = strangers();
            let mut said = before;
            peer.0.write_all(&said).await.unwrap();
            peer.0.get_mut().shutdown().await.unwrap();
            let _whatever = Qmp::connect(ours).await.is_ok();

            let (qmp, mut peer) = acquainted().await;
            said = after;
            peer.0.write_all(&said).await.unwrap();
            peer.0.get_mut().shutdown().await.unwrap();
            let _whatever = qmp.memory_devices().await.is_ok();
        });
    }
}
