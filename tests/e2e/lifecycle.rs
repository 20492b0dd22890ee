//! Containers come, run, end and go.

use tests::{
    config::Runtime,
    cri::Exit,
    failure::{Result, same},
    node::Node,
};

/// A story and its name.
pub type Story = (&'static str, fn(&Node, Runtime) -> Result);

pub const STORIES: &[Story] = &[("exit_codes", exit_codes)];

/// A container's exit code is the one its caller sees.
fn exit_codes(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "codes")?.run()?;
    for (code, reason) in [(0, "Completed"), (7, "Error")] {
        let container = pod.shell(&format!("ends-with-{code}"), &format!("exit {code}")).run()?;
        same("exit", container.wait_exit()?, Exit { code, reason: reason.into() })?;
    }
    let killed = pod.container("killed", &["sleep", "infinity"]).run()?;
    killed.kill("SIGKILL")?;
    same("exit", killed.wait_exit()?, Exit { code: 137, reason: "Error".into() })?;
    pod.remove()
}
