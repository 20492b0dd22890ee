//! Nodes, handles and sizes that are not true.

use nix::{errno::Errno, libc::O_RDWR};
use tests::failure::Result;

use super::{Attack, Nodes};
use crate::fuse::{
    Body, MODE, Op, SIZE, TOP, attributes, create, extended, mkdir, name, number, open, rename, transfer,
};

/// Nodes and handles that nobody has got.
const FORGED: &[u64] = &[0, 4_000_000, u64::MAX];

impl Attack {
    /// Handles that nobody was given, or that are another file's.
    pub(super) fn forged_handles(&mut self, nodes: &Nodes) -> Result {
        let bad = &[Errno::EBADF];
        let (theirs, mine) = (
            self.granted("to read", Op::Open, nodes.theirs, &open(0))?,
            self.granted("to write", Op::Open, nodes.mine, &open(O_RDWR))?,
        );
        let (theirs, mine) = (number(&theirs, 0), number(&mine, 0));
        for (what, node, handle) in FORGED
            .iter()
            .map(|forged| ("a handle that nobody has", nodes.mine, *forged))
            .chain([
                ("another file's handle", nodes.theirs, mine),
                ("another's handle", nodes.mine, theirs),
            ])
        {
            self.refused(what, Op::Read, node, &transfer(handle, 0, 10), bad)?;
            self.refused(what, Op::Write, node, &transfer(handle, 0, 1).bytes(b"x"), bad)?;
            self.refused(what, Op::Readdir, node, &transfer(handle, 0, 1000), bad)?;
            let handle = Body::default().u64(handle);
            self.refused(what, Op::Release, node, &handle.clone().u64(0).u64(0), bad)?;
            self.refused(what, Op::Fsync, node, &handle.clone().u64(0), bad)?;
            self.refused(what, Op::Flush, node, &handle.clone().u64(0).u64(0), bad)?;
            self.refused(what, Op::Lseek, node, &handle.clone().u64(0).u64(0), bad)?;
            self.refused(what, Op::Fallocate, node, &handle.u64(0).u64(1).u64(0), bad)?;
        }
        Ok(())
    }

    /// Nodes that nobody was given, or that were given back.
    pub(super) fn forged_nodes(&mut self, nodes: &Nodes) -> Result {
        let bad = &[Errno::EBADF];
        for node in FORGED {
            let what = &format!("of node {node}");
            self.refused(what, Op::Getattr, *node, &Body::default().u64(0).u64(0), bad)?;
            self.refused(what, Op::Lookup, *node, &name("x"), bad)?;
            self.refused(what, Op::Open, *node, &open(0), bad)?;
            self.refused(what, Op::Readlink, *node, &Body::default(), bad)?;
            self.refused(what, Op::Setattr, *node, &attributes(MODE, 0, 0, 0o777), bad)?;
            self.refused(what, Op::Setxattr, *node, &extended("user.note", b"x"), bad)?;
            self.refused(what, Op::Create, *node, &create("x", O_RDWR), bad)?;
            self.refused(what, Op::Unlink, *node, &name("x"), bad)?;
            self.refused(
                what,
                Op::Link,
                nodes.writable,
                &Body::default().u64(*node).name("x"),
                bad,
            )?;
            self.refused(what, Op::Rename, nodes.writable, &rename(*node, "mine", "x"), bad)?;
        }
        // What is forgotten oftener than it was known is gone; the top is back when it begins again.
        let oftener = Body::default().u64(u64::MAX);
        for node in FORGED.iter().chain([&TOP, &nodes.theirs]) {
            let message = self.fuse.message(Op::Forget as u32, *node, &oftener, None);
            let answer = self.fuse.send(&message)?;
            self.told("Forget has no answer", answer.is_none(), &format!("{answer:?}"));
        }
        self.refused("of what is forgotten", Op::Open, nodes.theirs, &open(0), bad)?;
        self.refused(
            "of the forgotten top",
            Op::Getattr,
            TOP,
            &Body::default().u64(0).u64(0),
            bad,
        )?;
        self.again("the beginning after all is forgotten")?;
        self.granted("of the top", Op::Getattr, TOP, &Body::default().u64(0).u64(0))
            .map(drop)
    }

    /// Sizes that are not true.
    pub(super) fn sizes(&mut self, nodes: &Nodes) -> Result {
        let created = self.granted("to write", Op::Create, nodes.writable, &create("sized", O_RDWR))?;
        let (file, handle) = (number(&created, 0), number(&created, 128));
        let said = self.granted(
            "of 5 bytes that says 4 GiB",
            Op::Write,
            file,
            &transfer(handle, 0, u32::MAX).bytes(b"words"),
        )?;
        self.told(
            "bytes written",
            number(&said, 0) as u32 == 5,
            &format!("{}", number(&said, 0)),
        );
        let read = self.granted("of 4 GiB", Op::Read, file, &transfer(handle, 0, u32::MAX))?;
        self.told("bytes read", read == b"words", &format!("{}", read.len()));
        let far = [Errno::EINVAL, Errno::EFBIG, Errno::EOVERFLOW, Errno::EIO];
        let last = i64::MAX.cast_unsigned();
        self.refused(
            "at the end of all",
            Op::Write,
            file,
            &transfer(handle, last, 5).bytes(b"words"),
            &far,
        )?;
        self.refused("at the end of all", Op::Read, file, &transfer(handle, last, 5), &far)?;
        let all = Body::default().u64(handle).u64(0).u64(u64::MAX).u64(0);
        self.refused("of all", Op::Fallocate, file, &all, &far)?;
        self.refused("to all", Op::Setattr, file, &attributes(SIZE, 0, u64::MAX, 0), &far)?;
        let much = Body::default().u32(u32::MAX).u32(0);
        self.refused("of 4 GiB", Op::Listxattr, file, &much, &[Errno::ENOMEM])?;
        self.refused(
            "of 4 GiB",
            Op::Getxattr,
            file,
            &much.name("user.note"),
            &[Errno::ENOMEM],
        )?;
        let large = extended("user.note", &[b'x'; 100 << 10]);
        let too_large = [Errno::E2BIG, Errno::ENOSPC, Errno::ERANGE];
        self.refused("of 100 KiB", Op::Setxattr, file, &large, &too_large)?;
        let long = vec![b'x'; 900 << 10];
        let written = self.granted(
            "of 900 KiB",
            Op::Write,
            file,
            &transfer(handle, 0, 900 << 10).bytes(&long),
        )?;
        self.told(
            "bytes written",
            number(&written, 0) as u32 == 900 << 10,
            &format!("{}", number(&written, 0)),
        );
        self.granted("of it", Op::Unlink, nodes.writable, &name("sized"))
            .map(drop)
    }

    pub(super) fn headers(&mut self, nodes: &Nodes) -> Result {
        let unknown = [0, 7, 19, 99, 4096, u32::MAX];
        for op in unknown {
            let message = self.fuse.message(op, nodes.writable, &name("x"), None);
            let answer = self.fuse.send(&message)?.unwrap_or(Err(Errno::UnknownErrno));
            self.judge(&format!("the unknown {op}"), &answer, &[Errno::ENOSYS]);
        }
        let ioctl = Body::default().u64(0).u64(0).u64(0).u64(0);
        for (op, body) in [
            (Op::Ioctl, &ioctl),
            (Op::SetupMapping, &ioctl),
            (Op::Tmpfile, &create("x", O_RDWR)),
        ] {
            let none = [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EBADF];
            self.refused("that no server has", op, nodes.writable, body, &none)?;
        }
        for length in [2 << 20, u32::MAX] {
            let message = self
                .fuse
                .message(Op::Mkdir as u32, nodes.writable, &mkdir("x"), Some(length));
            let answer = self.fuse.send(&message)?.unwrap_or(Err(Errno::UnknownErrno));
            self.judge(&format!("a header of {length}"), &answer, &[Errno::ENOMEM]);
        }
        let forgets = Body::default().u32(u32::MAX).u32(0).bytes(&[0; 160]);
        let message = self.fuse.message(Op::BatchForget as u32, 0, &forgets, None);
        let answer = self.fuse.send(&message)?;
        self.told(
            "4 G forgotten nodes",
            !matches!(answer, Some(Ok(_))),
            &format!("{answer:?}"),
        );
        self.granted("of the volume", Op::Syncfs, nodes.writable, &Body::default().u64(0))
            .map(drop)
    }

    /// It begins twice, ends, and begins again.
    pub(super) fn endings(&mut self) -> Result {
        self.again("the beginning in the middle")?;
        self.again("and once more")?;
        self.granted("that is the top's", Op::Getattr, TOP, &Body::default().u64(0).u64(0))?;
        let message = self.fuse.message(Op::Destroy as u32, 0, &Body::default(), None);
        let answer = self.fuse.send(&message)?;
        self.told("the end", !matches!(answer, Some(Err(_))), &format!("{answer:?}"));
        self.refused(
            "after the end",
            Op::Mkdir,
            TOP,
            &mkdir("made"),
            &[Errno::EBADF, Errno::EROFS],
        )?;
        self.again("a beginning after the end")?;
        self.refused("after it all", Op::Mkdir, TOP, &mkdir("made"), &[Errno::EROFS])
    }
}
