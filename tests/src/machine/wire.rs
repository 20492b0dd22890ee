//! What the harness and the runner inside an emulated node say to each other over one stream of bytes.
//!
//! A frame is the number of a command (u32), a [`Kind`] (u8), the length of what follows (u32, big endian as the
//! number), and so many bytes. Commands run at the same time; each has its own number, which the harness chooses.

use std::io::{self, Read, Write};

use serde_json::{Value, json};

/// No frame is longer: what a program writes at once is cut into several.
pub const LONGEST: usize = 64 << 10;

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the harness: the runner serves. The bytes are the boot's identifier (`/proc/sys/kernel/random/boot_id`).
    Hello,
    /// To the node: run a program. The bytes are those of [`Run`].
    Run,
    /// To the node: more standard input; no bytes: its end.
    Input,
    /// To the node: kill the program's process group.
    Kill,
    /// To the harness: more of standard output.
    Stdout,
    /// To the harness: more of standard error.
    Stderr,
    /// To the harness: the program has ended and its output too. The bytes are its exit code (i32, big endian),
    /// 128+signal when a signal ended it.
    Exit,
}

/// The numbers of kinds on the wire are their places in this table.
const KINDS: [Kind; 7] = [
    Kind::Hello,
    Kind::Run,
    Kind::Input,
    Kind::Kill,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Exit,
];

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// Whether standard input follows; otherwise it is empty.
    pub input: bool,
}

impl Run {
    /// The bytes of its frame.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        json!({ "words": self.words, "input": self.input })
            .to_string()
            .into_bytes()
    }

    /// Reads the bytes of a frame.
    ///
    /// # Errors
    /// When they are something else.
    pub fn parse(bytes: &[u8]) -> io::Result<Run> {
        let value: Value = serde_json::from_slice(bytes)?;
        let words = value["words"].as_array().into_iter().flatten();
        let words: Option<Vec<_>> = words.map(|word| word.as_str().map(str::to_owned)).collect();
        match (words, value["input"].as_bool()) {
            (Some(words), Some(input)) if !words.is_empty() => Ok(Run { words, input }),
            _ => Err(io::Error::other(format!("{value} is no program to run"))),
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The number of the command; 0 for [`Kind::Hello`].
    pub command: u32,
    /// What it means.
    pub kind: Kind,
    /// What belongs to it.
    pub bytes: Vec<u8>,
}

/// Writes a frame in one go.
///
/// # Errors
/// The stream's.
pub fn write(stream: &mut impl Write, command: u32, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let number = KINDS.iter().position(|known| *known == kind).unwrap_or_default();
    let mut frame = command.to_be_bytes().to_vec();
    frame.push(u8::try_from(number).map_err(io::Error::other)?);
    frame.extend(u32::try_from(bytes.len()).map_err(io::Error::other)?.to_be_bytes());
    frame.extend(bytes);
    stream.write_all(&frame)
}

/// Reads a frame; none at the end of the stream.
///
/// # Errors
/// The stream's, and [`io::ErrorKind::InvalidData`] when what comes is no frame.
pub fn read(stream: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; 9];
    match stream.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let length = number(5) as usize;
    let kind = KINDS.get(usize::from(head[4])).filter(|_| length <= LONGEST);
    let kind = kind.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{head:?} begins no frame")))?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(Some(Frame {
        command: number(0),
        kind: *kind,
        bytes,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut stream = Vec::new();
        for kind in KINDS {
            write(&mut stream, 70_000, kind, b"some bytes").unwrap();
        }
        let mut stream = stream.as_slice();
        for kind in KINDS {
            let bytes = b"some bytes".to_vec();
            let frame = Frame {
                command: 70_000,
                kind,
                bytes,
            };
            assert_eq!(read(&mut stream).unwrap(), Some(frame));
        }
        assert_eq!(read(&mut stream).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        assert!(read(&mut [0, 0, 0, 1, 99, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read(&mut [0, 0, 0, 1, 1, 255, 0, 0, 0].as_slice()).is_err());
    }

    #[test]
    fn a_program_to_run_keeps_its_words() {
        let run = Run {
            words: vec!["sh".into(), "-c".into(), "echo \"ä\"".into()],
            input: true,
        };
        assert_eq!(Run::parse(&run.to_bytes()).unwrap(), run);
        assert!(Run::parse(b"{\"words\":[],\"input\":false}").is_err());
    }
}
