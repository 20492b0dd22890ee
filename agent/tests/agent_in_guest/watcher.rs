//! A program for containers that says what inotify tells: this test itself, as busybox has none.

use std::{fs, io::Write, path::Path};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// What the program is called.
const NAME: &str = "tell-changes";

/// Puts it among a container's programs.
pub fn install(bin: &Path) -> std::io::Result<()> {
    fs::copy(std::env::current_exe()?, bin.join(NAME)).map(drop)
}

/// If it is called by that name, with a folder and a file in it: says what comes to a place in the folder, and the end
/// of the file.
pub fn serve(mut arguments: impl Iterator<Item = String>) {
    let name = arguments.next().unwrap_or_default();
    if Path::new(&name).file_name().is_none_or(|name| name != NAME) {
        return;
    }
    let inotify = Inotify::init(InitFlags::empty()).unwrap();
    let (folder, file) = (arguments.next().unwrap(), arguments.next().unwrap());
    inotify.add_watch(folder.as_str(), AddWatchFlags::IN_MOVED_TO).unwrap();
    inotify.add_watch(file.as_str(), AddWatchFlags::IN_DELETE_SELF).unwrap();
    let mut out = std::io::stdout();
    writeln!(out, "watching").unwrap();
    loop {
        for event in inotify.read_events().unwrap() {
            let name = event.name.unwrap_or_default();
            writeln!(out, "{:?} {}", event.mask, name.display()).unwrap();
        }
    }
}
