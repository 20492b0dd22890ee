//! How readily the host's OOM killer takes the processes of a pod (`oom_score_adj`, proc_pid_oom_score_adj(5)).
//!
//! The daemon that starts the shim protects itself, and its children inherit that. The shim gives up a little of it, as
//! every shim does; QEMU and virtiofsd hold what the pod's containers use, so they get what the kubelet gives to the
//! containers. The sandbox's own value is made for a process that uses nothing (-998), and counts for nobody here.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::{Mutex, PoisonError},
};

use oci_spec::runtime::Spec;

use crate::error::{Context, Result};

/// The kernel's largest value: taken first.
const MOST: i32 = 1000;

/// Makes this process a little less protected than the one that started it, as containerd's shims do
/// (`AdjustOOMScore`): the daemon is the last to go.
///
/// # Errors
/// `/proc` cannot be used.
pub fn below_the_daemon() -> Result<()> {
    let path = "/proc/self/oom_score_adj";
    let daemon: i32 = read(path).at("read", path)?;
    fs::write(path, (daemon + 1).min(MOST).to_string()).at("write", path)
}

/// What the pod's quality of service says as long as no container of it is known: the kubelet's values for its
/// containers (`GetContainerOOMScoreAdjust`). A burstable pod's depends on what its containers ask for, and is the
/// largest until then. `None` for a pod that is not the kubelet's.
pub fn of_class(cgroups_path: Option<&str>) -> Option<i32> {
    let path = cgroups_path?;
    if !path.contains("kubepods") {
        None
    } else if path.contains("besteffort") {
        Some(1000)
    } else if path.contains("burstable") {
        Some(999)
    } else {
        Some(-997)
    }
}

/// The containers' values: the VM has that of the most protected one.
#[derive(Debug, Default)]
pub struct Scores(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    containers: BTreeMap<String, i32>,
    refused: bool,
}

impl Scores {
    /// Counts a container and gives its VM's `processes` the value that follows.
    pub fn add(&self, container: &str, spec: &Spec, processes: &[u32]) {
        let score = spec.process().as_ref().and_then(|process| process.oom_score_adj());
        self.change(processes, |containers| {
            containers.extend(score.map(|score| (container.to_owned(), score)));
        });
    }

    /// Counts a container no more. With the last one the VM keeps its value.
    pub fn remove(&self, container: &str, processes: &[u32]) {
        self.change(processes, |containers| {
            containers.remove(container);
        });
    }

    fn change(&self, processes: &[u32], change: impl FnOnce(&mut BTreeMap<String, i32>)) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known.containers);
        let Some(score) = known.containers.values().min().copied() else {
            return;
        };
        for process in processes.iter().flat_map(|process| with_children(*process)) {
            match give(process, score) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    if !std::mem::replace(&mut known.refused, true) {
                        tracing::warn!(
                            score,
                            "the VM is less protected from the OOM killer than its containers should be: to lower \
                             oom_score_adj takes CAP_SYS_RESOURCE"
                        );
                    }
                }
                Err(error) => tracing::debug!(%error, process, "cannot set oom_score_adj"),
            }
        }
    }
}

/// virtiofsd serves in a child of its own.
fn with_children(process: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    std::iter::once(process).chain(children).collect()
}

/// Succeeds for a process that has ended.
fn give(process: u32, score: i32) -> io::Result<()> {
    let path = format!("/proc/{process}/oom_score_adj");
    let given = read(&path).and_then(|now| match now == score {
        true => Ok(()),
        false => fs::write(&path, score.to_string()),
    });
    match given {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
        given => given,
    }
}

fn read(path: &str) -> io::Result<i32> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_pods_class_is_in_its_cgroup_in_either_form() {
        for (path, score) in [
            ("/kubepods/besteffort/pod1/crio-abc", Some(1000)),
            ("kubepods-besteffort-pod1.slice:crio:abc", Some(1000)),
            ("/kubepods/burstable/pod1/abc", Some(999)),
            ("kubepods-burstable-pod1.slice:cri-containerd:abc", Some(999)),
            ("/kubepods/pod1/abc", Some(-997)),
            ("kubepods-pod1.slice:crio:abc", Some(-997)),
            ("/default/abc", None),
            ("system.slice:ctr:abc", None),
        ] {
            assert_eq!(of_class(Some(path)), score, "{path}");
        }
        assert_eq!(of_class(None), None);
    }

    #[test]
    fn a_vm_is_as_protected_as_the_most_protected_container_that_it_has() {
        let spec = |score: i32| {
            let mut json: serde_json::Value =
                serde_json::from_str(include_str!("spec/samples/crio-sandbox.json")).unwrap();
            json["process"]["oomScoreAdj"] = score.into();
            serde_json::from_value(json).unwrap()
        };
        let mut vm = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let processes = [vm.id()];
        let now = || read(&format!("/proc/{}/oom_score_adj", vm.id())).unwrap();
        let scores = Scores::default();
        scores.add("one", &spec(950), &processes);
        assert_eq!(now(), 950);
        scores.add("two", &spec(700), &processes);
        assert_eq!(now(), 700);
        scores.remove("two", &processes);
        assert_eq!(now(), 950);
        scores.remove("one", &processes);
        assert_eq!(now(), 950);
        vm.kill().unwrap();
        vm.wait().unwrap();
        // A process that has ended is none to give anything to.
        scores.add("three", &spec(800), &processes);
        assert!(!scores.0.lock().unwrap().refused);
    }
}
