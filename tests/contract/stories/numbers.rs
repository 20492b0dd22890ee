//! Statistics, and resources that change.

use std::{collections::BTreeSet, fs};

use containerd_shim_protos::{
    cgroups::metrics::Metrics as MetricsV1,
    cgroups_v2::metrics::Metrics as MetricsV2,
    protobuf::{Message, MessageField, well_known_types::any::Any},
};
use nix::mount::{MsFlags, mount, umount};
use serde_json::json;
use tests::{
    failure::{Result, Trying, claim, same},
    wait::Bell,
};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{GRACE, Pod},
    process::{self, Kind},
    task::{KILL, ORDINARY, Task},
};

/// This module's stories.
pub const TOLD: Told = &[
    (BOTH, "statistics_have_every_part_that_crio_reads", statistics),
    (OURS, "statistics_count_what_the_container_uses", usage),
    (BOTH, "an_update_changes_the_limits_of_a_running_container", update),
    (OURS, "the_memory_of_the_virtual_machine_follows_the_limits", memory),
    (
        OURS,
        "a_machine_runs_on_the_processors_that_its_containers_have_been_given",
        processors,
    ),
    (OURS, "huge_pages_come_and_go_with_their_container", huge_pages),
];

/// What CRI-O makes of the answer to Stats: version 1 or 2 of the same numbers.
struct Numbers {
    memory: u64,
    limit: u64,
    cpu: u64,
    pids: u64,
}

/// A missing part crashes CRI-O: it follows these without looking.
fn present<T>(part: &MessageField<T>, name: &str) -> Result {
    claim(
        part.is_some(),
        format!("the statistics have no {name}; CRI-O would crash"),
    )
}

fn decode(stats: &Any, strict: bool) -> Result<Numbers> {
    let version = if fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_ok() {
        "v2"
    } else {
        "v1"
    };
    // CRI-O looks this string up as it is, without any prefix, and reads the version that its own host has.
    same(
        "the type of the statistics",
        stats.type_url.as_str(),
        format!("io.containerd.cgroups.{version}.Metrics").as_str(),
    )?;
    claim(
        !stats.value.is_empty(),
        "the statistics are empty; CRI-O would call them unknown",
    )?;
    if version == "v1" {
        decode_v1(stats, strict)
    } else {
        decode_v2(stats)
    }
}

fn decode_v1(stats: &Any, strict: bool) -> Result<Numbers> {
    let metrics = MetricsV1::parse_from_bytes(&stats.value)
        .map_err(std::io::Error::other)
        .trying("decoding the statistics")?;
    present(&metrics.cpu, "CPU")?;
    present(&metrics.cpu.usage, "CPU.Usage")?;
    present(&metrics.cpu.throttling, "CPU.Throttling")?;
    present(&metrics.memory, "Memory")?;
    present(&metrics.memory.usage, "Memory.Usage")?;
    if strict {
        // A host without swap accounting leaves these out for runc, and CRI-O crashes there.
        present(&metrics.memory.swap, "Memory.Swap")?;
        present(&metrics.memory.kernel, "Memory.Kernel")?;
        present(&metrics.memory.kernel_tcp, "Memory.KernelTCP")?;
    }
    present(&metrics.pids, "Pids")?;
    Ok(Numbers {
        memory: metrics.memory.usage.usage,
        limit: metrics.memory.usage.limit,
        cpu: metrics.cpu.usage.total,
        pids: metrics.pids.current,
    })
}

fn decode_v2(stats: &Any) -> Result<Numbers> {
    let metrics = MetricsV2::parse_from_bytes(&stats.value)
        .map_err(std::io::Error::other)
        .trying("decoding the statistics")?;
    present(&metrics.cpu, "CPU")?;
    present(&metrics.memory, "Memory")?;
    present(&metrics.pids, "Pids")?;
    Ok(Numbers {
        memory: metrics.memory.usage,
        limit: metrics.memory.usage_limit,
        cpu: metrics.cpu.usage_usec,
        pids: metrics.pids.current,
    })
}

fn statistics(crio: &Crio<'_>) -> Result {
    let strict = crio.runtime == Runtime::Sandpod;
    let pod = Pod::run(crio)?;
    decode(&pod.sandbox.stats()?, strict)?;
    let mut container = pod.create(&Wanted::idle().with_memory(64))?;
    // critest asks for those of a container that was never started.
    decode(&container.stats()?, strict)?;
    container.start()?;
    container.stdout()?.line("ready", ORDINARY)?;
    let running = decode(&container.stats()?, strict)?;
    same("the memory limit", running.limit, 64 << 20)?;
    claim(
        running.memory > 0 && running.cpu > 0 && running.pids > 0,
        "a running container uses nothing",
    )?;
    container.stop(GRACE)?;
    if strict {
        // containerd 2.3 looks for the OOM kill after the exit.
        decode(&container.stats()?, strict)?;
    }
    pod.end([container])
}

fn usage(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let before = decode(&container.stats()?, true)?;
    container
        .shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; head -c 30000000 /dev/zero >/dev/shm/thirty")?;
    let after = decode(&container.stats()?, true)?;
    claim(
        after.cpu > before.cpu,
        format!("CPU time went from {} to {}", before.cpu, after.cpu),
    )?;
    claim(
        after.memory >= before.memory + 25_000_000,
        format!("memory went from {} to {} with 30 MB more", before.memory, after.memory),
    )?;
    pod.end([container])
}

fn update(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.start(&Wanted::idle().with_memory(64))?;
    container.stdout()?.line("ready", ORDINARY)?;
    container.update(&json!({
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
        "memory": {"limit": 96 << 20, "swap": 96 << 20},
    }))?;
    same(
        "the limit after the update",
        decode(&container.stats()?, false)?.limit,
        96 << 20,
    )?;
    pod.end([container])
}

fn memory(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let small = pod.idle()?;
    let total = || -> Result<u64> {
        let line = small.shell("grep MemTotal /proc/meminfo")?;
        Ok(line
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse().ok())
            .unwrap_or_default())
    };
    let before = total()?;
    let large = pod.start(&Wanted::idle().with_memory(512))?;
    large.stdout()?.line("ready", ORDINARY)?;
    let with = total()?;
    claim(
        with >= before + 480 * 1024,
        format!("memory went from {before} to {with} KiB for a container of 512 MiB"),
    )?;
    large.update(&json!({"memory": {"limit": 768u64 << 20, "swap": 768u64 << 20}}))?;
    let more = total()?;
    claim(
        more >= with + 240 * 1024,
        format!("memory went from {with} to {more} KiB for 256 MiB more"),
    )?;
    pod.end([small, large])
}

/// The processors that a process's threads may run on, each list once.
fn allowed(pid: i32) -> Result<BTreeSet<String>> {
    let tasks = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&tasks).trying(format!("reading {tasks}"))?;
    // A thread may end while its folder is looked at.
    let status = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let list = |status: String| {
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.map(|list| list.trim().to_owned())
    };
    Ok(status.filter_map(list).collect())
}

fn processors(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let machine = || [process::of_the_vm(crio), process::running(Kind::Shim, crio)].concat();
    let everywhere = allowed(process::only(Kind::Vm, crio)?)?;
    let all_on = |what: &str, wanted: &BTreeSet<String>| {
        machine()
            .into_iter()
            .try_for_each(|pid| same(what, &allowed(pid)?, wanted))
    };
    let on = |list: &str| BTreeSet::from([list.to_owned()]);

    let first = pod.start(&Wanted::idle().with_cpus("1"))?;
    all_on("with a container on processor 1", &on("1"))?;
    let second = pod.start(&Wanted::idle().with_cpus("0"))?;
    all_on("with another on processor 0", &on("0-1"))?;
    first.update(&json!({"cpu": {"shares": 512, "cpus": "0"}}))?;
    all_on("when the first has moved to processor 0", &on("0"))?;
    first.update(&json!({"cpu": {"shares": 256}}))?;
    all_on("after an update of something else", &on("0"))?;
    let third = pod.create(&Wanted::idle())?;
    all_on("with one that may run anywhere", &everywhere)?;
    let ended = third.begin_wait("")?;
    third.kill("", KILL)?.granted(ORDINARY)?;
    ended.granted(ORDINARY)?;
    third.remove()?;
    Bell::default().until("the pod's return to processor 0", ORDINARY, || {
        all_on("when that one is gone", &on("0")).map_err(|failure| failure.to_string())
    })?;
    pod.end([first, second])
}

fn huge_pages(crio: &Crio<'_>) -> Result {
    let pods = crio.node.folder().join(format!("huge-{}/pods", crio.node.serial()));
    let volume = pods.join("uid/volumes/kubernetes.io~empty-dir/huge");
    fs::create_dir_all(&volume).trying("making a folder for the volume")?;
    let hugetlbfs = Some("hugetlbfs");
    mount(hugetlbfs, &volume, hugetlbfs, MsFlags::empty(), Some("pagesize=2M")).trying("mounting huge pages")?;

    let pod = Pod::run(crio)?;
    let other = pod.idle()?;
    let pages = |of: &Task<'_, '_>, field: &str| of.shell(&format!("grep {field} /proc/meminfo | tr -dc 0-9"));
    same("before", pages(&other, "HugePages_Total")?, "0".to_owned())?;
    let mut user = pod.start(&Wanted::idle().with_huge_pages(64).with_volume(&volume, "/huge", false))?;
    user.stdout()?.line("ready", ORDINARY)?;
    same("all pages", pages(&user, "HugePages_Total")?, "32".to_owned())?;
    user.shell("fallocate -l 32M /huge/file")?;
    same("pages that are left", pages(&user, "HugePages_Free")?, "16".to_owned())?;
    same(
        "the volume",
        user.shell("grep -c ' /huge hugetlbfs ' /proc/mounts")?,
        "1".to_owned(),
    )?;
    user.shell("! fallocate -l 80M /huge/more; rm /huge/*")?;
    user.stop(GRACE)?;
    user.remove()?;
    same("afterwards", pages(&other, "HugePages_Total")?, "0".to_owned())?;
    pod.end([other])?;
    umount(&volume).trying("unmounting the huge pages")
}
