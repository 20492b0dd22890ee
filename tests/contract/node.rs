//! The node: the namespaces in which the client and the shims under test live.
//!
//! ```text
//! outside ──unshare──▶ init ──▶ client ──▶ shims, QEMU, virtiofsd, …
//! ```
//!
//! This program runs in three roles. `outside` makes mount, pid and network namespaces, and looks afterwards whether
//! anything is left on the machine. `init` is their first process: it collects orphans, as daemonised shims become.
//! `client` plays the stories, and puts the node back in order after each.

use std::{
    env, fs,
    os::unix::process::ExitStatusExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tests::{
    census::{self, Census, Scope},
    failure::{Failure, Result, Trying},
    images, procs,
    run::{self, succeed},
    wait::{Bell, patient},
};

use crate::{crio::Crio, stories::Story};

const ROLE: &str = "SANDPOD_CONTRACT_ROLE";
const FOLDER: &str = "SANDPOD_CONTRACT_FOLDER";
/// The folder below which the node's disk is, and the prefix of everything that has this program's pid in its name.
const PLACE: &str = "/var/tmp";
const PREFIX: &str = "sandpod-contract-";

/// How long what nobody waits for may outlive a pod's removal.
const SETTLE: Duration = Duration::from_secs(5);

/// Longer than any story may take.
const LONGEST: Duration = Duration::from_secs(300);

/// Folders that CRI-O, the runtimes and iproute2 make once per node and keep.
const KEPT: &[&str] = &[
    "/run/containerd/runc/default",
    "/run/containerd/s",
    "/run/containers/storage/overlay-containers",
    "/run/crio/exits",
    "/run/ipcns",
    "/run/kata",
    "/run/lock",
    "/run/netns",
    "/run/utsns",
    "/run/vc/crio/fifo/io",
];

/// Which of the three this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Started by the user.
    Outside,
    /// The first process of the namespaces.
    Init,
    /// Plays the stories.
    Client,
}

impl Role {
    /// Told by the environment.
    pub fn of_this_process() -> Role {
        match env::var(ROLE).as_deref() {
            Ok("init") => Role::Init,
            Ok("client") => Role::Client,
            _ => Role::Outside,
        }
    }
}

/// Makes the namespaces, waits for their end and removes what is the machine's: a folder and cgroups.
///
/// # Errors
/// When the namespaces cannot be made, or something is left.
pub fn outside() -> Result<ExitCode> {
    sweep_the_dead()?;
    let name = format!("{PREFIX}{}", std::process::id());
    let folder = Path::new(PLACE).join(&name);
    fs::create_dir(&folder).trying(format!("making {}", folder.display()))?;
    let told = unpack_image(&folder.join("image")).and_then(|()| in_namespaces(&folder));
    let undone = undo(&name);
    let code = told?;
    undone.map(|()| code)
}

fn in_namespaces(folder: &Path) -> Result<ExitCode> {
    let program = env::current_exe().trying("finding this program")?;
    let mut command = run::in_new_namespaces();
    command
        .arg(program)
        .args(env::args_os().skip(1))
        .env(ROLE, "init")
        .env(FOLDER, folder);
    let status = command.status().trying("making the node's namespaces (needs root)")?;
    Ok(code(run::code_of(status)))
}

fn code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Removes the folder and the cgroups of this name. The namespaces are gone by then, and the client has put everything
/// in order: any cgroup below its own is a leftover.
fn undo(name: &str) -> Result {
    let mut left = Vec::new();
    for hierarchy in census::hierarchies() {
        let own = hierarchy.join(name);
        for folder in census::folders(&own).into_iter().filter(|folder| folder.exists()) {
            if folder != own {
                left.push(format!("cgroup {}", folder.display()));
            }
            // The last processes of a pid namespace leave their cgroups some time after its first is reaped.
            Bell::default().until("an empty cgroup", SETTLE, || {
                fs::remove_dir(&folder).map_err(|error| error.to_string())
            })?;
        }
    }
    let folder = Path::new(PLACE).join(name);
    fs::remove_dir_all(&folder).trying(format!("removing {}", folder.display()))?;
    if left.is_empty() {
        Ok(())
    } else {
        Err(Failure::LeftBehind(left))
    }
}

/// A run that was killed from outside could not undo itself.
fn sweep_the_dead() -> Result {
    for entry in fs::read_dir(PLACE).trying(format!("reading {PLACE}"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Its leftovers were that run's to report.
            drop(undo(&name));
        }
    }
    Ok(())
}

/// Lays the test image out as a folder, the lower layer of every container's overlay.
fn unpack_image(folder: &Path) -> Result {
    let archive = images::archive()?;
    let layout = folder.with_file_name("layout");
    fs::create_dir_all(&layout)
        .and_then(|()| fs::create_dir_all(folder))
        .trying("making the image's folder")?;
    let unpack = |archive: &Path, into: &Path| {
        let mut command = Command::new("tar");
        command
            .arg("--extract")
            .arg("--file")
            .arg(archive)
            .arg("--directory")
            .arg(into);
        succeed(&mut command, run::ORDINARY).map(drop)
    };
    unpack(&archive, &layout)?;
    let blob = |digest: &str| layout.join("blobs").join(digest.replace(':', "/"));
    let index = read_json(&layout.join("index.json"))?;
    let manifests = index["manifests"].as_array().cloned().unwrap_or_default();
    let named =
        |manifest: &&serde_json::Value| manifest["annotations"]["org.opencontainers.image.ref.name"] == images::TEST;
    let digest = |descriptor: &serde_json::Value| descriptor["digest"].as_str().unwrap_or_default().to_owned();
    let image = manifests.iter().find(named).map(digest).unwrap_or_default();
    for layer in read_json(&blob(&image))?["layers"].as_array().into_iter().flatten() {
        unpack(&blob(&digest(layer)), folder)?;
    }
    fs::remove_dir_all(&layout).trying("removing the image's layout")
}

fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = fs::read(path).trying(format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).map_err(|source| Failure::Json {
        what: path.display().to_string(),
        source,
    })
}

/// Prepares the namespaces, starts the client, and collects every orphan until the client ends.
///
/// # Errors
/// The kernel's.
pub fn init() -> Result<ExitCode> {
    const NONE: Option<&str> = None;
    // As on a host with systemd: mounts propagate, so a shim's namespace may be a slave of this one.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE).trying("sharing the node's mounts")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).trying("mounting /run")?;
    for folder in KEPT {
        fs::create_dir_all(folder).trying(format!("making {folder}"))?;
    }
    // The first `ip netns add` of a node turns its folder into a mount.
    for command in [
        &["link", "set", "lo", "up"][..],
        &["netns", "add", "first"],
        &["netns", "del", "first"],
    ] {
        succeed(Command::new("ip").args(command), run::ORDINARY)?;
    }
    let program = env::current_exe().trying("finding this program")?;
    let client = Command::new(program)
        .args(env::args_os().skip(1))
        .env(ROLE, "client")
        .spawn()
        .trying("starting the client")?;
    let client = Pid::from_raw(client.id().cast_signed());
    loop {
        match waitpid(None, None).trying("collecting orphans")? {
            WaitStatus::Exited(pid, status) if pid == client => return Ok(code(status)),
            WaitStatus::Signaled(pid, signal, _) if pid == client => {
                let status = std::process::ExitStatus::from_raw(signal as i32);
                return Ok(code(run::code_of(status)));
            }
            _ => {}
        }
    }
}

/// The node as the client sees it.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    cgroup: String,
    serial: AtomicU32,
}

impl Node {
    /// The node of this process.
    ///
    /// # Errors
    /// When the cgroup cannot be made.
    pub fn here() -> Result<Node> {
        let folder = PathBuf::from(env::var_os(FOLDER).unwrap_or_default());
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let node = Node {
            folder,
            cgroup: format!("/{name}"),
            serial: AtomicU32::new(0),
        };
        make_cgroup(&node.cgroup)?;
        Ok(node)
    }

    /// The node's disk.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The lower layer of containers' root file systems.
    pub fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    /// The cgroup below which kubelet would make those of pods.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// A number that no other thing of this node has.
    pub fn serial(&self) -> u32 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// What the node holds now.
    pub fn census(&self) -> Census {
        Census::take(&Scope {
            init: 1,
            cgroup: self.cgroup.clone(),
            identifiers: Vec::new(),
        })
    }

    /// Waits until the node holds nothing that it did not hold at `before`.
    ///
    /// # Errors
    /// [`Failure::LeftBehind`] with everything that is still there after `deadline`.
    pub fn as_before(&self, before: &Census, deadline: Duration) -> Result {
        let mut left = Vec::new();
        let clean = Bell::default().until("a clean node", deadline, || {
            left = self.census().since(before);
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
        clean.map_err(|_| Failure::LeftBehind(left))
    }

    /// Plays a story: it must hold, and leave nothing. Whatever it does leave is removed before the next.
    ///
    /// # Errors
    /// The story's first failure, with what the shims logged.
    pub fn play(&self, story: &Story) -> Result {
        let before = self.census();
        let mounts = mounts();
        let crio = Crio::new(self, story.runtime)?;
        let told = watched(story, || (story.play)(&crio)).and_then(|()| self.as_before(&before, SETTLE));
        let told = told.map_err(|failure| Failure::Claim(format!("{failure}{}", crio.log())));
        drop(crio);
        // The story's own failure tells more than what it left.
        let reset = self.reset(&mounts);
        told.and(reset)?;
        self.as_before(&before, SETTLE)
    }

    /// Takes the node back by force to where it was with these mounts.
    fn reset(&self, kept: &[(String, PathBuf)]) -> Result {
        let own = std::process::id().cast_signed();
        Bell::default().until("the end of every process", SETTLE, || {
            let others: Vec<_> = procs::all()
                .into_iter()
                .filter(|process| process.pid != 1 && process.pid != own)
                .collect();
            for process in &others {
                // One that is gone already needs no signal.
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            if others.is_empty() {
                Ok(())
            } else {
                Err(format!("{others:?}"))
            }
        })?;
        // One by one: a mount that propagated goes with its twin.
        while let Some((_, path)) = mounts().iter().rfind(|mount| !kept.contains(mount)) {
            umount2(path, MntFlags::MNT_DETACH).trying(format!("unmounting {}", path.display()))?;
        }
        for hierarchy in census::hierarchies() {
            let own = hierarchy.join(self.cgroup.trim_start_matches('/'));
            for folder in census::folders(&own).into_iter().filter(|folder| *folder != own) {
                fs::remove_dir(&folder).trying(format!("removing {}", folder.display()))?;
            }
        }
        remove_all_but_kept(Path::new("/run"))?;
        let storage = self.folder.join("storage");
        if storage.exists() {
            fs::remove_dir_all(&storage).trying("removing the storage")?;
        }
        // Devices end with the namespace of their peer, some time after its last process and mount.
        Bell::default().until("the end of every network device", SETTLE, || match devices()? {
            devices if devices.is_empty() => Ok(()),
            devices => Err(format!("{devices:?}")),
        })
    }
}

/// Tells a story. Every wait in it has a deadline; should one of them be forgotten, this one ends the program, and the
/// node with it.
fn watched(story: &Story, play: impl FnOnce() -> Result) -> Result {
    let (end, ended) = mpsc::channel::<()>();
    let name = story.name();
    let watch = thread::spawn(move || {
        if ended.recv_timeout(patient(LONGEST)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("contract: {name} is not over after {LONGEST:?}");
            std::process::exit(1);
        }
    });
    let told =
        catch_unwind(AssertUnwindSafe(play)).unwrap_or_else(|_| Err(Failure::Claim("the story panicked".into())));
    drop(end);
    drop(watch.join());
    told
}

/// Makes a cgroup in every hierarchy, ready to take processes, as kubelet does for a pod.
///
/// # Errors
/// The kernel's.
pub fn make_cgroup(path: &str) -> Result {
    for hierarchy in census::hierarchies() {
        let folder = hierarchy.join(path.trim_start_matches('/'));
        fs::create_dir_all(&folder).trying(format!("making {}", folder.display()))?;
        // A cpuset of version 1 takes no process before it has been given processors and memory nodes.
        for file in ["cpuset.cpus", "cpuset.mems"]
            .iter()
            .filter(|file| folder.join(file).exists() && !folder.join("cgroup.subtree_control").exists())
        {
            let parent = folder.parent().unwrap_or(&hierarchy).join(file);
            let granted = fs::read_to_string(&parent).trying(format!("reading {}", parent.display()))?;
            fs::write(folder.join(file), granted).trying(format!("writing {file} of {}", folder.display()))?;
        }
    }
    Ok(())
}

/// Removes a cgroup from every hierarchy, as kubelet does when a pod is gone; it must have nothing in it.
///
/// # Errors
/// The kernel's.
pub fn remove_cgroup(path: &str) -> Result {
    for hierarchy in census::hierarchies() {
        let folder = hierarchy.join(path.trim_start_matches('/'));
        fs::remove_dir(&folder).trying(format!("removing {}", folder.display()))?;
    }
    Ok(())
}

/// The node's mounts: identifier and path, parents first (`proc_pid_mountinfo(5)`).
fn mounts() -> Vec<(String, PathBuf)> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount_of = |line: &str| {
        let fields: Vec<_> = line.split(' ').collect();
        Some(((*fields.first()?).to_owned(), PathBuf::from(fields.get(4)?)))
    };
    table.lines().filter_map(mount_of).collect()
}

fn remove_all_but_kept(folder: &Path) -> Result {
    for entry in fs::read_dir(folder)
        .trying(format!("reading {}", folder.display()))?
        .flatten()
    {
        let path = entry.path();
        let what = || format!("removing {}", path.display());
        if KEPT.iter().any(|kept| Path::new(kept).starts_with(&path)) {
            remove_all_but_kept(&path)?;
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            fs::remove_dir_all(&path).trying(what())?;
        } else {
            fs::remove_file(&path).trying(what())?;
        }
    }
    Ok(())
}

fn devices() -> std::result::Result<Vec<String>, String> {
    let table = fs::read_to_string("/proc/net/dev").map_err(|error| error.to_string())?;
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(|name| name.trim().to_owned());
    Ok(names.filter(|name| name != "lo").collect())
}
