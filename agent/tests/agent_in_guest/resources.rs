//! Limits, statistics, and the guest's own resources.

use std::sync::Arc;

use agent_protocol::protocol::agent::*;
use serde_json::json;

use super::pod::{Pod, base, create, storage};

super::cases![
    a_container_is_measured,
    too_much_memory_is_an_oom_event,
    a_limit_changes,
    a_frozen_container_stands_still,
    a_volume_in_memory_has_its_size_and_group_and_stays_with_the_pod,
    a_tmpfs_begins_with_what_the_image_has,
    a_small_correction_of_the_clock_is_no_jump,
    the_clock_is_set,
    entropy_is_added,
    the_guest_is_measured,
    a_processor_is_taken_into_use,
    the_agent_is_small,
];

async fn a_container_is_measured(pod: Arc<Pod>) {
    let mut spec = base("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 600");
    spec["linux"]["resources"]["memory"] = json!({ "limit": 67108864 });
    spec["linux"]["resources"]["pids"] = json!({ "limit": 50 });
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    pod.read_until("c", "", "done").await;
    let stats = pod.stats("c").await;
    let cpu = stats.cpu_stats.cpu_usage.clone().unwrap();
    assert!(cpu.total_usage > 1_000_000, "{cpu:?}");
    assert!(cpu.usage_in_usermode > 0);
    let memory = stats.memory_stats.clone().unwrap();
    assert_eq!(memory.usage.limit, 67108864);
    assert!(memory.usage.usage > 0 && memory.usage.max_usage >= memory.usage.usage);
    assert_eq!(memory.stats["oom_kill"], 0);
    assert!(memory.stats["anon"] > 0);
    assert!((1..10).contains(&stats.pids_stats.current));
    assert_eq!(stats.pids_stats.limit, 50);
    pod.remove("c").await;
}

async fn too_much_memory_is_an_oom_event(pod: Arc<Pod>) {
    let waiting = tokio::spawn({
        let client = pod.client.clone();
        async move { client.get_oom_event(GetOOMEventRequest::new()).await }
    });
    pod.run("neighbour", "sleep 600").await;
    let mut spec = base("tail /dev/zero");
    spec["linux"]["resources"]["memory"] = json!({ "limit": 16777216, "swap": 16777216 });
    spec["process"]["args"] = json!(["tail", "/dev/zero"]);
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    assert_eq!(waiting.await.unwrap().unwrap().container_id, "c");
    assert_eq!(pod.wait("c", "").await, 137);
    assert!(pod.stats("c").await.memory_stats.stats["oom_kill"] > 0);
    assert_eq!(pod.exec("neighbour", "true").await.0, 0);
    pod.remove("c").await;
    pod.remove("neighbour").await;
}

async fn a_limit_changes(pod: Arc<Pod>) {
    let mut spec = base("sleep 600");
    spec["linux"]["resources"]["memory"] = json!({ "limit": 67108864 });
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    let resources = json!({ "memory": { "limit": 134217728 }, "cpu": { "quota": 50000, "period": 100000 } });
    let resources: oci_spec::runtime::LinuxResources = serde_json::from_value(resources).unwrap();
    let mut request = UpdateContainerRequest::new();
    request.container_id = "c".into();
    request.resources = Some(agent_protocol::oci::resources_to_wire(&resources)).into();
    pod.client.update_container(request).await.unwrap();
    assert_eq!(pod.stats("c").await.memory_stats.usage.limit, 134217728);
    assert_eq!(pod.exec("c", "cat /sys/fs/cgroup/cpu.max").await.1, "50000 100000\n");
    pod.remove("c").await;
}

async fn a_frozen_container_stands_still(pod: Arc<Pod>) {
    pod.run("c", "while read line; do echo $line; done").await;
    let mut pause = PauseContainerRequest::new();
    pause.container_id = "c".into();
    for _ in 0..2 {
        pod.client.pause_container(pause.clone()).await.unwrap();
    }
    pod.write("c", "", b"asleep\n").await;
    let reading = tokio::spawn({
        let pod = Arc::clone(&pod);
        async move { pod.read("c", "", 100).await }
    });
    let before = pod.stats("c").await.cpu_stats.cpu_usage.total_usage;
    assert_eq!(pod.stats("c").await.cpu_stats.cpu_usage.total_usage, before);
    assert!(!reading.is_finished());
    let mut resume = ResumeContainerRequest::new();
    resume.container_id = "c".into();
    pod.client.resume_container(resume).await.unwrap();
    assert_eq!(reading.await.unwrap(), b"asleep\n");
    // Frozen again, it still can be removed.
    pod.client.pause_container(pause).await.unwrap();
    pod.remove("c").await;
}

async fn a_volume_in_memory_has_its_size_and_group_and_stays_with_the_pod(pod: Arc<Pod>) {
    let point = "/run/kata-containers/sandbox/ephemeral/cache";
    let mut spec = base("df -k /cache | tail -1 | awk '{print $2}'; stat -c '%g %a' /cache; sleep 600");
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/cache", "type": "bind", "source": point, "options": ["rbind"]
    }));
    let mut request = create("c", spec.clone());
    let options = ["size=1048576", "mode=0755", "fsgid=1234"];
    request.storages = vec![storage("ephemeral", "tmpfs", "tmpfs", &options, point)];
    let storages = request.storages.clone();
    pod.try_create(request).await.unwrap();
    pod.start("c").await;
    let text = pod.read_until("c", "", "1234").await;
    assert_eq!(text.lines().next(), Some("1024"), "{text}");
    assert!(text.contains("1234 2775"), "{text}");
    pod.exec("c", "echo kept >/cache/note").await;
    pod.remove("c").await;

    // The next container finds what an init container has left, and a part of it may be made for it.
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/part", "type": "bind", "source": format!("{point}/sub/part"), "options": ["rbind"]
    }));
    let mut second = create("d", spec);
    second.storages = storages;
    pod.try_create(second).await.unwrap();
    pod.start("d").await;
    let script = "cat /cache/note; touch /part/new; stat -c '%g %a %n' /cache/sub/part /cache/sub/part/new";
    let seen = pod.exec("d", script).await.1;
    assert_eq!(seen, "kept\n1234 2775 /cache/sub/part\n1234 644 /cache/sub/part/new\n");

    // A link that a container puts in the way of a part leads nobody elsewhere: neither to the guest's own files, nor
    // to those of another container.
    pod.exec(
        "d",
        "ln -s / /cache/evil; ln -s ../../../shared/containers /cache/close; touch /cache/file",
    )
    .await;
    for (part, refused) in [
        ("evil", true),
        ("evil/run/kata-agent", true),
        ("close", true),
        ("new/folder", false),
        ("file", false),
    ] {
        let mut spec = base("sleep 600");
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": format!("/{}", part.replace('/', "-")), "type": "bind", "source": format!("{point}/{part}"), "options": ["rbind"]
        }));
        let made = pod.try_create(create("e", spec)).await;
        match refused {
            true => {
                let error = made.unwrap_err().to_string();
                assert!(error.contains("leads over a symbolic link"), "{part}: {error}");
            }
            false => {
                made.unwrap();
                pod.remove("e").await;
            }
        }
    }
    pod.remove("d").await;
}

async fn a_tmpfs_begins_with_what_the_image_has(pod: Arc<Pod>) {
    // The image of the guest's test is shared by all containers: this one makes the folder that the next one finds.
    pod.run(
        "c",
        "mkdir -p /copied/deep; echo text >/copied/deep/file; ln -s deep/file /copied/link; chmod 1770 /copied",
    )
    .await;
    assert_eq!(pod.wait("c", "c").await, 0);
    pod.remove("c").await;
    let mut spec =
        base("stat -f -c %T /copied; stat -c %a /copied; cat /copied/link; echo new >/copied/own; sleep 600");
    let options = ["rw", "nodev", "nosuid", "tmpcopyup", "size=65536k"];
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/copied", "type": "tmpfs", "source": "tmpfs", "options": options }));
    let read_only = ["ro", "tmpcopyup", "mode=0700"];
    mounts.push(json!({ "destination": "/none/yet", "type": "tmpfs", "source": "tmpfs", "options": read_only }));
    pod.try_create(create("d", spec)).await.unwrap();
    pod.start("d").await;
    pod.read_until("d", "", "tmpfs\n1770\ntext").await;
    let (code, said) = pod.exec("d", "grep ' /copied ' /proc/mounts; touch /none/yet/x").await;
    assert!(
        code != 0 && said.contains("nosuid,nodev") && said.contains("size=65536k"),
        "{code}: {said}"
    );
    pod.remove("d").await;
    // What it wrote is not the image's.
    pod.run("e", "cat /copied/deep/file; ls /copied; rm -r /copied").await;
    pod.read_until("e", "", "text\ndeep\nlink\n").await;
    assert_eq!(pod.wait("e", "e").await, 0);
    pod.remove("e").await;
}

/// The guest's clock, in microseconds since the epoch, as the agent tells it.
async fn clock(pod: &Pod) -> i64 {
    let details = pod.client.get_guest_details(GuestDetailsRequest::new()).await.unwrap();
    let features = details.agent_details.extra_features.clone();
    let told = features
        .iter()
        .find_map(|feature| feature.strip_prefix("sandpod.wall_us="));
    told.unwrap().parse().unwrap()
}

async fn a_small_correction_of_the_clock_is_no_jump(pod: Arc<Pod>) {
    let before = clock(&pod).await;
    // Almost half a second into the past: programs must not see the clock go back.
    let wanted = before - 450_000;
    let mut request = SetGuestDateTimeRequest::new();
    (request.Sec, request.Usec) = (wanted / 1_000_000, wanted % 1_000_000);
    pod.client.set_guest_date_time(request).await.unwrap();
    let after = clock(&pod).await;
    assert!(after >= before, "from {before} back to {after}");
}

async fn the_clock_is_set(pod: Arc<Pod>) {
    let mut request = SetGuestDateTimeRequest::new();
    (request.Sec, request.Usec) = (2_000_000_000, 500_000);
    pod.client.set_guest_date_time(request).await.unwrap();
    pod.run("c", "stat -c %Y /proc/self").await;
    let seen: i64 = String::from_utf8(pod.output("c", "").await)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!((2_000_000_000..2_000_000_060).contains(&seen), "{seen}");
    pod.remove("c").await;
    let mut request = SetGuestDateTimeRequest::new();
    (request.Sec, request.Usec) = (1, 1_000_000);
    assert!(pod.client.set_guest_date_time(request).await.is_err());
}

async fn entropy_is_added(pod: Arc<Pod>) {
    let mut request = ReseedRandomDevRequest::new();
    request.data = vec![7; 64];
    pod.client.reseed_random_dev(request).await.unwrap();
    assert!(
        pod.client
            .reseed_random_dev(ReseedRandomDevRequest::new())
            .await
            .is_err()
    );
}

async fn the_guest_is_measured(pod: Arc<Pod>) {
    let text = pod.client.get_metrics(GetMetricsRequest::new()).await.unwrap().metrics;
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("no {name}"));
        line.trim().parse().unwrap()
    };
    println!(
        "resident {} KiB, available {} KiB",
        value("kata_agent_total_rss") / 1024.0,
        value("kata_guest_meminfo{item=\"mem_available\"}") / 1024.0
    );
    assert!(value("kata_guest_meminfo{item=\"mem_total\"}") > 900e6);
    assert!(value("kata_agent_process_open_fds") > 3.0);
    assert!(value("kata_guest_netdev_stat{interface=\"lo\",item=\"recv_bytes\"}") >= 0.0);
}

async fn a_processor_is_taken_into_use(pod: Arc<Pod>) {
    pod.plug_processor();
    let mut request = OnlineCPUMemRequest::new();
    // The total: fewer than there are is no fault, and a call may be repeated.
    for total in [1, 2, 2] {
        (request.nb_cpus, request.cpu_only) = (total, false);
        pod.client.online_cpu_mem(request.clone()).await.unwrap();
    }
    pod.run("c", "grep -c ^processor /proc/cpuinfo").await;
    assert_eq!(pod.output("c", "").await, b"2\n");
    pod.remove("c").await;
    request.nb_cpus = 3;
    let error = pod.client.online_cpu_mem(request).await.unwrap_err().to_string();
    assert!(error.contains("3 processors are wanted and 2 have appeared"), "{error}");
}

async fn the_agent_is_small(pod: Arc<Pod>) {
    let text = pod.client.get_metrics(GetMetricsRequest::new()).await.unwrap().metrics;
    let rss = text
        .lines()
        .find_map(|line| line.strip_prefix("kata_agent_total_rss "))
        .unwrap();
    let rss: f64 = rss.parse().unwrap();
    assert!(rss < 16e6, "{rss} bytes resident");
    let open = text
        .lines()
        .find_map(|line| line.strip_prefix("kata_agent_process_open_fds "))
        .unwrap();
    // Whatever the cases before have opened is closed.
    assert!(open.parse::<f64>().unwrap() < 40.0, "{open} descriptors");
}
