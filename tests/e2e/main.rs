//! End to end: a real containerd starts pods through our shim, and what its users see is what they were promised.
//!
//! Trials are named `<containerd>/<runtime>/<story>`. Every story plays with the newest containerd and our own kernel,
//! a selection with Debian's of both, and a few with the two mixed; the rest of all combinations, and runc, which
//! proves the stories themselves, run with `--include-ignored`.

use tests::{
    config::{Guest, Runtime, Site},
    failure::Result,
    node::{Containerd, Node, NodeSpec},
    stage::{self, Stage},
};

mod disks;
mod insight;
mod install;
mod isolation;
mod kernel;
mod lifecycle;
mod memory;
mod network;
mod page;
mod stdio;
mod upgrade;
mod users;
mod volumes;

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime) -> Result);

/// Stories that hold for containers of every runtime.
const COMMON: &[&[Story]] = &[
    lifecycle::STORIES,
    stdio::STORIES,
    isolation::COMMON,
    volumes::STORIES,
    disks::STORIES,
    network::STORIES,
    memory::COMMON,
];

/// Stories about the virtual machine.
const OF_A_VM: &[&[Story]] = &[
    isolation::OF_A_VM,
    volumes::OF_A_VM,
    memory::OF_A_VM,
    insight::OF_A_VM,
    page::OF_A_VM,
    upgrade::OF_A_VM,
];

/// What could differ with another containerd or another kernel: each call of the CRI and of ctr, each device of the
/// machine.
const SELECTION: &[&str] = &[
    "exit_codes",
    "signals",
    "a_missing_program_is_named",
    "statistics",
    "events",
    "a_pod_outlives_its_containerd",
    "a_task_without_kubernetes",
    "an_exec_has_its_own_exit_code",
    "input_is_half_closed",
    "a_terminal_with_resize",
    "a_restricted_container",
    "its_own_kernel",
    "a_writable_and_a_read_only_volume",
    "a_block_volume_is_the_pods",
    "a_web_server_on_the_pods_address",
    "too_much_memory_kills_only_the_culprit",
    "memory_comes_and_goes_with_a_container",
];

/// What shows that a combination works at all.
const FEW: &[&str] = &[
    "exit_codes",
    "a_web_server_on_the_pods_address",
    "memory_comes_and_goes_with_a_container",
];

/// Whether a combination plays a story by default.
fn plays(containerd: Containerd, runtime: Runtime, story: &str) -> bool {
    match (containerd, runtime) {
        _ if story == page::A_PICTURE => false,
        (_, Runtime::Runc) => false,
        (Containerd::Newest, Runtime::Kata(Guest::Own)) => true,
        (Containerd::Debian, Runtime::Kata(Guest::Debian)) => SELECTION.contains(&story),
        _ => FEW.contains(&story),
    }
}

fn main() {
    let containerds = [Containerd::Newest, Containerd::Debian];
    let stages = containerds.map(|containerd| {
        Stage::new(NodeSpec {
            handlers: [insight::handlers(), vec![upgrade::handler()]].concat(),
            ..NodeSpec::new(containerd)
        })
    });
    let runtimes = [
        ("own", Runtime::Kata(Guest::Own)),
        ("debian", Runtime::Kata(Guest::Debian)),
        ("runc", Runtime::Runc),
    ];
    let mut trials = Vec::new();
    for (containerd, stage) in containerds.into_iter().zip(&stages) {
        for (kind, runtime) in runtimes {
            let of_a_vm = if runtime == Runtime::Runc { &[] } else { OF_A_VM };
            // What Debian's containerd, or Debian's kernel, has not.
            let of_ours: &[&[Story]] = match (containerd, runtime) {
                (Containerd::Newest, Runtime::Kata(Guest::Own)) => &[users::OF_A_VM, kernel::OF_A_VM],
                _ => &[],
            };
            for (story, tell) in COMMON.iter().chain(of_a_vm).chain(of_ours).copied().flatten().copied() {
                let name = format!("{}/{kind}/{story}", containerd.name());
                let trial = stage::trial(name, stage, move |node| tell(node, runtime));
                trials.push(trial.with_ignored_flag(!plays(containerd, runtime, story)));
            }
        }
    }
    let bare = |containerd| NodeSpec {
        bare: true,
        ..NodeSpec::new(containerd)
    };
    let of_k3s = NodeSpec {
        site: Site::K3s,
        version: 3,
        ..bare(Containerd::Newest)
    };
    let [newest, strict, earlier, first, old] = [
        Containerd::Newest,
        Containerd::Strict,
        Containerd::Earlier,
        Containerd::First,
        Containerd::Debian,
    ]
    .map(|containerd| Stage::new(bare(containerd)));
    let k3s = Stage::new(of_k3s);
    let on_bare_nodes = [
        (Containerd::Newest, "bare", &newest, install::ON_A_BARE_NODE, false),
        (Containerd::Newest, "bare", &newest, install::AT_LENGTH, true),
        (Containerd::Newest, "k3s", &k3s, install::ON_A_NODE_OF_K3S, false),
        (Containerd::Strict, "bare", &strict, install::ON_A_STRICT_NODE, false),
        (
            Containerd::Earlier,
            "bare",
            &earlier,
            install::ON_AN_EARLIER_NODE,
            false,
        ),
        (Containerd::First, "bare", &first, install::ON_AN_EARLIER_NODE, false),
        (Containerd::Debian, "bare", &old, install::ON_AN_OLD_NODE, false),
    ];
    for (containerd, kind, stage, stories, at_length) in on_bare_nodes {
        for (story, tell) in stories.iter().copied() {
            let name = format!("{}/{kind}/{story}", containerd.name());
            trials.push(stage::trial(name, stage, tell).with_ignored_flag(at_length));
        }
    }
    let all = stages.into_iter().chain([newest, strict, earlier, first, old, k3s]);
    stage::perform(trials, &all.collect::<Vec<_>>())
}
