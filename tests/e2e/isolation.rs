//! What a container may not do, whose kernel it runs on, and by whose clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::{
    sys::{
        signal::{Signal, kill},
        utsname::uname,
    },
    unistd::Pid,
};
use serde_json::json;
use tests::{
    config::Runtime,
    cri::Container,
    failure::{Failure, Result, Trying, claim, contains, same},
    node::Node,
    run,
};

use crate::Story;

pub const COMMON: &[Story] = &[
    ("a_restricted_container", a_restricted_container),
    ("a_profile_compares_in_seven_ways", a_profile_compares_in_seven_ways),
    ("a_kernel_parameter", a_kernel_parameter),
    ("a_shared_process_namespace", a_shared_process_namespace),
    ("a_container_that_debugs_another", a_container_that_debugs_another),
];

pub const OF_A_VM: &[Story] = &[
    ("its_own_kernel", its_own_kernel),
    ("a_clock_that_is_the_nodes", a_clock_that_is_the_nodes),
    ("whom_to_debug_must_be_clear", whom_to_debug_must_be_clear),
];

/// Turning off address randomization (personality(2)) needs no privilege; the runtime's seccomp profile refuses it.
const REFUSED: &[&str] = &["setarch", "x86_64", "--addr-no-randomize", "true"];

/// For each comparison of a seccomp profile: the system calls and which argument of each, what it is compared with, a
/// script for each of three values, and those that are refused.
type Comparison<'t> = (&'t str, &'t [(&'t str, u32)], [u64; 2], &'t str, [&'t str; 3], &'t str);
const COMPARISONS: &[Comparison<'_>] = &[
    (
        "SCMP_CMP_NE",
        &[("chmod", 1), ("fchmodat", 2)],
        [0o640, 0],
        "chmod $value f",
        ["600", "640", "740"],
        "600 740",
    ),
    (
        "SCMP_CMP_LT",
        &[("ftruncate", 1)],
        [0x1_0000_0005, 0],
        "truncate -s $value f",
        ["4294967300", "4294967301", "4294967302"],
        "4294967300",
    ),
    (
        "SCMP_CMP_LE",
        &[("chown", 1), ("lchown", 1), ("fchownat", 2)],
        [5, 0],
        "chown $value f",
        ["4", "5", "6"],
        "4 5",
    ),
    (
        "SCMP_CMP_EQ",
        &[("kill", 1)],
        [18, 0],
        "kill -$value $$",
        ["17", "18", "28"],
        "18",
    ),
    (
        "SCMP_CMP_GE",
        &[("setpriority", 2)],
        [5, 0],
        "sh -c \"renice -n $value -p \\$\\$\"",
        ["4", "5", "6"],
        "5 6",
    ),
    (
        "SCMP_CMP_GT",
        &[("mknod", 1), ("mknodat", 2)],
        [0o10_640, 0],
        "mknod -m $value pipe$value p",
        ["600", "640", "740"],
        "740",
    ),
    // The first is the mask, the second what the masked argument is compared with.
    (
        "SCMP_CMP_MASKED_EQ",
        &[("chown", 2), ("lchown", 2), ("fchownat", 3)],
        [0o70, 0o40],
        "chgrp $value f",
        ["38", "92", "103"],
        "38 103",
    ),
];

fn a_profile_compares_in_seven_ways(node: &Node, runtime: Runtime) -> Result {
    let rule = |(comparison, calls, values, ..): &Comparison<'_>| {
        let rule = |(call, argument): &(&str, u32)| {
            let compared = json!({"index": argument, "op": comparison, "value": values[0], "valueTwo": values[1]});
            json!({"names": [call], "action": "SCMP_ACT_ERRNO", "args": [compared]})
        };
        calls.iter().map(rule).collect::<Vec<_>>()
    };
    let rules: Vec<_> = COMPARISONS.iter().flat_map(rule).collect();
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules,
    });
    let path = node.path("comparisons.json");
    node.write(&path, &profile.to_string())?;
    let tries = COMPARISONS.iter().map(|(.., script, values, _)| {
        format!(
            "for value in {}; do ({script}) >/dev/null 2>&1 || echo $value; done; echo",
            values.join(" ")
        )
    });
    let script = format!("cd /tmp; touch f; {}", tries.collect::<Vec<_>>().join("; "));
    let task = node
        .task(runtime, "compared")?
        .flag("--seccomp")
        .flag("--seccomp-profile");
    let seen = task
        .flag(&path.display().to_string())
        .run(&["sh", "-c", &script])?
        .text();
    let seen: Vec<_> = seen
        .trim_end()
        .split("\n\n")
        .map(|lines| lines.replace('\n', " "))
        .collect();
    for ((comparison, .., refused), seen) in COMPARISONS.iter().zip(&seen) {
        same(comparison, seen.trim(), *refused)?;
    }
    same("comparisons", seen.len(), COMPARISONS.len())
}

/// User 1000 without capabilities, seccomp and no_new_privs are in force where the container runs.
fn a_restricted_container(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "restricted")?.run()?;
    let restricted = pod.container("restricted", &["sleep", "infinity"]).restricted().run()?;
    let status = restricted.shell("id -u; id -g; cat /proc/1/status")?;
    claim(
        status.starts_with("1000\n1000\n"),
        format!("user and group are 1000 in {status}"),
    )?;
    for (field, value) in [
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        contains("status of the first process", &status, &format!("{field}:\t{value}\n"))?;
    }
    let refusal = restricted.exec(REFUSED, None, run::ORDINARY)?;
    claim(refusal.code != 0, "the profile refuses a personality")?;
    contains("refusal", &refusal.errors(), "Operation not permitted")?;

    let ordinary = pod.container("ordinary", &["sleep", "infinity"]).run()?;
    same(
        "the same call without the profile",
        ordinary.exec(REFUSED, None, run::ORDINARY)?.code,
        0,
    )?;
    // Kata's containers get what the CRI grants by default: CAP_SYS_ADMIN (bit 21) is not among it.
    claim(
        capabilities(&ordinary)? & (1 << 21) == 0,
        "an ordinary container is no administrator",
    )?;
    pod.remove()
}

fn capabilities(container: &Container<'_>) -> Result<u64> {
    let mask = container.shell("sed -n 's/^CapEff:\\s*//p' /proc/1/status")?;
    u64::from_str_radix(&mask, 16).map_err(|_| Failure::Claim(format!("{mask:?} is no mask")))
}

/// A pod's kernel parameter holds in its containers.
fn a_kernel_parameter(node: &Node, runtime: Runtime) -> Result {
    let pod = node
        .pod(runtime, "sysctl")?
        .sysctl("net.ipv4.ip_unprivileged_port_start", "80")
        .run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    same(
        "parameter",
        container
            .shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start")?
            .as_str(),
        "80",
    )?;
    same(
        "host name",
        container.shell("hostname")?.split('-').next(),
        Some("sysctl"),
    )?;
    pod.remove()
}

/// Containers of a pod that shares its processes see each other's; those of another pod do not.
fn a_shared_process_namespace(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "sharing")?.sharing_processes().run()?;
    pod.container("neighbour", &["sleep", "12345678"]).run()?;
    let observer = pod.container("observer", &["sleep", "infinity"]).run()?;
    contains("processes", &observer.shell("ps")?, "sleep 12345678")?;
    pod.remove()?;

    let pod = node.pod(runtime, "separate")?.run()?;
    pod.container("neighbour", &["sleep", "12345678"]).run()?;
    let observer = pod.container("observer", &["sleep", "infinity"]).run()?;
    claim(
        !observer.shell("ps")?.contains("sleep 12345678"),
        "a neighbour's processes are hidden by default",
    )?;
    pod.remove()
}

/// A container that is there to debug another sees that one's processes, with their numbers, and may end without it.
fn a_container_that_debugs_another(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "debugged")?.run()?;
    let app = pod.container("app", &["sleep", "12345678"]).run()?;
    let debugger = pod.shell("debugger", "tr '\\0' ' ' </proc/1/cmdline; ls /proc/1/root/www");
    let debugger = debugger.security(
        "capabilities",
        serde_json::json!({ "add_capabilities": ["SYS_PTRACE"] }),
    );
    let debugger = debugger.among_those_of(&app).run()?;
    same("the debugger's exit code", debugger.wait_exit()?.code, 0)?;
    contains("what it saw", &debugger.logs()?, "sleep 12345678 index.html")?;
    same("the app afterwards", app.shell("echo here")?.as_str(), "here")?;
    pod.remove()
}

/// With several containers in a pod, the CRI does not say which one is meant; guessing would show the wrong one.
fn whom_to_debug_must_be_clear(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "unclear")?.run()?;
    let app = pod.container("app", &["sleep", "infinity"]).run()?;
    pod.container("sidecar", &["sleep", "infinity"]).run()?;
    let debugger = pod.container("debugger", &["true"]).among_those_of(&app);
    let refused = match debugger.run() {
        Ok(_) => String::new(),
        Err(failure) => failure.to_string(),
    };
    contains("refusal", &refused, "which of the pod's 2 containers is the target")?;
    pod.remove()
}

/// The kernel inside is not the kernel outside, and neither are its processes, memory and boot.
fn its_own_kernel(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "kernel")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    let inside = container.shell("uname -r; cat /proc/sys/kernel/random/boot_id")?;
    let host = uname().map_err(std::io::Error::from);
    let host = host
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    claim(
        !inside.starts_with(&format!("{host}\n")),
        format!("another kernel than {host} in {inside}"),
    )?;
    claim(!inside.ends_with(boot.trim()), "another boot")?;
    pod.remove()
}

/// How soon a guest's clock must be right again: it is looked at once a minute, and half a second is gone after
/// another.
const RIGHT_AGAIN: Duration = Duration::from_secs(300);
/// How far from the node's it may be then, beside what the question leaves open.
const MOST_OFF: Duration = Duration::from_millis(100);

/// The guest's clock is the node's: from the start, after its machine was stopped, and after somebody in the pod has
/// set it.
fn a_clock_that_is_the_nodes(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "clock")?.run()?;
    let setter = pod
        .container("setter", &["sleep", "infinity"])
        .security("capabilities", json!({ "add_capabilities": ["SYS_TIME"] }))
        .run()?;
    clock_gets_right(node, &setter)?;
    setter.shell("date -u -s '2033-05-18 03:33:20'")?;
    clock_gets_right(node, &setter)?;
    let qemu = pod
        .processes()
        .into_iter()
        .find(|process| process.program().starts_with("qemu-system-"));
    let qemu = qemu.ok_or_else(|| Failure::Claim("the pod has no QEMU".into()))?;
    let stopped = || match std::fs::read_to_string(format!("/proc/{}/status", qemu.pid)) {
        Ok(status) if status.contains("State:\tT") => Ok(()),
        other => Err(format!("{other:?}")),
    };
    kill(Pid::from_raw(qemu.pid), Signal::SIGSTOP).trying("stopping QEMU")?;
    node.events().bell.until("QEMU's stop", run::ORDINARY, stopped)?;
    kill(Pid::from_raw(qemu.pid), Signal::SIGCONT).trying("continuing QEMU")?;
    clock_gets_right(node, &setter)?;
    pod.remove()
}

/// Waits until the guest's clock is near the node's. Each look leaves open as much as it takes.
fn clock_gets_right(node: &Node, container: &Container<'_>) -> Result {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let look = || {
        let before = now();
        let told = container.shell("touch /dev/shm/now; stat -c '%Y %y' /dev/shm/now");
        let after = now();
        let told = told.map_err(|failure| failure.to_string())?;
        let guest = time_of(&told).ok_or(told)?;
        match (before.saturating_sub(MOST_OFF)..=after + MOST_OFF).contains(&guest) {
            true => Ok(()),
            false => Err(format!("{guest:?}, and the node's {before:?} to {after:?}")),
        }
    };
    node.events()
        .bell
        .until("the right time in the guest", RIGHT_AGAIN, look)
}

/// The time of a file from its seconds since the epoch and its date, which has the rest: `1795779381 2026-11-27
/// 11:36:21.283758663 +0000`.
fn time_of(told: &str) -> Option<Duration> {
    let (seconds, date) = told.split_once(' ')?;
    let rest = date.split_once('.')?.1.split_whitespace().next()?;
    Some(Duration::new(seconds.parse().ok()?, rest.parse().ok()?))
}
