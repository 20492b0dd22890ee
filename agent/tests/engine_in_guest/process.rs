//! What a process is given, and what becomes of it.

use std::{os::fd::AsFd, sync::Arc, time::Instant};

use agent::engine::EngineError;
use serde_json::json;

use crate::{
    case,
    guest::{Case, Guest, Running, say},
    spec::{base, idle, process, script, with},
};

pub const CASES: &[Case] = &[
    case!(a_container_runs_and_its_exit_code_arrives),
    case!(a_process_has_its_user_groups_and_umask),
    case!(a_process_has_its_environment_in_order_and_a_home),
    case!(a_missing_working_directory_is_made),
    case!(a_process_can_open_its_own_output),
    case!(a_closed_pipe_kills_the_writer),
    case!(limits_of_a_process_are_its_own),
    case!(a_program_need_not_be_executable_by_others),
    case!(a_missing_program_fails_and_leaves_nothing),
    case!(a_container_has_a_terminal),
    case!(an_exec_has_its_own_user_directory_and_environment),
    case!(an_exec_keeps_the_containers_seccomp_and_limits),
    case!(an_exec_of_a_missing_program_names_it_and_leaves_nothing),
    case!(an_exec_in_a_missing_directory_names_it),
    case!(an_exec_has_a_terminal),
    case!(an_exec_that_ends_at_once_is_not_lost),
    case!(an_exec_works_on_a_read_only_root),
];

async fn a_container_runs_and_its_exit_code_arrives(guest: Arc<Guest>) {
    let began = Instant::now();
    let running = guest
        .create("c", script("c", "echo out; echo err >&2; exit 7"))
        .await
        .expect("a container");
    let created = began.elapsed();
    guest.engine.start("c").await.expect("a start");
    say(&format!(
        "create {} ms, start {} ms",
        created.as_millis(),
        (began.elapsed() - created).as_millis()
    ));
    let ended = guest.end(running).await;
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (7, "out", "err"));
    assert!(matches!(
        guest.engine.start("c").await,
        Err(EngineError::StartedBefore(_))
    ));
    guest.engine.delete("c").await.expect("a deletion");
    guest.engine.delete("c").await.expect("a second deletion");
    assert!(matches!(guest.engine.start("c").await, Err(EngineError::NotFound(_))));
}

async fn a_process_has_its_user_groups_and_umask(guest: Arc<Guest>) {
    let user = json!({ "process": { "user": { "uid": 1000, "gid": 1001, "additionalGids": [5, 20], "umask": 0o27 } } });
    let ended = guest.run("c", with(script("c", "id; umask"), user)).await;
    assert!(ended.out.starts_with("uid=1000"), "{ended:?}");
    assert!(ended.out.contains("gid=1001"), "{ended:?}");
    assert!(
        ended.out.contains("groups=5") || ended.out.contains("groups=1001,5,20"),
        "{ended:?}"
    );
    assert!(ended.out.ends_with("0027"), "{ended:?}");
    let ended = guest.run("c", script("c", "umask; cat /proc/self/status")).await;
    assert!(ended.out.starts_with("0022"), "{ended:?}");
}

async fn a_process_has_its_environment_in_order_and_a_home(guest: Arc<Guest>) {
    let env = json!({ "process": { "env": ["Z=1", "A=old", "PATH=/bin", "B=2=3", "A=new"] } });
    let ended = guest.run("c", with(base("c", &["env"]), env)).await;
    assert_eq!(
        ended.out.lines().collect::<Vec<_>>(),
        ["Z=1", "PATH=/bin", "B=2=3", "A=new", "HOME=/root"]
    );
    let web = json!({ "process": { "user": { "uid": 1000 }, "env": ["PATH=/bin", "HOME="] } });
    assert!(
        guest
            .run("c", with(base("c", &["env"]), web))
            .await
            .out
            .ends_with("HOME=/srv/web")
    );
    let nobody = json!({ "process": { "user": { "uid": 4242 } } });
    assert!(
        guest
            .run("c", with(base("c", &["env"]), nobody))
            .await
            .out
            .ends_with("HOME=/")
    );
    let bare = json!({ "process": { "env": [], "args": ["/bin/env"] } });
    assert!(
        guest
            .run("c", with(base("c", &[]), bare))
            .await
            .out
            .contains("PATH=/usr/local/sbin")
    );
}

async fn a_missing_working_directory_is_made(guest: Arc<Guest>) {
    let cwd = json!({ "process": { "cwd": "/srv/new/place" } });
    assert_eq!(
        guest.run("c", with(base("c", &["pwd"]), cwd)).await.out,
        "/srv/new/place"
    );
    let file = json!({ "process": { "cwd": "/etc/passwd" } });
    let error = guest
        .create("c", with(base("c", &["pwd"]), file))
        .await
        .err()
        .expect("a failure")
        .to_string();
    assert!(error.contains("/etc/passwd"), "{error}");
}

async fn a_process_can_open_its_own_output(guest: Arc<Guest>) {
    let web = json!({ "process": { "user": { "uid": 1000, "gid": 1000 } } });
    let ended = guest
        .run("c", with(script("c", "echo a >/dev/stdout; echo b >/dev/stderr"), web))
        .await;
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (0, "a", "b"));
}

async fn a_closed_pipe_kills_the_writer(guest: Arc<Guest>) {
    let ended = guest.run("c", script("c", "(yes; echo $? >&2) | true")).await;
    assert_eq!(ended.err, "141", "{ended:?}");
    let ended = guest
        .run("c", base("c", &["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]))
        .await;
    assert_eq!(ended.out, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000");
}

async fn limits_of_a_process_are_its_own(guest: Arc<Guest>) {
    let limits = json!({ "process": {
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }], "oomScoreAdj": 555
    } });
    let show = "grep -E 'open files|locked' /proc/self/limits; cat /proc/self/oom_score_adj";
    let own = std::fs::read_to_string("/proc/self/limits").expect("limits");
    let locked = own
        .lines()
        .find(|l| l.starts_with("Max locked memory"))
        .expect("a limit")
        .trim()
        .to_owned();
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let ended = guest.run("c", with(script("c", show), limits.clone())).await;
    let lines: Vec<_> = ended.out.lines().collect();
    assert_eq!(fields(lines[0])[3..5], ["100", "200"], "{ended:?}");
    assert_eq!(fields(lines[1]), fields(&locked), "{ended:?}");
    assert_eq!(lines[2], "555", "{ended:?}");

    let running = guest.start("c", with(idle("c"), limits)).await;
    let process = with(
        process(&["sh", "-c", show]),
        json!({
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 50, "hard": 60 }]
        }),
    );
    let ended = guest.exec("c", process).await;
    let lines: Vec<_> = ended.out.lines().collect();
    assert_eq!(fields(lines[0])[3..5], ["50", "60"], "{ended:?}");
    assert_eq!(lines[2], "555", "{ended:?}");
    guest.kill("c", running).await;
}

async fn a_program_need_not_be_executable_by_others(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let make = "cp /bin/busybox /tmp/sh; chmod 700 /tmp/sh; mkdir -p /tmp/d; touch /tmp/plain";
    let make = make
        .replace("cp ", "cat ")
        .replace("cat /bin/busybox /tmp/sh", "cat /bin/busybox > /tmp/sh");
    assert_eq!(guest.exec("c", process(&["sh", "-c", &make])).await.code, 0);
    assert_eq!(guest.exec("c", process(&["/tmp/sh", "-c", "exit 3"])).await.code, 3);
    for (program, problem) in [("/tmp/d", "is a directory"), ("/tmp/plain", "permission denied")] {
        let error = guest
            .try_exec("c", process(&[program]))
            .await
            .err()
            .expect("a failure")
            .to_string();
        assert!(error.contains(program) && error.contains(problem), "{error}");
    }
    guest.kill("c", running).await;
}

async fn a_missing_program_fails_and_leaves_nothing(guest: Arc<Guest>) {
    for (program, problem) in [
        ("nosuch", "not found in $PATH"),
        ("/no/such", "no such file or directory"),
    ] {
        let error = guest
            .create("c", base("c", &[program]))
            .await
            .err()
            .expect("a failure")
            .to_string();
        assert!(error.contains(program) && error.contains(problem), "{error}");
        assert!(!std::path::Path::new("/sys/fs/cgroup/kata/kubepods/pod1/c").exists());
    }
    // Exists, and only fails when it is run.
    let broken = json!({ "process": { "args": ["/etc/broken"] } });
    std::fs::write("/rootfs/etc/broken", "\u{7f}ELF").expect("a file");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions("/rootfs/etc/broken", mode).expect("a mode");
    let running = guest
        .create("c", with(base("c", &[]), broken))
        .await
        .expect("a container");
    let error = guest.engine.start("c").await.expect_err("a failure").to_string();
    assert!(
        error.contains("/etc/broken") && error.contains("exec format error"),
        "{error}"
    );
    assert_eq!(guest.end(running).await.code, 255);
    guest.engine.delete("c").await.expect("a deletion");
}

async fn a_container_has_a_terminal(guest: Arc<Guest>) {
    let terminal = json!({ "process": {
        "terminal": true, "consoleSize": { "height": 33, "width": 99 }, "user": { "uid": 1000, "gid": 1000 }
    } });
    let test =
        "test -t 0 && test -t 1 && tty && stty size && stat -c %u $(tty) && echo hi >/dev/tty && ls -l /dev/console";
    let mut running = guest.start("c", with(script("c", test), terminal)).await;
    let out = screen(&mut running).await;
    let ended = guest.end(running).await;
    assert_eq!(ended.code, 0, "{out}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[..4], ["/dev/pts/0", "33 99", "1000", "hi"], "{out}");
    guest.engine.delete("c").await.expect("a deletion");
}

async fn screen(running: &mut Running) -> String {
    let pty = running.pty.take().expect("a terminal");
    // A terminal's master is no pipe; reading it to the end (EIO) is the same.
    let file = std::fs::File::from(pty);
    tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        let _ = std::io::Read::read_to_end(&mut &file, &mut text);
        String::from_utf8_lossy(&text).replace('\r', "")
    })
    .await
    .expect("output")
}

async fn an_exec_has_its_own_user_directory_and_environment(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let process = with(
        process(&[
            "sh",
            "-c",
            "id -u; id -g; pwd; echo $A $HOME; ps -o args | grep -c '^sleep 1000'; hostname",
        ]),
        json!({
            "user": { "uid": 1000, "gid": 7 }, "cwd": "/tmp", "env": ["PATH=/bin", "A=exec"]
        }),
    );
    let began = Instant::now();
    let ended = guest.exec("c", process.clone()).await;
    say(&format!(
        "exec of a shell with four programs {} ms",
        began.elapsed().as_millis()
    ));
    assert_eq!(
        ended.out.lines().collect::<Vec<_>>(),
        ["1000", "7", "/tmp", "exec /srv/web", "1", "pod"],
        "{ended:?}"
    );
    guest.kill("c", running).await;
    let error = guest.try_exec("c", process).await.err().expect("a failure");
    assert!(matches!(error, EngineError::NotFound(_)), "{error}");
}

async fn an_exec_keeps_the_containers_seccomp_and_limits(guest: Arc<Guest>) {
    let locked = json!({
        "process": { "noNewPrivileges": true },
        "linux": { "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }]
        } }
    });
    let running = guest.start("c", with(idle("c"), locked)).await;
    let mut process = process(&[
        "sh",
        "-c",
        "mkdir /tmp/forbidden; grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status",
    ]);
    process.as_object_mut().expect("an object").remove("capabilities");
    let ended = guest.exec("c", process).await;
    assert!(ended.err.contains("Function not implemented"), "{ended:?}");
    let lines: Vec<_> = ended.out.lines().collect();
    assert_eq!(
        lines,
        ["CapEff:\t00000000a80425fb", "NoNewPrivs:\t1", "Seccomp:\t2"],
        "{ended:?}"
    );
    guest.kill("c", running).await;
}

async fn an_exec_of_a_missing_program_names_it_and_leaves_nothing(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    for (program, problem) in [
        ("nosuch", "not found in $PATH"),
        ("/no/such", "no such file or directory"),
    ] {
        let error = guest
            .try_exec("c", process(&[program]))
            .await
            .err()
            .expect("a failure")
            .to_string();
        assert!(error.contains(program) && error.contains(problem), "{error}");
    }
    let left = std::fs::read_to_string("/sys/fs/cgroup/kata/kubepods/pod1/c/cgroup.procs").expect("processes");
    assert_eq!(left.trim(), running.pid.to_string());
    let sockets = std::fs::read_dir("/run/kata-containers/engine")
        .expect("a folder")
        .count();
    assert_eq!(sockets, 0);
    guest.kill("c", running).await;
}

async fn an_exec_in_a_missing_directory_names_it(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let away = with(process(&["pwd"]), json!({ "cwd": "/not/there" }));
    let error = guest.try_exec("c", away).await.err().expect("a failure").to_string();
    assert!(
        error.contains("/not/there") && error.contains("no such file"),
        "{error}"
    );
    guest.kill("c", running).await;
}

async fn an_exec_has_a_terminal(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let shell = with(
        process(&["sh", "-c", "test -t 0 && tty && stty size && echo hi >/dev/tty"]),
        json!({
            "terminal": true, "consoleSize": { "height": 24, "width": 80 }
        }),
    );
    let mut exec = guest.try_exec("c", shell).await.expect("an exec");
    assert!(
        exec.pty
            .as_ref()
            .is_some_and(|pty| nix::unistd::isatty(pty.as_fd()).is_ok_and(|is| is))
    );
    let out = screen(&mut exec).await;
    assert_eq!(guest.end(exec).await.code, 0, "{out}");
    assert_eq!(out.lines().collect::<Vec<_>>(), ["/dev/pts/0", "24 80", "hi"], "{out}");
    guest.kill("c", running).await;
}

async fn an_exec_that_ends_at_once_is_not_lost(guest: Arc<Guest>) {
    let running = guest.start("c", idle("c")).await;
    let began = Instant::now();
    for code in 0..50 {
        let ended = guest.exec("c", process(&["sh", "-c", &format!("exit {code}")])).await;
        assert_eq!(ended.code, code);
    }
    say(&format!(
        "exec of a shell, one after the other: {} ms each",
        began.elapsed().as_millis() / 50
    ));
    guest.kill("c", running).await;
}

async fn an_exec_works_on_a_read_only_root(guest: Arc<Guest>) {
    let running = guest
        .start("c", with(idle("c"), json!({ "root": { "readonly": true } })))
        .await;
    let ended = guest.exec("c", process(&["sh", "-c", "echo in; touch /file"])).await;
    assert_eq!(ended.out, "in");
    assert!(ended.err.contains("Read-only file system"), "{ended:?}");
    guest.kill("c", running).await;
}
