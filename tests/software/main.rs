//! Real software from Debian's packages in pods, two containers each where that is how people run it.
//!
//! Trials are named `<runtime>/<story>`, with the newest containerd; `tracing` is the guest for eBPF agents. runc,
//! which proves the stories themselves, and what takes long, run with `--include-ignored`.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use tests::{
    config::{Guest, Runtime},
    cri::{Container, ContainerSpec, Pod},
    failure::{Result, Trying},
    node::{Containerd, Node, NodeSpec},
    run,
    stage::{self, Stage},
};

mod databases;
mod files;
mod image;
mod kernel;
mod machines;
mod names;
mod packages;
mod services;
mod tracing;
mod tunnel;
mod web;

/// A story and its name.
type Story = (&'static str, fn(&Node, Runtime) -> Result);

/// Stories of every day.
const STORIES: &[&[Story]] = &[
    databases::STORIES,
    web::STORIES,
    services::STORIES,
    packages::STORIES,
    names::STORIES,
];

/// Stories of every day about virtual machines.
const OF_A_VM: &[&[Story]] = &[tunnel::OF_A_VM, kernel::OF_A_VM, files::OF_A_VM];

/// Stories that take long.
const AT_LENGTH: &[&[Story]] = &[
    databases::AT_LENGTH,
    services::AT_LENGTH,
    packages::AT_LENGTH,
    machines::AT_LENGTH,
];

/// Stories that take long about the kernel for eBPF agents.
const OF_TRACING: &[&[Story]] = &[tracing::STORIES];

/// How long software may take to install something, to start or to answer, on a busy machine without KVM.
const PATIENCE: Duration = Duration::from_secs(300);

/// A container that runs a shell script with the software.
fn software<'p>(pod: &'p Pod<'p>, name: &str, script: &str) -> Result<ContainerSpec<'p>> {
    Ok(pod.shell(name, script).image(image::SOFTWARE.on(pod.node())?))
}

/// The same with the software of the long stories.
fn large<'p>(pod: &'p Pod<'p>, name: &str, script: &str) -> Result<ContainerSpec<'p>> {
    Ok(pod.shell(name, script).image(image::LARGE.on(pod.node())?))
}

/// Runs a shell script that may take its time in a container; it must succeed. Returns its output.
fn at_length(container: &Container<'_>, script: &str) -> Result<String> {
    let output = container.exec(&["sh", "-ec", script], None, PATIENCE)?;
    match output.code {
        0 => Ok(output.text()),
        _ => Err(output.failure(&run::last_of(script, 400))),
    }
}

/// An emptyDir of a pod, as the kubelet makes it.
fn empty_dir(node: &Node, name: &str) -> Result<PathBuf> {
    let pod = format!("kubelet/pods/{}", node.serial());
    open_folder(node.path(&pod).join("volumes/kubernetes.io~empty-dir").join(name))
}

/// Another folder of the node for pods, one after another.
fn host_path(node: &Node, name: &str) -> Result<PathBuf> {
    open_folder(node.path(&format!("{name}-{}", node.serial())))
}

fn open_folder(path: PathBuf) -> Result<PathBuf> {
    let what = || format!("making {}", path.display());
    fs::create_dir_all(&path).trying(what())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).trying(what())?;
    Ok(path)
}

fn main() {
    let stage = Stage::new(NodeSpec::new(Containerd::Newest));
    let (own, tracing) = (Runtime::Kata(Guest::Own), Runtime::Kata(Guest::Tracing));
    let mut trials = Vec::new();
    for (kind, runtime, of_every_day, at_length) in [
        ("own", own, &[STORIES, OF_A_VM][..], AT_LENGTH),
        ("tracing", tracing, &[], OF_TRACING),
        ("runc", Runtime::Runc, &[STORIES], AT_LENGTH),
    ] {
        let of_every_day = of_every_day.iter().map(|stories| (*stories, false));
        for (stories, at_length) in of_every_day.chain([(at_length, true)]) {
            for (story, tell) in stories.iter().copied().flatten().copied() {
                let trial = stage::trial(format!("{kind}/{story}"), &stage, move |node| tell(node, runtime));
                trials.push(trial.with_ignored_flag(at_length || runtime == Runtime::Runc));
            }
        }
    }
    stage::perform(trials, &[stage])
}
