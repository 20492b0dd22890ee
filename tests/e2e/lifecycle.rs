//! Containers come, run, end and go.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;
use tests::{
    config::Runtime,
    cri::{self, Exit},
    failure::{Result, Trying, claim, contains, same},
    images,
    node::Node,
    run,
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("exit_codes", exit_codes),
    ("signals", signals),
    ("stopping_is_gentle_then_firm", stopping_is_gentle_then_firm),
    (
        "work_ends_by_itself_in_its_grace_period",
        work_ends_by_itself_in_its_grace_period,
    ),
    ("an_exec_dies_by_a_real_time_signal", an_exec_dies_by_a_real_time_signal),
    ("a_missing_program_is_named", a_missing_program_is_named),
    ("statistics", statistics),
    ("events", events),
    ("a_pod_outlives_its_containerd", a_pod_outlives_its_containerd),
    ("a_task_without_kubernetes", a_task_without_kubernetes),
    (
        "open_files_are_limited_as_the_nodes_are",
        open_files_are_limited_as_the_nodes_are,
    ),
    ("a_task_of_several_processes", a_task_of_several_processes),
];

/// Prints "ready", and answers signals until it is killed.
const SIGNALLED: &str =
    "trap 'echo got USR1' USR1; trap 'echo got TERM; exit 3' TERM; echo ready; sleep infinity & while :; do wait; done";

/// A container's exit code is the one its caller sees.
fn exit_codes(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "codes")?.run()?;
    for (code, reason) in [(0, "Completed"), (7, "Error")] {
        let container = pod.shell(&format!("ends-with-{code}"), &format!("exit {code}")).run()?;
        same(
            "exit",
            container.wait_exit()?,
            Exit {
                code,
                reason: reason.into(),
            },
        )?;
    }
    let killed = pod.container("killed", &["sleep", "infinity"]).run()?;
    killed.kill("SIGKILL")?;
    same(
        "exit",
        killed.wait_exit()?,
        Exit {
            code: 137,
            reason: "Error".into(),
        },
    )?;
    pod.remove()
}

/// A signal reaches the container's first process.
fn signals(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "signals")?.run()?;
    let container = pod.shell("signalled", SIGNALLED).run()?;
    container.wait_for_log("ready")?;
    container.kill("SIGUSR1")?;
    container.wait_for_log("got USR1")?;
    container.kill("SIGTERM")?;
    same("exit code", container.wait_exit()?.code, 3)?;
    contains("log", &container.logs()?, "got TERM")?;
    pod.remove()
}

/// The kernel drops a SIGTERM that a container's first process has no handler for: the container goes on until its work
/// is done, or its grace period over.
fn work_ends_by_itself_in_its_grace_period(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "grace")?.run()?;
    let container = pod
        .shell("worker", "while [ ! -e /tmp/over ]; do sleep 0.1; done; exit 4")
        .run()?;
    container.kill("SIGTERM")?;
    container.shell("touch /tmp/over")?;
    same("exit code", container.wait_exit()?.code, 4)?;
    pod.remove()
}

/// Its caller is told of it as of any other end.
fn an_exec_dies_by_a_real_time_signal(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "realtime")?.run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let exec = container.exec(&["sh", "-c", "kill -40 $$"], None, run::ORDINARY)?;
    contains("what the client says", &exec.errors(), "exit code 168")?;
    pod.remove()
}

/// A stop sends TERM; a container that ignores it is killed after the grace period, and not earlier.
fn stopping_is_gentle_then_firm(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "stopping")?.run()?;
    let polite = pod.shell("polite", SIGNALLED).run()?;
    let stubborn = pod
        .shell(
            "stubborn",
            "trap '' TERM; echo ready; sleep infinity & while :; do wait; done",
        )
        .run()?;
    polite.wait_for_log("ready")?;
    stubborn.wait_for_log("ready")?;

    let start = Instant::now();
    polite.stop(20)?;
    same("exit code of the polite", polite.wait_exit()?.code, 3)?;
    claim(
        start.elapsed() < Duration::from_secs(10),
        "a container that obeys must not be waited for",
    )?;

    let start = Instant::now();
    stubborn.stop(1)?;
    same("exit code of the stubborn", stubborn.wait_exit()?.code, 137)?;
    claim(
        start.elapsed() >= Duration::from_secs(1),
        "the grace period must be kept",
    )?;
    stubborn.stop(1)?;
    pod.remove()
}

/// A program that does not exist fails the start by its name, and the pod goes on.
fn a_missing_program_is_named(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "missing")?.run()?;
    let broken = pod.container("broken", &["no-such-program"]).create()?;
    contains(
        "refusal",
        &cri::refused(node, &["start", broken.id()], run::ORDINARY)?,
        "no-such-program",
    )?;
    broken.remove()?;
    let whole = pod.shell("whole", "echo fine").run()?;
    same("exit code", whole.wait_exit()?.code, 0)?;
    pod.remove()
}

/// Statistics are there from a container's creation on, and grow with its use.
fn statistics(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "statistics")?.run()?;
    let container = pod
        .shell(
            "busy",
            "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep infinity",
        )
        .create()?;
    container.stats()?;
    container.start()?;
    container.wait_for_log("done")?;
    let stats = container.stats()?;
    let number = |part: &str, field: &str| {
        let value = &stats[part][field]["value"];
        value
            .as_str()
            .and_then(|text| text.parse::<u64>().ok())
            .or(value.as_u64())
            .unwrap_or(0)
    };
    claim(
        number("cpu", "usageCoreNanoSeconds") > 1_000_000,
        format!("it used the processor: {stats}"),
    )?;
    claim(
        number("memory", "workingSetBytes") > 10_000,
        format!("it holds memory: {stats}"),
    )?;
    pod.remove()
}

/// containerd hears of each step of a task and of an exec: an exec's end before that of the container that ends it, and
/// one deletion, of the task.
fn events(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "events")?.run()?;
    let container = pod.container("told", &["sleep", "infinity"]).run()?;
    container.shell("true")?;
    let mut client = node
        .crictl_command(["exec", container.id(), "sleep", "infinity"])?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .trying("starting crictl")?;
    let running = || {
        let topics = node.events().topics_of(container.id());
        match topics.iter().filter(|topic| *topic == "/tasks/exec-started").count() {
            2 => Ok(()),
            _ => Err(topics.join(" ")),
        }
    };
    node.events()
        .bell
        .until("the start of both execs", run::ORDINARY, running)?;
    container.kill("SIGKILL")?;
    container.wait_exit()?;
    client.wait().trying("waiting for crictl")?;
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/delete",
    ];
    node.events().bell.until("every event of a task", run::ORDINARY, || {
        let topics = node.events().topics_of(container.id());
        if wanted.iter().all(|topic| topics.iter().any(|heard| heard == topic)) {
            Ok(())
        } else {
            Err(topics.join(" "))
        }
    })?;
    let events = node.events().of(container.id());
    let of_topic = |topic: &'static str| events.iter().filter(move |event| event.topic == topic);
    let of_container: Vec<_> = of_topic("/tasks/exit")
        .map(|event| event.body["id"] == container.id())
        .collect();
    same(
        "which exits are the container's",
        of_container,
        vec![false, false, true],
    )?;
    let deleted: Vec<_> = of_topic("/tasks/delete")
        .map(|event| event.body["id"].clone())
        .collect();
    same("which deletions are an exec's", deleted, vec![Value::Null])?;
    pod.remove()
}

/// A containerd that is restarted finds its pods again, running, with their logs and exit codes.
fn a_pod_outlives_its_containerd(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "survivor")?.run()?;
    let container = pod.shell("survivor", SIGNALLED).run()?;
    container.wait_for_log("ready")?;
    node.restart_containerd()?;
    same("pod", pod.state()?.as_str(), "SANDBOX_READY")?;
    same("exec", container.shell("echo still here")?, "still here")?;
    container.kill("SIGTERM")?;
    same("exit code", container.wait_exit()?.code, 3)?;
    contains("log", &container.logs()?, "got TERM")?;
    pod.remove()
}

/// `ctr run` sets none of the CRI's annotations and no network: still a pod of one container, with its output and exit
/// code.
fn a_task_without_kubernetes(node: &Node, runtime: Runtime) -> Result {
    let task = node.task(runtime, "plain")?;
    let script = format!("{}; echo to stderr >&2; exit 7", images::INTERFACES);
    let output = task.run(&["sh", "-c", &script])?;
    same("exit code", output.code, 7)?;
    same("network devices", output.text().as_str(), "lo")?;
    contains("standard error", &output.errors(), "to stderr")?;

    let unheard = node.task(runtime, "unheard")?.flag("--null-io");
    let output = unheard.run(&["sh", "-c", "dd if=/dev/zero bs=1M count=2; exit 6"])?;
    same("exit code of one whose output nobody wants", output.code, 6)?;

    let task = node.task(runtime, "running")?.start(&["sleep", "infinity"])?;
    let output = task.exec(&["sh", "-c", "echo hello; exit 5"])?;
    same("exec", (output.code, output.text().as_str()), (5, "hello"))?;
    task.remove()
}

/// A container and an exec that set no limit of open files have those that the node's CRI was started with.
fn open_files_are_limited_as_the_nodes_are(node: &Node, runtime: Runtime) -> Result {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).trying("asking for the limits of open files")?;
    // As long as Linux's own default allows as many, which is all that a guest's kernel does.
    let [soft, hard] = [soft, hard].map(|limit| limit.min(1 << 20));
    let expected = format!("{soft}\n{hard}");
    let pod = node.pod(runtime, "limited")?.run()?;
    let container = pod
        .shell("limited", "ulimit -Sn; ulimit -Hn; exec sleep infinity")
        .run()?;
    same(
        "limits of an exec",
        container.shell("ulimit -Sn; ulimit -Hn")?.trim(),
        expected.trim(),
    )?;
    same("limits of a container", container.logs()?.trim(), expected.trim())?;
    pod.remove()
}

/// The task API lists the processes of a task, and signals all of them when it is told so.
fn a_task_of_several_processes(node: &Node, runtime: Runtime) -> Result {
    const FAMILY: &str = "mkfifo /tmp/over; (trap 'echo child >/tmp/over; exit' USR1; while :; do sleep 1; done) & \
        trap '' USR1; while read line </tmp/over; do [ $line = child ] && exit 4; done";
    let task = node.task(runtime, "family")?.start(&["sh", "-c", FAMILY])?;
    let listed = || {
        let listed = node
            .ctr(["tasks", "ps", task.id()])
            .map_err(|failure| failure.to_string())?;
        // A title, and a line for each: two shells and what the second of them waits for.
        match listed.text().lines().count() {
            4 => Ok(()),
            _ => Err(listed.text()),
        }
    };
    node.events().bell.until("three processes", run::ORDINARY, listed)?;
    node.ctr(["tasks", "kill", "--all", "--signal", "SIGUSR1", task.id()])?;
    let ended = || {
        let events = node.events().of(task.id());
        let exit = events.iter().find(|event| event.topic == "/tasks/exit");
        exit.map(|exit| exit.body["exit_status"].clone())
            .ok_or_else(|| format!("{events:?}"))
    };
    let code = node.events().bell.until("the end of the task", run::ORDINARY, ended)?;
    same("exit code", code, Value::from(4))?;
    task.remove()
}
