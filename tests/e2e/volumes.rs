//! Files of the node in a container.

use std::fs;

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, Trying, claim, contains, same},
    node::Node,
    run,
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("a_writable_and_a_read_only_volume", a_writable_and_a_read_only_volume),
    ("a_root_of_its_own", a_root_of_its_own),
];

/// What a container writes to a volume is on the node, with its owner; what it may only read stays as it is.
fn a_writable_and_a_read_only_volume(node: &Node, runtime: Runtime) -> Result {
    let folder = node.path(&format!("volumes-{}", node.serial()));
    node.write(&folder.join("writable/seen"), "from the node")?;
    node.write(&folder.join("fixed/seen"), "fixed")?;
    let pod = node.pod(runtime, "volumes")?.run()?;
    let container = pod
        .container("host", &["sleep", "infinity"])
        .volume(&folder.join("writable"), "/writable", Access::ReadWrite)
        .volume(&folder.join("fixed"), "/fixed", Access::ReadOnly)
        .volume(&folder.join("fixed/seen"), "/etc/single-file", Access::ReadOnly)
        .run()?;
    let seen = container.shell(
        "cat /writable/seen /etc/single-file; echo from the pod >/writable/new; chown 1000:1000 /writable/new",
    )?;
    same("what the container sees", seen.as_str(), "from the nodefixed")?;
    same(
        "what the node sees",
        text(&folder.join("writable/new"))?.as_str(),
        "from the pod\n",
    )?;
    let owner =
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(folder.join("writable/new")).trying("looking at the file")?);
    same("its owner", owner, 1000)?;

    for script in [
        "echo changed >/fixed/seen",
        "touch /fixed/new",
        "echo changed >/etc/single-file",
    ] {
        let refusal = container.exec(&["sh", "-c", script], None, run::ORDINARY)?;
        claim(refusal.code != 0, format!("`{script}` is refused"))?;
        contains("refusal", &refusal.errors(), "Read-only file system")?;
    }
    same("the fixed file", text(&folder.join("fixed/seen"))?.as_str(), "fixed")?;
    node.write(&folder.join("fixed/later"), "later")?;
    same(
        "a file made later",
        container.shell("cat /fixed/later")?.as_str(),
        "later",
    )?;
    pod.remove()
}

/// Two containers of one image do not see each other's changes.
fn a_root_of_its_own(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "roots")?.run()?;
    let writer = pod.container("writer", &["sleep", "infinity"]).run()?;
    let reader = pod.container("reader", &["sleep", "infinity"]).run()?;
    writer.shell("echo mine >/root/note; rm /www/index.html")?;
    same(
        "the writer's view",
        writer.shell("cat /root/note; ls /www")?.as_str(),
        "mine",
    )?;
    same(
        "the reader's view",
        reader.shell("ls /root /www")?.as_str(),
        "/root:\n\n/www:\nindex.html",
    )?;
    let fixed = pod
        .container("fixed", &["sleep", "infinity"])
        .security("readonly_rootfs", true.into())
        .run()?;
    let refusal = fixed.exec(&["touch", "/new"], None, run::ORDINARY)?;
    contains("refusal", &refusal.errors(), "Read-only file system")?;
    pod.remove()
}

fn text(path: &std::path::Path) -> Result<String> {
    fs::read_to_string(path).trying(format!("reading {}", path.display()))
}
