//! Messages that nobody can make sense of.

use nix::libc::O_RDWR;
use tests::failure::{Failure, Result};

use super::World;
use crate::{
    fuse::{Body, Fuse, Op, TOP, create, name, number, transfer},
    virtio::{Descriptor, NEXT, PAGE, WRITE},
};

/// Sends one message that is malformed. Returns what became of it.
///
/// # Errors
/// There is no device.
pub fn malformed(kind: &str, world: &World) -> Result<String> {
    let mut fuse = Fuse::take()?;
    fuse.init()?
        .map_err(|error| Failure::Claim(format!("no beginning: {error}")))?;
    let lookup = |body: &Body, length| (Op::Lookup as u32, TOP, body.clone(), length);
    let (op, node, body, length) = match kind {
        "length-none" => lookup(&name("x"), Some(0)),
        "length-long" => lookup(&name("x"), Some(5000)),
        "no-nul" => lookup(&Body::default().bytes(b"x"), None),
        "value-short" => {
            let lie = Body::default().u32(4000).u32(0).name("user.note").bytes(b"x");
            (Op::Setxattr as u32, TOP, lie, None)
        }
        "far-write" => {
            let (file, handle) = created(&mut fuse, &world.writable)?;
            let far = transfer(handle, u64::MAX, 5).bytes(b"words");
            (Op::Write as u32, file, far, None)
        }
        "read-without-room" => {
            let (file, handle) = created(&mut fuse, &world.writable)?;
            (Op::Read as u32, file, transfer(handle, 0, 5), None)
        }
        _ => lookup(&name("x"), None),
    };
    let message = fuse.message(op, node, &body, length);
    let (first, second) = (fuse.queue.page(0), fuse.queue.page(1));
    fuse.queue.fill(0, &message)?;
    let all = message.len() as u32;
    let buffer = |address, length, flags, next| Descriptor {
        address,
        length,
        flags,
        next,
    };
    let answer = buffer(second, PAGE as u32, WRITE, 0);
    let chain = match kind {
        "read-without-room" => vec![buffer(first, all, 0, 0)],
        "little-room" => vec![buffer(first, all, NEXT, 1), buffer(second, 8, WRITE, 0)],
        "loop" => vec![
            buffer(first, all, NEXT, 1),
            buffer(second, PAGE as u32, WRITE | NEXT, 1),
        ],
        "elsewhere" => vec![buffer(1 << 45, all, NEXT, 1), answer],
        "endless" => vec![buffer(first, u32::MAX, NEXT, 1), answer],
        _ => vec![buffer(first, all, NEXT, 1), answer],
    };
    let used = fuse.queue.send(&chain)?;
    Ok(format!("{kind}: back with {used} bytes\n"))
}

/// A file of the attacker's and its handle.
fn created(fuse: &mut Fuse, folder: &str) -> Result<(u64, u64)> {
    let folder = fuse.walk(folder)?.unwrap_or_default();
    let made = fuse
        .ask(Op::Create, folder, &create("far", O_RDWR))?
        .unwrap_or_default();
    Ok((number(&made, 0), number(&made, 128)))
}
