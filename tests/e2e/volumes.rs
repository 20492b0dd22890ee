//! Files of the node in a container.

use std::{fs, os::unix::fs::symlink, path::Path};

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, Trying, claim, contains, same},
    images,
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
    (
        "a_volume_is_the_same_for_all_containers",
        a_volume_is_the_same_for_all_containers,
    ),
    ("a_device_file_that_somebody_makes", a_device_file_that_somebody_makes),
    ("an_image_of_a_hundred_layers", an_image_of_a_hundred_layers),
    (
        "attributes_and_capabilities_of_files",
        attributes_and_capabilities_of_files,
    ),
    ("a_root_of_its_own", a_root_of_its_own),
    ("names_as_long_as_they_can_be", names_as_long_as_they_can_be),
    (
        "later_mounts_show_where_they_are_to",
        later_mounts_show_where_they_are_to,
    ),
];

/// Stories about the virtual machine.
pub const OF_A_VM: &[Story] = &[
    (
        "a_read_only_volume_withstands_the_guests_root",
        a_read_only_volume_withstands_the_guests_root,
    ),
    (
        "nothing_stays_of_a_container_though_others_have_the_nodes_root",
        nothing_stays_of_a_container_though_others_have_the_nodes_root,
    ),
];

/// Whoever has the node's root as a volume has nothing of what a shim mounts for its containers: it goes with them.
fn nothing_stays_of_a_container_though_others_have_the_nodes_root(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "leaving")?.run()?;
    let first = pod.container("first", &["sleep", "infinity"]).run()?;
    let other = node.pod(runtime, "looking")?.run()?;
    for pod in [&pod, &other] {
        let looking = pod.container("looking", &["sleep", "infinity"]);
        looking.volume(Path::new("/"), "/node", Access::ReadOnly).run()?;
    }
    let mine = node.processes_of(pod.id());
    let shim = mine
        .iter()
        .find(|process| process.program() == "containerd-shim-kata-v2");
    let shim = shim.map(|shim| shim.pid).unwrap_or_default();
    let share = Path::new("/proc")
        .join(shim.to_string())
        .join("root/run/kata")
        .join(pod.id())
        .join("shared");
    let place = share.join(first.id());
    claim(place.is_dir(), format!("{} is there", place.display()))?;
    first.kill("SIGKILL")?;
    first.wait_exit()?;
    claim(
        !place.exists(),
        format!("{} is gone with its container", place.display()),
    )?;
    pod.remove()?;
    other.remove()
}

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

/// A file's name has 255 bytes at most, and a ConfigMap's key 253: as a volume, in one, and made by a container.
fn names_as_long_as_they_can_be(node: &Node, runtime: Runtime) -> Result {
    let (name, key) = ("n".repeat(255), "k".repeat(253));
    let file = node.path(&format!("names-{}", node.serial())).join(&name);
    node.write(&file, "a file")?;
    let settings = node.path(&format!(
        "kubelet-{}/pods/4f0c/volumes/kubernetes.io~configmap/settings",
        node.serial()
    ));
    update(&settings, "..2026_01", &[(&key, "first")])?;
    let pod = node.pod(runtime, "names")?.run()?;
    let container = pod
        .container("long", &["sleep", "infinity"])
        .volume(&file, "/file", Access::ReadOnly)
        .volume(file.parent().unwrap_or(&file), "/data", Access::ReadWrite)
        .volume(&settings, "/settings", Access::ReadOnly)
        .run()?;
    let seen = container.shell(&format!("cat /file /data/{name} /settings/{key}"))?;
    same("what is in them", seen.as_str(), "a filea filefirst")?;
    let other = "m".repeat(255);
    container.shell(&format!("echo made >/data/{other} && mv /data/{other} /root/{other}"))?;
    update(&settings, "..2026_02", &[(&key, "second")])?;
    let look = || match container.shell(&format!("cat /settings/{key}")) {
        Ok(text) if text == "second" => Ok(()),
        other => Err(format!("{other:?}")),
    };
    node.events().bell.until("the update", run::ORDINARY, look)?;
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

/// A socket, a pipe and a lock in a volume are the same for all containers of the pod: for one that came first and may
/// only read, for one that sees a part (`subPath`), first or last, and for one that comes after another has gone.
fn a_volume_is_the_same_for_all_containers(node: &Node, runtime: Runtime) -> Result {
    let pods = node.path(&format!("kubelet-{}/pods", node.serial()));
    let part = pods.join("5c1d/volume-subpaths/data/app/0");
    let empty_dir = pods.join("5c1d/volumes/kubernetes.io~empty-dir/data");
    let host_path = node.path(&format!("shared-{}", node.serial()));
    for (volume, part_first) in [(empty_dir, true), (host_path, false)] {
        let whole = volume.join("part");
        for folder in [&whole, &part] {
            fs::create_dir_all(folder).trying("making the volume's folders")?;
        }
        succeed(node.command("mount").arg("--bind").args([&whole, &part]), run::ORDINARY)?;
        let pod = node.pod(runtime, "shared")?.run()?;
        let sleeper = |name: &str| pod.container(name, &["sleep", "infinity"]);
        let with_part = |name: &str| sleeper(name).volume(&part, "/volume/part", Access::ReadWrite).run();
        let first = match part_first {
            true => with_part("first")?,
            false => sleeper("first").volume(&volume, "/volume", Access::ReadOnly).run()?,
        };
        let serve = "cd /volume/part && mkfifo pipe && ln -s $PWD/log /dev/log && touch lock && \
            { flock -x lock sleep infinity & while :; do cat pipe; done & exec syslogd -n -O -; }";
        let server = pod
            .shell("server", serve)
            .volume(&volume, "/volume", Access::ReadWrite)
            .run()?;
        server.wait_for_log("syslogd started")?;
        let meets = |client: &tests::cri::Container<'_>, word: &str| {
            let script = format!(
                "cd /volume/part && ln -s $PWD/log /dev/log && logger {word}-socket && echo {word}-pipe >pipe; \
                 flock -n -x lock true; echo $?"
            );
            same("whether the lock is taken", client.shell(&script)?.as_str(), "1")?;
            server.wait_for_log(&format!("{word}-socket"))?;
            server.wait_for_log(&format!("{word}-pipe"))
        };
        meets(&first, "first")?;
        let second = with_part("second")?;
        meets(&second, "second")?;
        second.remove()?;
        meets(&with_part("third")?, "third")?;
        pod.remove()?;
        succeed(node.command("umount").arg(&part), run::ORDINARY)?;
    }
    Ok(())
}

/// The names of all layers do not fit the options of one mount.
fn an_image_of_a_hundred_layers(node: &Node, runtime: Runtime) -> Result {
    let archive = images::layered(100)?.display().to_string();
    node.ctr(["-n", "k8s.io", "images", "import", &archive])?;
    let pod = node.pod(runtime, "layers")?.run()?;
    let command = ["busybox", "sh", "-c", "busybox ls /layer | busybox wc -l"];
    let container = pod.container("counter", &command).image(images::LAYERED).run()?;
    same("exit code", container.wait_exit()?.code, 0)?;
    same(
        "files, one of each layer but the lowest",
        container.logs()?.trim(),
        "99",
    )?;
    pod.remove()?;
    node.crictl(["rmi", images::LAYERED]).map(drop)
}

/// Files keep extended attributes, on the root as in a volume, and a program has the capabilities that its file has.
fn attributes_and_capabilities_of_files(node: &Node, runtime: Runtime) -> Result {
    // CAP_NET_BIND_SERVICE, permitted and effective: `vfs_cap_data` of <linux/capability.h>.
    const CAPABILITY: &str = "0x0100000200040000000000000000000000000000";
    let volume = node.path(&format!("attributes-{}", node.serial()));
    fs::create_dir_all(&volume).trying("making the volume")?;
    let pod = node.pod(runtime, "attributes")?.run()?;
    let container = pod
        .container("keeper", &["sleep", "infinity"])
        .volume(&volume, "/volume", Access::ReadWrite)
        .run()?;
    for folder in ["/tmp", "/volume"] {
        let script = format!(
            "cd {folder} && cp /usr/bin/busybox . && setfattr -n user.note -v kept busybox && \
             getfattr --only-values -n user.note busybox && setfattr -n security.capability -v {CAPABILITY} busybox && \
             chmod 755 busybox && /usr/sbin/chroot --userspec=app:app / {folder}/busybox grep CapEff /proc/self/status"
        );
        same(
            folder,
            container.shell(&script)?.as_str(),
            "keptCapEff:\t0000000000000400",
        )?;
    }
    pod.remove()
}

/// A device file that a container makes is a device, as a chroot of its own wants one.
fn a_device_file_that_somebody_makes(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "mknod")?.run()?;
    let container = pod.container("maker", &["sleep", "infinity"]).run()?;
    let made =
        container.shell("mkdir -p /c/dev && mknod -m 666 /c/dev/null c 1 3 && echo x >/c/dev/null && echo fine")?;
    same("what becomes of it", made.as_str(), "fine")?;
    pod.remove()
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
