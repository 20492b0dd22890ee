//! A new version of what pods run with, installed while they run.

use std::{fs, os::unix::fs::symlink, path::Path};

use tests::{
    config::{self, Guest, Runtime},
    failure::{Result, Trying, same},
    node::Node,
    places,
};

use crate::Story;

pub const OF_A_VM: &[Story] = &[("a_pod_outlives_its_installation", a_pod_outlives_its_installation)];

/// The handler that runs pods with what is installed below [`INSTALLATION`].
const HANDLER: &str = "kata-versioned";
/// In the node's own `/opt`, with a folder for each version and a link to the current one, as the installer lays it
/// out.
const INSTALLATION: &str = "opt/versioned";

/// The handler of these stories.
pub fn handler() -> (String, String) {
    let current = Path::new("/").join(INSTALLATION).join("current");
    let text = config::configuration(&current, &current.join("virtiofsd"), config::accelerator(), true);
    (HANDLER.to_owned(), text)
}

/// A version is replaced and its files are removed: the pod that runs with it does not notice, and the next one runs
/// with the new.
fn a_pod_outlives_its_installation(node: &Node, _: Runtime) -> Result {
    install(node, "1")?;
    let old = node.pod_with_handler(HANDLER, "old").run()?;
    let container = old
        .shell("counter", "i=0; while :; do echo $((i+=1)); sleep 0.1; done")
        .run()?;
    container.wait_for_log("5\n")?;
    install(node, "2")?;
    let folder = node.path(INSTALLATION).join("versions/1");
    fs::remove_dir_all(folder).trying("removing the old version")?;

    same("an exec", container.shell("echo here")?.as_str(), "here")?;
    let late = old.container("late", &["cat", "/etc/passwd"]).memory_mib(64).run()?;
    same("the exit code of a container made later", late.wait_exit()?.code, 0)?;
    let logged = container.logs()?.lines().count();
    container.wait_for_log(&format!("{}\n", logged + 5))?;
    let new = node.pod_with_handler(HANDLER, "new").run()?;
    let greeter = new.container("greeter", &["sleep", "infinity"]).run()?;
    same("the next pod", greeter.shell("echo here, too")?.as_str(), "here, too")?;
    new.remove()?;
    old.remove()
}

/// Installs a version: its files, then the link to it, in one step.
fn install(node: &Node, version: &str) -> Result {
    let root = node.path(INSTALLATION);
    let folder = root.join("versions").join(version);
    fs::create_dir_all(&folder).trying("making the version's folder")?;
    let guest = places::guest(Guest::Own.name())?;
    for file in [guest.join("vmlinux"), guest.join("initrd"), places::virtiofsd()?] {
        let name = file.file_name().unwrap_or_default();
        fs::copy(&file, folder.join(name)).trying(format!("installing {}", file.display()))?;
    }
    let link = root.join(".current");
    symlink(Path::new("versions").join(version), &link).trying("linking the version")?;
    fs::rename(link, root.join("current")).trying("making the version the current one")
}
