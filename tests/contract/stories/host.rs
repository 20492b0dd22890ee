//! What a pod takes from its host, and what its machine can reach there.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tests::{
    failure::{Failure, Result, Trying, claim, contains, same},
    run::{ORDINARY as PROGRAM, Output, finish},
};

use super::{OURS, Told};
use crate::{
    bundle::Wanted,
    crio::Crio,
    pod::Pod,
    process::{self, Kind},
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "the_machines_of_two_pods_are_strangers", strangers),
    (OURS, "a_machine_is_as_protected_as_its_containers", protection),
    (OURS, "a_shim_has_all_the_open_files_it_may", open_files),
    (OURS, "nothing_of_a_pod_can_gain_privileges", privileges),
    (OURS, "a_privileged_container_has_its_guests_devices", guests_devices),
];

/// A field of a process's status, such as `Uid` (proc_pid_status(5)).
fn status(pid: i32, field: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).trying(format!("reading {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.map(|value| value.trim().to_owned())
        .ok_or_else(|| Failure::Claim(format!("no {field} in {text}")))
}

/// QEMU and virtiofsd, which do what the guest wants.
fn of_the_guest(crio: &Crio<'_>) -> Vec<i32> {
    let kinds = [Kind::Vm, Kind::FileServer].into_iter();
    kinds.flat_map(|kind| process::running(kind, crio)).collect()
}

fn user(pid: i32) -> Result<u32> {
    let ids = status(pid, "Uid")?;
    let ids: BTreeSet<&str> = ids.split_whitespace().collect();
    let one = ids.first().filter(|_| ids.len() == 1).and_then(|id| id.parse().ok());
    one.ok_or_else(|| Failure::Claim(format!("process {pid} is not one user but {ids:?}")))
}

/// The guest's memory, as an open file of its QEMU.
fn memory(qemu: i32) -> Result<PathBuf> {
    let folder = PathBuf::from(format!("/proc/{qemu}/fd"));
    let files = fs::read_dir(&folder).trying(format!("reading {}", folder.display()))?;
    let is_memory =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"));
    let found = files.flatten().map(|entry| entry.path()).find(is_memory);
    found.ok_or_else(|| Failure::Claim(format!("process {qemu} holds no guest's memory")))
}

/// A guest that has broken into its QEMU tries to get at its neighbour.
fn strangers(crio: &Crio<'_>) -> Result {
    let (one, other) = (Pod::run(crio)?, Pod::run(crio)?);
    let machines = process::running(Kind::Vm, crio);
    let &[attacker, victim] = &machines[..] else {
        return Err(Failure::Claim(format!("two pods have the machines {machines:?}")));
    };
    let (own, others) = (user(attacker)?, user(victim)?);
    claim(own != others, format!("both machines are user {own}"))?;
    for id in [own, others] {
        // Above the users of people and programs, of user namespaces and of systemd's containers.
        claim(id >= 0x7000_0000, format!("a machine is user {id}"))?;
    }
    // As that user, from among all processes of the node: what the user may.
    let as_attacker = |script: &str| -> Result<Output> {
        let mut command = Command::new("setpriv");
        command.args([
            format!("--reuid={own}"),
            format!("--regid={own}"),
            "--clear-groups".into(),
        ]);
        finish(command.args(["sh", "-c", script]), None, PROGRAM)
    };
    let steal = |qemu: i32| -> Result<Output> { as_attacker(&format!("exec 3<>{}", memory(qemu)?.display())) };
    same("opening its own guest's memory", steal(attacker)?.code, 0)?;
    contains("opening the neighbour's", &steal(victim)?.errors(), "Permission denied")?;
    let kill = as_attacker(&format!("kill -KILL {victim}"))?;
    contains("killing the neighbour", &kill.errors().to_lowercase(), "not permitted")?;
    // In its place: what it can see at all.
    let mut place = Command::new("nsenter");
    place.args(["--target", &attacker.to_string(), "--mount", "--pid", "--"]);
    place.args(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'"]);
    let seen = finish(&mut place, None, PROGRAM)?.text();
    let names: BTreeSet<&str> = seen.lines().filter(|line| line.starts_with("sandbox-")).collect();
    same("the machines it sees", names.len(), 1)?;
    claim(
        !seen.contains("containerd-shim-"),
        format!("a machine sees a shim in {seen}"),
    )?;
    one.end([])?;
    other.end([])
}

fn score(pid: &str) -> Result<i32> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let text = fs::read_to_string(&path).trying(format!("reading {path}"))?;
    text.trim()
        .parse()
        .map_err(std::io::Error::other)
        .trying(format!("reading {path}"))
}

/// CRI-O's sandbox asks for -998, which is meant for a process that uses nothing, and its containers for 1000.
fn protection(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let own = score("self")?;
    let shim = process::only(Kind::Shim, crio)?;
    same("the shim's score beside CRI-O's", score(&shim.to_string())?, own + 1)?;
    let container = pod.idle()?;
    for pid in of_the_guest(crio) {
        let is = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        same(&format!("the score of {}", is.trim()), score(&pid.to_string())?, 1000)?;
    }
    same("the shim's score", score(&shim.to_string())?, own + 1)?;
    pod.end([container])
}

/// Soft and hard limit.
fn files_of(pid: i32) -> Result<(String, String)> {
    let path = format!("/proc/{pid}/limits");
    let limits = fs::read_to_string(&path).trying(format!("reading {path}"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let mut words = line.unwrap_or_default().split_whitespace().map(str::to_owned);
    words
        .next()
        .zip(words.next())
        .ok_or_else(|| Failure::Claim(format!("no open files in {limits}")))
}

/// CRI-O's own soft limit is the one of programs that use select(2), and its shim inherits it.
fn open_files(crio: &Crio<'_>) -> Result {
    let set = |soft, hard| setrlimit(Resource::RLIMIT_NOFILE, soft, hard).trying("setting the limit of open files");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).trying("reading the limit of open files")?;
    set(1000, hard)?;
    let pod = Pod::run(crio);
    set(soft, hard)?;
    let pod = pod?;
    let of_shim = files_of(process::only(Kind::Shim, crio)?)?;
    same("the shim's soft limit", &of_shim.0, &of_shim.1)?;
    let of_qemu = files_of(process::only(Kind::Vm, crio)?)?;
    same("QEMU's soft limit", of_qemu.0.as_str(), "1000")?;
    same("QEMU's hard limit", of_qemu.1, of_shim.1)?;
    pod.end([])
}

/// virtiofsd has two processes: one that serves, and root's, which waits for it.
fn privileges(crio: &Crio<'_>) -> Result {
    /// `CAP_SYS_MODULE`, `CAP_SYS_PTRACE` and `CAP_NET_ADMIN` (capabilities(7)).
    const OF_THE_HOST: u64 = 1 << 16 | 1 << 19 | 1 << 12;
    let pod = Pod::run(crio)?;
    let servers = process::running(Kind::FileServer, crio);
    claim(servers.len() == 2, format!("virtiofsd is {servers:?}"))?;
    for pid in of_the_guest(crio) {
        same(
            &format!("no_new_privs of {:?}", fs::read_link(format!("/proc/{pid}/exe"))),
            status(pid, "NoNewPrivs")?.as_str(),
            "1",
        )?;
        let capabilities = u64::from_str_radix(&status(pid, "CapEff")?, 16).map_err(std::io::Error::other);
        let capabilities = capabilities.trying("reading capabilities")?;
        claim(
            capabilities & OF_THE_HOST == 0,
            format!("process {pid} has the capabilities {capabilities:x}"),
        )?;
        // A core dump is without what is shared (core(5)), which is the guest's memory.
        let dumped = fs::read_to_string(format!("/proc/{pid}/coredump_filter")).trying("reading a core's filter")?;
        same("what a core dump holds", dumped.trim(), "00000031")?;
    }
    for server in servers {
        let one_of_the_hosts = Path::new(&format!("/proc/{server}/ns/net")).read_link().ok();
        claim(
            one_of_the_hosts != Path::new("/proc/self/ns/net").read_link().ok(),
            "virtiofsd is in the host's network",
        )?;
    }
    pod.end([])
}

/// CRI-O lists the devices of the host, which are other devices in the guest, or none.
fn guests_devices(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let container = pod.start(&Wanted::idle().privileged())?;
    let devices =
        container.shell("cd /dev; ls kvm sda vfio nvidia0 2>/dev/null; ls -d fuse loop-control loop0 net/tun")?;
    let devices: Vec<_> = devices.split_whitespace().collect();
    same("the devices", devices, vec!["fuse", "loop-control", "loop0", "net/tun"])?;
    container.shell("exec 3<>/dev/loop-control 4<>/dev/loop0")?;
    pod.end([container])
}
