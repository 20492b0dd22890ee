//! Limits by cgroup.

use std::{fs, sync::Arc, time::Instant};

use agent::engine::EngineError;
use serde_json::json;

use crate::{
    case,
    guest::{Case, Guest, say},
    spec::{base, idle, process, script, with},
};

pub const CASES: &[Case] = &[
    case!(limits_are_written),
    case!(too_many_tasks_are_refused),
    case!(too_much_memory_is_killed),
    case!(limits_change_while_it_runs),
    case!(cgroup_paths_of_all_forms_work),
    case!(a_deleted_container_leaves_no_cgroup),
    case!(an_exec_beside_a_deletion_leaves_nothing),
    case!(an_exec_enters_a_container_that_made_cgroups),
];

fn value(id: &str, file: &str) -> String {
    let path = format!("/sys/fs/cgroup/kata/kubepods/pod1/{id}/{file}");
    fs::read_to_string(&path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|e| format!("{path}: {e}"))
}

async fn limits_are_written(guest: Arc<Guest>) {
    let limits = json!({ "linux": { "resources": {
        "memory": { "limit": 64 << 20, "swap": 64 << 20, "reservation": 32 << 20 },
        "cpu": { "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0" },
        "pids": { "limit": 0 }, "unified": { "memory.high": "60000000" }
    } } });
    let running = guest.start("c", with(idle("c"), limits)).await;
    assert_eq!(value("c", "memory.max"), (64 << 20).to_string());
    assert_eq!(value("c", "memory.swap.max"), "0");
    assert_eq!(value("c", "memory.low"), (32 << 20).to_string());
    assert_eq!(value("c", "cpu.max"), "50000 100000");
    assert_eq!(value("c", "cpuset.cpus"), "0");
    assert_eq!(value("c", "pids.max"), "max");
    assert!(
        value("c", "memory.high").starts_with("5999"),
        "{}",
        value("c", "memory.high")
    );
    assert_ne!(value("c", "cpu.weight"), "100");
    guest.kill("c", running).await;
}

async fn too_many_tasks_are_refused(guest: Arc<Guest>) {
    let few = json!({ "linux": { "resources": { "pids": { "limit": 5 } } } });
    let ended = guest
        .run(
            "c",
            with(script("c", "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; wait"), few),
        )
        .await;
    assert!(ended.err.contains("can't fork"), "{ended:?}");
    let any = json!({ "linux": { "resources": { "pids": { "limit": -1 } } } });
    let running = guest.start("c", with(idle("c"), any)).await;
    assert_eq!(value("c", "pids.max"), "max");
    guest.kill("c", running).await;
}

async fn too_much_memory_is_killed(guest: Arc<Guest>) {
    let little = json!({ "linux": { "resources": { "memory": { "limit": 16 << 20, "swap": 16 << 20 } } } });
    let eat = "dd if=/dev/zero of=/dev/shm/x bs=1M count=60";
    let running = guest
        .start("c", with(base("c", &["sh", "-c", &format!("exec {eat}")]), little))
        .await;
    let ended = guest.end(running).await;
    assert_eq!(ended.code, 137, "{ended:?}");
    assert!(
        value("c", "memory.events").contains("oom_kill 1"),
        "{}",
        value("c", "memory.events")
    );
    guest.engine.delete("c").await.expect("a deletion");
}

async fn limits_change_while_it_runs(guest: Arc<Guest>) {
    let little = json!({ "linux": { "resources": { "memory": { "limit": 16 << 20 }, "pids": { "limit": 20 } } } });
    let running = guest.start("c", with(idle("c"), little)).await;
    let update = |change| serde_json::from_value(change).expect("resources");
    let began = Instant::now();
    let more =
        json!({ "memory": { "limit": 128 << 20, "swap": 256 << 20 }, "cpu": { "quota": 20_000, "period": 100_000 } });
    guest.engine.update("c", &update(more)).await.expect("an update");
    say(&format!("update {} ms", began.elapsed().as_millis()));
    assert_eq!(value("c", "memory.max"), (128 << 20).to_string());
    assert_eq!(value("c", "memory.swap.max"), (128 << 20).to_string());
    assert_eq!(value("c", "cpu.max"), "20000 100000");
    assert_eq!(value("c", "pids.max"), "20");
    guest
        .engine
        .update("c", &update(json!({ "pids": { "limit": 0 } })))
        .await
        .expect("an update");
    assert_eq!(value("c", "pids.max"), "max");
    guest
        .engine
        .update("c", &update(json!({ "memory": { "limit": -1 } })))
        .await
        .expect("an update");
    assert_eq!(value("c", "memory.max"), "max");
    let wrong = guest
        .engine
        .update("c", &update(json!({ "memory": { "limit": 2 << 20, "swap": 1 << 20 } })))
        .await;
    assert!(wrong.is_err_and(|e| e.to_string().contains("swap")));
    // Devices still are what they were.
    let ended = guest
        .exec(
            "c",
            process(&[
                "sh",
                "-c",
                "mknod /tmp/m c 1 11; dd if=/tmp/m count=1; rm /tmp/m; echo >/dev/null",
            ]),
        )
        .await;
    assert!(ended.err.contains("Operation not permitted"), "{ended:?}");
    assert_eq!(ended.code, 0);
    guest.kill("c", running).await;
    let none = guest.engine.update("c", &update(json!({}))).await;
    assert!(matches!(none, Err(EngineError::NotFound(_))));
}

async fn cgroup_paths_of_all_forms_work(guest: Arc<Guest>) {
    for (given, made) in [
        (
            json!("kubepods.slice:cri-containerd:abc"),
            "kata/kubepods.slice/cri-containerd/abc",
        ),
        (json!("/a/b"), "kata/a/b"),
        (json!("/kata/b"), "kata/b"),
        (json!(""), "kata/c"),
        (json!(null), "kata/c"),
    ] {
        let running = guest
            .start("c", with(idle("c"), json!({ "linux": { "cgroupsPath": given } })))
            .await;
        assert_eq!(
            guest.engine.cgroup("c").expect("a cgroup"),
            std::path::Path::new("/sys/fs/cgroup").join(made)
        );
        let procs = fs::read_to_string(format!("/sys/fs/cgroup/{made}/cgroup.procs")).expect("processes");
        assert_eq!(procs.trim(), running.pid.to_string());
        guest.kill("c", running).await;
        assert!(!std::path::Path::new("/sys/fs/cgroup").join(made).exists());
    }
}

async fn a_deleted_container_leaves_no_cgroup(guest: Arc<Guest>) {
    // Deleted while init and a child run.
    let running = guest.start("c", script("c", "sleep 1000 & sleep 1000")).await;
    let began = Instant::now();
    guest.engine.delete("c").await.expect("a deletion");
    say(&format!(
        "delete of a running container {} ms",
        began.elapsed().as_millis()
    ));
    assert_eq!(guest.end(running).await.code, 137);
    assert!(!std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists());
    // Deleted before it was started.
    let running = guest.create("c", idle("c")).await.expect("a container");
    guest.engine.delete("c").await.expect("a deletion");
    assert_eq!(guest.end(running).await.code, 137);
    assert_eq!(
        fs::read_dir("/run/kata-containers/engine").expect("a folder").count(),
        0
    );
}

async fn an_exec_beside_a_deletion_leaves_nothing(guest: Arc<Guest>) {
    for round in 0..20 {
        let running = guest.start("c", idle("c")).await;
        let exec = guest.try_exec("c", process(&["sleep", "1000"]));
        // Each round the deletion comes a little later: before, while and after the process enters the cgroup.
        let delete = async {
            for _ in 0..round * 200 {
                tokio::task::yield_now().await;
            }
            guest.engine.delete("c").await.expect("a deletion");
        };
        let (exec, ()) = tokio::join!(exec, delete);
        assert_eq!(guest.end(running).await.code, 137);
        if let Ok(process) = exec {
            assert_eq!(guest.end(process).await.code, 137);
        }
        assert!(
            !std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists(),
            "round {round}"
        );
    }
}

async fn an_exec_enters_a_container_that_made_cgroups(guest: Arc<Guest>) {
    // As systemd does in a privileged container.
    let writable = with(
        idle("c"),
        json!({ "process": { "args": ["sh", "-c",
        "mkdir -p /sys/fs/cgroup/init /sys/fs/cgroup/more/deep && echo 1 >/sys/fs/cgroup/init/cgroup.procs && \
         echo +memory >/sys/fs/cgroup/cgroup.subtree_control && echo ready && sleep 1000"] } }),
    );
    let mut spec = writable;
    for mount in spec["mounts"].as_array_mut().expect("mounts") {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["nosuid"]);
        }
    }
    let running = guest.start("c", spec).await;
    while value("c", "cgroup.subtree_control") != "memory" {
        tokio::task::yield_now().await;
    }
    let ended = guest.exec("c", process(&["cat", "/proc/self/cgroup"])).await;
    assert_eq!(ended.out, "0::/init", "{ended:?}");
    guest.engine.delete("c").await.expect("a deletion");
    guest.end(running).await;
    assert!(!std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists());
}
