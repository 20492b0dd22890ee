//! Where something may be made, and where not.

use nix::{
    errno::Errno,
    libc::{O_RDWR, O_TRUNC, O_WRONLY, RENAME_EXCHANGE},
};
use tests::failure::Result;

use super::{Attack, Nodes, up};
use crate::fuse::{
    Body, CHARACTERS, FILE, MODE, Op, PIPE, SIZE, TOP, attributes, create, extended, mkdir, name, number, open, rename,
    rename2, special, transfer,
};

impl Attack {
    /// What is granted where it may be: these messages are well made.
    pub(super) fn what_is_granted(&mut self, nodes: &Nodes) -> Result {
        for (what, folder) in [("in the volume", nodes.writable), ("in the root", nodes.root)] {
            self.granted(what, Op::Mkdir, folder, &mkdir("made"))?;
            self.granted(
                what,
                Op::Symlink,
                folder,
                &name("away").name(&self.world.canary.clone()),
            )?;
            let created = self.granted(what, Op::Create, folder, &create("new", O_RDWR))?;
            let (file, handle) = (number(&created, 0), number(&created, 128));
            self.granted(what, Op::Write, file, &transfer(handle, 0, 5).bytes(b"words"))?;
            self.granted(what, Op::Setattr, file, &attributes(MODE | SIZE, 0, 3, 0o600))?;
            self.granted(what, Op::Setxattr, file, &extended("user.note", b"x"))?;
            self.granted(what, Op::Link, folder, &Body::default().u64(file).name("second"))?;
            self.granted(what, Op::Rename, folder, &rename(folder, "second", "third"))?;
            self.granted(
                what,
                Op::Rename2,
                folder,
                &rename2(folder, RENAME_EXCHANGE, "third", "made"),
            )?;
            self.granted(what, Op::Release, file, &Body::default().u64(handle).u64(0).u64(0))?;
            self.granted(what, Op::Unlink, folder, &name("made"))?;
            self.granted(what, Op::Rmdir, folder, &name("third"))?;
        }
        Ok(())
    }

    /// The share's own folders are the shim's.
    pub(super) fn the_top(&mut self, nodes: &Nodes) -> Result {
        let above = self
            .world
            .root
            .rsplit_once('/')
            .map_or("", |(above, _)| above)
            .to_owned();
        let own = self.fuse.walk(&above)?.unwrap_or_default();
        let read_only = &[Errno::EROFS];
        for (what, folder, inside) in [
            ("at the top", TOP, above.as_str()),
            ("in the container's folder", own, "rootfs"),
        ] {
            self.refused(what, Op::Mkdir, folder, &mkdir("made"), read_only)?;
            self.refused(what, Op::Symlink, folder, &name("link").name("/nowhere"), read_only)?;
            self.refused(
                what,
                Op::Mknod,
                folder,
                &special(CHARACTERS | 0o666, 1, 5, "device"),
                read_only,
            )?;
            self.refused(what, Op::Mknod, folder, &special(FILE | 0o666, 0, 0, "file"), read_only)?;
            self.refused(what, Op::Create, folder, &create("file", O_RDWR), read_only)?;
            let other = &[Errno::EXDEV, Errno::EROFS];
            self.refused(
                what,
                Op::Link,
                folder,
                &Body::default().u64(nodes.mine).name("link"),
                other,
            )?;
            self.refused(what, Op::Rename, nodes.writable, &rename(folder, "mine", "mine"), other)?;
            let swap = rename2(folder, RENAME_EXCHANGE, "mine", inside);
            self.refused(what, Op::Rename2, nodes.writable, &swap, other)?;
            self.refused(what, Op::Rename, folder, &rename(folder, inside, "other"), read_only)?;
            self.refused(what, Op::Rmdir, folder, &name(inside), &[Errno::EROFS, Errno::EBUSY])?;
            self.refused(what, Op::Unlink, folder, &name(inside), &[Errno::EROFS, Errno::EISDIR])?;
            self.refused(what, Op::Setattr, folder, &attributes(MODE, 0, 0, 0o777), read_only)?;
            self.refused(what, Op::Setxattr, folder, &extended("user.note", b"x"), read_only)?;
        }
        Ok(())
    }

    pub(super) fn file_that_may_only_be_read(&mut self, nodes: &Nodes) -> Result {
        let (what, read_only) = ("of a file that may only be read", &[Errno::EROFS]);
        let file = nodes.theirs;
        let opened = self.granted("to read", Op::Open, file, &open(0))?;
        let handle = number(&opened, 0);
        let read = self.granted("as it may be", Op::Read, file, &transfer(handle, 0, 100))?;
        self.told(
            "the file that may be read",
            read == b"theirs",
            &format!("{} bytes", read.len()),
        );
        let write = transfer(handle, 0, 4).bytes(b"mine");
        self.refused("by a handle for reading", Op::Write, file, &write, &[Errno::EBADF])?;
        let all = Body::default().u64(handle).u64(0).u64(1 << 20).u64(0);
        self.refused("by a handle for reading", Op::Fallocate, file, &all, &[Errno::EBADF])?;
        for flags in [O_RDWR, O_WRONLY, O_RDWR | O_TRUNC, O_TRUNC] {
            self.refused(
                &format!("{what} by {flags:#x}"),
                Op::Open,
                file,
                &open(flags),
                read_only,
            )?;
        }
        self.refused(what, Op::Setattr, file, &attributes(MODE, 0, 0, 0o777), read_only)?;
        self.refused(what, Op::Setattr, file, &attributes(SIZE, 0, 0, 0), read_only)?;
        self.refused(what, Op::Setxattr, file, &extended("user.note", b"x"), read_only)?;
        self.refused(what, Op::Removexattr, file, &name("user.kept"), read_only)?;
        let mine = self.granted("to write", Op::Open, nodes.mine, &open(O_RDWR))?;
        let copy = Body::default()
            .u64(number(&mine, 0))
            .u64(0)
            .u64(file)
            .u64(handle)
            .u64(0)
            .u64(4)
            .u64(0);
        self.refused(what, Op::CopyFileRange, nodes.mine, &copy, &[Errno::EBADF])
    }

    pub(super) fn folder_that_may_only_be_read(&mut self, nodes: &Nodes) -> Result {
        let (what, read_only, other) = ("in a folder that may only be read", &[Errno::EROFS], &[Errno::EXDEV]);
        let (folder, file) = (nodes.readonly, nodes.theirs);
        self.refused(what, Op::Create, folder, &create("theirs", O_RDWR), read_only)?;
        self.refused(what, Op::Create, folder, &create("other", O_RDWR), read_only)?;
        self.refused(what, Op::Mkdir, folder, &mkdir("made"), read_only)?;
        self.refused(what, Op::Symlink, folder, &name("link").name("/nowhere"), read_only)?;
        self.refused(what, Op::Mknod, folder, &special(PIPE | 0o666, 0, 0, "pipe"), read_only)?;
        self.refused(what, Op::Unlink, folder, &name("theirs"), read_only)?;
        self.refused(what, Op::Rename, folder, &rename(folder, "theirs", "other"), read_only)?;
        self.refused(
            what,
            Op::Rename,
            folder,
            &rename(nodes.writable, "theirs", "got"),
            other,
        )?;
        self.refused(
            what,
            Op::Rename,
            nodes.writable,
            &rename(folder, "mine", "theirs"),
            other,
        )?;
        self.refused(
            what,
            Op::Link,
            nodes.writable,
            &Body::default().u64(file).name("got"),
            other,
        )?;
        Ok(())
    }

    /// Names that lead out of the folder that they are for. What is made at the volume's top with one `..` is made in
    /// the share, which may not be written to. On the host, all others lead to the canary: a server that lets something
    /// through harms nothing else.
    pub(super) fn names(&mut self, nodes: &Nodes) -> Result {
        let folder = nodes.writable;
        let canary = self.world.canary.clone();
        let (beside, secret) = (format!("{canary}/made"), format!("{canary}/secret"));
        let (upwards, to_secret) = (up(&beside), up(&secret));
        let (long, longer) = ("x".repeat(256), "x".repeat(5000));
        let gone = [Errno::ENOENT, Errno::EROFS];
        let taken = [Errno::EEXIST, Errno::ENOENT, Errno::EISDIR, Errno::EINVAL];
        let names: [(&str, &[Errno]); 8] = [
            ("../made", &[Errno::EROFS]),
            (&upwards, &gone),
            (&beside, &gone),
            (".", &taken),
            ("..", &taken),
            ("", &taken),
            (&long, &[Errno::ENAMETOOLONG]),
            (&longer, &[Errno::ENAMETOOLONG]),
        ];
        for (place, by) in names {
            let what = &format!("{:.60} of {} bytes", place, place.len());
            self.refused(what, Op::Mkdir, folder, &mkdir(place), by)?;
            self.refused(what, Op::Symlink, folder, &name(place).name("/nowhere"), by)?;
            self.refused(what, Op::Mknod, folder, &special(FILE | 0o666, 0, 0, place), by)?;
            self.refused(
                what,
                Op::Link,
                folder,
                &Body::default().u64(nodes.mine).name(place),
                &with(by, Errno::EXDEV),
            )?;
            let rename = rename(folder, "mine", place);
            self.refused(
                what,
                Op::Rename,
                folder,
                &rename,
                &[by, &[Errno::EXDEV, Errno::EBUSY]].concat(),
            )?;
        }
        // These are looked up with the folder as the root of all.
        for place in [secret.as_str(), &to_secret, "../theirs", ""] {
            self.refused(place, Op::Lookup, folder, &name(place), &[Errno::ENOENT])?;
            self.refused(place, Op::Unlink, folder, &name(place), &gone)?;
        }
        for (what, folder) in [("the top", TOP), ("the volume", folder)] {
            let own = self.fuse.ask(Op::Lookup, folder, &name("."))?.unwrap_or_default();
            let above = self.granted(what, Op::Lookup, folder, &name(".."))?;
            let same = own.get(..8) == above.get(..8) && !own.is_empty();
            self.told(&format!("what is above {what}"), same, "its node");
        }
        Ok(())
    }
}

fn with(errors: &[Errno], other: Errno) -> Vec<Errno> {
    [errors, &[other]].concat()
}
