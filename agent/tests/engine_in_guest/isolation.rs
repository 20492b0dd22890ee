//! What a container may not do or see.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    case,
    guest::{Case, Guest},
    spec::{base, idle, process, script, with},
    sys,
};

pub const CASES: &[Case] = &[
    case!(capabilities_are_those_of_the_specification),
    case!(a_user_other_than_root_has_no_capabilities),
    case!(seccomp_refuses_with_and_without_new_privileges),
    case!(seccomp_compares_arguments_as_the_specification_says),
    case!(a_call_that_no_profile_knows_does_not_exist),
    case!(seccomp_that_cannot_be_honoured_is_refused_by_name),
    case!(seccomp_takes_no_capability_and_gives_none),
    case!(a_container_has_a_session_keyring_of_its_own),
    case!(a_container_has_a_cgroup_namespace_of_its_own),
    case!(masked_and_read_only_paths_hold),
    case!(the_root_is_read_only),
    case!(namespaces_are_new_or_joined),
    case!(sysctls_are_set),
    case!(devices_exist_and_others_are_refused),
    case!(a_privileged_container_keeps_its_devices_over_an_update),
    case!(what_cannot_be_honoured_is_refused_by_name),
    case!(a_failed_mount_is_named_and_leaves_nothing),
];

async fn capabilities_are_those_of_the_specification(guest: Arc<Guest>) {
    let show = "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status";
    let ended = guest.run("c", script("c", show)).await;
    let sets: Vec<_> = ended.out.lines().filter_map(|l| l.split_whitespace().nth(1)).collect();
    let default = "00000000a80425fb";
    assert_eq!(
        sets,
        ["0000000000000000", default, default, default, "0000000000000000"],
        "{ended:?}"
    );
    let mut none = script("c", show);
    none["process"]
        .as_object_mut()
        .expect("a process")
        .remove("capabilities");
    let ended = guest.run("c", none).await;
    assert!(
        ended.out.lines().all(|line| line.ends_with("\t0000000000000000")),
        "{ended:?}"
    );
}

async fn a_user_other_than_root_has_no_capabilities(guest: Arc<Guest>) {
    let show = "grep -E 'Cap(Prm|Eff|Amb)' /proc/self/status";
    let web = json!({ "process": { "user": { "uid": 1000 } } });
    let ended = guest.run("c", with(script("c", show), web.clone())).await;
    assert!(
        ended.out.lines().all(|line| line.ends_with("\t0000000000000000")),
        "{ended:?}"
    );
    let ambient = json!({ "process": { "capabilities": {
        "ambient": ["CAP_NET_BIND_SERVICE"], "inheritable": ["CAP_NET_BIND_SERVICE"]
    } } });
    let ended = guest.run("c", with(with(script("c", show), web), ambient)).await;
    assert!(
        ended.out.lines().all(|line| line.ends_with("\t0000000000000400")),
        "{ended:?}"
    );
}

fn seccomp(no_new_privileges: &Value) -> Value {
    json!({
        "process": { "noNewPrivileges": no_new_privileges },
        "linux": { "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                { "names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO" }
            ]
        } }
    })
}

async fn seccomp_refuses_with_and_without_new_privileges(guest: Arc<Guest>) {
    let script = script(
        "c",
        "mkdir /tmp/x; chmod 700 /tmp; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status",
    );
    for (given, privs) in [(json!(null), "0"), (json!(false), "0"), (json!(true), "1")] {
        let ended = guest.run("c", with(script.clone(), seccomp(&given))).await;
        assert!(ended.err.contains("/tmp/x': Function not implemented"), "{ended:?}");
        assert!(ended.err.contains("Operation not permitted"), "{ended:?}");
        assert_eq!(ended.out, format!("NoNewPrivs:\t{privs}\nSeccomp:\t2"), "{ended:?}");
    }
}

/// `chmod` and `unshare` that are refused by a condition on one argument, for each operator with both of its values.
async fn seccomp_compares_arguments_as_the_specification_says(guest: Arc<Guest>) {
    // What is compared, and which of the modes 600, 640 and 740 are refused.
    let table: &[(&str, u64, u64, &str)] = &[
        ("SCMP_CMP_NE", 0o640, 0o600, "600 740"),
        ("SCMP_CMP_LT", 0o640, 0o777, "600"),
        ("SCMP_CMP_LE", 0o640, 0o777, "600 640"),
        ("SCMP_CMP_EQ", 0o640, 0o600, "640"),
        ("SCMP_CMP_GE", 0o640, 0o777, "640 740"),
        ("SCMP_CMP_GT", 0o640, 0o777, "740"),
        // The first is the mask, the second what the masked argument is compared with.
        ("SCMP_CMP_MASKED_EQ", 0o070, 0o040, "640 740"),
        ("SCMP_CMP_MASKED_EQ", 0o100, 0, "600 640"),
        ("SCMP_CMP_MASKED_EQ", 0o700, 0o700, "740"),
        ("SCMP_CMP_MASKED_EQ", 0, 0, "600 640 740"),
        // What the mask leaves out is left out on both sides.
        ("SCMP_CMP_MASKED_EQ", 0o070, 0o740, "640 740"),
        ("SCMP_CMP_MASKED_EQ", 0, 0o040, "600 640 740"),
    ];
    let script = "for mode in 600 640 740; do chmod $mode /tmp/f 2>/dev/null || echo $mode; done";
    for (op, value, second, refused) in table {
        let rule = |name: &str, index: u32| {
            json!({ "names": [name], "action": "SCMP_ACT_ERRNO",
                    "args": [{ "index": index, "value": value, "valueTwo": second, "op": op }] })
        };
        let profile = json!({ "linux": { "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [rule("chmod", 1), rule("fchmodat", 2)]
        } } });
        let script = self::script("c", &format!("touch /tmp/f; {script}"));
        let ended = guest.run("c", with(script, profile)).await;
        let seen: Vec<_> = ended.out.lines().collect();
        assert_eq!(seen.join(" "), *refused, "{op} {value:o} {second:o}");
    }
    // The shape of the CRI's own profiles: of all namespaces it is the user's alone that is refused.
    let (namespaces, user) = (0x7e02_0000, 0x1000_0000);
    let profile = json!({ "linux": { "seccomp": {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                       "args": [{ "index": 0, "value": namespaces, "valueTwo": user, "op": "SCMP_CMP_MASKED_EQ" }] }]
    } } });
    let try_it = self::script("c", "unshare true && echo none; unshare -U true || echo refused");
    let ended = guest.run("c", with(try_it, profile)).await;
    assert_eq!(ended.out, "none\nrefused", "{ended:?}");
    assert!(ended.err.contains("Function not implemented"), "{ended:?}");
}

/// What this program and the last steps before it take.
const CALLS: &str = "accept4 access arch_prctl brk capget capset chdir clock_gettime clone close connect execve exit \
     exit_group fcntl fstat futex getcwd getpid getppid getrandom gettid ioctl lseek madvise mmap mprotect mremap \
     munmap newfstatat openat poll prctl pread64 prlimit64 read readlink recvfrom recvmsg rseq rt_sigaction \
     rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield sendmsg sendto set_robust_list set_tid_address \
     sigaltstack socket stat statx tgkill uname unlink unlinkat write writev";

/// A container in which this test makes system calls by their numbers.
fn caller(id: &str, calls: &[&str]) -> Value {
    base(id, &[&["caller", sys::CALL], calls].concat())
}

/// What a program is told of a call that is newer than its profile, and of one that is forbidden, as runc tells it.
async fn a_call_that_no_profile_knows_does_not_exist(guest: Arc<Guest>) {
    const GETPPID: &str = "110";
    const MKNOD: &str = "133";
    const NONE: &str = "1000";
    // The default action and its errno, what is answered to a forbidden call and to one that is too new.
    let table = [
        (
            "SCMP_ACT_ERRNO",
            json!(null),
            "EPERM: Operation not permitted",
            "ENOSYS: Function not implemented",
        ),
        (
            "SCMP_ACT_ERRNO",
            json!(13),
            "EACCES: Permission denied",
            "ENOSYS: Function not implemented",
        ),
        (
            "SCMP_ACT_ERRNO",
            json!(38),
            "ENOSYS: Function not implemented",
            "ENOSYS: Function not implemented",
        ),
    ];
    let everything: Vec<_> = CALLS.split_whitespace().collect();
    for privileges in [false, true] {
        for (action, answer, forbidden, unknown) in &table {
            let profile = json!({
                "process": { "noNewPrivileges": privileges },
                "linux": { "seccomp": {
                    "defaultAction": action, "defaultErrnoRet": answer,
                    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                    "syscalls": [{ "names": everything, "action": "SCMP_ACT_ALLOW" }]
                } }
            });
            let calls = [GETPPID, MKNOD, NONE];
            let ended = guest.run("c", with(caller("c", &calls), profile)).await;
            let expected = format!("{GETPPID} fine 0\n{MKNOD} {forbidden}\n{NONE} {unknown}");
            assert_eq!(ended.out, expected, "{action} {answer} {privileges}: {ended:?}");
        }
    }
}

async fn seccomp_that_cannot_be_honoured_is_refused_by_name(guest: Arc<Guest>) {
    let rule = |more: Value| with(json!({ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }), more);
    for (change, named) in [
        (
            json!({ "action": "SCMP_ACT_NOTIFY" }),
            "SCMP_ACT_NOTIFY is not supported",
        ),
        (
            json!({ "args": [{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }] }),
            "linux.seccomp: mkdir: ",
        ),
    ] {
        let profile = json!({ "linux": { "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule(change)]
        } } });
        let error = guest
            .create("c", with(idle("c"), profile))
            .await
            .err()
            .expect("a refusal");
        assert!(error.to_string().contains(named), "{error}");
    }
    let asks = json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_NOTIFY" } } });
    let error = guest.create("c", with(idle("c"), asks)).await.err().expect("a refusal");
    assert!(
        error.to_string().contains("SCMP_ACT_NOTIFY is not supported"),
        "{error}"
    );
}

/// Whatever it takes to install a filter, a process has the capabilities of its specification afterwards.
async fn seccomp_takes_no_capability_and_gives_none(guest: Arc<Guest>) {
    let show = script(
        "c",
        "grep Cap /proc/self/status; mount -t tmpfs none /tmp 2>/dev/null && echo mounted",
    );
    let admin = json!({ "process": { "capabilities": {
        "bounding": ["CAP_SYS_ADMIN", "CAP_KILL"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]
    } } });
    let permitted = json!({ "process": { "capabilities": {
        "bounding": ["CAP_SYS_ADMIN"], "effective": [], "permitted": ["CAP_SYS_ADMIN"]
    } } });
    let user = json!({ "process": { "user": { "uid": 1000 } } });
    let none = json!({ "process": { "capabilities": { "bounding": [], "effective": [], "permitted": [] } } });
    for change in [json!({}), admin, permitted, user, none] {
        for privileges in [false, true] {
            let plain = json!({ "process": { "noNewPrivileges": privileges } });
            let plain = guest.run("c", with(with(show.clone(), change.clone()), plain)).await;
            let filtered = with(with(show.clone(), change.clone()), seccomp(&json!(privileges)));
            assert_eq!(guest.run("c", filtered).await.out, plain.out, "{change} {privileges}");
        }
    }
}

/// All processes of a container have one, and no other container has it, for root and for others.
async fn a_container_has_a_session_keyring_of_its_own(guest: Arc<Guest>) {
    // keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0)
    const CALL: &[&str] = &["caller", sys::CALL, "250,0,-3,0"];
    for user in [0, 1000] {
        let user = json!({ "user": { "uid": user, "gid": user } });
        let first = guest.start("c", with(idle("c"), json!({ "process": user }))).await;
        let of_first = guest.exec("c", with(process(CALL), user.clone())).await.out;
        assert_eq!(guest.exec("c", with(process(CALL), user.clone())).await.out, of_first);
        let of_other = guest
            .run("d", with(base("d", CALL), json!({ "process": user })))
            .await
            .out;
        for ring in [&of_first, &of_other] {
            assert!(ring.contains("fine"), "{ring}");
        }
        assert_ne!(of_first, of_other);
        guest.kill("c", first).await;
    }
}

async fn a_container_has_a_cgroup_namespace_of_its_own(guest: Arc<Guest>) {
    // On a node with cgroup v1 the CRI asks for none.
    let kinds = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let none = json!({ "linux": { "namespaces": kinds } });
    let limit = json!({ "linux": { "resources": { "pids": { "limit": 77 } } } });
    let script = script("c", "cat /proc/self/cgroup /sys/fs/cgroup/pids.max");
    let ended = guest.run("c", with(with(script, none), limit)).await;
    assert_eq!(ended.out, "0::/\n77", "{ended:?}");
}

async fn masked_and_read_only_paths_hold(guest: Arc<Guest>) {
    let try_it = "wc -c </proc/kpagecount; wc -c </proc/keys; ls /proc/acpi | wc -l; \
                  echo 1 >/proc/sys/kernel/printk; echo b >/proc/sysrq-trigger; echo 1 >/sys/kernel/mm/lru_gen/enabled; \
                  mkdir /sys/fs/cgroup/x";
    let ended = guest.run("c", script("c", try_it)).await;
    assert_eq!(
        ended.out.split_whitespace().collect::<Vec<_>>(),
        ["0", "0", "0"],
        "{ended:?}"
    );
    assert!(ended.err.matches("Read-only file system").count() >= 3, "{ended:?}");
}

async fn the_root_is_read_only(guest: Arc<Guest>) {
    let read_only = json!({ "root": { "readonly": true } });
    let ended = guest
        .run(
            "c",
            with(script("c", "touch /x; touch /dev/shm/y && echo ok"), read_only),
        )
        .await;
    assert!(ended.err.contains("Read-only file system"), "{ended:?}");
    assert_eq!(ended.out, "ok");
}

async fn namespaces_are_new_or_joined(guest: Arc<Guest>) {
    let ended = guest
        .run(
            "c",
            script(
                "c",
                "hostname; echo $$; ps -o args | grep -c '[k]thread'; cat /proc/self/cgroup",
            ),
        )
        .await;
    assert_eq!(
        ended.out.lines().collect::<Vec<_>>(),
        ["pod", "1", "0", "0::/"],
        "{ended:?}"
    );
    // As a pod does: the pid, ipc and uts namespaces of another container.
    let first = guest.start("a", idle("a")).await;
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", first.pid);
    let joined = json!({ "linux": { "namespaces": [
        { "type": "pid", "path": path("pid") }, { "type": "ipc", "path": path("ipc") },
        { "type": "uts", "path": path("uts") }, { "type": "mount" }, { "type": "cgroup" }
    ] } });
    let ended = guest
        .run(
            "b",
            with(script("b", "ps -o args | grep -c '^sleep 1000'; hostname"), joined),
        )
        .await;
    assert_eq!(ended.out.lines().collect::<Vec<_>>(), ["1", "pod"], "{ended:?}");
    guest.kill("a", first).await;
}

async fn sysctls_are_set(guest: Arc<Guest>) {
    let sysctls = json!({ "linux": { "sysctl": {
        "kernel.msgmax": "4321", "net.ipv4.ip_unprivileged_port_start": "80", "vm.max_map_count": "300000"
    } } });
    let show = "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/vm/max_map_count";
    let ended = guest.run("c", with(script("c", show), sysctls)).await;
    assert_eq!(
        ended.out.lines().collect::<Vec<_>>(),
        ["4321", "80", "300000"],
        "{ended:?}"
    );
    let wrong = json!({ "linux": { "sysctl": { "kernel.no_such_thing": "1" } } });
    let error = guest
        .create("c", with(idle("c"), wrong))
        .await
        .err()
        .expect("a failure")
        .to_string();
    assert!(error.contains("no_such_thing"), "{error}");
}

async fn devices_exist_and_others_are_refused(guest: Arc<Guest>) {
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
                  echo x >/dev/null; dd if=/dev/zero bs=4 count=1 2>/dev/null | wc -c; \
                  readlink /dev/ptmx; readlink /dev/fd; mknod /tmp/kmsg c 1 11 && dd if=/tmp/kmsg of=/dev/null count=1; stat -c %a /dev/null";
    let ended = guest.run("c", self::script("c", script)).await;
    assert_eq!(
        ended.out.lines().collect::<Vec<_>>(),
        ["4", "pts/ptmx", "/proc/self/fd", "666"],
        "{ended:?}"
    );
    assert!(ended.err.contains("Operation not permitted"), "{ended:?}");
    let given = json!({ "linux": {
        "devices": [
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 0, "gid": 9 }
        ],
        "resources": { "devices": [
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw" }
        ] }
    } });
    let ended = guest
        .run(
            "c",
            with(
                self::script("c", ": <>/dev/net/tun; stat -c '%a %g' /dev/net/tun"),
                given,
            ),
        )
        .await;
    assert_eq!(ended.out, "640 9", "{ended:?}");
    assert!(!ended.err.contains("not permitted"), "{ended:?}");
}

async fn a_privileged_container_keeps_its_devices_over_an_update(guest: Arc<Guest>) {
    let privileged = json!({ "linux": { "resources": { "devices": [{ "allow": true, "access": "rwm" }] } } });
    let running = guest.start("c", with(idle("c"), privileged)).await;
    let look = process(&["sh", "-c", "mknod /tmp/k$$ c 10 200 && : <>/tmp/k$$"]);
    let before = guest.exec("c", look.clone()).await;
    assert!(!before.err.contains("not permitted"), "{before:?}");
    let more = serde_json::from_value(json!({ "memory": { "limit": 100 << 20 } })).expect("resources");
    guest.engine.update("c", &more).await.expect("an update");
    let after = guest.exec("c", look).await;
    assert!(!after.err.contains("not permitted"), "{after:?}");
    guest.kill("c", running).await;
}

async fn what_cannot_be_honoured_is_refused_by_name(guest: Arc<Guest>) {
    let refusals = [
        (
            json!({ "process": { "selinuxLabel": "system_u:system_r:container_t:s0" } }),
            "selinuxLabel",
        ),
        (
            json!({ "process": { "apparmorProfile": "docker-default" } }),
            "apparmorProfile",
        ),
        (json!({ "root": { "path": "rootfs" } }), "root.path"),
        (json!({ "process": { "args": [] } }), "process.args"),
        (json!({ "linux": { "cgroupsPath": "../../x" } }), "cgroup path"),
        (json!({ "linux": { "namespaces": [] } }), "mount namespace"),
        (
            json!({ "mounts": [{ "destination": "/data", "type": "bind", "source": "/tmp",
                                 "options": ["rbind", "nosymfollow"] }] }),
            "nosymfollow of the mount on /data",
        ),
    ];
    for (change, name) in refusals {
        let error = guest
            .create("c", with(idle("c"), change))
            .await
            .err()
            .expect("a refusal")
            .to_string();
        assert!(error.contains(name), "{error}");
    }
}

async fn a_failed_mount_is_named_and_leaves_nothing(guest: Arc<Guest>) {
    let mut spec = base("c", &["true"]);
    let volume = json!({ "destination": "/data", "type": "bind", "source": "/no/volume", "options": ["rbind", "rw"] });
    spec["mounts"].as_array_mut().expect("mounts").push(volume);
    let error = guest.create("c", spec).await.err().expect("a failure").to_string();
    assert!(error.contains("/no/volume"), "{error}");
    assert!(!std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists());
    // And the id is free.
    assert_eq!(guest.run("c", base("c", &["true"])).await.code, 0);
}
