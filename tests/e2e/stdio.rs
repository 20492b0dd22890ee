//! Bytes in and out.

use std::time::Duration;

use tests::{
    config::Runtime,
    failure::{Result, claim, contains, same},
    node::Node,
    run::{self, finish},
};

use crate::Story;

pub const STORIES: &[Story] = &[
    ("no_input_is_dev_null", no_input_is_dev_null),
    ("output_and_errors", output_and_errors),
    ("an_exec_has_its_own_exit_code", an_exec_has_its_own_exit_code),
    ("input_is_half_closed", input_is_half_closed),
    ("input_of_a_container", input_of_a_container),
    ("a_hundred_mebibytes", a_hundred_mebibytes),
    ("a_background_child_holds_nobody_up", a_background_child_holds_nobody_up),
    ("a_terminal_with_resize", a_terminal_with_resize),
];

/// How long 100 MiB may take there and back on two cores that emulate a machine.
const BULK: Duration = Duration::from_secs(180);

/// Both streams reach the log, complete, although the container ends at once.
fn output_and_errors(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "output")?.run()?;
    let container = pod
        .shell("talker", "seq 20000; echo all said; echo an error >&2")
        .run()?;
    same("exit code", container.wait_exit()?.code, 0)?;
    // The CRI knows of an exit before it has written the last of the log.
    container.wait_for_log("all said")?;
    container.wait_for_log("an error")?;
    let logs = container.logs()?;
    same(
        "lines",
        logs.lines().filter(|line| line.parse::<u32>().is_ok()).count(),
        20_000,
    )?;
    pod.remove()
}

/// An exec's exit code and streams are its own.
fn an_exec_has_its_own_exit_code(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "exec")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    for code in [0, 7, 137] {
        let script = format!("echo out; echo err >&2; [ {code} = 137 ] && kill -9 $$; exit {code}");
        let output = container.exec(&["sh", "-c", &script], None, run::ORDINARY)?;
        same("exit code", output.code, code)?;
        same("standard output", output.text().as_str(), "out")?;
        contains("standard error", &output.errors(), "err")?;
    }
    same(
        "state",
        container.status()?["state"].as_str(),
        Some("CONTAINER_RUNNING"),
    )?;
    pod.remove()
}

/// The end of input reaches the program, and what it says after that still comes back.
fn input_is_half_closed(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "input")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    let output = container.exec(
        &["sh", "-c", "wc -c; echo after the end"],
        Some(vec![b'x'; 70_000]),
        run::ORDINARY,
    )?;
    same("what it said", output.text().as_str(), "70000\nafter the end")?;
    let output = container.exec(&["cat"], Some(Vec::new()), run::ORDINARY)?;
    same("no input at all", (output.code, output.stdout.len()), (0, 0))?;
    pod.remove()
}

/// A container's own input, through attach.
fn input_of_a_container(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "attach")?.run()?;
    let container = pod.shell("reader", "wc -c; exit 4").with_input().run()?;
    let mut client = node.crictl_command(["attach", "--stdin", container.id()])?;
    finish(&mut client, Some(vec![b'x'; 12_345]), run::ORDINARY)?;
    same("exit code", container.wait_exit()?.code, 4)?;
    contains("log", &container.logs()?, "12345")?;
    pod.remove()
}

/// 100 MiB go in and come back, byte for byte.
fn a_hundred_mebibytes(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "bulk")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    let sent = noise(100 << 20);
    let output = container.exec(&["cat"], Some(sent.clone()), BULK)?;
    same("exit code", output.code, 0)?;
    same("bytes", output.stdout.len(), sent.len())?;
    claim(output.stdout == sent, "every byte is the one that was sent")?;
    pod.remove()
}

/// A child that keeps the output open does not delay the exit of the exec that left it behind.
fn a_background_child_holds_nobody_up(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "background")?.run()?;
    let container = pod.shell("parent", "sleep infinity & echo started; exit 6").run()?;
    same("exit code", container.wait_exit()?.code, 6)?;
    contains("log", &container.logs()?, "started")?;
    pod.remove()
}

/// A terminal is one: its device, its size, its new size, and its end.
fn a_terminal_with_resize(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "terminal")?.run()?;
    let container = pod.container("host", &["sleep", "infinity"]).run()?;
    let mut console = container.exec_on_terminal(&["sh"])?;
    console.enter("tty")?;
    console.expect("/dev/pts/")?;
    // Quotes keep the typed line, which the terminal echoes, apart from what it prints.
    console.enter("until [ \"$(stty size)\" = '24 80' ]; do :; done; echo first' 'size")?;
    console.expect("first size")?;
    console.resize(132, 43)?;
    console.enter("until [ \"$(stty size)\" = '43 132' ]; do :; done; echo new' 'size")?;
    console.expect("new size")?;
    // A shell of its own speaks when it has the foreground, and with it the ^C: the outer one starts `sleep` unable
    // to be interrupted.
    console.enter("sh -c 'echo go\"\"ing; exec sleep infinity'")?;
    console.expect("going")?;
    console.enter("\x03echo inter''rupted")?;
    console.expect("interrupted")?;
    console.enter("exit 5")?;
    console.expect("exit code 5")?;
    console.wait(run::ORDINARY)?;
    pod.remove()
}

/// Bytes without a pattern, the same in every run (xorshift64*).
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A process that nobody gives input reads what no server takes for a client that has left.
fn no_input_is_dev_null(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "no-input")?.run()?;
    let container = pod.container("reader", &["sleep", "infinity"]).run()?;
    let seen = container.shell("readlink /proc/1/fd/0; readlink /proc/$$/fd/0")?;
    same("what they read", seen.as_str(), "/dev/null\n/dev/null")?;
    pod.remove()
}
