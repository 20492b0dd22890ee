//! Pods with a user namespace (`hostUsers: false`): their root is nobody's elsewhere.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
};

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, Trying, claim, contains, same},
    images,
    node::{INSTALLED, Node},
    run,
};

use crate::{Story, volumes};

/// Stories for a containerd that knows user namespaces.
pub const OF_A_VM: &[Story] = &[
    ("a_root_who_is_nobody_elsewhere", a_root_who_is_nobody_elsewhere),
    (
        "files_keep_their_owners_in_a_user_namespace",
        files_keep_their_owners_in_a_user_namespace,
    ),
    (
        "a_root_who_may_write_wherever_the_image_has_its_folders",
        a_root_who_may_write_wherever_the_image_has_its_folders,
    ),
    (
        "a_network_that_belongs_to_the_pods_root",
        a_network_that_belongs_to_the_pods_root,
    ),
];

/// The first ID that the kubelet gave the pod, and how many.
const FIRST: u32 = 200_000;
const SIZE: u32 = 65_536;

/// All processes of the pod have its IDs, those of an exec too, and its root may do what a container's root may.
fn a_root_who_is_nobody_elsewhere(node: &Node, _: Runtime) -> Result {
    let pod = node
        .pod_with_handler(INSTALLED, "users")
        .with_users(FIRST, SIZE)
        .sharing_processes()
        .run()?;
    let first = pod.container("first", &["sleep", "infinity"]).run()?;
    let second = pod
        .container("second", &["sleep", "infinity"])
        .security("run_as_user", serde_json::json!({ "value": 1000 }))
        .run()?;
    for (container, user) in [(&first, "0"), (&second, "1000")] {
        let seen = container.shell("tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; id -u")?;
        let map = format!(" 0 {FIRST} {SIZE}");
        same("IDs", seen.as_str(), format!("{map}\n{map}\n{user}").as_str())?;
    }
    same(
        "the same namespace",
        first.shell("readlink /proc/self/ns/user")?,
        second.shell("readlink /proc/self/ns/user")?,
    )?;
    let names = first.shell("cat /proc/[0-9]*/comm")?;
    same(
        "sleepers that it sees",
        names.lines().filter(|name| *name == "sleep").count(),
        2,
    )?;
    let terminal = pod
        .shell("terminal", "stat -c 'owner %u' /dev/console; tty")
        .terminal()
        .run()?;
    same("the exit code on a terminal", terminal.wait_exit()?.code, 0)?;
    contains("the terminal", &terminal.logs()?, "owner 0\n/dev/pts/0")?;
    let work = "chown 7:8 /tmp && chmod 700 /tmp && stat -c %u:%g:%a /tmp && hostname other && hostname";
    let refused = first.exec(&["sh", "-c", work], None, run::ORDINARY)?;
    contains("what its root did", &refused.text(), "7:8:700")?;
    claim(refused.code != 0, "without CAP_SYS_ADMIN it does not rename the pod")?;
    pod.remove()
}

/// Files of the node belong to the same users in the container as on the node, and what it makes belongs to them there.
fn files_keep_their_owners_in_a_user_namespace(node: &Node, _: Runtime) -> Result {
    let folder = node.path(&format!("users-{}", node.serial()));
    node.write(&folder.join("of-root"), "secret")?;
    node.write(&folder.join("of-app"), "app's")?;
    own(&folder.join("of-root"), 0, 0o600)?;
    own(&folder.join("of-app"), 1000, 0o600)?;
    let settings = node.path(&format!(
        "kubelet-{}/pods/4f0c/volumes/kubernetes.io~secret/settings",
        node.serial()
    ));
    volumes::update(&settings, "..2026_01", &[("color", "red")])?;
    own(&settings.join("..2026_01/color"), 0, 0o400)?;

    let pod = node
        .pod_with_handler(INSTALLED, "owners")
        .with_users(FIRST, SIZE)
        .run()?;
    let container = pod
        .container("root", &["sleep", "infinity"])
        .volume(&folder, "/data", Access::ReadWrite)
        .volume(&settings, "/settings", Access::ReadOnly)
        .run()?;
    let seen = container.shell(
        "stat -c %u:%g / /root /home/app /data/of-root /data/of-app /dev/shm; cat /data/of-root /settings/color",
    )?;
    same(
        "owners",
        seen.as_str(),
        "0:0\n0:0\n1000:1000\n0:0\n1000:1000\n0:0\nsecretred",
    )?;
    container.shell("echo new >/data/new; chown 5:6 /data/new; echo mine >/root/mine; echo shared >/dev/shm/shared")?;
    let made = fs::metadata(folder.join("new")).trying("looking at the new file")?;
    same("the new file's owner on the node", (made.uid(), made.gid()), (5, 6))?;
    volumes::update(&settings, "..2026_02", &[("color", "green")])?;
    let look = || match container.shell("cat /settings/color") {
        Ok(color) if color == "green" => Ok(()),
        other => Err(format!("{other:?}")),
    };
    node.events().bell.until("the update", run::ORDINARY, look)?;
    let restricted = pod.container("app", &["sleep", "infinity"]).restricted().run()?;
    same(
        "a restricted container",
        restricted.shell("id -u; cat /dev/shm/shared")?.as_str(),
        "1000\nshared",
    )?;
    pod.remove()
}

/// CAP_DAC_OVERRIDE holds for all files of the container's users: in folders of others, in folders without the right to
/// write, for everything that can be made; and the runtime makes what a volume needs.
fn a_root_who_may_write_wherever_the_image_has_its_folders(node: &Node, _: Runtime) -> Result {
    let folder = node.path(&format!("users-{}", node.serial()));
    node.write(&folder.join("key"), "value")?;
    own(&folder, 33, 0o755)?;
    let pod = node
        .pod_with_handler(INSTALLED, "override")
        .with_users(FIRST, SIZE)
        .run()?;
    let container = pod
        .container("root", &["sleep", "infinity"])
        .volume(&folder, "/not/in/the/image", Access::ReadWrite)
        .working_in("/not/in/the/image/work/here")
        .run()?;
    same(
        "where it works",
        container.shell("pwd; stat -c %u:%g:%a . ..")?.as_str(),
        "/not/in/the/image/work/here\n0:0:755\n0:0:755",
    )?;
    container.shell(
        "mkdir -p /others/deep /closed; chown -R 33:33 /others; chmod 755 /others /others/deep; chmod 555 /closed /",
    )?;
    for place in ["/others", "/others/deep", "/closed", "", "/not/in/the/image"] {
        let make = format!(
            "cd {place}/; mkdir folder; echo new >file; ln -s file link; mkfifo pipe; ln file second; mv second third; cat third; \
             stat -c %u:%g folder file pipe; stat -c %a .; rm -r folder file link pipe third"
        );
        let mode = if ["/closed", ""].contains(&place) { 555 } else { 755 };
        let expected = format!("new\n0:0\n0:0\n0:0\n{mode}");
        same(place, container.shell(&make)?.as_str(), expected.as_str())?;
    }
    // The right to write is the guest kernel's to give, and a user without the capability has it not.
    let web = pod
        .container("web", &["sleep", "infinity"])
        .security("run_as_user", serde_json::json!({ "value": 1000 }))
        .volume(&folder, "/data", Access::ReadWrite)
        .run()?;
    let refused = web.exec(&["sh", "-c", "echo new >/data/file"], None, run::ORDINARY)?;
    claim(
        refused.code != 0,
        "a user without capabilities writes into the folder of another",
    )?;
    contains("the refusal", &refused.errors(), "Permission denied")?;
    pod.remove()
}

/// Its root may use the network as on a node: raw sockets, low ports, and the pod is reached on its address.
fn a_network_that_belongs_to_the_pods_root(node: &Node, _: Runtime) -> Result {
    let pod = node
        .pod_with_handler(INSTALLED, "net")
        .with_users(FIRST, SIZE)
        .sysctl("net.ipv4.ip_unprivileged_port_start", "1024")
        .run()?;
    let server = ["httpd", "-f", "-p", "80", "-h", "/www"];
    let server = pod.container("server", &server).run()?;
    same("page", node.get(&pod.ip()?, 80, "/")?.as_str(), images::PAGE)?;
    contains(
        "raw sockets",
        &server.shell("ping -c 1 -W 10 127.0.0.1")?,
        "1 packets received",
    )?;
    same("interfaces", server.shell(images::INTERFACES)?.as_str(), "eth0\nlo")?;
    pod.remove()
}

fn own(file: &Path, user: u32, mode: u32) -> Result {
    chown(file, Some(user), Some(user)).trying("giving a file away")?;
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).trying("setting a file's mode")
}
