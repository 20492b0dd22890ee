//! A process of a pod is killed, while nothing happens and during an exec.

use std::time::{Duration, Instant};

use nix::{
    errno::Errno,
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tests::{
    config::Runtime,
    cri::{Container, Pod},
    failure::{Failure, Result, Trying, claim, same},
    network::Network,
    node::Node,
    procs::Process,
    run,
};

use crate::Story;

pub const COMMON: &[Story] = &[
    ("the_shim_dies_idle", |node, runtime| {
        killed(node, runtime, "containerd-shim-", Moment::Idle)
    }),
    ("the_shim_dies_during_an_exec", |node, runtime| {
        killed(node, runtime, "containerd-shim-", Moment::Exec)
    }),
];

pub const OF_A_VM: &[Story] = &[
    ("qemu_dies_idle", |node, runtime| {
        killed(node, runtime, "qemu-system-", Moment::Idle)
    }),
    ("qemu_dies_during_an_exec", |node, runtime| {
        killed(node, runtime, "qemu-system-", Moment::Exec)
    }),
    ("virtiofsd_dies_idle", |node, runtime| {
        killed(node, runtime, "virtiofsd", Moment::Idle)
    }),
    ("virtiofsd_dies_during_an_exec", |node, runtime| {
        killed(node, runtime, "virtiofsd", Moment::Exec)
    }),
    ("the_agent_dies_idle", |node, runtime| {
        crashed(node, runtime, AGENT, Moment::Idle)
    }),
    ("the_agent_dies_during_an_exec", |node, runtime| {
        crashed(node, runtime, AGENT, Moment::Exec)
    }),
    ("the_guests_kernel_dies", |node, runtime| {
        crashed(node, runtime, KERNEL, Moment::Idle)
    }),
    ("a_frozen_machine_is_removed", a_frozen_machine_is_removed),
    ("a_network_outlives_the_shim", a_network_outlives_the_shim),
];

/// When the death comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Idle,
    Exec,
}

/// How soon every caller knows.
const KNOWN: Duration = Duration::from_secs(5);

/// How long containerd waits for the end of what it has killed.
const KILLED: Duration = Duration::from_secs(120);

/// SIGKILL does not reach PID 1 from its own guest (pid_namespaces(7) holds for the first one too), so an administrator
/// there wipes its code.
pub const AGENT: &str = "code=$(grep -m1 ' r-xp ' /proc/1/maps); from=$((0x${code%%-*})); to=${code#*-}; to=$((0x${to%% *})); \
    exec dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((from / 4096)) count=$(((to - from) / 4096)) conv=notrunc";

/// proc(5): crashes the kernel.
const KERNEL: &str = "echo c >/proc/sysrq-trigger";

/// One of the pod's processes on the node is killed.
fn killed(node: &Node, runtime: Runtime, program: &str, moment: Moment) -> Result {
    let pod = node.pod(runtime, "victim")?.run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let victim = process_of(&pod, program)?;
    everyone_hears(&pod, &container, moment, || kill(victim, program))?;
    pod.remove()?;
    if runtime == Runtime::Runc {
        // The reference leaves its socket.
        run::succeed(
            node.command("sh").args(["-c", "rm -f /run/containerd/s/*"]),
            run::ORDINARY,
        )?;
    }
    Ok(())
}

/// A privileged container that sees the guest's own processes does something to the guest.
fn crashed(node: &Node, runtime: Runtime, script: &str, moment: Moment) -> Result {
    let pod = node.pod(runtime, "victim")?.with_host_processes().privileged().run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let culprit = pod.container("culprit", &["sleep", "infinity"]).privileged().run()?;
    everyone_hears(&pod, &container, moment, || {
        // How the client of a crashed machine ends is not the point; that it ends is.
        drop(culprit.exec(&["sh", "-c", script], None, KNOWN)?);
        Ok(())
    })?;
    pod.remove()
}

/// After `death`, the exec, the container and the pod are over for their callers in time.
fn everyone_hears(pod: &Pod<'_>, container: &Container<'_>, moment: Moment, death: impl FnOnce() -> Result) -> Result {
    let exec = match moment {
        Moment::Idle => None,
        Moment::Exec => {
            let console = container.exec_on_terminal(&["sh", "-c", "echo begun; sleep infinity"])?;
            console.expect("begun")?;
            Some(console)
        }
    };
    let start = Instant::now();
    death()?;
    if let Some(exec) = exec {
        claim(exec.wait(KNOWN)? != 0, "an exec that was cut off did not succeed")?;
    }
    let exit = container.wait_exit_within(KNOWN.saturating_sub(start.elapsed()))?;
    claim(
        exit.code != 0,
        format!("a container that was cut off did not succeed: {exit:?}"),
    )?;
    let left = KNOWN.saturating_sub(start.elapsed()).max(Duration::from_secs(1));
    pod.node()
        .events()
        .bell
        .until("the end of the pod", left, || match pod.state() {
            Ok(state) if state == "SANDBOX_NOTREADY" => Ok(()),
            Ok(state) => Err(state),
            Err(failure) => Err(failure.to_string()),
        })
}

/// A machine that neither answers nor ends does not keep its pod from being removed, in the time that containerd has
/// for what it has killed (`killContainerTimeout`).
fn a_frozen_machine_is_removed(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "frozen")?.run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
    same("before", container.shell("echo alive")?.as_str(), "alive")?;
    let qemu = process_of(&pod, "qemu-system-")?;
    signal::kill(Pid::from_raw(qemu), Signal::SIGSTOP).trying("freezing QEMU")?;
    let mut removal = node.crictl_command(["rmp", "--force", pod.id()])?;
    run::succeed(&mut removal, KILLED + run::ORDINARY)?;
    pod.leave();
    Ok(())
}

/// A namespace that was there before the pod is as before after its shim was killed: no tap, no filter.
fn a_network_outlives_the_shim(node: &Node, runtime: Runtime) -> Result {
    let network = Network::make(node)?;
    let before = network.look()?;
    let task = node
        .task(runtime, "guest")?
        .flag("--with-ns")
        .flag(&format!("network:{}", network.path()))
        .start(&["sleep", "infinity"])?;
    claim(network.look()? != before, "the pod has a tap in its network")?;
    let shim = find(&node.processes_of(task.id()), "containerd-shim-")?;
    kill(shim, "the shim")?;
    node.events().bell.until("the network as before", KNOWN, || {
        match network.look().map_err(|failure| failure.to_string())? {
            now if now == before => Ok(()),
            now => Err(now),
        }
    })?;
    task.remove_orphaned()?;
    network.remove()
}

fn process_of(pod: &Pod<'_>, program: &str) -> Result<i32> {
    find(&pod.processes(), program)
}

/// Ends a process of the node at once.
pub fn kill(pid: i32, name: &str) -> Result {
    claim(kill_if_there(pid, name)?, format!("{name} has ended by itself"))
}

/// Ends a process of the node at once, unless it has ended since it was found; whether it was there.
pub fn kill_if_there(pid: i32, name: &str) -> Result<bool> {
    match signal::kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Err(Errno::ESRCH) => Ok(false),
        killed => killed.trying(format!("killing {name}")).map(|()| true),
    }
}

/// The process that runs a program.
pub fn find(processes: &[Process], program: &str) -> Result<i32> {
    let found = processes.iter().find(|process| process.program().starts_with(program));
    found
        .map(|process| process.pid)
        .ok_or_else(|| Failure::Claim(format!("no {program} among {processes:?}")))
}
