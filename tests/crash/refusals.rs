//! Starts that cannot succeed say why in one sentence, and leave nothing.

use std::{fs, time::Duration};

use tests::{
    config::{Guest, Runtime},
    cri,
    failure::{Failure, Result, Trying, claim, contains},
    node::Node,
    run::{self, finish},
};

use crate::Story;

pub const COMMON: &[Story] = &[
    ("an_unreadable_root", an_unreadable_root),
    ("a_network_that_is_gone", a_network_that_is_gone),
];

pub const OF_A_VM: &[Story] = &[
    ("a_missing_kernel", |node, _| {
        refused(node, "kata-no-kernel", &["/nowhere/vmlinux"])
    }),
    ("a_missing_initrd", |node, _| {
        refused(node, "kata-no-initrd", &["/nowhere/initrd"])
    }),
    ("a_missing_qemu", |node, _| {
        refused(node, "kata-no-qemu", &["/nowhere/qemu"])
    }),
    ("a_missing_virtiofsd", |node, _| {
        refused(node, "kata-no-virtiofsd", &["/nowhere/virtiofsd"])
    }),
    ("an_unknown_key", |node, _| {
        refused(node, "kata-bad-key", &["defualt_memory", "default_memory"])
    }),
    ("a_kernel_that_is_none", |node, _| refused(node, "kata-bad-kernel", &[])),
    ("an_initrd_that_is_none", an_initrd_that_is_none),
    ("the_hosts_network", the_hosts_network),
];

/// How soon a start that cannot succeed is refused.
const SOON: Duration = Duration::from_secs(30);

/// Handlers whose configurations are wrong in one place each. (With a guest that is not built they are wrong in more,
/// and the stories say so.)
pub fn handlers() -> Vec<(String, String)> {
    let good = Guest::Own.configuration().unwrap_or_default();
    let with = |key: &str, value: &str| -> String {
        let changed = |line: &str| {
            if line.starts_with(key) {
                format!("{key} = \"{value}\"")
            } else {
                line.to_owned()
            }
        };
        good.lines().map(|line| changed(line) + "\n").collect()
    };
    let handlers = [
        ("kata-no-kernel", with("kernel", "/nowhere/vmlinux")),
        ("kata-no-initrd", with("initrd", "/nowhere/initrd")),
        ("kata-no-qemu", with("path", "/nowhere/qemu")),
        ("kata-no-virtiofsd", with("virtio_fs_daemon", "/nowhere/virtiofsd")),
        ("kata-bad-key", format!("{good}defualt_memory = 512\n")),
        ("kata-bad-kernel", with("kernel", "/etc/hostname")),
        ("kata-bad-initrd", with("initrd", "/etc/hostname")),
        ("kata-kvm", with("accelerator", "kvm")),
    ];
    handlers
        .into_iter()
        .map(|(name, text)| (name.to_owned(), text))
        .collect()
}

/// The CRI's caller is told every one of `words`, in one line.
fn refused(node: &Node, handler: &str, words: &[&str]) -> Result {
    Runtime::Kata(Guest::Own).require()?;
    let Err(failure) = node.pod_with_handler(handler, "refused").run() else {
        return Err(Failure::Claim(format!("a pod with {handler} should have been refused")));
    };
    one_sentence(&failure.to_string(), words)
}

/// A guest's kernel that panics has its last words in the caller's sentence, and its console in the log, marked as the
/// pod's.
fn an_initrd_that_is_none(node: &Node, _: Runtime) -> Result {
    refused(
        node,
        "kata-bad-initrd",
        &["its console says", "Kernel panic - not syncing"],
    )?;
    let said = |log: &str| {
        let of_pods = log.lines().filter(|line| line.starts_with("kata["));
        let lines: Vec<&str> = of_pods.filter_map(|line| Some(line.split_once("] ")?.1)).collect();
        let begin = lines
            .iter()
            .position(|line| line.contains("the last words of the guest's console"));
        let rest = begin.map(|begin| &lines[begin..]).unwrap_or_default();
        rest.iter().any(|line| line.contains("Kernel panic - not syncing"))
    };
    let log = node.path("containerd.log");
    node.events().bell.until("the console in the log", SOON, || {
        let text = fs::read_to_string(&log).map_err(|error| error.to_string())?;
        said(&text).then_some(()).ok_or(text)
    })
}

fn one_sentence(said: &str, words: &[&str]) -> Result {
    for word in words {
        contains("refusal", said, word)?;
    }
    claim(
        !said.contains("panicked") && !said.contains("RUST_BACKTRACE"),
        format!("a sentence, not a panic: {said}"),
    )?;
    // What crictl says around it has lines of its own; in what it quotes, a new line would be escaped.
    let sentence = said.rsplit("failed to create shim task: ").next().unwrap_or_default();
    claim(
        !sentence.trim().contains('\n') && !sentence.contains("\\n"),
        format!("one line, not: {sentence}"),
    )
}

/// Without hardware virtualization, a configuration that asks for it is refused: nothing emulates in silence. The node
/// has no /dev/kvm.
pub fn no_kvm(node: &Node) -> Result {
    refused(node, "kata-kvm", &["KVM"])?;
    let mut check = node.command("kata-ctl");
    check
        .arg("check")
        .env("KATA_CONF_FILE", node.configuration_of("kata-kvm"));
    let output = finish(&mut check, None, SOON)?;
    claim(output.code == 1, format!("the check fails: {output:?}"))?;
    contains("what is missing", &output.text(), "MISSING  KVM ")?;
    contains("what is there", &output.text(), "ok       virtiofsd ")
}

/// A VM cannot be in the node's own network.
fn the_hosts_network(node: &Node, runtime: Runtime) -> Result {
    let spec = node.task(runtime, "host-network")?.flag("--net-host").flag("--rm");
    let output = finish(&mut spec.command(&["true"]), None, SOON)?;
    claim(output.code != 0, "a VM in the host's network is refused")?;
    contains("refusal", &output.errors(), "network")
}

/// The writable layer of a container vanishes between its creation and its start.
fn an_unreadable_root(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "rootless")?.run()?;
    let broken = pod.container("broken", &["true"]).create()?;
    let mounts = node
        .ctr(["-n", "k8s.io", "snapshots", "mounts", "/anywhere", broken.id()])?
        .text();
    let upper = mounts
        .split(['=', ','])
        .skip_while(|word| *word != "upperdir")
        .nth(1)
        .unwrap_or_default()
        .to_owned();
    let hidden = format!("{upper}.hidden");
    fs::rename(&upper, &hidden).trying(format!("hiding the layer in {mounts}"))?;
    let said = cri::refused(node, &["start", broken.id()], SOON);
    fs::rename(&hidden, &upper).trying("bringing the layer back")?;
    contains("refusal", &said?.to_lowercase(), "no such file or directory")?;
    broken.remove()?;
    pod.container("whole", &["true"]).run()?.wait_exit()?;
    pod.remove()
}

/// The network namespace that a task should join does not exist.
fn a_network_that_is_gone(node: &Node, runtime: Runtime) -> Result {
    let spec = node
        .task(runtime, "netless")?
        .flag("--with-ns")
        .flag("network:/run/netns/gone")
        .flag("--rm");
    let output = finish(&mut spec.command(&["true"]), None, SOON)?;
    claim(output.code != 0, "a namespace that is gone is refused")?;
    contains("refusal", &output.errors(), "/run/netns/gone")?;
    claim(
        !run::last_of(&output.errors(), 4000).contains("panicked"),
        "a sentence, not a panic",
    )
}
