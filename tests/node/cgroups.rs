//! What systemd, the kubelet and the kernel do to a pod's cgroup on a node with systemd and cgroup v2.

use tests::{
    failure::{Failure, Result, claim, contains, same},
    machine::{Machine, ORDINARY, Pod},
};

use crate::{
    Story,
    install::{ensure, pods_are_gone},
};

pub const STORIES: &[Story] = &[
    (
        "a_pods_cgroup_stays_as_it_is_whatever_systemd_does_to_other_units",
        systemd_acts,
    ),
    (
        "a_pod_whose_slice_is_out_of_memory_is_told_as_out_of_memory",
        out_of_memory,
    ),
];

/// The scope of a pod's virtual machine: its name and its folder.
fn scope_of(pod: &Pod<'_>) -> (String, String) {
    let unit = format!("cri-containerd-{}.scope", pod.id());
    let folder = format!("{}/{unit}", pod.cgroup());
    (unit, folder)
}

fn systemd_acts(node: &Machine) -> Result {
    ensure(node)?;
    let passed_on = "cat /sys/fs/cgroup/cgroup.subtree_control";
    let of_the_root = node.run(passed_on)?;
    let pod = node.pod("kata", "scope").run()?;
    same("what the root passes on", node.run(passed_on)?, of_the_root)?;
    let container = pod.container_with("pinned", &["sleep", "infinity"], |config| {
        config["linux"]["resources"] = serde_json::json!({ "cpuset_cpus": "1" });
    })?;
    let slice = pod.slice().to_owned();
    node.run(&format!(
        "systemctl set-property --runtime {slice} MemoryMax=3G TasksMax=500"
    ))?;
    let (unit, folder) = scope_of(&pod);
    same(
        "the scope",
        node.run(&format!("systemctl is-active {unit}"))?.as_str(),
        "active",
    )?;
    for program in ["containerd-shim-kata-v2", "qemu-system-x86_64", "virtiofsd"] {
        node.run(&format!(
            "for pid in $(pidof {program}); do grep -qx $pid {folder}/cgroup.procs || exit 1; done"
        ))?;
    }

    let state = || {
        node.run(&format!(
            "cd {folder} && cat cgroup.controllers cpuset.cpus pids.max memory.max ../memory.max ../pids.max && \
                 [ $(cat memory.current) -gt 50000000 ] && [ $(cat pids.current) -gt 3 ] && \
                 grep -h Cpus_allowed_list /proc/$(pidof qemu-system-x86_64)/task/*/status | sort -u"
        ))
    };
    let before = state()?;
    contains("the scope", &before, "Cpus_allowed_list:\t1")?;
    for controller in ["memory", "pids", "cpu", "cpuset", "io"] {
        contains("the scope's controllers", &before, controller)?;
    }
    for act in [
        "systemctl daemon-reload; systemctl start foo.slice; systemctl stop foo.slice",
        "systemd-run --quiet --wait --slice kubepods-besteffort.slice true",
        &format!("systemctl set-property --runtime {slice} CPUWeight=50"),
        "systemctl daemon-reexec; systemctl start foo.slice; systemctl stop foo.slice",
    ] {
        node.run(act)?;
        same(&format!("the pod's cgroup after `{act}`"), &state()?, &before)?;
    }
    node.run(&format!("systemctl set-property --runtime {slice} MemoryMax=4G"))?;
    same(
        "the slice's new limit",
        node.run(&format!("cat {folder}/../memory.max"))?.as_str(),
        "4294967296",
    )?;
    same(
        "the scope's controllers",
        node.run(&format!("cat {folder}/cgroup.controllers"))?,
        first_line(&before)?,
    )?;

    node.crictl(&["update", "--cpuset-cpus", "0", container.id()])?;
    node.run("systemctl daemon-reload; systemctl start foo.slice; systemctl stop foo.slice")?;
    let allowed = "grep -h Cpus_allowed_list /proc/$(pidof qemu-system-x86_64)/task/*/status | sort -u";
    same(
        "QEMU's processors",
        node.run(allowed)?.as_str(),
        "Cpus_allowed_list:\t0",
    )?;

    let statistics = node.crictl(&["statsp", "--output", "json", "--id", pod.id()])?;
    let statistics: serde_json::Value =
        serde_json::from_str(&statistics).map_err(|error| Failure::Claim(format!("{statistics}: {error}")))?;
    let linux = &statistics["stats"][0]["linux"];
    for number in [
        &linux["cpu"]["usageCoreNanoSeconds"]["value"],
        &linux["memory"]["workingSetBytes"]["value"],
    ] {
        let counted = number
            .as_str()
            .is_some_and(|number| number.parse::<u64>().is_ok_and(|number| number > 0));
        claim(
            counted,
            format!("the pod's statistics have no such number: {statistics}"),
        )?;
    }
    leaves_nothing(node, pod)
}

/// Removes a pod; systemd forgets its scope.
fn leaves_nothing(node: &Machine, pod: Pod<'_>) -> Result {
    let (unit, folder) = scope_of(&pod);
    pod.remove()?;
    node.until(
        "the end of the scope",
        &format!("! systemctl is-active --quiet {unit} && [ ! -e {folder} ]"),
        ORDINARY,
    )?;
    let remembered = node.run("systemctl list-units --all --plain --no-legend 'cri-containerd-*'")?;
    same("what systemd remembers", remembered.as_str(), "")?;
    pods_are_gone(node)
}

fn first_line(text: &str) -> Result<String> {
    let line = text.lines().next().map(str::to_owned);
    line.ok_or_else(|| Failure::Claim("nothing was said".into()))
}

fn out_of_memory(node: &Machine) -> Result {
    ensure(node)?;
    let pod = node.pod("kata", "memory").run()?;
    let container = pod.container("hog", &["sh", "-c", "sleep infinity"])?;
    let (_, folder) = scope_of(&pod);
    // The limit that the kubelet gives the slice, here as good as used up.
    node.run(&format!(
        "systemctl set-property --runtime {} MemoryMax=$(($(cat {folder}/memory.current) + 33554432))",
        pod.slice()
    ))?;
    drop(container.shell("head -c 800000000 /dev/zero | tail"));
    same("the exit code", container.wait_exit()?, 137)?;
    let told = node.inspect("inspect", container.id(), "{{.status.reason}}")?;
    same("the reason", told.as_str(), "OOMKilled")?;
    contains(
        "containerd's journal",
        &node.journal("containerd")?,
        "has reached its limit",
    )?;
    leaves_nothing(node, pod)
}
