//! Files that are something else on the host: symbolic links and device files.

use nix::{
    errno::Errno,
    libc::{O_PATH, O_RDWR, O_TRUNC, RENAME_WHITEOUT},
};
use tests::failure::Result;

use super::{Attack, Nodes, up};
use crate::fuse::{
    BLOCKS, Body, CHARACTERS, FILE, KIND, LINK, MODE, Op, PIPE, SIZE, attributes, create, extended, mkdir, mode, name,
    number, open, rename, rename2, special,
};

impl Attack {
    /// Links that lead out of the share: nothing is opened or changed at their ends.
    pub(super) fn links(&mut self, nodes: &Nodes) -> Result {
        let folder = nodes.writable;
        let upwards = up(&self.world.canary);
        self.granted("upwards", Op::Symlink, folder, &name("up").name(&upwards))?;
        for link in ["away", "up"] {
            let entry = self.granted(link, Op::Lookup, folder, &name(link))?;
            self.told(&format!("what {link} is"), mode(&entry) & KIND == LINK, "a link");
            let node = number(&entry, 0);
            for flags in [0, O_RDWR, O_RDWR | O_TRUNC, O_PATH] {
                let closed = &[Errno::EBADF, Errno::ELOOP];
                self.refused(&format!("{link} by {flags:#x}"), Op::Open, node, &open(flags), closed)?;
            }
            self.refused(
                link,
                Op::Opendir,
                node,
                &open(0),
                &[Errno::EBADF, Errno::ELOOP, Errno::ENOTDIR],
            )?;
            let no_folder = &[Errno::ENOTDIR];
            self.refused(link, Op::Lookup, node, &name("secret"), no_folder)?;
            self.refused(link, Op::Mkdir, node, &mkdir("made"), no_folder)?;
            let unchanged = &[
                Errno::EOPNOTSUPP,
                Errno::EBADF,
                Errno::ELOOP,
                Errno::EPERM,
                Errno::EINVAL,
            ];
            self.refused(link, Op::Setattr, node, &attributes(MODE, 0, 0, 0o777), unchanged)?;
            self.refused(link, Op::Setattr, node, &attributes(SIZE, 0, 0, 0), unchanged)?;
            self.refused(link, Op::Setxattr, node, &extended("user.note", b"x"), unchanged)?;
        }
        Ok(())
    }

    /// The same by names that go through the links, which nobody follows to where they would lead on the host.
    pub(super) fn names_through_links(&mut self, nodes: &Nodes) -> Result {
        let folder = nodes.writable;
        for link in ["away", "up"] {
            let inside = |file: &str| format!("{link}/{file}");
            let (gone, made) = (&[Errno::ENOENT], inside("made"));
            self.refused(link, Op::Lookup, folder, &name(&inside("secret")), gone)?;
            self.refused(link, Op::Mkdir, folder, &mkdir(&made), gone)?;
            self.refused(link, Op::Symlink, folder, &name(&made).name("x"), gone)?;
            self.refused(link, Op::Mknod, folder, &special(FILE | 0o666, 0, 0, &made), gone)?;
            self.refused(link, Op::Create, folder, &create(&made, O_RDWR), gone)?;
            self.refused(link, Op::Create, folder, &create(&inside("secret"), O_RDWR), gone)?;
            self.refused(
                link,
                Op::Link,
                folder,
                &Body::default().u64(nodes.mine).name(&made),
                gone,
            )?;
            self.refused(link, Op::Rename, folder, &rename(folder, "mine", &made), gone)?;
            self.refused(
                link,
                Op::Rename,
                folder,
                &rename(folder, &inside("secret"), "got"),
                gone,
            )?;
            self.refused(link, Op::Unlink, folder, &name(&inside("secret")), gone)?;
            // Through the name of the link itself, nothing is opened or made at its end.
            let taken = &[Errno::EBADF, Errno::ELOOP, Errno::EEXIST];
            self.refused(link, Op::Create, folder, &create(link, O_RDWR), taken)?;
        }
        Ok(())
    }

    /// A container may make device files, but the host opens none.
    pub(super) fn devices(&mut self, nodes: &Nodes) -> Result {
        let kinds = [("zero", CHARACTERS, 1, 5), ("disk", BLOCKS, 7, 0), ("pipe", PIPE, 0, 0)];
        for (folder, in_root) in [(nodes.writable, false), (nodes.root, true)] {
            for (file, kind, major, minor) in kinds {
                let what = &format!("{file}{}", if in_root { " in the root" } else { "" });
                let made = self.granted(what, Op::Mknod, folder, &special(kind | 0o666, major, minor, file))?;
                self.told(&format!("what {what} is"), mode(&made) & KIND == kind, "as asked");
                let node = number(&made, 0);
                for flags in [0, O_RDWR, O_RDWR | O_TRUNC, O_PATH] {
                    self.refused(
                        &format!("{what} by {flags:#x}"),
                        Op::Open,
                        node,
                        &open(flags),
                        &[Errno::EBADF],
                    )?;
                }
                self.refused(what, Op::Create, folder, &create(file, O_RDWR), &[Errno::EBADF])?;
                self.refused(what, Op::Opendir, node, &open(0), &[Errno::EBADF, Errno::ENOTDIR])?;
                self.refused(
                    what,
                    Op::Setattr,
                    node,
                    &attributes(SIZE, 0, 0, 0),
                    &[Errno::EBADF, Errno::EINVAL],
                )?;
            }
        }
        // Overlays know a layer's deleted file by such a device.
        let whiteout = special(CHARACTERS, 0, 0, "whiteout");
        self.refused("of a whiteout", Op::Mknod, nodes.root, &whiteout, &[Errno::EPERM])?;
        let rename = rename2(nodes.root, RENAME_WHITEOUT, "new", "old");
        self.refused("with a whiteout", Op::Rename2, nodes.root, &rename, &[Errno::EINVAL])?;
        // The host keeps these under other names, which nobody in the guest may use.
        for (what, folder) in [("of the root", nodes.root), ("of the volume", nodes.writable)] {
            for key in ["trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.any"] {
                let what = &format!("{key} {what}");
                self.granted(what, Op::Setxattr, folder, &extended(key, b"/nowhere"))?;
                let renamed = extended(&format!("user.virtiofs.{key}"), b"/nowhere");
                self.refused(
                    &format!("user.virtiofs.{what}"),
                    Op::Setxattr,
                    folder,
                    &renamed,
                    &[Errno::EPERM],
                )?;
            }
        }
        Ok(())
    }
}
