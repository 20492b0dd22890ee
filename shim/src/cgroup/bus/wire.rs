//! D-Bus's wire format, little-endian, for the types that systemd is asked with and that answers are read from.
//! Source: "Marshaling (Wire Format)" and "Message Format" of the D-Bus specification.

use super::{BusError, Object};

type Result<T> = std::result::Result<T, BusError>;

/// Byte order, type, flags, version, length of the body, serial, length of the fields.
pub(super) const START: usize = 16;
/// No answer of systemd's is longer, in bytes.
const LONGEST: usize = 1 << 20;

const METHOD_CALL: u8 = 1;
const SIGNAL: u8 = 4;

// The fields of a header.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// An argument of a call.
#[derive(Debug)]
pub(in super::super) enum Value<'a> {
    Bool(bool),
    Number(u64),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Process ids, for example.
    Numbers(&'a [u32]),
    /// Names and variants.
    Properties(&'a [(&'a str, Value<'a>)]),
    /// The other units that `StartTransientUnit` could make: none.
    NoUnits,
}

impl Value<'_> {
    fn signature(&self) -> &'static str {
        match self {
            Value::Bool(_) => "b",
            Value::Number(_) => "t",
            Value::Text(_) => "s",
            Value::Bytes(_) => "ay",
            Value::Numbers(_) => "au",
            Value::Properties(_) => "a(sv)",
            Value::NoUnits => "a(sa(sv))",
        }
    }

    fn write(&self, out: &mut Writer) {
        match self {
            Value::Bool(value) => out.number(u32::from(*value)),
            Value::Number(value) => {
                out.align(8);
                out.0.extend(value.to_le_bytes());
            }
            Value::Text(text) => out.text(text),
            Value::Bytes(bytes) => out.array(1, |out| out.0.extend(*bytes)),
            Value::Numbers(numbers) => out.array(4, |out| numbers.iter().for_each(|number| out.number(*number))),
            Value::Properties(properties) => out.array(8, |out| {
                for (name, value) in *properties {
                    out.align(8);
                    out.text(name);
                    out.signature(value.signature());
                    value.write(out);
                }
            }),
            Value::NoUnits => out.array(8, |_| ()),
        }
    }
}

/// Bytes so far; positions count from the start of the message, or from one that is as well aligned.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn number(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        // The whole message is measured in the end.
        self.number(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// At most 255 letters; ours are all known here.
    fn signature(&mut self, signature: &str) {
        self.0.push(signature.len() as u8);
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// The length is that of the elements, without what aligns the first of them.
    fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Writer)) {
        self.number(0);
        let length = self.0.len() - 4;
        self.align(alignment);
        let first = self.0.len();
        elements(self);
        let bytes = (self.0.len() - first) as u32;
        self.0[length..length + 4].copy_from_slice(&bytes.to_le_bytes());
    }
}

/// The call of a method.
pub(super) struct Call<'a> {
    pub serial: u32,
    pub object: Object,
    pub method: &'a str,
    pub arguments: &'a [Value<'a>],
}

impl Call<'_> {
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut body = Writer::default();
        self.arguments.iter().for_each(|argument| argument.write(&mut body));
        if body.0.len() > LONGEST {
            return Err(BusError::Format("it is too long"));
        }
        let signature: String = self.arguments.iter().map(Value::signature).collect();
        let fields = [
            (PATH, "o", self.object.path),
            (INTERFACE, "s", self.object.interface),
            (MEMBER, "s", self.method),
            (DESTINATION, "s", self.object.service),
            (SIGNATURE, "g", &signature),
        ];
        let mut out = Writer(vec![b'l', METHOD_CALL, 0, 1]);
        out.number(body.0.len() as u32);
        out.number(self.serial);
        out.array(8, |out| {
            for (code, kind, value) in fields {
                out.align(8);
                out.0.push(code);
                out.signature(kind);
                match kind {
                    "g" => out.signature(value),
                    _ => out.text(value),
                }
            }
        });
        out.align(8);
        out.0.extend(body.0);
        Ok(out.0)
    }
}

/// An answer or a signal.
#[derive(Debug, Default)]
pub(super) struct Message {
    /// The name of a signal.
    pub signal: Option<String>,
    /// The serial of the call that it answers.
    pub reply_to: Option<u32>,
    /// The name of an error.
    pub error: Option<String>,
    /// Its arguments, as far as they are strings and paths, up to the first that is more than a number.
    pub texts: Vec<String>,
}

/// How many bytes follow the start of a message.
pub(super) fn rest(start: &[u8; START]) -> Result<usize> {
    let mut reader = Reader { bytes: start, at: 4 };
    let (body, _serial, fields) = (reader.number()?, reader.number()?, reader.number()?);
    let (body, fields) = (body as usize, fields as usize);
    match start {
        [b'l', _, _, 1, ..] if body <= LONGEST && fields <= LONGEST => Ok(fields.next_multiple_of(8) + body),
        _ => Err(BusError::Format("it is of another version or byte order, or too long")),
    }
}

impl Message {
    pub fn decode(bytes: &[u8]) -> Result<Message> {
        let kind = bytes.get(1).copied().unwrap_or_default();
        let mut reader = Reader { bytes, at: START - 4 };
        let end = reader.number()? as usize + START;
        let mut message = Message::default();
        let mut signature = "";
        while reader.at < end {
            reader.align(8);
            let code = reader.take(1)?[0];
            let (mut text, mut number) = ("", None);
            match reader.signature()? {
                "s" | "o" => text = reader.text()?,
                "g" => text = reader.signature()?,
                "u" => number = Some(reader.number()?),
                _ => return Err(BusError::Format("its header has a field of an unknown type")),
            }
            match code {
                MEMBER if kind == SIGNAL => message.signal = Some(text.to_owned()),
                ERROR_NAME => message.error = Some(text.to_owned()),
                REPLY_SERIAL => message.reply_to = number,
                SIGNATURE => signature = text,
                _ => {}
            }
        }
        reader.align(8);
        for argument in signature.bytes() {
            match argument {
                b's' | b'o' => message.texts.push(reader.text()?.to_owned()),
                b'u' => drop(reader.number()?),
                _ => break,
            }
        }
        Ok(message)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at + length);
        self.at += length;
        taken.ok_or(BusError::Format("it ends too early"))
    }

    fn number(&mut self) -> Result<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self) -> Result<&'a str> {
        let length = self.number()? as usize;
        self.letters(length)
    }

    fn signature(&mut self) -> Result<&'a str> {
        let length = self.take(1)?[0];
        self.letters(length.into())
    }

    /// Letters and the zero behind them.
    fn letters(&mut self, length: usize) -> Result<&'a str> {
        let letters = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(letters).map_err(|_| BusError::Format("it has text that is not UTF-8"))
    }
}
