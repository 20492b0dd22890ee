//! Real cgroups below a folder of the test's own: these tests need root.

use super::*;
use std::process::{Child, Command, Stdio};

/// A folder name that no other test, and no other run, has.
fn unique(name: &str) -> String {
    format!("sandpod-test-{}-{name}", std::process::id())
}

fn sleeper() -> Child {
    // Without the test's output, whose reader would wait for it when a test fails.
    let output = Stdio::null;
    Command::new("sleep")
        .arg("600")
        .stdout(output())
        .stderr(output())
        .spawn()
        .unwrap()
}

fn leftovers(name: &str) -> Vec<PathBuf> {
    let all = trees().unwrap().into_iter().map(|(root, _)| root.join(unique(name)));
    all.filter(|folder| folder.exists()).collect()
}

#[test]
fn the_cris_two_spellings_lead_to_a_folder() {
    let relative = |path: &str| located(path).map(|(path, _)| path);
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
fn only_a_triple_is_a_scope() {
    let scope = |path: &str| located(path).unwrap().1;
    assert_eq!(scope("/kubepods/burstable/pod0e5b/5ab1"), None);
    let (slice, unit) = ("kubepods-pod0e5b.slice".to_owned(), "crio-5ab1.scope".to_owned());
    assert_eq!(scope("kubepods-pod0e5b.slice:crio:5ab1"), Some(Scope { slice, unit }));
    let (slice, unit) = ("system.slice".to_owned(), "77.scope".to_owned());
    assert_eq!(scope("::77"), Some(Scope { slice, unit }));
}

#[test]
fn a_sandboxs_processes_are_counted_killed_and_removed_with_it() {
    let name = "whole";
    let cgroup = SandboxCgroup::plan(&format!("/{}/pod/abc", unique(name))).unwrap();
    let record = cgroup.record();
    let mut children = [sleeper(), sleeper()];
    for child in &children {
        cgroup.create(child.id()).unwrap();
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
    let mut stranger = sleeper();
    parent.create(stranger.id()).unwrap();

    // A CRI that has made the folder itself: nothing of it is the sandbox's.
    let given = SandboxCgroup::plan(&unique(name)).unwrap();
    assert!(given.record().made.is_empty());
    given.create(stranger.id()).unwrap();
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
    cgroup.create(std::process::id()).unwrap();
    assert_ne!(std::fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    // Children are born where the shim is.
    let mut child = sleeper();
    cgroup.record().remove().unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
}

#[test]
fn a_pod_runs_on_the_processors_of_its_containers() {
    let name = "bound";
    let cgroup = SandboxCgroup::plan(&format!("/{}/abc", unique(name))).unwrap();
    let mut child = sleeper();
    let allowed = |pid: u32| -> CpuList {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.unwrap().parse().unwrap()
    };
    let list = |text: &str| -> CpuList { text.parse().unwrap() };
    let everywhere = allowed(child.id());
    cgroup.create(child.id()).unwrap();
    let processors = Processors::new(cgroup.clone());
    processors.set("one", list("0")).unwrap();
    assert_eq!(allowed(child.id()), list("0"));
    processors.set("two", list("1")).unwrap();
    assert_eq!(allowed(child.id()), list("0-1"));
    processors.remove("one").unwrap();
    assert_eq!(allowed(child.id()), list("1"));
    // One that may run anywhere must not be held back by the other.
    processors.set("three", CpuList::default()).unwrap();
    assert_eq!(allowed(child.id()), everywhere);
    processors.remove("three").unwrap();
    processors.set("four", list("8191")).unwrap_err();
    assert_eq!(allowed(child.id()), list("1"), "what is refused changes nothing");

    cgroup.record().remove().unwrap();
    child.wait().unwrap();
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
}

#[test]
fn a_kill_for_want_of_memory_is_known_when_its_process_has_ended() {
    let name = "memory";
    let cgroup = SandboxCgroup::plan(&format!("/{}/abc", unique(name))).unwrap();
    let mut innocent = sleeper();
    cgroup.create(innocent.id()).unwrap();
    let kills = OomKills::new(cgroup.clone());
    innocent.kill().unwrap();
    innocent.wait().unwrap();
    assert!(!kills.any());

    let mut glutton = Command::new("tail")
        .arg("/dev/zero")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    cgroup.create(glutton.id()).unwrap();
    let limit = if is_v2() { "memory.max" } else { "memory.limit_in_bytes" };
    std::fs::write(cgroup.folder_of("memory").unwrap().join(limit), "16777216").unwrap();
    assert!(!glutton.wait().unwrap().success());
    assert!(kills.any());
    cgroup.record().remove().unwrap();
    assert_eq!(leftovers(name), Vec::<PathBuf>::new());
    assert!(kills.any(), "also when the cgroup is gone");
}

/// On a host without systemd a triple is a folder, and everything else is the same.
#[test]
fn a_scope_is_systemds_where_systemd_is() {
    let name = unique("scope").replace('-', "_");
    let cgroup = SandboxCgroup::plan(&format!("{name}.slice:story:{name}")).unwrap();
    let unit = format!("story-{name}.scope");
    let active = || {
        let answer = Command::new("systemctl").args(["is-active", &unit]).output();
        answer.is_ok_and(|answer| answer.status.success())
    };
    let mut child = sleeper();
    cgroup.create(child.id()).unwrap();
    let own = std::fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
    assert!(
        own.lines()
            .all(|line| line.ends_with(&format!("/{name}.slice/{unit}")) || line.starts_with("0::/") && !is_v2()),
        "{own}"
    );
    assert_eq!(active(), systemd::is_booted());
    for leaf in &cgroup.record.leaves {
        assert_eq!(processes(&leaf.folder).unwrap(), [child.id()]);
    }
    cgroup.usage().unwrap();
    let processors = Processors::new(cgroup.clone());
    processors.set("one", "0".parse().unwrap()).unwrap();
    let allowed = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(allowed.contains("Cpus_allowed_list:\t0\n"), "{allowed}");
    processors.remove("one").unwrap();
    let allowed = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(!allowed.contains("Cpus_allowed_list:\t0\n"), "{allowed}");

    cgroup.record().remove().unwrap();
    child.wait().unwrap();
    for leaf in &cgroup.record.leaves {
        assert!(!leaf.folder.exists(), "{leaf:?}");
        drop(std::fs::remove_dir(leaf.folder.parent().unwrap()));
    }
    if systemd::is_booted() {
        let stopped = Command::new("systemctl")
            .args(["stop", &format!("{name}.slice")])
            .status();
        assert!(stopped.unwrap().success() && !active());
    }
}

#[test]
fn a_scopes_folder_is_left_to_systemd_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let scope = folder.path().join("cri-1.scope");
    std::fs::create_dir(&scope).unwrap();
    systemd::wait_for_removal(&scope, Duration::ZERO).unwrap();
    assert!(scope.exists());
    std::thread::scope(|threads| {
        threads.spawn(|| std::fs::remove_dir(&scope).unwrap());
        // The deadline is the test's.
        systemd::wait_for_removal(&scope, Duration::from_secs(600)).unwrap();
        assert!(!scope.exists());
    });
    systemd::wait_for_removal(&folder.path().join("gone.slice/gone.scope"), END).unwrap();
}
