//! What others on the node do to a shim: the kubelet's cleaning, a shutdown, and what CRI-O has left open.

use std::{
    fs,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::Status;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe},
};
use tests::{
    census,
    failure::{Result, Trying, claim, same},
    wait::Bell,
};

use super::{OURS, Told, death::swept};
use crate::{
    crio::Crio,
    pod::{GRACE, Pod},
    process::{self, Kind},
    task::{KILL, ORDINARY, TERM, Task},
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "a_stopped_sandbox_outlives_the_kubelets_cleaning", kubelet),
    (OURS, "a_shim_ends_with_the_node_and_not_before", shutdown),
    (OURS, "a_machine_that_cannot_die_is_told_as_ended", undying),
    (OURS, "a_shim_keeps_nothing_open_of_its_caller", inherited),
];

/// Generous: what is waited for happens at once on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn cgroups_of(pid: i32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).trying("reading a process's cgroups")
}

/// The folders of a cgroup and below it, in every hierarchy.
fn folders_of(cgroup: &str) -> Vec<PathBuf> {
    let hierarchies = census::hierarchies();
    let roots = hierarchies.iter().map(|root| root.join(cgroup.trim_start_matches('/')));
    roots.flat_map(|root| census::folders(&root)).collect()
}

/// When a pod has ended the kubelet kills whoever is in its cgroup (`SyncTerminatedPod`); CRI-O removes the pod when it
/// is asked to, which may be days later.
fn kubelet(crio: &Crio<'_>) -> Result {
    let mut pod = Pod::run(crio)?;
    let mut container = pod.idle()?;
    let shim = process::only(Kind::Shim, crio)?;
    let home = cgroups_of(std::process::id().cast_signed())?;
    claim(
        cgroups_of(shim)? != home,
        "the shim of a running pod is not in the pod's cgroup",
    )?;
    pod.stop(&mut [&mut container])?;
    same("the cgroups of the shim of a stopped pod", cgroups_of(shim)?, home)?;
    let own = |folder: &&PathBuf| {
        folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("crio-"))
    };
    let folders = folders_of(&pod.facts.cgroup);
    same("the sandbox's cgroups", folders.iter().filter(own).count(), 0)?;
    for folder in folders {
        let processes = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            process::murder(pid)?;
        }
    }
    same("the shim", process::only(Kind::Shim, crio)?, shim)?;
    pod.sandbox.is(Status::STOPPED)?;
    pod.sandbox.stats()?;
    container.is(Status::STOPPED)?;
    pod.end([container])?;
    process::gone("the shim", &[shim], PATIENCE)
}

fn send(signal: Signal, pid: i32) -> Result {
    kill(Pid::from_raw(pid), signal).trying(format!("sending {signal} to process {pid}"))
}

/// At a shutdown systemd sends SIGTERM to every process, and waits.
fn shutdown(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut container = pod.idle()?;
    let shim = process::only(Kind::Shim, crio)?;
    send(Signal::SIGTERM, shim)?;
    same(
        "a container's word after SIGTERM",
        container.shell("echo here")?,
        "here",
    )?;
    let machine = process::of_the_vm(crio);
    process::murder(process::only(Kind::Vm, crio)?)?;
    process::gone("the shim and its machine", &[&machine[..], &[shim]].concat(), PATIENCE)?;
    // Had only the shim been meant, the next start on the node would see to it that CRI-O gets its answers.
    let next = Pod::run(crio)?;
    let mut pod = pod;
    answered(&mut pod.sandbox)?;
    answered(&mut container)?;
    pod.end([container])?;
    let shim = Bell::default().until("the end of the shim in the dead one's place", PATIENCE, || {
        process::only(Kind::Shim, crio).map_err(|failure| failure.to_string())
    })?;
    // Without a machine there is nothing to wait for.
    let mut next = next;
    next.stop(&mut [])?;
    send(Signal::SIGTERM, shim)?;
    process::gone("the shim of a stopped pod", &[shim], PATIENCE)?;
    let last = Pod::run(crio)?;
    answered(&mut next.sandbox)?;
    next.end([])?;
    last.end([])
}

/// CRI-O has been restarted, and hears of the end.
fn answered(task: &mut Task<'_, '_>) -> Result {
    task.abandon()?;
    let state = task.recover()?;
    same("the status", state.status.enum_value_or_default(), Status::STOPPED)?;
    task.kill("", KILL)?.granted(ORDINARY)?;
    task.exit = Some(task.begin_wait("")?);
    task.exited(ORDINARY).map(drop)
}

/// A cgroup of version 1 whose process is frozen, until this is dropped.
struct Ice(PathBuf);

impl Ice {
    fn around(pid: i32, parent: &Path) -> Result<Ice> {
        let ice = Ice(parent.join("ice"));
        fs::create_dir(&ice.0).trying("making a cgroup")?;
        ice.write("cgroup.procs", &pid.to_string())?;
        ice.write("freezer.state", "FROZEN")?;
        Bell::default().until("a frozen process", PATIENCE, || {
            let state = fs::read_to_string(ice.0.join("freezer.state")).unwrap_or_default();
            if state.trim() == "FROZEN" { Ok(()) } else { Err(state) }
        })?;
        Ok(ice)
    }

    fn thaw(&self) -> Result {
        self.write("freezer.state", "THAWED")
    }

    fn write(&self, file: &str, text: &str) -> Result {
        fs::write(self.0.join(file), text).trying(format!("writing {file}"))
    }
}

impl Drop for Ice {
    fn drop(&mut self) {
        // The node, which ends every process after a story, could not end a frozen one. The folder it removes, if this
        // does not.
        let _ = self.thaw();
        let _ = fs::remove_dir(&self.0);
    }
}

/// A process that waits for a device dies when the device answers. A frozen one dies when it is thawed.
fn undying(crio: &Crio<'_>) -> Result {
    let Some(freezer) = census::hierarchies().into_iter().find(|root| root.ends_with("freezer")) else {
        println!("this kernel has no process that SIGKILL does not end: no freezer of version 1");
        return Ok(());
    };
    let mut pod = Pod::run(crio)?;
    let container = pod.idle()?;
    let (shim, machine) = (process::only(Kind::Shim, crio)?, process::only(Kind::Vm, crio)?);
    let ice = Ice::around(machine, &freezer.join(crio.node.cgroup().trim_start_matches('/')))?;
    pod.sandbox.kill("", TERM)?.granted(ORDINARY)?;
    pod.sandbox.exited(PATIENCE)?;
    same("the container's exit", container.exited(PATIENCE)?.exit_status, 137)?;
    claim(Path::new(&format!("/proc/{machine}")).exists(), "the machine could die")?;
    pod.disconnect()?;
    let mut container = container;
    container.rootfs.unmount()?;
    for task in [&container, &pod.sandbox] {
        task.begin_delete("")?.granted(PATIENCE)?;
    }
    pod.sandbox.shutdown()?;
    process::gone("the shim", &[shim], PATIENCE)?;
    ice.thaw()?;
    process::gone("the machine", &[machine], PATIENCE)?;
    drop(ice);
    // What the shim could not take back is owed: the next start does.
    let next = Pod::run(crio)?;
    swept(&pod.facts.id)?;
    container.discard()?;
    pod.sandbox.rootfs.unmount()?;
    pod.discard()?;
    next.end([])
}

/// A descriptor that CRI-O has forgotten to close on exec must not stay open in a shim that outlives it.
fn inherited(crio: &Crio<'_>) -> Result {
    let (_read, left_open) = pipe().trying("making a pipe")?;
    let name = format!("/proc/self/fd/{}", left_open.as_raw_fd());
    let name = fs::read_link(name).trying("looking at the pipe")?;
    let pod = Pod::run(crio)?;
    let shim = process::only(Kind::Shim, crio)?;
    for pid in [&[shim][..], &process::of_the_vm(crio)].concat() {
        let folder = format!("/proc/{pid}/fd");
        let open = fs::read_dir(&folder).trying(format!("reading {folder}"))?.flatten();
        let has = open
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|path| path == name);
        claim(!has, format!("process {pid} has a pipe of its caller open"))?;
    }
    drop(left_open);
    let mut pod = pod;
    pod.sandbox.stop(GRACE)?;
    pod.end([])
}
