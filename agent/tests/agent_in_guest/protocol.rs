//! What a foreign shim asks for and ours does not.

use std::{fs, os::unix::fs::symlink, path::PathBuf, sync::Arc};

use agent_protocol::{
    client::ClientError,
    protocol::{agent::*, csi::volume_usage::Unit},
};
use serde_json::{Value, json};
use ttrpc::Code;

use super::{
    boot::HOOKS,
    lifecycle::code,
    pod::{Pod, SHARE, SHM, base, create, storage},
};

super::cases![
    an_update_on_the_host_wakes_a_watcher_in_the_guest,
    a_copy_ends_with_its_last_container,
    a_volume_that_is_no_folder_is_bound,
    a_volume_in_memory_grows_with_the_guest,
    only_volumes_of_the_agent_are_resized,
    a_volume_tells_how_full_it_is,
    a_volume_that_is_not_there_is_not_found,
    the_guests_hooks_run_beside_each_container,
    a_failing_hook_of_the_guest_fails_the_creation_by_name,
    a_foreign_shims_hooks_run_in_the_container_too,
    the_packet_filter_is_saved_and_restored,
    a_program_that_the_image_lacks_is_named,
    a_restore_that_fails_or_hangs_is_told,
    what_has_no_meaning_here_is_refused_by_name,
];

/// A ConfigMap as the kubelet keeps it, on the host's side of the share.
struct ConfigMap(PathBuf);

impl ConfigMap {
    fn new(pod: &Pod, name: &str) -> ConfigMap {
        let folder = pod.share().join(name);
        fs::create_dir(&folder).unwrap();
        // Go's shim makes it on the host; the guest has its own file system there.
        fs::create_dir_all(pod.share().join("watchable")).unwrap();
        ConfigMap(folder)
    }

    /// New values, by a new folder and one swap.
    fn publish(&self, stamp: &str, value: &str) {
        fs::create_dir(self.0.join(stamp)).unwrap();
        fs::write(self.0.join(stamp).join("key"), value).unwrap();
        let before = fs::read_link(self.0.join("..data"));
        symlink(stamp, self.0.join("..data_tmp")).unwrap();
        fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
        match before {
            Ok(before) => fs::remove_dir_all(self.0.join(before)).unwrap(),
            Err(_) => symlink("..data/key", self.0.join("key")).unwrap(),
        }
    }
}

/// A container that has a watchable volume on `/<name>`.
fn watching(id: &str, name: &str, script: &str) -> CreateContainerRequest {
    let point = format!("{SHARE}/watchable/{name}");
    let mut spec = base(script);
    mount(&mut spec, &format!("/{name}"), &point);
    let mut request = create(id, spec);
    let options = ["rbind", "rprivate", "ro"];
    request.storages = vec![storage(
        "watchable-bind",
        &format!("{SHARE}/{name}"),
        "bind",
        &options,
        &point,
    )];
    request
}

fn mount(spec: &mut Value, destination: &str, source: &str) {
    let bind = json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] });
    spec["mounts"].as_array_mut().unwrap().push(bind);
}

async fn an_update_on_the_host_wakes_a_watcher_in_the_guest(pod: Arc<Pod>) {
    let map = ConfigMap::new(&pod, "config-1");
    map.publish("..1", "old");
    pod.try_create(watching("c", "config-1", "exec tell-changes /config-1 /config-1/key"))
        .await
        .unwrap();
    pod.start("c").await;
    pod.read_until("c", "", "watching").await;
    assert_eq!(pod.exec("c", "cat /config-1/key").await.1, "old");
    map.publish("..2", "new");
    // What the swap shows is there before it, and what it hides goes after it.
    let told = pod.read_until("c", "", "IN_DELETE_SELF").await;
    assert!(told.contains("..data\n"), "{told}");
    assert_eq!(
        pod.exec("c", "cat /config-1/key; readlink /config-1/..data").await.1,
        "new..2\n"
    );
    let only = "until [ $(ls -a /config-1 | wc -l) = 5 ]; do sleep 0.1; done; ls -a /config-1";
    assert_eq!(pod.exec("c", only).await.1, ".\n..\n..2\n..data\nkey\n");
    pod.remove("c").await;
}

async fn a_copy_ends_with_its_last_container(pod: Arc<Pod>) {
    let map = ConfigMap::new(&pod, "config-2");
    map.publish("..1", "value");
    for id in ["c", "d"] {
        pod.try_create(watching(id, "config-2", "cat /config-2/key; sleep 600"))
            .await
            .unwrap();
        pod.start(id).await;
        pod.read_until(id, "", "value").await;
    }
    let point = format!("{SHARE}/watchable/config-2");
    pod.remove("c").await;
    assert!(volume(&pod, &point).await.is_ok());
    pod.remove("d").await;
    let error = volume(&pod, &point).await.unwrap_err();
    assert!(matches!(error, ClientError::NotFound(_)), "{error}");
    // And with the last of all copies the file system that they were on: what is there now is the host's.
    let below = volume(&pod, &format!("{SHARE}/watchable")).await.unwrap();
    let share = volume(&pod, SHARE).await.unwrap();
    assert_eq!(below.usage[0].total, share.usage[0].total);
}

async fn a_volume_that_is_no_folder_is_bound(pod: Arc<Pod>) {
    fs::create_dir_all(pod.share().join("watchable")).unwrap();
    fs::write(pod.share().join("single"), "alone\n").unwrap();
    pod.try_create(watching("c", "single", "cat /single; sleep 600"))
        .await
        .unwrap();
    pod.start("c").await;
    pod.read_until("c", "", "alone").await;
    pod.remove("c").await;
    assert_eq!(fs::read_to_string(pod.share().join("single")).unwrap(), "alone\n");
    pod.await_console("single is no folder, so its updates wake nobody")
        .await;
    // A copy has its place, and no other.
    let mut request = watching("c", "single", "true");
    request.storages[0].mount_point = format!("{SHARE}/elsewhere/single");
    let error = pod.try_create(request).await.unwrap_err();
    assert!(error.to_string().contains("is in no folder \"watchable\""), "{error}");
}

async fn a_volume_in_memory_grows_with_the_guest(pod: Arc<Pod>) {
    let point = "/run/kata-containers/sandbox/ephemeral/grows";
    let mut spec = base("sleep 600");
    mount(&mut spec, "/cache", point);
    let mut request = create("c", spec);
    let options = ["nosuid", "nodev", "size=1M", "fsgid=1234"];
    request.storages = vec![storage("ephemeral", "tmpfs", "tmpfs", &options, point)];
    pod.try_create(request).await.unwrap();
    pod.start("c").await;
    pod.exec("c", "echo kept >/cache/note").await;
    resize(&pod, point, &["remount", "size=3M", "fsgid=1234"])
        .await
        .unwrap();
    let seen = pod
        .exec(
            "c",
            "df -k /cache | tail -1 | awk '{print $2}'; cat /cache/note; stat -c %g /cache",
        )
        .await
        .1;
    assert_eq!(seen, "3072\nkept\n1234\n");
    let usage = volume(&pod, point).await.unwrap().usage;
    assert_eq!(usage[0].total, 3 << 20);
    // No options, no change.
    resize(&pod, point, &[]).await.unwrap();
    assert_eq!(volume(&pod, point).await.unwrap().usage[0].total, 3 << 20);
    pod.remove("c").await;
}

async fn only_volumes_of_the_agent_are_resized(pod: Arc<Pod>) {
    for point in ["/tmp", "/run", SHARE, "/run/kata-containers/sandbox/ephemeral/nobodys"] {
        let error = resize(&pod, point, &["remount", "size=1M"]).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        assert!(
            error
                .to_string()
                .starts_with(&format!("{point} is no tmpfs that this agent has mounted")),
            "{error}"
        );
    }
    let error = resize(&pod, SHM, &["remount", "size=lots"]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot remount /run/kata-containers/sandbox/shm with size=lots"),
        "{error}"
    );
}

async fn resize(pod: &Pod, point: &str, options: &[&str]) -> Result<(), ClientError> {
    let mut request = UpdateEphemeralMountsRequest::new();
    request.storages = vec![storage("ephemeral", "tmpfs", "tmpfs", options, point)];
    pod.client.update_ephemeral_mounts(request).await
}

async fn volume(pod: &Pod, path: &str) -> Result<agent_protocol::protocol::csi::VolumeStatsResponse, ClientError> {
    let mut request = VolumeStatsRequest::new();
    request.volume_guest_path = path.into();
    pod.client.get_volume_stats(request).await
}

async fn a_volume_tells_how_full_it_is(pod: Arc<Pod>) {
    let before = volume(&pod, SHM).await.unwrap();
    assert!(!before.volume_condition.abnormal);
    let [bytes, inodes] = &before.usage[..] else {
        panic!("{before:?}")
    };
    assert_eq!((bytes.unit.unwrap(), inodes.unit.unwrap()), (Unit::BYTES, Unit::INODES));
    assert_eq!(bytes.total, 8388608);
    assert_eq!(
        (bytes.used + bytes.available, inodes.used + inodes.available),
        (bytes.total, inodes.total)
    );
    pod.run("c", "dd if=/dev/zero of=/dev/shm/fill bs=4096 count=10 2>&1; sleep 600")
        .await;
    pod.read_until("c", "", "10+0 records out").await;
    let after = volume(&pod, SHM).await.unwrap().usage;
    assert_eq!((after[0].used, after[1].used), (bytes.used + 40960, inodes.used + 1));
    pod.exec("c", "rm /dev/shm/fill").await;
    pod.remove("c").await;
}

async fn a_volume_that_is_not_there_is_not_found(pod: Arc<Pod>) {
    let error = volume(&pod, "/run/kata-containers/sandbox/storage/none")
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::NotFound(_)), "{error}");
    for path in ["/proc", "", "/run/kata-containers/../../etc"] {
        assert_eq!(
            code(&volume(&pod, path).await.unwrap_err()),
            Code::INVALID_ARGUMENT,
            "{path}"
        );
    }
    // The host's links lead nowhere else.
    symlink("/proc", pod.share().join("out")).unwrap();
    let error = volume(&pod, &format!("{SHARE}/out")).await.unwrap_err();
    assert!(
        error.to_string().contains("leads out of /run/kata-containers"),
        "{error}"
    );
}

async fn the_guests_hooks_run_beside_each_container(_: Arc<Pod>) {
    let pod = &Pod::boot(HOOKS).await.unwrap();
    pod.run("reader", "sleep 600").await;
    // What they were told on their standard input they have kept in the pod's shared memory.
    let told = |stage: &'static str| async move { pod.exec("reader", &format!("cat /dev/shm/{stage}-hooked")).await };
    pod.create("hooked", "sleep 600").await;
    let (code, state) = told("prestart").await;
    assert_eq!(code, 0);
    let state: Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["id"], "hooked");
    assert!(state["pid"].as_i64().unwrap() > 1, "{state}");
    assert_ne!(told("poststart").await.0, 0);
    pod.start("hooked").await;
    assert!(told("poststart").await.1.contains("\"running\""));
    assert_ne!(told("poststop").await.0, 0);
    pod.remove("hooked").await;
    assert!(told("poststop").await.1.contains("\"stopped\""));
    pod.end();
}

async fn a_failing_hook_of_the_guest_fails_the_creation_by_name(_: Arc<Pod>) {
    let pod = &Pod::boot(HOOKS).await.unwrap();
    let failing = |stage: &str| {
        let mut spec = base("true");
        spec["annotations"] = json!({ "hook": format!("fail-at-{stage}") });
        create("c", spec)
    };
    let text = pod.try_create(failing("prestart")).await.unwrap_err().to_string();
    assert!(text.starts_with(&format!("the hook {HOOKS}/prestart/note: ")), "{text}");
    // One that fails after the container's end is told to the console, and the container is gone.
    pod.try_create(failing("poststop")).await.unwrap();
    pod.remove("c").await;
    pod.await_console(&format!("container c: the hook {HOOKS}/poststop/note: "))
        .await;
    pod.run("c", "exit 7").await;
    assert_eq!(pod.wait("c", "").await, 7);
    pod.end();
}

async fn a_foreign_shims_hooks_run_in_the_container_too(pod: Arc<Pod>) {
    let mut spec = base("cat /tmp/hooked; sleep 600");
    let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", "cat >/tmp/hooked"], "env": ["PATH=/bin"] });
    spec["hooks"] = json!({ "startContainer": [hook] });
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    pod.read_until("c", "", "\"id\":\"c\"").await;
    pod.remove("c").await;
}

async fn iptables(pod: &Pod, is_ipv6: bool) -> Result<String, ClientError> {
    let mut request = GetIPTablesRequest::new();
    request.is_ipv6 = is_ipv6;
    let data = pod.client.get_ip_tables(request).await?.data;
    Ok(String::from_utf8(data).unwrap())
}

async fn set_iptables(pod: &Pod, is_ipv6: bool, rules: &str) -> Result<String, ClientError> {
    let mut request = SetIPTablesRequest::new();
    (request.is_ipv6, request.data) = (is_ipv6, rules.into());
    let data = pod.client.set_ip_tables(request).await?.data;
    Ok(String::from_utf8(data).unwrap())
}

async fn the_packet_filter_is_saved_and_restored(pod: Arc<Pod>) {
    let rules: String = (0..20_000)
        .map(|n| format!("-A INPUT -p tcp --dport {n} -j DROP\n"))
        .collect();
    assert_eq!(
        set_iptables(&pod, false, &rules).await.unwrap(),
        "iptables-restore --wait 5\n"
    );
    // Our own client takes no answer of such a size.
    set_iptables(&pod, false, "*filter\nCOMMIT\n").await.unwrap();
    assert_eq!(iptables(&pod, false).await.unwrap(), "*filter\nCOMMIT\n");
    assert_eq!(
        set_iptables(&pod, true, "*filter\n").await.unwrap(),
        "ip6tables-restore --wait 5\n"
    );
    assert_eq!(iptables(&pod, false).await.unwrap(), "*filter\nCOMMIT\n");
}

async fn a_program_that_the_image_lacks_is_named(pod: Arc<Pod>) {
    let error = iptables(&pod, true).await.unwrap_err();
    assert_eq!(code(&error), Code::UNIMPLEMENTED);
    assert!(
        error.to_string().starts_with("the guest image has no ip6tables-save"),
        "{error}"
    );
}

async fn a_restore_that_fails_or_hangs_is_told(pod: Arc<Pod>) {
    let error = set_iptables(&pod, false, "bad\n").await.unwrap_err();
    let expected = "cannot run /usr/sbin/iptables-restore: it ended with 2: line 1 is bad; nothing is done";
    assert!(error.to_string().starts_with(expected), "{error}");
    let error = set_iptables(&pod, false, "hang\n").await.unwrap_err();
    assert!(matches!(error, ClientError::Deadline(_)), "{error}");
}

async fn what_has_no_meaning_here_is_refused_by_name(pod: Arc<Pod>) {
    let mut policy = SetPolicyRequest::new();
    policy.policy = "package agent_policy\ndefault CreateContainerRequest := false".into();
    let refusals = [
        (
            pod.client.set_policy(policy).await,
            "SetPolicy (nothing would enforce the policy)",
        ),
        (
            pod.client.resize_volume(ResizeVolumeRequest::new()).await,
            "ResizeVolume",
        ),
    ];
    for (refusal, name) in refusals {
        let error = refusal.unwrap_err();
        assert_eq!(code(&error), Code::UNIMPLEMENTED);
        assert!(
            error
                .to_string()
                .starts_with(&format!("{name} is not implemented by this agent")),
            "{error}"
        );
    }
    let drivers = pod.details.agent_details.storage_handlers.clone();
    assert_eq!(
        drivers,
        ["blk", "ephemeral", "local", "scsi", "virtio-fs", "watchable-bind"]
    );
}
