//! `make demo`: containerd runs a pod in a virtual machine, and every claim about it is shown. Ends with 1 if one does
//! not hold.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::sys::utsname::uname;
use tests::{
    config::{self, Guest, Runtime},
    cri::{Container, Exit, Pod},
    failure::{Failure, Result, Trying, claim, contains, same},
    footprint::{Charge, Footprint, mib},
    images,
    node::{Containerd, Node, NodeSpec},
    places,
    run::{self, ORDINARY},
    stage,
};

/// Debian's kernel, which nobody has to build first.
const RUNTIME: Runtime = Runtime::Kata(Guest::Debian);

/// How long the guest's kernel may take to let go of memory.
const RETURN: Duration = Duration::from_secs(10);

const MEM_TOTAL: &str = "grep MemTotal /proc/meminfo";

/// The guide's figures for the shim, virtiofsd, QEMU and the guest's kernel, in MiB.
const GUIDE: [u64; 4] = [20, 10, 30, 110];

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("\ndemo: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result {
    let start = Instant::now();
    if config::accelerator() == "kvm" {
        title("Virtual machines run by KVM");
    } else {
        title(
            "This machine has no hardware virtualization: virtual machines are emulated (QEMU's TCG), about ten times slower",
        );
    }
    RUNTIME.require()?;
    let node = Node::start(&NodeSpec::new(Containerd::Debian))?;
    let version = run::succeed(node.command("containerd").arg("--version"), ORDINARY)?.text();
    shown(
        "the node",
        &format!("{version}, in namespaces of its own, {}", seconds(start)),
    );

    let before = node.census();
    pod(&node)?;
    title("Removal");
    node.nothing_left_since(&before, stage::SETTLE)?;
    shown(
        "nothing is left",
        &format!(
            "processes, mounts, sockets, files in /run, network devices, cgroups: the same {} as before the pod",
            before.count()
        ),
    );
    node.close()?;
    shown("the node", &format!("gone too; all of it took {}", seconds(start)));
    Ok(())
}

/// The pod's life, to its removal.
fn pod(node: &Node) -> Result {
    title("A pod with a web server, started by containerd's CRI");
    let start = Instant::now();
    let pod = node.pod(RUNTIME, "demo")?.run()?;
    shown("pod", &format!("{} ready after {}", short(pod.id()), seconds(start)));
    let start = Instant::now();
    let server = pod
        .container("web", &["httpd", "-f", "-p", "8080", "-h", "/www"])
        .run()?;
    shown(
        "container",
        &format!("{} running after {}", short(server.id()), seconds(start)),
    );
    waterfall(&pod)?;
    kernels(&server)?;
    network(&pod)?;
    footprint(&pod)?;
    memory(&pod, &server)?;
    exec(&server)?;
    failing(&pod)?;
    let start = Instant::now();
    pod.remove()?;
    shown("pod", &format!("removed in {}", seconds(start)));
    Ok(())
}

fn waterfall(pod: &Pod<'_>) -> Result {
    title("Its start, step by step (kata-ctl trace)");
    let program = places::binaries()?.join("kata-ctl").display().to_string();
    let trace = run::succeed(pod.node().command(&program).args(["trace", pod.id()]), ORDINARY)?.text();
    for line in trace.lines() {
        println!("  {line}");
    }
    contains("the waterfall", &trace, "container exec'd")
}

fn kernels(server: &Container<'_>) -> Result {
    title("Two kernels");
    let host = uname().map_err(std::io::Error::from).trying("asking for the kernel")?;
    let host = host.release().to_string_lossy().into_owned();
    let guest = server.shell("uname -r")?;
    shown("host", &host);
    shown("guest", &guest);
    claim(host != guest, "the container runs on the host's kernel")
}

/// The request comes from the node's network, so it passes the bridge, the pod's tap and the machine's card.
fn network(pod: &Pod<'_>) -> Result {
    title("A request from outside the virtual machine, to the pod's address");
    let ip = pod.ip()?;
    let page = pod.node().get(&ip, 8080, "/")?;
    shown(&format!("GET http://{ip}:8080/"), page.trim_end());
    same("the page", page.as_str(), images::PAGE)
}

fn footprint(pod: &Pod<'_>) -> Result {
    title("What the pod holds of the node's memory, in MiB");
    let held = Footprint::of(&pod.processes());
    let rows = [
        ("containerd-shim-kata-v2", held.shim_kib),
        ("virtiofsd", held.virtiofsd_kib),
        ("QEMU, without guest RAM", held.qemu_kib),
        ("guest kernel and agent: guest RAM in use", held.guest_kib),
    ];
    println!("  {:<44} {:>8} {:>12}", "", "here", "guide's");
    for ((what, kib), guide) in rows.iter().zip(GUIDE) {
        println!("  {what:<44} {:>8} {guide:>12}", mib(*kib));
        claim(*kib > 0, format!("{what} holds no memory: is it not running?"))?;
    }
    println!(
        "  {:<44} {:>8} {:>12}",
        "total, with mapped guest memory counted once",
        mib(held.total_kib()),
        GUIDE.iter().sum::<u64>()
    );
    shown(
        "of QEMU's",
        &format!(
            "{} MiB are mapped files (kernel, initrd, programs), which all machines of a node share",
            mib(held.qemu_files_kib)
        ),
    );
    let charge = Charge::of(&pod.cgroup())?;
    shown(
        "charged to the pod's cgroup on the host",
        &format!(
            "{} MiB, of which {} MiB are pages of files",
            mib(charge.usage_kib),
            mib(charge.files_kib)
        ),
    );
    Ok(())
}

/// The limit is added before the container's first instruction, which is to look.
fn memory(pod: &Pod<'_>, server: &Container<'_>) -> Result {
    title("Memory follows the limits");
    let before = total_mib(&server.shell(MEM_TOTAL)?)?;
    shown("MemTotal in the guest", &format!("{before} MiB"));
    let limited = pod
        .shell("limited", &format!("{MEM_TOTAL}; exec sleep infinity"))
        .memory_mib(512)
        .run()?;
    limited.wait_for_log("kB")?;
    let at_start = total_mib(&limited.logs()?)?;
    shown(
        "seen by the first instruction of a container with a limit of 512 MiB",
        &format!("{at_start} MiB"),
    );
    // The new memory's page structures come out of it.
    claim(
        at_start >= before + 512 - 16,
        "the memory was not plugged before the container started",
    )?;
    let start = Instant::now();
    limited.remove()?;
    let seen = || total_mib(&server.shell(MEM_TOTAL)?);
    let bell = &pod.node().events().bell;
    bell.until("the return of the memory", RETURN, || match seen() {
        Ok(now) if now <= before => Ok(()),
        Ok(now) => Err(format!("{now} MiB")),
        Err(failure) => Err(failure.to_string()),
    })?;
    shown(
        "after the container's removal",
        &format!("{before} MiB again, {} later", seconds(start)),
    );
    Ok(())
}

fn exec(server: &Container<'_>) -> Result {
    title("exec");
    let script = "test -t 0 || echo 'no terminal'; wc -c; exit 3";
    let output = server.exec(&["sh", "-c", script], Some(b"hello".to_vec()), ORDINARY)?;
    shown(
        "without a terminal, 5 bytes on its input",
        &format!("{:?}, exit code {}", output.text(), output.code),
    );
    same("the exec", (output.code, output.text().as_str()), (3, "no terminal\n5"))?;
    // The client tells the terminal's size after the start.
    let console = server.exec_on_terminal(&[
        "sh",
        "-c",
        "tty; until [ \"$(stty size 2>/dev/null)\" ]; do :; done; stty size",
    ])?;
    console.expect("24 80")?;
    let screen = console.shown();
    console.wait(ORDINARY)?;
    let words: Vec<_> = screen.split_whitespace().collect();
    shown("on a terminal of 24 lines and 80 columns", &words.join(" "));
    contains("the terminal", &screen, "/dev/pts/")
}

fn failing(pod: &Pod<'_>) -> Result {
    title("A container that fails on purpose");
    let container = pod
        .shell("failing", "echo working; echo 'no such thing' >&2; exit 7")
        .run()?;
    let exit = container.wait_exit()?;
    container.wait_for_log("no such thing")?;
    let logs = container.logs()?;
    shown("its log", &format!("{:?}", logs.trim()));
    shown("its end", &format!("exit code {}, {}", exit.code, exit.reason));
    contains("the log", &logs, "working")?;
    let wanted = Exit {
        code: 7,
        reason: "Error".into(),
    };
    same("the exit", exit, wanted)
}

fn total_mib(line: &str) -> Result<u64> {
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse::<u64>().ok());
    kib.map(|kib| kib >> 10)
        .ok_or_else(|| Failure::Claim(format!("{line:?} is no MemTotal")))
}

fn title(text: &str) {
    println!("\n{text}");
}

fn shown(what: &str, value: &str) {
    println!("  {what}: {value}");
}

fn seconds(start: Instant) -> String {
    format!("{:.2} s", start.elapsed().as_secs_f64())
}

/// The beginning of an identifier, as the CRI's clients show it.
fn short(id: &str) -> &str {
    id.get(..13).unwrap_or(id)
}
