//! Memory: limits, the machine's bounds, and who is charged.

use std::time::Duration;

use tests::{
    cold_read::{ColdRead, FILE_MIB, View},
    config::Runtime,
    cri::{Access, Container, Exit},
    failure::{Failure, Result, Trying, claim, contains, same},
    footprint::Charge,
    node::Node,
    run::{self, succeed},
};

use crate::Story;

pub const COMMON: &[Story] = &[(
    "too_much_memory_kills_only_the_culprit",
    too_much_memory_kills_only_the_culprit,
)];

pub const OF_A_VM: &[Story] = &[
    (
        "memory_comes_and_goes_with_a_container",
        memory_comes_and_goes_with_a_container,
    ),
    ("a_running_container_is_resized", a_running_container_is_resized),
    (
        "without_a_limit_the_machine_is_the_bound",
        without_a_limit_the_machine_is_the_bound,
    ),
    ("mapped_memory_is_counted_once", mapped_memory_is_counted_once),
    ("a_greedy_pod_ends_before_its_guest", a_greedy_pod_ends_before_its_guest),
];

/// How long a machine may take to follow the limits. How soon it does, the benchmark measures.
const RESIZING: Duration = Duration::from_secs(60);

/// Keeps what it reads, for ever.
const GREEDY: &[&str] = &["tail", "/dev/zero"];

/// How long a greedy program may take to fill the memory of an emulated machine.
const FILLING: Duration = Duration::from_secs(90);

/// A container that exceeds its limit is killed, and everyone is told why; its neighbour lives.
fn too_much_memory_kills_only_the_culprit(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "greedy")?.run()?;
    let neighbour = pod
        .container("neighbour", &["sleep", "infinity"])
        .memory_mib(64)
        .run()?;
    let culprit = pod.container("culprit", GREEDY).memory_mib(64).run()?;
    same(
        "exit",
        culprit.wait_exit_within(FILLING)?,
        Exit {
            code: 137,
            reason: "OOMKilled".into(),
        },
    )?;
    same("the neighbour", neighbour.shell("echo alive")?.as_str(), "alive")?;
    pod.remove()
}

/// The limit of a container is added to the machine before the container starts, and taken away when it is removed.
fn memory_comes_and_goes_with_a_container(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "growing")?.run()?;
    let observer = pod.container("observer", &["sleep", "infinity"]).run()?;
    let before = total_mib(&observer)?;
    let container = pod
        .shell("limited", "grep MemTotal /proc/meminfo; exec sleep infinity")
        .memory_mib(512)
        .run()?;
    container.wait_for_log("kB")?;
    let at_start = parse(&container.logs()?)?;
    // The page structures of the new memory come out of it.
    claim(
        at_start >= before + 512 - 16,
        format!("512 MiB were there when it began: {before} MiB before, {at_start} MiB then"),
    )?;
    container.remove()?;
    // virtio-mem keeps one block of 2 MiB.
    let returned = |now: u64| now <= before + 2;
    settle(
        node,
        "the return of the memory",
        RESIZING,
        || total_mib(&observer),
        returned,
    )?;
    pod.remove()
}

/// The limit of a container that runs is raised and lowered: the machine follows, and the host has back what
/// was used.
fn a_running_container_is_resized(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "resized")?.run()?;
    let observer = pod.container("observer", &["sleep", "infinity"]).run()?;
    let container = pod.container("resized", &["sleep", "infinity"]).memory_mib(512).run()?;
    let small = total_mib(&observer)?;
    let used = || Charge::of(&pod.cgroup()).map(|charge| charge.usage_kib >> 10);
    let used_before = used()?;

    container.resize_mib(2048)?;
    let larger = |now: u64| now >= small + 1536 - 32;
    settle(node, "the larger machine", RESIZING, || total_mib(&observer), larger)?;
    same("the new limit", limit_mib(&container)?, 2048)?;
    // One buffer of a GiB, filled.
    let fill = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1024M", "count=1"];
    same("filling a GiB", container.exec(&fill, None, FILLING)?.code, 0)?;
    let used_then = used()?;
    claim(
        used_then >= used_before + 512,
        format!("the host gave what was filled: {used_before} MiB before, {used_then} MiB then"),
    )?;

    container.resize_mib(256)?;
    // virtio-mem keeps one block of 2 MiB.
    let smaller = |now: u64| now <= small - 256 + 2;
    settle(node, "the smaller machine", RESIZING, || total_mib(&observer), smaller)?;
    same("the last limit", limit_mib(&container)?, 256)?;
    let returned = |now: u64| now <= used_before + 64;
    settle(node, "the host's memory", RESIZING, used, returned)?;
    same("the container", container.shell("echo alive")?.as_str(), "alive")?;
    pod.remove()
}

/// Waits for a number of MiB.
fn settle(
    node: &Node,
    what: &str,
    patience: Duration,
    read: impl Fn() -> Result<u64>,
    enough: impl Fn(u64) -> bool,
) -> Result {
    node.events().bell.until(what, patience, || match read() {
        Ok(mib) if enough(mib) => Ok(()),
        Ok(mib) => Err(format!("{mib} MiB")),
        Err(failure) => Err(failure.to_string()),
    })
}

fn limit_mib(container: &Container<'_>) -> Result<u64> {
    let bytes = container.shell("cat /sys/fs/cgroup/memory.max")?;
    bytes
        .parse::<u64>()
        .map(|bytes| bytes >> 20)
        .map_err(|_| Failure::Claim(format!("{bytes:?} is no limit")))
}

/// A container without a limit can use the machine's memory and no more.
fn without_a_limit_the_machine_is_the_bound(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "unbound")?.run()?;
    let neighbour = pod.container("neighbour", &["sleep", "infinity"]).run()?;
    let total = total_mib(&neighbour)?;
    claim(
        (1900..=2048).contains(&total),
        format!("a machine without limits has 2048 MiB less its kernel, not {total}"),
    )?;
    let culprit = pod.container("culprit", GREEDY).run()?;
    same("exit code", culprit.wait_exit_within(FILLING)?.code, 137)?;
    same("the neighbour", neighbour.shell("echo alive")?.as_str(), "alive")?;
    pod.remove()
}

/// A volume in memory is as large as the node, as the kubelet asks for it when a pod has no limit; the guest is
/// smaller. Whoever fills it is told so, and a container that takes all that is left is killed; its neighbours and the
/// machine live. With the machine grow the volume and what Linux allows by memory, unless somebody has set it.
fn a_greedy_pod_ends_before_its_guest(node: &Node, runtime: Runtime) -> Result {
    let kubelet = node.path(&format!("kubelet-{}/pods/1f0a", node.serial()));
    let volume = kubelet.join("volumes/kubernetes.io~empty-dir/scratch");
    std::fs::create_dir_all(&volume).trying("making the volume's folder")?;
    let on_the_node =
        |program: &str, arguments: &[&str]| succeed(node.command(program).args(arguments).arg(&volume), run::ORDINARY);
    on_the_node("mount", &["-t", "tmpfs", "-o", "size=64g", "tmpfs"])?;
    let pod = node.pod(runtime, "memory-eater")?.privileged().run()?;
    let app = pod
        .container("app", &["sleep", "infinity"])
        .volume(&volume, "/scratch", Access::ReadWrite)
        .privileged()
        .run()?;
    let sizes = || {
        let text = app.shell(
            "df -m /scratch | awk 'END {print $2}'; cat /proc/sys/kernel/threads-max /proc/sys/user/max_pid_namespaces",
        )?;
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        <[u64; 3]>::try_from(numbers).map_err(|_| Failure::Claim(format!("three numbers in {text:?}")))
    };
    let small = sizes()?;
    claim((1024..2048).contains(&small[0]), format!("the volume's MiB: {small:?}"))?;
    let fill = ["dd", "if=/dev/zero", "of=/scratch/all", "bs=16M"];
    contains(
        "refusal",
        &app.exec(&fill, None, FILLING)?.errors(),
        "No space left on device",
    )?;
    let culprit = pod.container("culprit", GREEDY).run()?;
    same("exit code", culprit.wait_exit_within(FILLING)?.code, 137)?;
    same("the app", app.shell("rm /scratch/all; echo alive")?.as_str(), "alive")?;

    app.shell("echo 12345 >/proc/sys/fs/epoll/max_user_watches")?;
    pod.container("limited", &["sleep", "infinity"])
        .memory_mib(2048)
        .run()?;
    let large = sizes()?;
    for (before, after) in small.into_iter().zip(large) {
        claim(
            (before * 18 / 10..=before * 22 / 10).contains(&after),
            format!("twice as much after {small:?}: {large:?}"),
        )?;
    }
    let set = app.shell("cat /proc/sys/fs/epoll/max_user_watches")?;
    same("what the pod has set", set.as_str(), "12345")?;
    pod.remove()?;
    on_the_node("umount", &[]).map(drop)
}

/// A file's pages in the guest are seen in QEMU and in virtiofsd, and are one and the same memory: the pod's cgroup on
/// the host is charged once.
fn mapped_memory_is_counted_once(node: &Node, runtime: Runtime) -> Result {
    let read = ColdRead::perform(node, runtime)?;
    let grown = |kib: fn(&View) -> u64| (kib(&read.after).saturating_sub(kib(&read.before))) >> 10;
    // The programs' files are left out: their shares change when a neighbouring pod comes or goes.
    let once = grown(|view| view.footprint.unshared_kib());
    // The host's own copy is charged to whoever read it first, the pod; how much of it there is, the file itself tells
    // best.
    let charged = grown(|view| view.charge.usage_kib).saturating_sub(grown(|view| view.host_cache));
    claim(
        grown(|view| view.guest_cached) >= FILE_MIB - 10,
        format!("the guest keeps the file: {read:?}"),
    )?;
    claim(
        (FILE_MIB - 10..=FILE_MIB + 50).contains(&once),
        format!("the pod grew by the file, once: {read:?}"),
    )?;
    claim(
        charged.abs_diff(once) < 50,
        format!("the pod's cgroup says the same, besides the host's own copy of the file: {read:?}"),
    )
}

fn total_mib(observer: &Container<'_>) -> Result<u64> {
    parse(&observer.shell("grep MemTotal /proc/meminfo")?)
}

fn parse(line: &str) -> Result<u64> {
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse::<u64>().ok());
    kib.map(|kib| kib >> 10)
        .ok_or_else(|| Failure::Claim(format!("{line:?} is no MemTotal")))
}
