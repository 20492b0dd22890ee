//! FUSE messages, made by hand. Source: `include/uapi/linux/fuse.h` of Linux, protocol 7.38.

use nix::{errno::Errno, libc::O_CREAT};
use tests::failure::{Result, claim};

use crate::virtio::Queue;

/// The node of the share's top.
pub const TOP: u64 = 1;
/// Bytes of a message's header.
const HEADER: usize = 40;
/// The most bytes of an answer that are taken.
const ROOM: usize = 8 << 10;

/// Which bits of a mode say what a file is, and what they can say.
pub const KIND: u32 = 0o170_000;
/// A symbolic link.
pub const LINK: u32 = 0o120_000;
/// A character device.
pub const CHARACTERS: u32 = 0o020_000;
/// A block device.
pub const BLOCKS: u32 = 0o060_000;
/// A named pipe.
pub const PIPE: u32 = 0o010_000;
/// An ordinary file.
pub const FILE: u32 = 0o100_000;

/// `SETATTR` changes the mode.
pub const MODE: u32 = 1;
/// `SETATTR` changes the size.
pub const SIZE: u32 = 8;

/// What a message asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Create = 35,
    Destroy = 38,
    Ioctl = 39,
    BatchForget = 42,
    Fallocate = 43,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    SetupMapping = 48,
    Syncfs = 50,
    Tmpfile = 51,
}

/// The bytes after a message's header.
#[derive(Debug, Clone, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// One more number of 32 bits.
    pub fn u32(mut self, value: u32) -> Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// One more number of 64 bits.
    pub fn u64(mut self, value: u64) -> Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// One more name, with the NUL at its end.
    pub fn name(mut self, name: &str) -> Body {
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Body {
        self.0.extend(bytes);
        self
    }
}

/// A name alone.
pub fn name(name: &str) -> Body {
    Body::default().name(name)
}

/// What `READ` and `WRITE` begin with.
pub fn transfer(handle: u64, offset: u64, size: u32) -> Body {
    Body::default().u64(handle).u64(offset).u32(size).u32(0).u64(0).u64(0)
}

/// `SETATTR` of what `valid` says: the mode, the owner, the size.
pub fn attributes(valid: u32, handle: u64, size: u64, mode: u32) -> Body {
    let body = Body::default().u32(valid).u32(0).u64(handle).u64(size);
    let times = (0..4).fold(body, |body, _| body.u64(0));
    let rest = times.u32(0).u32(0).u32(0).u32(mode);
    (0..4).fold(rest, |body, _| body.u32(0))
}

/// `SETXATTR` of a value.
pub fn extended(name: &str, value: &[u8]) -> Body {
    let size = u32::try_from(value.len()).unwrap_or(0);
    Body::default().u32(size).u32(0).name(name).bytes(value)
}

/// `MKNOD` of a file with this mode and device number.
pub fn special(mode: u32, major: u32, minor: u32, place: &str) -> Body {
    let device = major << 8 | minor & 0xff;
    Body::default().u32(mode).u32(device).u32(0).u32(0).name(place)
}

/// `OPEN` with these flags.
pub fn open(flags: i32) -> Body {
    Body::default().u32(flags.cast_unsigned()).u32(0)
}

/// `MKDIR` of a folder.
pub fn mkdir(place: &str) -> Body {
    Body::default().u32(0o755).u32(0).name(place)
}

/// `CREATE` of a file with these flags.
pub fn create(place: &str, flags: i32) -> Body {
    let flags = (flags | O_CREAT).cast_unsigned();
    Body::default().u32(flags).u32(FILE | 0o644).u32(0).u32(0).name(place)
}

/// `RENAME` into a folder.
pub fn rename(folder: u64, from: &str, to: &str) -> Body {
    Body::default().u64(folder).name(from).name(to)
}

/// `RENAME2` into a folder.
pub fn rename2(folder: u64, flags: u32, from: &str, to: &str) -> Body {
    Body::default().u64(folder).u32(flags).u32(0).name(from).name(to)
}

/// An answer: what it holds, or how the message was refused.
pub type Answer = std::result::Result<Vec<u8>, Errno>;

/// The number of 64 bits at this place of an answer, zero if it is shorter.
pub fn number(answer: &[u8], place: usize) -> u64 {
    let bytes = answer.get(place..place + 8).and_then(|bytes| bytes.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}

/// The mode in the answer to a `LOOKUP`.
pub fn mode(entry: &[u8]) -> u32 {
    (number(entry, 96) >> 32) as u32
}

/// Somebody who says what no file system says.
pub struct Fuse {
    /// The way to the device.
    pub queue: Queue,
    unique: u64,
}

impl Fuse {
    /// Takes the device from the kernel.
    ///
    /// # Errors
    /// There is none.
    pub fn take() -> Result<Fuse> {
        Ok(Fuse {
            queue: Queue::take()?,
            unique: 0,
        })
    }

    /// A whole message; its header says `length`, or the truth.
    pub fn message(&mut self, op: u32, node: u64, body: &Body, length: Option<u32>) -> Vec<u8> {
        self.unique += 1;
        let truth = u32::try_from(HEADER + body.0.len()).unwrap_or(u32::MAX);
        let header = Body::default()
            .u32(length.unwrap_or(truth))
            .u32(op)
            .u64(self.unique)
            .u64(node);
        // By root, of no process.
        header.u64(0).u64(0).bytes(&body.0).0
    }

    /// Sends a message as it is; `None` when it comes back without an answer.
    ///
    /// # Errors
    /// The answer is no answer.
    pub fn send(&mut self, message: &[u8]) -> Result<Option<Answer>> {
        let answer = self.queue.exchange(message, ROOM)?;
        if answer.is_empty() {
            return Ok(None);
        }
        claim(answer.len() >= 16, format!("an answer of {} bytes", answer.len()))?;
        claim(number(&answer, 8) == self.unique, "an answer to another message")?;
        let error = (number(&answer, 0) >> 32) as u32;
        Ok(Some(match error.cast_signed() {
            0 => Ok(answer[16..].to_vec()),
            error => Err(Errno::from_raw(-error)),
        }))
    }

    /// Sends a message that is to be answered.
    ///
    /// # Errors
    /// It is not.
    pub fn ask(&mut self, op: Op, node: u64, body: &Body) -> Result<Answer> {
        let message = self.message(op as u32, node, body, None);
        let answer = self.send(&message)?;
        claim(answer.is_some(), format!("{op:?} has no answer"))?;
        Ok(answer.unwrap_or(Err(Errno::UnknownErrno)))
    }

    /// Begins, as a file system does.
    ///
    /// # Errors
    /// There is no answer.
    pub fn init(&mut self) -> Result<Answer> {
        // Large writes, many pages.
        let flags = 1 << 5 | 1 << 22;
        let body = Body::default().u32(7).u32(38).u32(0).u32(flags).bytes(&[0; 48]);
        self.ask(Op::Init, 0, &body)
    }

    /// The node at a path of the share, or why there is none.
    ///
    /// # Errors
    /// There is no answer.
    pub fn walk(&mut self, path: &str) -> Result<std::result::Result<u64, Errno>> {
        let mut node = TOP;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            match self.ask(Op::Lookup, node, &name(part))? {
                Ok(entry) => node = number(&entry, 0),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(node))
    }
}
