//! Containers and processes from creation to removal.

use std::sync::Arc;

use agent_protocol::{client::ClientError, protocol::agent::*};
use serde_json::json;
use ttrpc::Code;

use super::pod::{Pod, SHARE, base, create, process, root_file_system};

super::cases![
    a_container_runs_to_its_exit_code,
    the_guest_tells_what_it_is,
    a_container_finds_its_pod,
    a_guest_has_the_limits_of_a_node,
    unknown_containers_and_processes_have_their_statuses,
    what_is_not_there_yet_is_unimplemented_by_name,
    a_container_that_cannot_be_made_leaves_nothing,
    a_container_exists_once,
    a_program_that_is_missing_fails_the_start,
    a_process_is_signalled_by_its_exec_id,
    any_signal_reaches_all_processes_that_are_counted,
    a_process_dies_by_any_signal,
    a_stop_signal_is_nothing_to_an_init_without_a_handler,
    a_stop_signal_reaches_a_handler,
    a_created_container_can_be_killed,
    killing_all_ends_every_process,
    many_waiters_see_one_exit,
    an_exec_is_forgotten_when_all_of_it_was_told,
    a_removed_container_takes_its_processes_along,
    containers_share_their_processes_on_demand,
    a_pause_container_leads_the_shared_processes,
    a_pod_has_many_containers,
    orphans_are_reaped,
    the_host_gets_a_removed_containers_files_back,
    the_guest_ends_with_its_engine,
];

/// The status of an answer.
pub fn code(error: &ClientError) -> Code {
    match error {
        ClientError::Rpc { code, .. } => *code,
        ClientError::NotFound(_) => Code::NOT_FOUND,
        other => panic!("{other}"),
    }
}

async fn a_container_runs_to_its_exit_code(pod: Arc<Pod>) {
    pod.run("c", "echo hello; exit 7").await;
    assert_eq!(pod.output("c", "c").await, b"hello\n");
    assert_eq!(pod.wait("c", "").await, 7);
    pod.remove("c").await;
}

async fn a_process_dies_by_any_signal(pod: Arc<Pod>) {
    // Those whose default is not the end: SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH.
    const HARMLESS: [i32; 8] = [17, 18, 19, 20, 21, 22, 23, 28];
    pod.run("c", "sleep 600").await;
    for signal in (1..=64).filter(|signal| !HARMLESS.contains(signal)) {
        // Not a shell, which may have a mind of its own.
        pod.try_exec("c", "dying", process("exec sleep 600")).await.unwrap();
        pod.signal("c", "dying", signal).await.unwrap();
        assert_eq!(pod.wait("c", "dying").await, 128 + signal);
    }
    // An init that leads no PID namespace of its own.
    let mut request = create("shared", base("kill -40 $$; sleep 600"));
    request.sandbox_pidns = true;
    pod.try_create(request).await.unwrap();
    pod.start("shared").await;
    assert_eq!(pod.wait("shared", "").await, 168);
    for container in ["shared", "c"] {
        pod.remove(container).await;
    }
}

async fn the_guest_tells_what_it_is(pod: Arc<Pod>) {
    let version = pod.client.version().await.unwrap();
    assert_eq!(version.grpc_version, "0.0.1");
    let agent = pod.details.agent_details.clone().unwrap();
    assert_eq!(agent.version, version.agent_version);
    assert!(agent.init_daemon && agent.supports_seccomp);
    assert_eq!(pod.details.mem_block_size_bytes % (1 << 20), 0);
    let clock = |key: &str| {
        let text = agent
            .extra_features
            .iter()
            .find_map(|feature| feature.strip_prefix(key))
            .unwrap();
        text.parse::<u64>().unwrap()
    };
    let (began, answered) = (clock("sandpod.pid1_us="), clock("sandpod.now_us="));
    println!(
        "PID 1 at {began} µs, described itself at {answered} µs, first answer after {:?}",
        pod.answered
    );
    assert!(began < answered);
}

/// A pod whose containers nobody can make or look into any more is none.
async fn the_guest_ends_with_its_engine(_: Arc<Pod>) {
    let pod = Pod::boot("").await.unwrap();
    let find = "for process in /proc/[0-9]*; do grep -q ^container-engin $process/comm && echo ${process#/proc/}; done";
    let mut spec = base(&format!("kill -9 $({find})"));
    spec["annotations"] = json!({ agent_protocol::GUEST_PIDS: "true" });
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    pod.await_console("the container engine's helper process has ended with 137")
        .await;
    pod.end();
}

async fn a_guest_has_the_limits_of_a_node(pod: Arc<Pod>) {
    let script = "cd /proc/sys && cat fs/protected_hardlinks fs/protected_symlinks fs/protected_fifos \
                  fs/protected_regular kernel/dmesg_restrict vm/max_map_count fs/inotify/max_user_watches \
                  fs/inotify/max_user_instances";
    pod.run("c", script).await;
    let text = String::from_utf8(pod.output("c", "").await).unwrap();
    let values: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(values, [1, 1, 1, 1, 1, 1_048_576, 524_288, 1024]);
    pod.remove("c").await;
}

async fn a_container_finds_its_pod(pod: Arc<Pod>) {
    pod.run(
        "c",
        "hostname; stat -f -c %b*%S /dev/shm; cat /proc/self/cgroup; ulimit -n; sleep 600",
    )
    .await;
    let text = pod.read_until("c", "", "1048576").await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..3], ["pod-host", "2048*4096", "0::/"]);
    // What one container leaves in the pod's shared memory another finds, and so with the host name's namespace.
    pod.run(
        "d",
        "echo here >/dev/shm/note; readlink /proc/self/ns/uts /proc/self/ns/ipc",
    )
    .await;
    let theirs = String::from_utf8(pod.output("d", "").await).unwrap();
    let (code, ours) = pod
        .exec("c", "readlink /proc/self/ns/uts /proc/self/ns/ipc; cat /dev/shm/note")
        .await;
    assert_eq!((code, ours), (0, theirs + "here\n"));
    // But not its processes, nor the agent's.
    let (_, pids) = pod.exec("c", "ls -d /proc/[0-9]* | wc -l").await;
    assert!(pids.trim().parse::<u32>().unwrap() < 8, "{pids}");
    pod.remove("c").await;
    pod.remove("d").await;
}

async fn unknown_containers_and_processes_have_their_statuses(pod: Arc<Pod>) {
    let mut request = StartContainerRequest::new();
    request.container_id = "nobody".into();
    let error = pod.client.start_container(request).await.unwrap_err();
    assert_eq!(code(&error), Code::INVALID_ARGUMENT);
    assert!(
        error.to_string().starts_with("container \"nobody\" does not exist"),
        "{error}"
    );
    pod.run("c", "sleep 600").await;
    assert!(matches!(
        pod.try_wait("c", "nobody").await,
        Err(ClientError::NotFound(_))
    ));
    assert!(matches!(
        pod.signal("c", "nobody", 15).await,
        Err(ClientError::NotFound(_))
    ));
    pod.signal("c", "c", 9).await.unwrap();
    assert_eq!(pod.wait("c", "c").await, 137);
    assert!(matches!(pod.signal("c", "c", 15).await, Err(ClientError::NotFound(_))));
    // All of it stays killable until it is removed.
    pod.signal("c", "", 9).await.unwrap();
    assert_eq!(
        code(&pod.signal("c", "c", 99).await.unwrap_err()),
        Code::INVALID_ARGUMENT
    );
    pod.remove("c").await;
}

async fn what_is_not_there_yet_is_unimplemented_by_name(pod: Arc<Pod>) {
    let mut request = create("c", base("true"));
    let mut device = Device::new();
    (device.type_, device.container_path) = ("vfio-pci".into(), "/dev/vfio/7".into());
    request.devices.push(device);
    let error = pod.try_create(request).await.unwrap_err();
    assert_eq!(code(&error), Code::UNIMPLEMENTED);
    assert!(
        error
            .to_string()
            .contains("the device \"/dev/vfio/7\" of type \"vfio-pci\""),
        "{error}"
    );
    for (driver, code_of_it, sentence) in [
        ("nvdimm", Code::UNIMPLEMENTED, "the storage driver \"nvdimm\""),
        // It is, but nobody has plugged that disk.
        (
            "scsi",
            Code::INVALID_ARGUMENT,
            "no scsi device \"0:1\" has come within 3s",
        ),
    ] {
        let mut request = create("c", base("true"));
        let storage = super::pod::storage(driver, "0:1", "ext4", &[], "/run/kata-containers/sandbox/x");
        request.storages.push(storage);
        let error = pod.try_create(request).await.unwrap_err();
        assert_eq!(code(&error), code_of_it, "{error}");
        assert!(error.to_string().contains(sentence), "{error}");
    }
}

async fn a_container_that_cannot_be_made_leaves_nothing(pod: Arc<Pod>) {
    let mut spec = base("true");
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/no/such/folder", "options": ["rbind"]
    }));
    let mut request = create("c", spec);
    let point = "/run/kata-containers/sandbox/ephemeral/gone";
    request
        .storages
        .push(super::pod::storage("ephemeral", "tmpfs", "tmpfs", &[], point));
    let error = pod.try_create(request).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    a_container_runs_to_its_exit_code(pod).await;
}

async fn a_container_exists_once(pod: Arc<Pod>) {
    pod.run("c", "read line; exit 5").await;
    let error = pod.try_create(create("c", base("true"))).await.unwrap_err();
    assert!(error.to_string().starts_with("container c exists"), "{error}");
    // The first is none the worse for it.
    pod.write("c", "", b"go\n").await;
    assert_eq!(pod.wait("c", "").await, 5);
    pod.remove("c").await;
}

async fn a_program_that_is_missing_fails_the_start(pod: Arc<Pod>) {
    let mut spec = base("");
    spec["process"]["args"] = json!(["no-such-program"]);
    let error = match pod.try_create(create("c", spec)).await {
        Err(error) => error,
        Ok(()) => {
            let mut request = StartContainerRequest::new();
            request.container_id = "c".into();
            let error = pod.client.start_container(request).await.unwrap_err();
            pod.remove("c").await;
            error
        }
    };
    assert!(
        error
            .to_string()
            .contains("\"no-such-program\": executable file not found in $PATH"),
        "{error}"
    );
    pod.run("c", "sleep 600").await;
    let mut missing = process("");
    missing["args"] = json!(["/bin/missing"]);
    let error = pod.try_exec("c", "x", missing).await.unwrap_err();
    assert!(error.to_string().contains("/bin/missing"), "{error}");
    // Its exec_id is free again.
    assert_eq!(pod.exec("c", "exit 3").await.0, 3);
    pod.remove("c").await;
}

async fn a_process_is_signalled_by_its_exec_id(pod: Arc<Pod>) {
    pod.run("c", "trap 'exit 5' USR1; echo ready; while true; do sleep 0.1; done")
        .await;
    pod.read_until("c", "c", "ready").await;
    pod.try_exec(
        "c",
        "x",
        process("trap 'exit 6' USR1; echo ready; while true; do sleep 0.1; done"),
    )
    .await
    .unwrap();
    pod.read_until("c", "x", "ready").await;
    pod.signal("c", "x", 10).await.unwrap();
    assert_eq!(pod.wait("c", "x").await, 6);
    pod.signal("c", "", 10).await.unwrap();
    assert_eq!(pod.wait("c", "").await, 5);
    pod.remove("c").await;
}

async fn any_signal_reaches_all_processes_that_are_counted(pod: Arc<Pod>) {
    let waits = |then: &str| format!("trap '{then}' USR1; echo ready; while true; do read line </proc/self/fd/9; done");
    // With the init would go the exec, signalled or not: it ends when the test has seen the end of the exec.
    let script = format!(
        "mkfifo /tmp/never /tmp/any-over; exec 8<>/tmp/any-over 9<>/tmp/never; (exec sleep 600) & {}",
        waits("until read line <&8; do :; done; exit 5")
    );
    pod.run("c", &script).await;
    pod.read_until("c", "c", "ready").await;
    let exec = format!("exec 9<>/tmp/never; {}", waits("exit 6"));
    pod.try_exec("c", "x", process(&exec)).await.unwrap();
    pod.read_until("c", "x", "ready").await;
    let mut count = StatsContainerRequest::new();
    count.container_id = "c".into();
    assert_eq!(pod.client.stats_container(count.clone()).await.unwrap().processes, 0);
    count.count_processes = true;
    assert_eq!(pod.client.stats_container(count).await.unwrap().processes, 3);
    let mut all = SignalProcessRequest::new();
    (all.container_id, all.exec_id, all.signal, all.all) = ("c".into(), "c".into(), 10, true);
    pod.client.signal_process(all).await.unwrap();
    assert_eq!(pod.wait("c", "x").await, 6);
    assert_eq!(pod.exec("c", "echo >/tmp/any-over").await.0, 0);
    assert_eq!(pod.wait("c", "c").await, 5);
    pod.remove("c").await;
}

async fn a_stop_signal_is_nothing_to_an_init_without_a_handler(pod: Arc<Pod>) {
    pod.run("c", "while [ ! -e /tmp/over ]; do sleep 0.1; done; exit 4")
        .await;
    pod.signal("c", "c", 15).await.unwrap();
    // As long as its grace period lasts it goes on, and may end by itself.
    assert_eq!(pod.exec("c", "touch /tmp/over").await.0, 0);
    assert_eq!(pod.wait("c", "c").await, 4);
    pod.remove("c").await;
}

async fn a_stop_signal_reaches_a_handler(pod: Arc<Pod>) {
    pod.run(
        "c",
        "trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.1; done",
    )
    .await;
    pod.read_until("c", "c", "ready").await;
    pod.signal("c", "c", 15).await.unwrap();
    assert_eq!(pod.read_until("c", "c", "bye").await, "bye\n");
    assert_eq!(pod.wait("c", "c").await, 0);
    pod.remove("c").await;
}

async fn a_created_container_can_be_killed(pod: Arc<Pod>) {
    pod.create("c", "echo never").await;
    pod.signal("c", "", 9).await.unwrap();
    assert_eq!(pod.wait("c", "").await, 137);
    assert_eq!(pod.output("c", "").await, b"");
    pod.remove("c").await;
}

async fn killing_all_ends_every_process(pod: Arc<Pod>) {
    pod.run("c", "echo ready; sleep 600 & wait").await;
    pod.read_until("c", "", "ready").await;
    pod.try_exec("c", "x", process("echo ready; sleep 600")).await.unwrap();
    pod.read_until("c", "x", "ready").await;
    pod.signal("c", "", 9).await.unwrap();
    assert_eq!((pod.wait("c", "").await, pod.wait("c", "x").await), (137, 137));
    assert_eq!(pod.output("c", "").await, b"");
    pod.remove("c").await;
}

async fn many_waiters_see_one_exit(pod: Arc<Pod>) {
    pod.run("c", "read line; exit 9").await;
    pod.try_exec("c", "x", process("read line; exit 8")).await.unwrap();
    let waiters: Vec<_> = ["", "c", "x", "x"]
        .into_iter()
        .map(|exec| {
            let pod = Arc::clone(&pod);
            tokio::spawn(async move { pod.wait("c", exec).await })
        })
        .collect();
    pod.write("c", "x", b"go\n").await;
    pod.write("c", "c", b"go\n").await;
    let mut codes = Vec::new();
    for waiter in waiters {
        codes.push(waiter.await.unwrap());
    }
    // The end of a container's init takes what else is in its PID namespace along.
    assert_eq!(codes[..2], [9, 9]);
    assert!(codes[2..] == [8, 8] || codes[2..] == [137, 137], "{codes:?}");
    assert_eq!(pod.wait("c", "c").await, 9);
    pod.remove("c").await;
}

async fn an_exec_is_forgotten_when_all_of_it_was_told(pod: Arc<Pod>) {
    pod.run("c", "sleep 600").await;
    pod.try_exec("c", "x", process("echo out; echo err >&2; exit 4"))
        .await
        .unwrap();
    // First the exit, then the output that it left.
    assert_eq!(pod.wait("c", "x").await, 4);
    assert!(matches!(pod.signal("c", "x", 15).await, Err(ClientError::NotFound(_))));
    assert_eq!(pod.output("c", "x").await, b"out\n");
    assert_eq!(pod.errors("c", "x").await, "err\n");
    assert!(matches!(pod.try_wait("c", "x").await, Err(ClientError::NotFound(_))));
    pod.remove("c").await;
}

async fn a_removed_container_takes_its_processes_along(pod: Arc<Pod>) {
    pod.run("c", "trap '' TERM; echo ready; sleep 600").await;
    pod.read_until("c", "", "ready").await;
    let waiter = tokio::spawn({
        let pod = Arc::clone(&pod);
        async move { pod.wait("c", "").await }
    });
    // The waiter is there before its container goes.
    tokio::task::yield_now().await;
    pod.exec("c", "true").await;
    pod.remove("c").await;
    assert_eq!(waiter.await.unwrap(), 137);
    let error = pod.try_wait("c", "").await.unwrap_err();
    assert_eq!(code(&error), Code::INVALID_ARGUMENT);
    a_container_runs_to_its_exit_code(pod).await;
}

async fn containers_share_their_processes_on_demand(pod: Arc<Pod>) {
    for id in ["c", "d"] {
        let mut request = create(id, base("sleep 600"));
        request.sandbox_pidns = true;
        pod.try_create(request).await.unwrap();
        pod.start(id).await;
    }
    let (_, processes) = pod
        .exec(
            "c",
            "ps -o comm,args | grep -c '[s]leep 600'; cat /proc/1/comm; ls /proc/1/root",
        )
        .await;
    let lines: Vec<_> = processes.lines().collect();
    assert_eq!(lines[..2], ["2", "pause"], "{processes}");
    // The namespace's first process shows nothing of the guest.
    assert_eq!(lines.len(), 2, "{processes}");
    // Not its namespace's first process, the init ends as any other.
    pod.signal("c", "c", 15).await.unwrap();
    assert_eq!(pod.wait("c", "c").await, 143);
    pod.remove("c").await;
    assert_eq!(pod.exec("d", "true").await.0, 0);
    pod.remove("d").await;
}

async fn a_pause_container_leads_the_shared_processes(pod: Arc<Pod>) {
    // As upstream's shims do it: a container of the sandbox's name comes first.
    let mut request = create("pod", base("sleep 700"));
    request.sandbox_pidns = true;
    pod.try_create(request).await.unwrap();
    pod.start("pod").await;
    let mut request = create("c", base("sleep 600"));
    request.sandbox_pidns = true;
    pod.try_create(request).await.unwrap();
    pod.start("c").await;
    let (_, processes) = pod.exec("c", "ps -o pid,args").await;
    assert!(
        processes.contains("    1 sleep 700") || processes.contains("    1 /bin/sh -c sleep 700"),
        "{processes}"
    );
    pod.remove("c").await;
    pod.remove("pod").await;
}

async fn a_pod_has_many_containers(pod: Arc<Pod>) {
    let containers: Vec<_> = (0..20)
        .map(|n| {
            let pod = Arc::clone(&pod);
            tokio::spawn(async move {
                let id = format!("many-{n}");
                pod.run(&id, &format!("echo {n}; exit {n}")).await;
                assert_eq!(pod.output(&id, "").await, format!("{n}\n").as_bytes());
                assert_eq!(pod.wait(&id, "").await, n);
                pod.remove(&id).await;
            })
        })
        .collect();
    for container in containers {
        container.await.unwrap();
    }
}

async fn orphans_are_reaped(pod: Arc<Pod>) {
    let mut spec = base("");
    // The guest's processes are seen in a PID namespace that is not the container's own.
    spec["process"]["args"] = json!(["sleep", "600"]);
    let mut request = create("c", spec);
    request.sandbox_pidns = true;
    pod.try_create(request).await.unwrap();
    pod.start("c").await;
    let (_, output) = pod
        .exec(
            "c",
            "(sh -c 'sleep 0.1 & echo started' &); sleep 0.5; ps -o stat,args | grep -c '^Z'",
        )
        .await;
    assert_eq!(output, "started\n0\n");
    pod.remove("c").await;
}

async fn the_host_gets_a_removed_containers_files_back(pod: Arc<Pod>) {
    let folder = pod.share().join("c");
    let root = folder.join("rootfs");
    std::fs::create_dir_all(&root).unwrap();
    let none = None::<&str>;
    let mounted = nix::mount::mount(Some("tmpfs"), &root, Some("tmpfs"), nix::mount::MsFlags::empty(), none);
    if mounted == Err(nix::errno::Errno::EPERM) {
        return println!("not tested: only root can mount");
    }
    mounted.unwrap();
    root_file_system(&root).unwrap();
    let mut spec = base("echo hello");
    spec["root"]["path"] = json!(format!("{SHARE}/c/rootfs"));
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    assert_eq!(pod.output("c", "").await, b"hello\n");
    pod.wait("c", "").await;
    pod.remove("c").await;
    // The file server lets go when it hears of it: by a message that nobody answers.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while let Err(error) = nix::mount::umount(&root) {
        assert_eq!(error, nix::errno::Errno::EBUSY);
        if std::time::Instant::now() > deadline {
            nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH).unwrap();
            panic!("the container's root is still in use");
        }
        tokio::task::yield_now().await;
    }
    std::fs::remove_dir_all(folder).unwrap();
}
