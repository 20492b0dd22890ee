//! What cannot be started says why in a sentence and leaves nothing. One test, because it counts what its process has.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "support/spec.rs"]
mod support;

use std::{collections::BTreeSet, fs, os::fd::OwnedFd, path::Path, time::Duration};

use tempfile::TempDir;
use tokio::time::timeout;
use vmm::{
    Placement, Spawner, Virtiofsd, VirtiofsdSpec, Vm, VmFds,
    spec::{Accelerator, Channel, VmSpec},
};
use vmm_host::kvm_ready;

const DEADLINE: Duration = Duration::from_secs(60);

/// A start that must fail.
struct Attempt {
    spec: VmSpec,
    fds: VmFds,
    /// What the error says, or how it begins or ends.
    says: String,
}

/// A description that only lacks files with content.
fn plain(folder: &Path) -> VmSpec {
    let (kernel, initrd) = (folder.join("vmlinux"), folder.join("initrd"));
    fs::write(&kernel, "this is no kernel").unwrap();
    fs::write(&initrd, "this is no RAM disk").unwrap();
    VmSpec {
        kernel,
        initrd,
        channel: Channel::VirtioSerial,
        fs: None,
        ..support::pod()
    }
}

fn attempt(folder: &Path, says: impl Into<String>, spoil: impl FnOnce(&mut VmSpec)) -> Attempt {
    let mut spec = plain(folder);
    spoil(&mut spec);
    Attempt {
        spec,
        fds: VmFds::default(),
        says: says.into(),
    }
}

fn attempts(folder: &Path) -> Vec<Attempt> {
    let missing = folder.join("missing");
    let shown = missing.display();
    let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let mut attempts = vec![
        attempt(folder, "the VM's description is invalid: 0 vCPUs at boot", |spec| {
            spec.vcpus.boot = 0
        }),
        attempt(folder, format!("cannot open {shown}: No such file"), |spec| {
            spec.kernel = missing.clone()
        }),
        attempt(folder, format!("cannot open {shown}: No such file"), |spec| {
            spec.initrd = missing.clone()
        }),
        attempt(folder, format!("cannot start {shown}: No such file"), |spec| {
            spec.qemu = missing.clone()
        }),
        attempt(
            folder,
            format!("cannot start {}: Permission denied", folder.display()),
            |spec| spec.qemu = folder.into(),
        ),
        attempt(
            folder,
            "QEMU exited with code 1 before it was ready; it said: ",
            |spec| spec.qemu = "/bin/false".into(),
        ),
        // QEMU's own words.
        attempt(
            folder,
            "QEMU exited with code 1 before it was ready; it said: qemu: linux kernel too old to load a ram disk",
            |_| {},
        ),
        attempt(
            folder,
            format!("cannot open {}: not a regular file", folder.display()),
            |spec| spec.initrd = folder.into(),
        ),
        attempt(folder, "phys-bits too low (40)", |spec| spec.memory.max_mib = 4 << 20),
        attempt(
            folder,
            "the VM's description is invalid: the kernel command line has ",
            |spec| {
                spec.kernel_params.push("x".repeat(2000));
            },
        ),
        attempt(
            folder,
            "the VM has 1 virtiofs devices but got 0 open files for them",
            |spec| {
                spec.fs = support::pod().fs;
            },
        ),
        attempt(
            folder,
            "the VM has 2 network devices but got 0 open files for them",
            |spec| {
                spec.nics = vec![support::nic(1), support::nic(2)];
            },
        ),
    ];
    let mut taps = attempt(
        folder,
        "the VM has 1 vhost-net devices but got 2 open files for them",
        |spec| {
            spec.nics = vec![support::nic(1)];
        },
    );
    taps.fds = VmFds {
        taps: vec![null()],
        vhost_net: vec![null(), null()],
        ..VmFds::default()
    };
    attempts.push(taps);
    let mut no_tap = attempt(folder, "TUNGETIFF", |spec| spec.nics = vec![support::nic(1)]);
    no_tap.fds.taps = vec![null()];
    attempts.push(no_tap);
    // Which sentence it is depends on the machine; that KVM is missing comes before everything else.
    if let Err(missing) = kvm_ready() {
        attempts.push(attempt(folder, missing.to_string(), |spec| {
            spec.accelerator = Accelerator::Kvm
        }));
    }
    let says = "the VM has 1 vhost-vsock devices but got 0 open files for them";
    attempts.push(attempt(folder, says, |spec| spec.channel = Channel::VhostVsock));
    let mut no_vsock = attempt(folder, "cannot lease a vsock context id: ", |spec| {
        spec.channel = Channel::VhostVsock;
    });
    no_vsock.fds.vhost_vsock = Some(null());
    attempts.push(no_vsock);
    attempts
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let spawner = Spawner::new().unwrap();
    // The runtime opens files of its own with the first child.
    start(
        &spawner,
        attempt(folder.path(), "QEMU exited", |spec| spec.qemu = "/bin/false".into()),
    )
    .await;
    // The last child's keeper ends after it.
    spawner.end().await;
    let before = belongings();
    for attempt in attempts(folder.path()) {
        start(&spawner, attempt).await;
    }
    label_nothing(&spawner, folder.path()).await;
    serve_nothing(&spawner, folder.path()).await;
    spawner.end().await;
    assert_eq!(belongings(), before);
}

fn nobody() -> Placement {
    Placement {
        netns: None,
        uid: 64620,
        gid: 64620,
        label: None,
        oom_score_adj: None,
    }
}

async fn start(spawner: &Spawner, attempt: Attempt) {
    let started = timeout(DEADLINE, Vm::start(spawner, &attempt.spec, attempt.fds, &nobody())).await;
    let error = started.expect("an answer").expect_err(&attempt.says).to_string();
    assert!(error.contains(&attempt.says), "{error:?} should say {:?}", attempt.says);
}

async fn serve_nothing(spawner: &Spawner, folder: &Path) {
    let mut spec = VirtiofsdSpec {
        program: folder.join("missing"),
        shared_dir: folder.into(),
        cache: "auto".into(),
        extra_args: Vec::new(),
        label: None,
        oom_score_adj: None,
    };
    let error = Virtiofsd::start(spawner, &spec).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "cannot start {}: No such file or directory (os error 2)",
            spec.program.display()
        )
    );

    // One that complains and ends, as for a bad argument.
    spec.program = "/bin/ls".into();
    let (server, _connection) = Virtiofsd::start(spawner, &spec).unwrap();
    let ended = timeout(DEADLINE, server.child().exited()).await.unwrap();
    assert_eq!(ended.to_string(), "exited with code 2");
    let heard = async {
        while !server.log_tail().contains("unrecognized option") {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, heard).await.expect("its last words");
}

/// A label that no policy knows, which a kernel without SELinux takes as little.
async fn label_nothing(spawner: &Spawner, folder: &Path) {
    let label = Some("no:such:label:s0".to_owned());
    let mut spec = plain(folder);
    spec.qemu = "/bin/true".into();
    let placement = Placement {
        label: label.clone(),
        ..nobody()
    };
    let error = Vm::start(spawner, &spec, VmFds::default(), &placement)
        .await
        .unwrap_err()
        .to_string();
    let says = "cannot start /bin/true with the SELinux label \"no:such:label:s0\": ";
    assert!(error.starts_with(says), "{error}");

    let server = VirtiofsdSpec {
        program: "/bin/true".into(),
        shared_dir: folder.into(),
        cache: "auto".into(),
        extra_args: Vec::new(),
        label,
        oom_score_adj: None,
    };
    let error = Virtiofsd::start(spawner, &server).unwrap_err().to_string();
    assert!(error.starts_with(says), "{error}");
}

/// Open files and child processes of this process.
fn belongings() -> BTreeSet<String> {
    let files = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| {
        // Not the one that reads this list.
        let target = fs::read_link(fd.path()).ok()?;
        (!target.ends_with("fd")).then(|| format!("{} -> {}", fd.path().display(), target.display()))
    });
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    files.chain(children.filter(|list| !list.is_empty())).collect()
}
