//! What an administrator is told of the pods that run: by `kata-ctl` on the node, and by Prometheus' means.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    process::{Child, ChildStdin, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tests::{
    cold_read::at_rest,
    config::{Guest, Runtime},
    console::Console,
    cri::Pod,
    failure::{Failure, Result, Trying, claim, contains, same},
    footprint::Footprint,
    node::Node,
    run::{self, finish, succeed},
    wait::Bell,
};

use crate::Story;

pub const OF_A_VM: &[Story] = &[
    ("top_counts_each_page_once", top_counts_each_page_once),
    (
        "a_monitor_serves_the_metrics_of_every_pod",
        a_monitor_serves_the_metrics_of_every_pod,
    ),
    (
        "a_scrape_has_some_of_three_hundred_interfaces",
        a_scrape_has_some_of_three_hundred_interfaces,
    ),
    (
        "a_frozen_guest_holds_up_neither_scrapes_nor_verbs",
        a_frozen_guest_holds_up_neither_scrapes_nor_verbs,
    ),
    ("a_report_has_no_secrets", a_report_has_no_secrets),
    ("a_shell_in_the_guest", a_shell_in_the_guest),
];

/// The ending of a handler whose configuration allows the debug console.
const DEBUG: &str = "-debug";

/// Handlers as the ordinary ones, with the debug console. (With a guest that is not built the stories say so.)
pub fn handlers() -> Vec<(String, String)> {
    let handler = |guest: Guest| {
        let text = guest.configuration().unwrap_or_default();
        let name = Runtime::Kata(guest).handler() + DEBUG;
        (name, text + "[agent.kata]\ndebug_console_enabled = true\n")
    };
    [Guest::Own, Guest::Debian].map(handler).to_vec()
}

/// The monitor's own default.
pub const PORT: u16 = 8090;

/// What may change between two looks at a pod at rest, in KiB.
const TOLERANCE: u64 = 2048;

/// How long the machine may take to do nothing else for a moment.
const AGREEING: Duration = Duration::from_secs(120);

/// `kata-ctl top` and the harness, each by its own means, count the same.
fn top_counts_each_page_once(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "measured")?.run()?;
    pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let own = Bell::default().until("what is told as it is counted", AGREEING, || {
        told_as_counted(node, pod.id()).map_err(|failure| failure.to_string())
    })?;
    claim(
        own["cpu_seconds"].as_f64() > Some(0.1),
        format!("a boot takes time: {own}"),
    )?;
    same("containers", own["containers"].as_u64(), Some(1))?;
    let name = own["pod"]["name"].as_str().unwrap_or_default();
    contains("the pod's name", name, "measured-")?;
    contains(
        "the table",
        &kata_ctl(node, &["top"])?,
        &format!("default/{name}  running"),
    )?;
    contains(
        "the list",
        &kata_ctl(node, &["list"])?,
        &format!("{}  default/{name}  running", pod.id()),
    )?;
    pod.remove()
}

/// What `kata-ctl top` says of a pod, when it is what is counted. A page that several VMs have is counted in parts, so a
/// VM of another suite that starts or ends between the two looks changes both.
fn told_as_counted(node: &Node, sandbox: &str) -> Result<Value> {
    let counted = at_rest(node, sandbox)?;
    let told = kata_ctl(node, &["top", "--json"])?;
    let told: Value = serde_json::from_str(&told).map_err(|error| Failure::Claim(format!("{error}: {told}")))?;
    let mut all = told.as_array().into_iter().flatten();
    let own = all.find(|usage| usage["sandbox"] == sandbox);
    let own = own.ok_or_else(|| Failure::Claim(format!("the pod is not in {told}")))?;
    let told_kib = |part: &str| own["memory"][part].as_u64().unwrap_or(0) >> 10;
    for (part, kib) in [
        ("guest", counted.guest_kib),
        ("qemu", counted.qemu_kib),
        ("virtiofsd", counted.virtiofsd_kib),
        ("shim", counted.shim_kib),
        ("total", counted.total_kib()),
    ] {
        claim(
            kib > 0 && told_kib(part).abs_diff(kib) <= TOLERANCE,
            format!("{part}: {kib} KiB are counted, and told are {own}"),
        )?;
    }
    Ok(own.clone())
}

/// One address has the metrics of the host's and the guest's side of two pods, told apart by their labels.
fn a_monitor_serves_the_metrics_of_every_pod(node: &Node, runtime: Runtime) -> Result {
    let first = node.pod(runtime, "scraped")?.run()?;
    let second = node.pod(runtime, "scraped")?.run()?;
    let container = first.container("sleeper", &["sleep", "infinity"]).run()?;
    let monitor = Monitor::start(node)?;
    let text = node.get("127.0.0.1", PORT, "/metrics")?;

    same("shims", metric(&text, "kata_monitor_running_shim_count", &[])?, 2.0)?;
    let total = container.shell("grep MemTotal /proc/meminfo")?;
    let kib = total.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    let of_first = format!("sandbox_id=\"{}\"", first.id());
    let mem_total = ["item=\"mem_total\"", &of_first, "cri_namespace=\"default\""];
    same(
        "the first guest's memory",
        Some(metric(&text, "kata_guest_meminfo", &mem_total)?),
        kib.map(|kib| kib * 1024.0),
    )?;
    for pod in [&first, &second] {
        let label = format!("sandbox_id=\"{}\"", pod.id());
        for name in [
            "kata_hypervisor_threads",
            "kata_virtiofsd_fds",
            "kata_shim_process_resident_memory_bytes",
            "kata_shim_pod_overhead_memory_in_bytes",
            "kata_agent_scrape_count",
        ] {
            claim(metric(&text, name, &[&label])? > 0.0, format!("{name} of {}", pod.id()))?;
        }
    }
    let created = ["action=\"create\"", &of_first];
    let calls = metric(&text, "kata_shim_rpc_durations_histogram_milliseconds_count", &created)?;
    same("creates of the first pod", calls, 2.0)?;
    let name = "kata_shim_agent_rpc_durations_histogram_milliseconds_count";
    let started = ["action=\"grpc.StartContainerRequest\"", &of_first];
    same("starts in the first guest", metric(&text, name, &started)?, 1.0)?;
    well_formed(&text)?;

    let one = node.get("127.0.0.1", PORT, &format!("/metrics?sandbox={}", second.id()))?;
    claim(!one.contains(first.id()), "the second pod's metrics are its own")?;
    let ids = node.get("127.0.0.1", PORT, "/sandboxes")?;
    let mut listed: Vec<&str> = ids.lines().collect();
    let mut both = [first.id(), second.id()];
    listed.sort_unstable();
    both.sort_unstable();
    same("sandboxes", listed.as_slice(), both)?;
    lasting(node, &first, &text)?;
    monitor.stop()?;
    first.remove()?;
    second.remove()
}

/// However often it is scraped, a shim has the threads that it had, and little more memory than after the first time.
fn lasting(node: &Node, pod: &Pod<'_>, first: &str) -> Result {
    let small = Footprint::of(&pod.processes()).shim_unshared_kib;
    let mut last = String::new();
    for _ in 0..20 {
        last = node.get("127.0.0.1", PORT, "/metrics")?;
    }
    let label = format!("sandbox_id=\"{}\"", pod.id());
    let threads = |text: &str| metric(text, "kata_shim_threads", &[&label]);
    same("the shim's threads", threads(&last)?, threads(first)?)?;
    let large = Footprint::of(&pod.processes()).shim_unshared_kib;
    claim(
        large < small + 512,
        format!("the shim has {small} KiB after one scrape, {large} KiB after twenty"),
    )
}

/// Prometheus' text format: a family is described once, before its samples, which follow each other.
fn well_formed(text: &str) -> Result {
    let mut families = Vec::new();
    for name in text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
    {
        claim(!families.contains(&name), format!("{name} is described twice"))?;
        families.push(name);
    }
    for line in text.lines().filter(|line| !line.starts_with("# HELP ")) {
        let name = line
            .trim_start_matches("# TYPE ")
            .split(['{', ' '])
            .next()
            .unwrap_or_default();
        let current = families.first().copied().unwrap_or_default();
        if line.starts_with("# TYPE ") && name != current {
            families.remove(0);
        }
        claim(
            name.starts_with(families[0]),
            format!("{line:?} is among {}", families[0]),
        )?;
    }
    Ok(())
}

/// A pod may make as many interfaces as it likes: its metrics have the first ones, and it goes on.
fn a_scrape_has_some_of_three_hundred_interfaces(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "interfaces")?.privileged().run()?;
    let maker = pod.container("maker", &["sleep", "infinity"]).privileged().run()?;
    maker.shell("i=0; while [ $i -lt 300 ]; do ip link add d$i type dummy || exit; i=$((i + 1)); done")?;
    let monitor = Monitor::start(node)?;
    let text = node.get("127.0.0.1", PORT, "/metrics")?;
    let of_pod = format!("sandbox_id=\"{}\"", pod.id());
    let memory = metric(&text, "kata_guest_meminfo", &["item=\"mem_total\"", &of_pod])?;
    claim(memory > 0.0, "the guest's memory is told")?;
    metric(
        &text,
        "kata_guest_netdev_stat",
        &["interface=\"eth0\"", "item=\"recv_bytes\"", &of_pod],
    )?;
    let told = text
        .lines()
        .filter(|line| line.starts_with("kata_guest_netdev_stat{") && line.contains("recv_bytes"));
    same("interfaces that are told", told.count(), 16)?;
    same("the container's word", maker.shell("echo here")?.trim(), "here")?;
    monitor.stop()?;
    pod.remove()
}

/// A guest that does not answer is left out of its pod's metrics after a while, and meanwhile everything else goes on.
fn a_frozen_guest_holds_up_neither_scrapes_nor_verbs(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "frozen")?.run()?;
    let monitor = Monitor::start(node)?;
    let qemu = pod
        .processes()
        .into_iter()
        .find(|process| process.program().starts_with("qemu-system-"));
    let qemu = qemu.ok_or_else(|| Failure::Claim("the pod has no QEMU".into()))?;
    kill(Pid::from_raw(qemu.pid), Signal::SIGSTOP).trying("freezing QEMU")?;
    let (text, state) = std::thread::scope(|scope| {
        let scrape = scope.spawn(|| node.get("127.0.0.1", PORT, "/metrics"));
        let state = during(node, &pod);
        let text = scrape
            .join()
            .unwrap_or_else(|_| Err(Failure::Claim("the scrape panicked".into())));
        (text, state)
    });
    let (text, state) = (text?, state?);
    same("the pod meanwhile", state.as_str(), "SANDBOX_READY")?;
    claim(
        metric(&text, "kata_hypervisor_threads", &[])? > 0.0,
        "the host's side is measured",
    )?;
    claim(!text.contains("kata_guest_"), "the guest said nothing")?;
    same(
        "failed scrapes",
        metric(&text, "kata_monitor_scrape_failed_count", &[])?,
        0.0,
    )?;
    kill(Pid::from_raw(qemu.pid), Signal::SIGCONT).trying("thawing QEMU")?;
    contains(
        "a later scrape",
        &node.get("127.0.0.1", PORT, "/metrics")?,
        "kata_guest_load",
    )?;
    monitor.stop()?;
    pod.remove()
}

/// Asks for the pod's state, which has to come before the scrape gives up on its guest.
fn during(node: &Node, pod: &Pod<'_>) -> Result<String> {
    let began = Instant::now();
    let state = pod.state()?;
    kata_ctl(node, &["top"])?;
    claim(
        began.elapsed() < Duration::from_secs(4),
        format!("{:?} for a state", began.elapsed()),
    )?;
    Ok(state)
}

/// The archive for a bug report tells of the pod, and of nothing that runs in it.
fn a_report_has_no_secrets(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "reported")?.run()?;
    let container = pod.shell("secretive", "echo hunter2; exec sleep infinity").run()?;
    container.wait_for_log("hunter2")?;
    let file = node.path(&format!("report-{}.tar.gz", node.serial()));
    let path = file.display().to_string();
    let said = kata_ctl(node, &["gather", "--output", &path])?;
    let mut tar = node.command("tar");
    let names = succeed(tar.args(["-tzf", &path]), run::ORDINARY)?.text();
    for name in [
        "env.toml",
        "check.txt",
        "config.txt",
        "list.txt",
        "top.txt",
        "journal.txt",
        "kernel.txt",
    ] {
        contains("the archive", &names, &format!("kata-gather/{name}"))?;
    }
    for name in ["state.json", "trace.txt", "metrics.txt", "containers.json"] {
        contains("what was said", &said, &format!("sandboxes/{}/{name}", pod.id()))?;
    }
    let mut tar = node.command("tar");
    let text = succeed(tar.args(["-xzOf", &path]), run::ORDINARY)?.text();
    for part in [
        "kata_guest_load",
        "agent connected",
        container.id(),
        "QEMU emulator version",
        "\"undo\"",
    ] {
        contains("the archive", &text, part)?;
    }
    claim(
        !text.contains("hunter2"),
        "no command line or output of a container is in it",
    )?;
    pod.remove()
}

/// Where the configuration allows it, an administrator of the node has a shell among the guest's own processes, with
/// and without a terminal; it goes with its client.
fn a_shell_in_the_guest(node: &Node, runtime: Runtime) -> Result {
    let closed = node.pod(runtime, "closed")?.run()?;
    contains(
        "a pod without",
        &run_shell(node, &closed, "true")?,
        "`debug_console_enabled = true`",
    )?;
    closed.remove()?;

    let pod = node.pod_with_handler(&(runtime.handler() + DEBUG), "opened").run()?;
    contains(
        "a pod without containers",
        &run_shell(node, &pod, "true")?,
        "has a /bin/sh",
    )?;
    let lender = pod.container("lender", &["sleep", "infinity"]).run()?;
    let said = run_shell(
        node,
        &pod,
        "ls /proc/1/root/run/kata-containers; id -u; echo told >&2; cat /proc/self/cgroup",
    )?;
    let words: Vec<&str> = said.split_whitespace().collect();
    for word in ["shared", "0", "told", "0::/kata/debug-console-0"] {
        claim(words.contains(&word), format!("{word} in {said:?}"))?;
    }

    let mut command = node.command("kata-ctl");
    let mut console = Console::start(node, command.args(["exec", pod.id()]))?;
    console.enter("echo size: $(stty size) term: $TERM")?;
    console.expect("size: 24 80 term: ")?;
    console.enter("exit")?;
    same("kata-ctl's exit code", console.wait(run::ORDINARY)?, 0)?;

    hang_up(node, &pod)?;
    let listed = || run_shell(node, &pod, "ls /proc/1/root/sys/fs/cgroup/kata").map_err(|failure| failure.to_string());
    node.events()
        .bell
        .until("the end of the shell", run::ORDINARY, || match listed()? {
            text if text.contains("debug-console-2") => Err(text),
            _ => Ok(()),
        })?;
    same("the lender", lender.shell("echo alive")?.as_str(), "alive")?;
    pod.remove()
}

/// A client on a terminal that is cut off while its shell is busy.
fn hang_up(node: &Node, pod: &Pod<'_>) -> Result {
    let folder = node.inside(&format!("/run/kata/{}", pod.id()));
    let folder = File::open(&folder).trying(format!("opening {}", folder.display()))?;
    // The path of a socket has to be short.
    let socket = format!("/proc/self/fd/{}/shim-monitor.sock", folder.as_raw_fd());
    let mut stream = UnixStream::connect(socket).trying("connecting to the shim")?;
    stream
        .set_read_timeout(Some(run::ORDINARY))
        .trying("setting a deadline")?;
    let mut ask = |text: &str, answer: &str| {
        stream.write_all(text.as_bytes()).trying("typing")?;
        let mut shown = String::new();
        let mut bytes = [0; 4096];
        while !shown.contains(answer) {
            let count = stream.read(&mut bytes).trying("reading what is shown")?;
            claim(count > 0, format!("the shell ended before {answer:?}: {shown}"))?;
            shown += &String::from_utf8_lossy(&bytes[..count]);
        }
        Ok(())
    };
    ask(
        "GET /exec?rows=24&columns=80&term=dumb HTTP/1.1\r\n\r\n",
        "101 Switching",
    )?;
    ask("echo $((6 * 7)); exec sleep infinity\n", "42")
}

/// What a script says in the guest, or why there is no shell for it.
fn run_shell(node: &Node, pod: &Pod<'_>, script: &str) -> Result<String> {
    let input = format!("{script}\n").into_bytes();
    let output = finish(
        node.command("kata-ctl").args(["exec", pod.id()]),
        Some(input),
        run::ORDINARY,
    )?;
    Ok(format!("{}{}", output.text(), output.errors()))
}

/// The value of the one sample with this name and these labels.
fn metric(text: &str, name: &str, labels: &[&str]) -> Result<f64> {
    let samples: Vec<&str> = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .collect();
    let value = match samples[..] {
        [one] => one.rsplit(' ').next().and_then(|value| value.parse().ok()),
        _ => None,
    };
    value.ok_or_else(|| Failure::Claim(format!("not one {name} with {labels:?}: {samples:?}")))
}

pub fn kata_ctl(node: &Node, arguments: &[&str]) -> Result<String> {
    succeed(node.command("kata-ctl").args(arguments), run::ORDINARY).map(|output| output.text())
}

/// `kata-ctl monitor` in the node; it ends with its shell's input.
pub struct Monitor {
    shell: Child,
    input: ChildStdin,
}

impl Monitor {
    /// Starts it; it listens when this returns.
    pub fn start(node: &Node) -> Result<Monitor> {
        Monitor::start_with(node, "")
    }

    /// Starts it with some options.
    pub fn start_with(node: &Node, options: &str) -> Result<Monitor> {
        let mut command = node.command("sh");
        command.args(["-c", &format!("kata-ctl monitor {options} & cat; kill $!; wait")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = command.spawn().trying("starting kata-ctl monitor")?;
        let pipes = shell.stdin.take().zip(shell.stdout.take());
        let (input, output) = pipes.ok_or_else(|| Failure::Claim("the monitor has no pipes".into()))?;
        let mut line = String::new();
        let mut output = BufReader::new(output);
        output.read_line(&mut line).trying("reading what the monitor says")?;
        contains("the monitor's first words", &line, "http://127.0.0.1:8090/metrics")?;
        Ok(Monitor { shell, input })
    }

    pub fn stop(self) -> Result {
        drop(self.input);
        run::wait(self.shell, run::ORDINARY, "kata-ctl monitor").map(drop)
    }
}
