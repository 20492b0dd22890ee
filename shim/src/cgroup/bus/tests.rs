//! A peer that speaks from the text of the specification: what it says is written down byte by byte.

use super::*;
use std::thread;

const OBJECT: Object = Object {
    service: "s.S",
    path: "/o",
    interface: "i.I",
};

/// A field of a header whose value is a string, or an object path.
fn field(code: u8, kind: u8, value: &str) -> Vec<u8> {
    let mut field = vec![code, 1, kind, 0];
    field.extend((value.len() as u32).to_le_bytes());
    field.extend(value.as_bytes());
    field.push(0);
    field
}

fn signature(value: &str) -> Vec<u8> {
    let mut field = vec![8, 1, b'g', 0, value.len() as u8];
    field.extend(value.as_bytes());
    field.push(0);
    field
}

fn reply_to(serial: u8) -> Vec<u8> {
    vec![5, 1, b'u', 0, serial, 0, 0, 0]
}

fn string(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u32).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes.push(0);
    bytes
}

fn message(kind: u8, fields: &[Vec<u8>], body: &[u8]) -> Vec<u8> {
    // What aligns a field comes before it, and what aligns the body is not of the fields' length.
    let fields = fields.iter().fold(Vec::new(), |mut all: Vec<u8>, field| {
        all.resize(all.len().next_multiple_of(8), 0);
        all.extend(field);
        all
    });
    let mut message = vec![b'l', kind, 0, 1];
    message.extend((body.len() as u32).to_le_bytes());
    message.extend(77_u32.to_le_bytes());
    message.extend((fields.len() as u32).to_le_bytes());
    message.extend(fields);
    message.resize(message.len().next_multiple_of(8), 0);
    message.extend(body);
    message
}

/// Lets a client in and then sends what it is told, whatever the client says.
fn peer(answers: Vec<Vec<u8>>) -> Bus {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut said = [0; 256];
        let read = theirs.read(&mut said).unwrap();
        assert!(said[..read].starts_with(b"\0AUTH EXTERNAL 3"), "{:?}", &said[..read]);
        theirs.write_all(b"OK 0123456789abcdef\r\n").unwrap();
        for answer in answers {
            theirs.write_all(&answer).unwrap();
        }
        // It stays until the client goes.
        io::copy(&mut theirs, &mut io::sink()).unwrap();
    });
    Bus::over(ours, Peer::Systemd, Duration::from_secs(120)).unwrap()
}

#[test]
fn a_call_is_what_the_specification_says() {
    let properties = [("P", Value::Number(9)), ("Qq", Value::Numbers(&[6, 7]))];
    let arguments = [
        Value::Text("ab"),
        Value::Bool(true),
        Value::Properties(&properties),
        Value::NoUnits,
    ];
    let call = Call {
        serial: 5,
        object: OBJECT,
        method: "Do",
        arguments: &arguments,
    };
    let call = call.encode().unwrap();
    let fields = [
        field(1, b'o', "/o"),
        field(2, b's', "i.I"),
        field(3, b's', "Do"),
        field(6, b's', "s.S"),
        signature("sba(sv)a(sa(sv))"),
    ];
    let body: [&[u8]; 13] = [
        b"\x02\0\0\0ab\0\0",
        b"\x01\0\0\0",
        // 48 bytes of properties, which begin at a multiple of 8.
        b"\x30\0\0\0",
        b"\x01\0\0\0P\0",
        b"\x01t\0",
        b"\0\0\0\0\0\0\0",
        b"\x09\0\0\0\0\0\0\0",
        b"\x02\0\0\0Qq\0",
        b"\x02au\0",
        b"\0",
        b"\x08\0\0\0\x06\0\0\0\x07\0\0\0",
        // No units, and what would align the first.
        b"\0\0\0\0",
        b"\0\0\0\0",
    ];
    let mut wanted = message(1, &fields, &body.concat());
    wanted[8..12].copy_from_slice(&5_u32.to_le_bytes());
    assert_eq!(call, wanted);
}

#[test]
fn a_signal_that_comes_before_the_answer_is_not_lost() {
    let signal = |name: &str| {
        let fields = [field(1, b'o', "/o"), field(3, b's', name), signature("s")];
        message(4, &fields, &string(&format!("the body of {name}")))
    };
    let answer = message(2, &[reply_to(1), signature("s")], &string("/job/1"));
    let mut bus = peer(vec![signal("Other"), signal("Done"), answer]);
    assert_eq!(bus.call(OBJECT, "Do", &[]).unwrap(), ["/job/1"]);
    let body = bus.wait_for("Done", |texts| Some(texts.to_vec())).unwrap();
    assert_eq!(body, ["the body of Done"]);
}

#[test]
fn a_refusal_is_told_in_the_services_words() {
    let fields = [field(4, b's', "i.I.No"), reply_to(1), signature("s")];
    let mut bus = peer(vec![message(3, &fields, &string("there is no such unit"))]);
    let refused = bus.call(OBJECT, "Do", &[]).unwrap_err().to_string();
    assert_eq!(refused, "there is no such unit (i.I.No)");
}

#[test]
fn a_peer_that_speaks_of_more_than_it_may_is_not_believed() {
    let mut long = message(2, &[reply_to(1)], &[]);
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut bus = peer(vec![long]);
    let refused = bus.call(OBJECT, "Do", &[]).unwrap_err();
    assert!(matches!(refused, BusError::Format(_)), "{refused}");
}

#[test]
fn an_answer_that_is_cut_short_or_garbled_is_an_error() {
    let whole = message(4, &[field(1, b'o', "/o"), field(3, b's', "Done"), signature("uos")], &{
        let mut body = 7_u32.to_le_bytes().to_vec();
        body.extend(string("/job/1"));
        body.push(0);
        body.extend(string("done"));
        body
    });
    assert_eq!(Message::decode(&whole).unwrap().texts, ["/job/1", "done"]);
    for length in START..whole.len() {
        assert!(Message::decode(&whole[..length]).is_err(), "{length} bytes");
    }
    for at in 0..whole.len() {
        let mut garbled = whole.clone();
        garbled[at] ^= 0xff;
        drop(Message::decode(&garbled));
    }
}
