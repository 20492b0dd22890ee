//! A node whose SELinux enforces: pods have labels of their own there, under a policy that is modelled on
//! container-selinux (`image/etc/selinux/node`).

use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, claim, contains, same},
    machine::{Machine, ORDINARY, Pod},
};

use crate::{
    Story,
    install::{HANDLER, KATA_CTL, ensure, pods_are_gone, uninstall},
};

pub const STORIES: &[Story] = &[
    ("files_are_installed_with_their_types", files_have_their_types),
    ("a_refused_label_is_named", a_refused_label_is_named),
    ("a_pod_has_a_label_and_works", a_pod_has_a_label_and_works),
    ("pods_do_not_reach_each_other", pods_do_not_reach_each_other),
    ("a_shim_takes_all_domains_with_it", a_shim_takes_all_domains_with_it),
    ("nothing_is_left", nothing_is_left),
];

/// The type that the CRI gives QEMU and virtiofsd.
const VM: &str = "system_u:system_r:container_kvm_t:";

/// The domain of containerd and its shims.
const RUNTIME: &str = "system_u:system_r:container_runtime_t:s0";

/// What belongs to each pod, by the names of the programs.
const PROGRAMS: &str = "containerd-shim-kata-v2 qemu-system-x86_64 virtiofsd vm-keeper";

/// A node with Sandpod whose kernel refuses what the policy does not allow.
fn enforcing(node: &Machine) -> Result {
    same(
        "whether SELinux enforces",
        node.run("cat /sys/fs/selinux/enforce")?.as_str(),
        "1",
    )?;
    same(
        "containerd's domain",
        domain(node, &node.run("pidof containerd")?)?.as_str(),
        RUNTIME,
    )?;
    ensure(node)
}

/// The label of a process.
fn domain(node: &Machine, pid: &str) -> Result<String> {
    node.run(&format!("tr -d '\\0' </proc/{pid}/attr/current"))
}

/// The processes of a program.
fn processes(node: &Machine, program: &str) -> Result<Vec<String>> {
    // A keeper is no program, so it is found by its name.
    let found = node.try_run(&format!("pidof {program} || pgrep -x {program}"))?.text();
    let pids: Vec<_> = found.split_whitespace().map(str::to_owned).collect();
    claim(!pids.is_empty(), format!("no {program} runs"))?;
    Ok(pids)
}

/// What the policy has refused since the kernel's messages were cleared.
fn refusals(node: &Machine) -> Result<String> {
    Ok(node.try_run("dmesg | grep --text 'avc:  denied'")?.text())
}

/// The types that a distribution's policy gives such files.
fn files_have_their_types(node: &Machine) -> Result {
    enforcing(node)?;
    let listed = node.run("cd -P /opt/sandpod/current && find . -type f -printf '%P %Z\\n'")?;
    let label_of = |path: &str| {
        let line = listed
            .lines()
            .find_map(|line| line.strip_prefix(path)?.strip_prefix(' '));
        line.ok_or_else(|| Failure::Claim(format!("{path} is not installed: {listed}")))
    };
    for (path, kind) in [
        ("bin/containerd-shim-kata-v2", "container_runtime_exec_t"),
        ("bin/qemu-system-x86_64", "qemu_exec_t"),
        ("bin/kata-ctl", "bin_t"),
        ("virtiofsd", "bin_t"),
        ("lib/ld-linux-x86-64.so.2", "ld_so_t"),
        ("lib/libc.so.6", "lib_t"),
        ("share/qemu/pvh.bin", "usr_t"),
        ("vmlinux", "usr_t"),
        ("MANIFEST", "usr_t"),
    ] {
        same(
            &format!("the label of {path}"),
            label_of(path)?,
            format!("system_u:object_r:{kind}:s0").as_str(),
        )?;
    }
    let other = "grep -cvE ':(container_runtime_exec_t|qemu_exec_t|bin_t|ld_so_t|lib_t|usr_t):s0$'";
    let others = format!("cd -P /opt/sandpod/current && find . -printf '%P %Z\\n' | {other}");
    same("files of another type", node.try_run(&others)?.text().as_str(), "0")?;
    node.run(&format!("{KATA_CTL} check")).map(drop)
}

/// The pod does not start; the sentence names the label and the way out, and nothing is left of the pod.
fn a_refused_label_is_named(node: &Machine) -> Result {
    enforcing(node)?;
    let virtiofsd =
        "cannot start /opt/sandpod/current/virtiofsd with the SELinux label \\\"system_u:system_r:container_kvm_t:s0:";
    for (lacking, why) in [
        ("container_transition", "Permission denied"),
        ("container_nnp_transition", "Operation not permitted"),
    ] {
        allow(node, lacking, false)?;
        let refused = refused(node, |_| ());
        allow(node, lacking, true)?;
        let refused = refused?;
        for part in [virtiofsd, why] {
            contains(&format!("without {lacking}"), &refused, part)?;
        }
    }
    let role = refused(node, |pod| options(pod, json!({ "role": "visitor_r" })))?;
    contains(
        "a role that the policy does not know",
        &role,
        "virtiofsd with the SELinux label \\\"system_u:visitor_r:container_kvm_t:s0:",
    )?;
    let level = refused(node, |pod| options(pod, json!({ "level": "s0:c1,c5000" })))?;
    contains(
        "a category that the policy does not know",
        &level,
        "with the SELinux label \\\"system_u:object_r:container_file_t:s0:c1,c5000\\\" of the pod's files: Invalid arg",
    )
}

/// Gives the policy a permission that it can do without, or takes it.
fn allow(node: &Machine, permission: &str, allowed: bool) -> Result {
    let value = i32::from(allowed);
    node.run(&format!(
        "echo {value} >/sys/fs/selinux/booleans/{permission} && echo 1 >/sys/fs/selinux/commit_pending_bools"
    ))
    .map(drop)
}

fn options(pod: &mut Value, options: Value) {
    pod["linux"]["security_context"]["selinux_options"] = options;
}

/// The CRI's words about a pod that cannot start.
fn refused(node: &Machine, change: impl FnOnce(&mut Value)) -> Result<String> {
    let failure = match node.pod(HANDLER, "refused").with(change).run() {
        Ok(_) => return Err(Failure::Claim("a pod starts whose label is refused".into())),
        Err(failure) => failure.to_string(),
    };
    contains("the failure", &failure, "`disable_selinux = true` in [hypervisor.qemu]")?;
    same("the CRI's pods", node.crictl(&["pods", "--quiet"])?.as_str(), "")?;
    pods_are_gone(node)?;
    Ok(failure)
}

/// It has volumes of both kinds, a log and a network, and nothing that its programs ask for is refused.
fn a_pod_has_a_label_and_works(node: &Machine) -> Result {
    enforcing(node)?;
    node.run("dmesg --clear")?;
    let device = node.run(
        "mkdir -p /var/lib/kubelet/volume && echo 'from the node' >/var/lib/kubelet/volume/file && \
         truncate -s 8M /var/tmp/disk && losetup --find --show /var/tmp/disk",
    )?;
    let pod = node.pod(HANDLER, "labelled").run()?;
    let container = pod.container_with("worker", &["sh", "-c", "echo begun; sleep infinity"], |container| {
        container["mounts"] =
            json!([{ "host_path": "/var/lib/kubelet/volume", "container_path": "/volume", "selinux_relabel": true }]);
        container["devices"] = json!([{ "host_path": device, "container_path": "/dev/block", "permissions": "rwm" }]);
    })?;
    let level = level_of(node)?;
    its_own_programs(node, &level)?;

    let work = "cat /volume/file && echo 'from the pod' >/volume/answer && \
                mkdir /volume/folder && chown 7:7 /volume/folder && \
                echo 'to the disk' | dd of=/dev/block conv=fsync 2>/dev/null && \
                ln -s volume /link && ip address show eth0";
    let said = container.shell(work)?;
    contains("the volume", &said, "from the node")?;
    contains("the network", &said, "10.88.")?;
    contains("the log", &container.logs()?, "begun")?;
    same(
        "what the node reads",
        node.run("cd /var/lib/kubelet/volume && cat answer && head -c 11 /var/tmp/disk && stat -c ' %C %u' folder")?
            .as_str(),
        format!("from the pod\nto the disk system_u:object_r:container_file_t:{level} 7").as_str(),
    )?;
    same("what was refused", refusals(node)?.as_str(), "")?;
    pod.remove()?;
    pods_are_gone(node)?;
    node.run(&format!(
        "losetup --detach {device} && rm -r /var/tmp/disk /var/lib/kubelet/volume"
    ))
    .map(drop)
}

/// The level of the only pod: the CRI gives its processes two categories.
fn level_of(node: &Machine) -> Result<String> {
    let [qemu] = &processes(node, "qemu-system-x86_64")?[..] else {
        return Err(Failure::Claim("several QEMUs run".into()));
    };
    let label = domain(node, qemu)?;
    let level = label.strip_prefix(VM).unwrap_or_default().to_owned();
    claim(
        level.starts_with("s0:c") && level.contains(','),
        format!("QEMU's label is {label}"),
    )?;
    Ok(level)
}

/// The domain is entered by the programs of the VM, and not by those that keep it. Whoever enters it loses its death
/// signal (`secureexec` in fs/exec.c of Linux, which programs see as AT_SECURE), and its loader trusts no path that is
/// relative to it.
fn its_own_programs(node: &Machine, level: &str) -> Result {
    for program in ["qemu-system-x86_64", "virtiofsd"] {
        for pid in processes(node, program)? {
            same(program, domain(node, &pid)?, format!("{VM}{level}"))?;
            let secure = format!("od -A n -t u8 -w16 /proc/{pid}/auxv | awk '$1 == 23 {{ print $2 }}'");
            same(&format!("AT_SECURE of {program}"), node.run(&secure)?.as_str(), "1")?;
            let foreign = format!(
                "awk '$6 ~ \"^/\" {{ print $6 }}' /proc/{pid}/maps | grep -vE '^/(opt/sandpod/|memfd:)' | sort -u"
            );
            same(
                &format!("files of the node in {program}"),
                node.try_run(&foreign)?.text().as_str(),
                "",
            )?;
        }
    }
    for program in ["containerd-shim-kata-v2", "vm-keeper"] {
        for pid in processes(node, program)? {
            same(program, domain(node, &pid)?.as_str(), RUNTIME)?;
        }
    }
    Ok(())
}

/// What runs with the label of one pod reads its own processes and files, and none of another's.
fn pods_do_not_reach_each_other(node: &Machine) -> Result {
    enforcing(node)?;
    let first = node.pod(HANDLER, "first").run()?;
    let level = level_of(node)?;
    let qemu = processes(node, "qemu-system-x86_64")?.concat();
    let second = node.pod(HANDLER, "second").run()?;
    let labels =
        node.run("for pid in $(pidof qemu-system-x86_64); do tr -d '\\0' </proc/$pid/attr/current; echo; done")?;
    let other = labels
        .lines()
        .map(str::trim)
        .find(|label| *label != format!("{VM}{level}"));
    let other = other.ok_or_else(|| Failure::Claim(format!("both pods have one level: {labels}")))?;

    node.run(&format!(
        "echo secret >/run/first && chcon system_u:object_r:container_file_t:{level} /run/first"
    ))?;
    let read = |label: &str, path: &str| node.try_run(&format!("runcon {label} cat {path}"));
    for path in ["/run/first", &format!("/proc/{qemu}/cmdline")] {
        let own = read(&format!("{VM}{level}"), path)?;
        claim(own.code == 0, format!("{path} is not its own pod's: {}", own.errors()))?;
        let foreign = read(other, path)?;
        claim(
            foreign.code != 0,
            format!("{path} is another pod's: {}", foreign.text()),
        )?;
        contains("the refusal", &foreign.errors(), "Permission denied")?;
    }
    let node_file = read(other, "/etc/shadow")?;
    contains("the node's secrets", &node_file.errors(), "Permission denied")?;
    node.run("rm /run/first")?;
    first.remove()?;
    second.remove()?;
    pods_are_gone(node)
}

/// Its processes are in two domains, and the kernel has taken the death signal from those of the VM.
fn a_shim_takes_all_domains_with_it(node: &Machine) -> Result {
    enforcing(node)?;
    let pod: Pod<'_> = node.pod(HANDLER, "murdered").run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    for program in PROGRAMS.split(' ') {
        processes(node, program)?;
    }
    node.run("kill -KILL $(pidof containerd-shim-kata-v2)")?;
    let gone = format!("for program in {PROGRAMS}; do ! pidof $program && ! pgrep -x $program || exit 1; done");
    node.until("the end of the shim, its VM and what keeps it", &gone, ORDINARY)?;
    // containerd asks the dead shim once more, after a while, before it takes the container for ended.
    let ended = format!(
        "crictl ps --all --quiet --state exited --id {} | grep .",
        container.id()
    );
    node.until("the container's end in the CRI", &ended, ORDINARY)?;
    pod.remove()?;
    pods_are_gone(node)
}

fn nothing_is_left(node: &Machine) -> Result {
    enforcing(node)?;
    uninstall(node)
}
