//! Containers in time: many at once, hooks, and the zygote itself.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    case,
    guest::{Case, Guest, say},
    spec::{base, idle, process, script, with},
};

pub const CASES: &[Case] = &[
    case!(an_id_is_used_once_at_a_time),
    case!(hooks_run_at_their_stages),
    case!(a_failing_hook_fails_the_creation),
    case!(a_hook_that_hangs_is_ended),
    case!(twenty_containers_at_once),
    case!(twenty_execs_at_once),
    case!(a_large_specification_passes),
    case!(nothing_leaks),
];

async fn an_id_is_used_once_at_a_time(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let error = guest.create("c", idle("c")).await.err().expect("a failure").to_string();
    assert_eq!(error, "container c exists");
    guest.kill("c", running).await;
    assert_eq!(guest.run("c", base("c", &["true"])).await.code, 0);
}

fn hook(name: &str) -> serde_json::Value {
    json!([{ "path": "/rootfs/bin/sh", "args": ["sh", "-c", format!("/rootfs/bin/cat >/run/hook-{name}")] }])
}

async fn hooks_run_at_their_stages(guest: Arc<Guest>) {
    let inside = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "cat >/tmp/hook-start"], "env": ["PATH=/bin"] }]);
    let hooks = json!({ "hooks": {
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "startContainer": inside, "poststart": hook("poststart"), "poststop": hook("poststop")
    } });
    let ran = |name: &str| fs::read_to_string(format!("/run/hook-{name}")).ok();
    let running = guest.create("c", with(idle("c"), hooks)).await.expect("a container");
    let state = ran("createRuntime").expect("a hook that ran");
    assert!(
        state.contains(&format!("\"pid\":{}", running.pid)) && state.contains("\"id\":\"c\""),
        "{state}"
    );
    assert!(ran("prestart").is_some() && ran("createContainer").is_some());
    assert!(ran("poststart").is_none());
    guest.engine.start("c").await.expect("a start");
    assert!(ran("poststart").is_some_and(|state| state.contains("running")));
    assert_eq!(
        guest.exec("c", process(&["test", "-s", "/tmp/hook-start"])).await.code,
        0
    );
    assert!(ran("poststop").is_none());
    guest.kill("c", running).await;
    assert!(ran("poststop").is_some_and(|state| state.contains("stopped")));
}

async fn a_failing_hook_fails_the_creation(guest: Arc<Guest>) {
    let failing = json!([{ "path": "/rootfs/bin/false" }]);
    let hooks = json!({ "hooks": { "createRuntime": failing } });
    let error = guest
        .create("c", with(idle("c"), hooks))
        .await
        .err()
        .expect("a failure")
        .to_string();
    assert!(error.starts_with("the hook /rootfs/bin/false: "), "{error}");
    assert!(!std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists());
}

async fn a_hook_that_hangs_is_ended(guest: Arc<Guest>) {
    let hook = json!([{ "path": "/rootfs/bin/sh", "args": ["sh", "-c", "exec /rootfs/bin/sleep 600"], "timeout": 1 }]);
    let spec = with(idle("c"), json!({ "hooks": { "prestart": hook } }));
    let error = guest.create("c", spec).await.err().expect("a failure").to_string();
    assert!(error.starts_with("the hook /rootfs/bin/sh: "), "{error}");
    assert!(error.contains("timeout"), "{error}");
    assert_eq!(guest.run("c", base("c", &["true"])).await.code, 0);
}

async fn twenty_containers_at_once(guest: Arc<Guest>) {
    let began = Instant::now();
    let all: Vec<_> = (0..20)
        .map(|n| {
            let guest = Arc::clone(&guest);
            tokio::spawn(async move {
                let id = format!("many{n}");
                let spec = script(&id, &format!("echo {n}; exit {n}"));
                guest.run(&id, spec).await
            })
        })
        .collect();
    for (n, ended) in all.into_iter().enumerate() {
        let ended = ended.await.expect("a container");
        assert_eq!((ended.code, ended.out), (n as i32, n.to_string()));
    }
    say(&format!(
        "twenty containers at once, from creation to deletion: {} ms",
        began.elapsed().as_millis()
    ));
}

async fn twenty_execs_at_once(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let began = Instant::now();
    let all: Vec<_> = (0..20)
        .map(|n| {
            let guest = Arc::clone(&guest);
            tokio::spawn(async move { guest.exec("c", process(&["sh", "-c", &format!("exit {n}")])).await.code })
        })
        .collect();
    for (n, code) in all.into_iter().enumerate() {
        assert_eq!(code.await.expect("an exec"), n as i32);
    }
    say(&format!("twenty execs at once: {} ms", began.elapsed().as_millis()));
    guest.kill("c", running).await;
}

async fn a_large_specification_passes(guest: Arc<Guest>) {
    let mut env: Vec<_> = (0..5000)
        .map(|n| format!("SERVICE_{n}_PORT=tcp://10.0.0.1:80/{}", "x".repeat(60)))
        .collect();
    env.push("PATH=/bin".to_owned());
    let ended = guest
        .run(
            "c",
            with(
                script("c", "env | grep -c ^SERVICE_"),
                json!({ "process": { "env": env } }),
            ),
        )
        .await;
    assert_eq!(ended.out, "5000", "{:?}", ended.err);
}

async fn nothing_leaks(guest: Arc<Guest>) {
    let count = |folder: &str| fs::read_dir(folder).expect("a folder").count();
    let zygote = fs::read_dir("/proc").expect("processes").flatten().find_map(|entry| {
        let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
        (comm.trim() == "container-engin").then(|| entry.path())
    });
    let zygote = zygote.expect("the zygote").join("fd");
    let zygote = zygote.to_str().expect("a path");
    let before = (count("/proc/self/fd"), count(zygote));
    for _ in 0..5 {
        let running = guest.start("c", idle("c")).await;
        assert_eq!(
            guest
                .exec("c", process(&["sh", "-c", "ls /proc/self/fd | wc -l"]))
                .await
                .out,
            "4"
        );
        assert!(guest.try_exec("c", process(&["nosuch"])).await.is_err());
        guest.kill("c", running).await;
        assert!(guest.create("c", base("c", &["nosuch"])).await.is_err());
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    // The zygote closes a request's descriptors after it was answered.
    while (count("/proc/self/fd"), count(zygote)) != before {
        assert!(
            Instant::now() < deadline,
            "{:?}, not {before:?}",
            (count("/proc/self/fd"), count(zygote))
        );
        tokio::task::yield_now().await;
    }
    let zombies = || {
        let processes = fs::read_dir("/proc").expect("processes").flatten();
        processes.filter(|entry| fs::read_to_string(entry.path().join("stat")).is_ok_and(|stat| stat.contains(") Z ")))
    };
    // The last ones are still to be reaped, by this process.
    while zombies().count() > 0 {
        assert!(Instant::now() < deadline, "zombies");
        tokio::task::yield_now().await;
    }
}
