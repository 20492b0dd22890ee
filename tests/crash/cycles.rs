//! Long use.

use tests::{
    config::Runtime,
    failure::{Result, same},
    node::Node,
    run,
};

use crate::Story;

/// The longest story of this program, so the first.
pub const STORIES: &[Story] = &[("two_hundred_cycles", two_hundred_cycles)];

/// Pods, and containers in each of them, one after another.
const PODS: usize = 20;
const CONTAINERS: usize = 10;

/// 200 containers are created, used and deleted: afterwards the node holds what it held before, and containerd as many
/// open files. (What else the node holds, the stage looks at.)
fn two_hundred_cycles(node: &Node, runtime: Runtime) -> Result {
    // Two pods first: daemons open some files at their first use.
    for _ in 0..2 {
        a_pod_of_containers(node, runtime, 2)?;
    }
    let before = node.containerd_descriptors();
    for _ in 0..PODS {
        a_pod_of_containers(node, runtime, CONTAINERS)?;
    }
    // Connections of clients that are gone are closed by containerd when it notices.
    node.events().bell.until("containerd's files", run::ORDINARY, || {
        match node.containerd_descriptors() {
            now if now <= before => Ok(()),
            now => Err(format!("{before} before, {now} now")),
        }
    })
}

fn a_pod_of_containers(node: &Node, runtime: Runtime, count: usize) -> Result {
    let pod = node.pod(runtime, "cycle")?.run()?;
    for number in 0..count {
        let container = pod
            .container(&format!("number-{number}"), &["sleep", "infinity"])
            .run()?;
        same("exec", container.shell("echo hello")?.as_str(), "hello")?;
        container.remove()?;
    }
    pod.remove()
}
