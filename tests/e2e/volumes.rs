//! Files of the node in a container.

use std::{fs, os::unix::fs::symlink, path::Path};

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, Trying, claim, contains, same},
    node::Node,
    run::{self, succeed},
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("a_writable_and_a_read_only_volume", a_writable_and_a_read_only_volume),
    (
        "an_updated_configmap_wakes_who_watches_it",
        an_updated_configmap_wakes_who_watches_it,
    ),
    ("a_volume_in_memory_is_the_pods", a_volume_in_memory_is_the_pods),
    ("a_root_of_its_own", a_root_of_its_own),
    (
        "later_mounts_show_where_they_are_to",
        later_mounts_show_where_they_are_to,
    ),
];

/// Stories about the virtual machine.
pub const OF_A_VM: &[Story] = &[(
    "a_read_only_volume_withstands_the_guests_root",
    a_read_only_volume_withstands_the_guests_root,
)];

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

/// Updates of a ConfigMap arrive whole, and whoever watches a file hears of its end, as without a VM.
fn an_updated_configmap_wakes_who_watches_it(node: &Node, runtime: Runtime) -> Result {
    let pods = node.path(&format!("kubelet-{}/pods", node.serial()));
    let volume = pods.join("4f0c/volumes/kubernetes.io~configmap/settings");
    update(&volume, "..2026_01", &[("color", "red"), ("size", "big")])?;
    let pod = node.pod(runtime, "updates")?.run()?;
    let watch = "cat /settings/color; inotifywait -e delete_self --format '%e' /settings/color; \
        inotifywait -e moved_to --format '%f' /settings";
    let watcher = pod
        .shell("watcher", watch)
        .volume(&volume, "/settings", Access::ReadOnly)
        .run()?;
    let reader = pod
        .container("reader", &["sleep", "infinity"])
        .volume(&volume, "/etc/settings", Access::ReadOnly)
        .run()?;
    let view = "cd /etc/settings; for file in *; do echo $file=$(cat $file); done; ls -d ..2*";
    same("before", reader.shell(view)?.as_str(), "color=red\nsize=big\n..2026_01")?;
    let seen = |wanted: &str| {
        let look = || match reader.shell(view) {
            Ok(seen) if seen == wanted => Ok(()),
            Ok(seen) => Err(seen),
            Err(failure) => Err(failure.to_string()),
        };
        node.events().bell.until("the update", run::ORDINARY, look)
    };

    let watching = "Setting up watches.\nWatches established.";
    watcher.wait_for_log(watching)?;
    update(&volume, "..2026_02", &[("color", "green"), ("shape", "round")])?;
    seen("color=green\nshape=round\n..2026_02")?;
    watcher.wait_for_log(&format!("{watching}\n{watching}"))?;
    update(&volume, "..2026_03", &[("color", "blue")])?;
    same("the watcher's exit code", watcher.wait_exit()?.code, 0)?;
    contains("what it saw", &watcher.logs()?, "redDELETE_SELF\n..data\n")?;
    seen("color=blue\n..2026_03")?;
    pod.remove()
}

/// Replaces all files of a volume at once, as the kubelet does (`AtomicWriter` in its `pkg/volume/util`).
pub fn update(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result {
    let made = || -> std::io::Result<()> {
        fs::create_dir_all(volume.join(version))?;
        for (name, text) in files {
            fs::write(volume.join(version).join(name), text)?;
        }
        let before = fs::read_link(volume.join("..data")).ok();
        symlink(version, volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
        for (name, _) in files {
            if !volume.join(name).is_symlink() {
                symlink(Path::new("..data").join(name), volume.join(name))?;
            }
        }
        for entry in fs::read_dir(volume)? {
            let link = entry?.path();
            if link.is_symlink() && !link.exists() {
                fs::remove_file(link)?;
            }
        }
        before.map_or(Ok(()), |before| fs::remove_dir_all(volume.join(before)))
    };
    made().trying(format!("updating {}", volume.display()))
}

/// What an init container writes to an emptyDir of `medium: Memory` is there for the next container, also behind a
/// `subPath`, and its size holds wherever it is mounted.
fn a_volume_in_memory_is_the_pods(node: &Node, runtime: Runtime) -> Result {
    let kubelet = node.path(&format!("kubelet-{}/pods/9a3e", node.serial()));
    let volume = kubelet.join("volumes/kubernetes.io~empty-dir/scratch");
    let part = kubelet.join("volume-subpaths/scratch/app/0");
    for folder in [&volume, &part] {
        fs::create_dir_all(folder).trying("making the volume's folders")?;
    }
    let on_the_node = |program: &str, arguments: &[&str], folders: &[&Path]| {
        succeed(node.command(program).args(arguments).args(folders), run::ORDINARY)
    };
    on_the_node("mount", &["-t", "tmpfs", "-o", "size=8m,mode=777", "tmpfs"], &[&volume])?;
    on_the_node("mkdir", &["-m", "777"], &[&volume.join("part")])?;
    on_the_node("mount", &["--bind"], &[&volume.join("part"), &part])?;

    let pod = node.pod(runtime, "memory-volume")?.run()?;
    let first = pod
        .shell("first", "echo kept >/scratch/note")
        .volume(&volume, "/scratch", Access::ReadWrite)
        .run()?;
    same("the first container's exit code", first.wait_exit()?.code, 0)?;
    first.remove()?;
    let app = pod
        .container("app", &["sleep", "infinity"])
        .volume(&volume, "/dev/shm", Access::ReadWrite)
        .volume(&part, "/part", Access::ReadWrite)
        .run()?;
    let seen = app.shell(
        "cat /dev/shm/note; echo new >/part/file; cat /dev/shm/part/file; df -k /dev/shm | awk 'END {print $2}'",
    )?;
    same("what the next container sees", seen.as_str(), "kept\nnew\n8192")?;
    let too_much = app.exec(
        &["dd", "if=/dev/zero", "of=/dev/shm/big", "bs=1M", "count=9"],
        None,
        run::ORDINARY,
    )?;
    contains("refusal", &too_much.errors(), "No space left on device")?;
    pod.remove()?;
    on_the_node("umount", &[], &[&part, &volume]).map(drop)
}

/// What the node mounts below a volume later shows in a container that asked for it (`HostToContainer`), and in no
/// other.
fn later_mounts_show_where_they_are_to(node: &Node, runtime: Runtime) -> Result {
    let volume = node.path(&format!("later-{}", node.serial()));
    let below = volume.join("below");
    fs::create_dir_all(&below).trying("making the volume")?;
    let mount = |arguments: &[&str]| succeed(node.command("mount").args(arguments).arg(&below), run::ORDINARY);
    let pod = node.pod(runtime, "later")?.run()?;
    let follower = pod
        .container("follower", &["sleep", "infinity"])
        .following_volume(&volume, "/volume")
        .run()?;
    let other = pod
        .container("other", &["sleep", "infinity"])
        .volume(&volume, "/volume", Access::ReadWrite)
        .run()?;
    mount(&["-t", "tmpfs", "tmpfs"])?;
    succeed(node.command("touch").arg(below.join("here")), run::ORDINARY)?;
    same("who follows", follower.shell("ls /volume/below")?.as_str(), "here")?;
    same("who does not", other.shell("ls /volume/below")?.as_str(), "")?;
    pod.remove()?;
    succeed(node.command("umount").arg(&below), run::ORDINARY).map(drop)
}

/// Root in a privileged container can make any mount of the guest writable; what is read-only stays so on the node.
fn a_read_only_volume_withstands_the_guests_root(node: &Node, runtime: Runtime) -> Result {
    let volume = node.path(&format!("fixed-{}", node.serial()));
    node.write(&volume.join("seen"), "fixed")?;
    let pod = node.pod(runtime, "fixed")?.privileged().run()?;
    let container = pod
        .container("root", &["sleep", "infinity"])
        .privileged()
        .volume(&volume, "/fixed", Access::ReadOnly)
        .run()?;
    container.shell("busybox mount -o remount,rw,bind /fixed && grep -q ' /fixed .*rw' /proc/mounts")?;
    let refusal = container.exec(&["touch", "/fixed/new"], None, run::ORDINARY)?;
    contains("refusal", &refusal.errors(), "Read-only file system")?;
    claim(!volume.join("new").exists(), "nothing new is on the node")?;
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

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).trying(format!("reading {}", path.display()))
}
