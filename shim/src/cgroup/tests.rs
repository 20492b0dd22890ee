//! Real cgroups below a folder of the test's own: these tests need root.

use super::*;
use std::process::{Child, Command};

/// A folder name that no other test, and no other run, has.
fn unique(name: &str) -> String {
    format!("sandpod-test-{}-{name}", std::process::id())
}

fn sleeper() -> Child {
    Command::new("sleep").arg("600").spawn().unwrap()
}

fn leftovers(name: &str) -> Vec<PathBuf> {
    let all = trees().unwrap().into_iter().map(|(root, _)| root.join(unique(name)));
    all.filter(|folder| folder.exists()).collect()
}

#[test]
fn the_cris_two_spellings_lead_to_a_folder() {
    assert_eq!(
        relative("/kubepods/burstable/pod0e5b/5ab1").unwrap(),
        "kubepods/burstable/pod0e5b/5ab1"
    );
    assert_eq!(
        relative("kubepods-burstable-pod0e5b.slice:crio:5ab1").unwrap(),
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0e5b.slice/crio-5ab1.scope"
    );
    assert_eq!(
        relative(":cri-containerd:77").unwrap(),
        "system.slice/cri-containerd-77.scope"
    );
    assert_eq!(relative("-.slice:crio:77").unwrap(), "crio-77.scope");
    for wrong in [
        "",
        "/",
        "../etc",
        "/a/../../b",
        "a.slice:b",
        "a.slice:b:c/d",
        "noslice:b:c",
        "a.slice:b:",
    ] {
        assert!(relative(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_sandboxs_processes_are_counted_killed_and_removed_with_it() {
    let name = "whole";
    let cgroup = SandboxCgroup::plan(&format!("/{}/pod/abc", unique(name))).unwrap();
    let record = cgroup.record();
    cgroup.create().unwrap();
    let mut children = [sleeper(), sleeper()];
    for child in &children {
        cgroup.add(child.id()).unwrap();
    }
    for leaf in &record.leaves {
        assert_eq!(processes(&leaf.folder).unwrap().len(), 2, "{leaf:?}");
    }
    let usage = cgroup.usage().unwrap();
    let has = |name: &str| record.v2 || trees().unwrap().iter().any(|(root, _)| root.ends_with(name));
    if has("pids") {
        assert_eq!((usage.pids_stats.current, usage.pids_stats.limit), (2, 0));
    }
    if has("memory") {
        assert!(usage.memory_stats.usage.limit > 0 && !usage.memory_stats.stats.is_empty());
    }

    // As `delete` does it, from the state file alone.
    let record: Record = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
    record.remove().unwrap();
    for child in &mut children {
        assert!(!child.wait().unwrap().success());
    }
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
    record.remove().unwrap();
}

#[test]
fn what_was_there_before_stays_and_so_do_its_processes() {
    let name = "shared";
    let parent = SandboxCgroup::plan(&unique(name)).unwrap();
    parent.create().unwrap();
    let mut stranger = sleeper();
    parent.add(stranger.id()).unwrap();

    // A CRI that has made the folder itself: nothing of it is the sandbox's.
    let given = SandboxCgroup::plan(&unique(name)).unwrap();
    assert!(given.record().made.is_empty());
    given.create().unwrap();
    given.record().remove().unwrap();
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger's process lives on");
    assert!(!leftovers(name).is_empty());

    parent.record().remove().unwrap();
    stranger.wait().unwrap();
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
}

#[test]
fn the_shim_leaves_before_its_cgroup_is_removed() {
    let name = "own";
    let test = std::env::args().next().unwrap();
    if std::env::var_os("SANDPOD_TEST_INSIDE").is_none() {
        // Another process plays the shim: this one has other tests to run.
        let status = Command::new(test)
            .args([
                "--exact",
                "cgroup::tests::the_shim_leaves_before_its_cgroup_is_removed",
                "--nocapture",
            ])
            .env("SANDPOD_TEST_INSIDE", "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let before = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let cgroup = SandboxCgroup::plan(&unique(name)).unwrap();
    cgroup.create().unwrap();
    cgroup.add(std::process::id()).unwrap();
    assert_ne!(std::fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    // Children are born where the shim is.
    let mut child = sleeper();
    cgroup.record().remove().unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
}
