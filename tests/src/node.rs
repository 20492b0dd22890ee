//! A node: a real containerd with its own mounts, network, processes and images, undone when it is dropped.
//!
//! A node is a mount, network, IPC and pid namespace made by `unshare`. Its first process holds a pipe from the harness and ends with it; the kernel then ends
//! every other process of the node, and the mounts go with the last one. /run is a tmpfs of the node's own, so nodes do not see each other's sockets
//! and state. Only cgroups are the machine's: they live below one folder per node, which is removed last.

mod daemon;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;

use self::daemon::Daemon;
use crate::{
    census::{self, Census, Scope},
    config::{self, Guest, Runtime},
    events::Events,
    failure::{Failure, Result, Trying, same},
    images, places, procs,
    run::{self, Output, succeed},
};

/// What runs in the node's first process, as root in new namespaces. `cat` ends with the pipe from the harness; the shell collects orphans.
const FIRST: &str = "set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/cni /run/kata /var/lib/cni
mount --bind /run/cni /var/lib/cni
mount --bind /run/netns /run/netns
mount --make-shared /run/netns
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
mount --bind \"$OPT\" /opt
[ -z \"$ETC\" ] || mount -t overlay -o \"lowerdir=/etc,upperdir=$ETC/upper,workdir=$ETC/work\" overlay /etc
[ -z \"$MASK_KVM\" ] || ! [ -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
echo ready
cat >/dev/null || :
exit 0";

/// The handler whose configuration the shim finds by itself, where it is installed: with our own kernel. Only with such a handler, containerd runs pods with user namespaces.
pub const INSTALLED: &str = "kata-installed";

/// The prefix of the cgroup folders of nodes; the harness's pid follows.
const CGROUP: &str = "sandpod-test-";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The containerd of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Containerd {
    /// Debian's 1.6.
    Debian,
    /// 2.4, built from its Go module.
    Newest,
}

impl Containerd {
    /// The name that trials carry.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Containerd::Debian => "containerd-1.6",
            Containerd::Newest => "containerd-2.4",
        }
    }

    /// The folder with its programs.
    fn folder(self) -> Result<PathBuf> {
        match self {
            Containerd::Debian => Ok(PathBuf::from("/usr/bin")),
            Containerd::Newest => places::peers(),
        }
    }
}

/// What a node is made of.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Its containerd.
    pub containerd: Containerd,
    /// Runtime handlers besides runc, kata-own and kata-debian: name and configuration.toml.
    pub handlers: Vec<(String, String)>,
    /// Hides /dev/kvm.
    pub without_kvm: bool,
    /// Has an `/etc` of its own, with containerd's configuration at its usual place, and nothing of Sandpod's: no handler, nothing in `/opt` and in the PATH.
    pub bare: bool,
}

impl NodeSpec {
    /// A node with this containerd and nothing special.
    #[must_use]
    pub fn new(containerd: Containerd) -> Self {
        NodeSpec {
            containerd,
            handlers: Vec::new(),
            without_kvm: false,
            bare: false,
        }
    }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    folder: TempDir,
    programs: PathBuf,
    bare: bool,
    cgroup: String,
    init: i32,
    first: Option<(Child, ChildStdin)>,
    daemon: Mutex<Option<Daemon>>,
    identifiers: Mutex<Vec<String>>,
    serial: AtomicU32,
    events: Arc<Events>,
}

impl Node {
    /// Starts a node and imports the test images into containerd's namespaces `k8s.io` and `default`.
    ///
    /// # Errors
    /// When something it needs is missing, or does not start.
    pub fn start(spec: &NodeSpec) -> Result<Node> {
        let folder = tempfile::Builder::new()
            .prefix("sandpod-node-")
            .tempdir_in("/var/tmp")
            .trying("making a folder for the node")?;
        sweep_cgroups_of_the_dead();
        // What is installed there is the node's own.
        for own in ["opt", "etc/upper", "etc/work"] {
            fs::create_dir_all(folder.path().join(own)).trying(format!("making the node's {own}"))?;
        }
        let (first, init) = first_process(spec, folder.path())?;
        let node = Node {
            programs: spec.containerd.folder()?,
            bare: spec.bare,
            cgroup: format!(
                "/{CGROUP}{}-{}",
                std::process::id(),
                COUNTER.fetch_add(1, Ordering::Relaxed)
            ),
            init,
            first: Some(first),
            daemon: Mutex::default(),
            identifiers: Mutex::default(),
            serial: AtomicU32::new(0),
            events: Arc::default(),
            folder,
        };
        node.configure(spec)?;
        node.start_containerd()?;
        let archive = images::archive()?.display().to_string();
        for namespace in ["k8s.io", "default"] {
            node.ctr(["-n", namespace, "images", "import", &archive])?;
        }
        node.settle_in()?;
        Ok(node)
    }

    /// Runs a first pod and a first task with runc: what a node keeps ever after (its bridge, the folders of its programs) is there from then on.
    fn settle_in(&self) -> Result {
        let pod = self.pod(Runtime::Runc, "first")?.run()?;
        pod.shell("first", "exit 0").run()?.wait_exit()?;
        pod.remove()?;
        let task = self.task(Runtime::Runc, "first")?.run(&["true"])?;
        same("the first task's exit code", task.code, 0)
    }

    fn configure(&self, spec: &NodeSpec) -> Result {
        self.write(&self.path("cni/pods.conflist"), &config::cni())?;
        if self.bare {
            let text = config::containerd(self.folder.path(), &[]);
            let text = format!("imports = [\"/etc/containerd/conf.d/*.toml\"]\n{text}");
            return self.write(&self.inside(&self.containerd_configuration()), &text);
        }
        let mut handlers = Vec::new();
        let known = [Guest::Own, Guest::Debian].map(|guest| {
            // A guest that is not built fails the stories that ask for it (see Runtime::require), not those with runc.
            (
                format!("kata-{}", guest.name()),
                guest.configuration().unwrap_or_default(),
            )
        });
        for (name, text) in known.iter().chain(&spec.handlers) {
            let path = self.configuration_of(name);
            self.write(&path, text)?;
            handlers.push((name.clone(), Some(path.display().to_string())));
        }
        handlers.push((INSTALLED.to_owned(), None));
        let installed = Guest::Own.configuration().unwrap_or_default();
        self.write(&self.path("opt/sandpod/current/configuration.toml"), &installed)?;
        self.write(
            Path::new(&self.containerd_configuration()),
            &config::containerd(self.folder.path(), &handlers),
        )
    }

    /// The path of containerd's configuration, as the node sees it.
    fn containerd_configuration(&self) -> String {
        if self.bare {
            return "/etc/containerd/config.toml".into();
        }
        self.path("containerd.toml").display().to_string()
    }

    /// The path of a handler's configuration.toml.
    #[must_use]
    pub fn configuration_of(&self, handler: &str) -> PathBuf {
        self.path(&format!("{handler}/configuration.toml"))
    }

    /// A path in the node's folder, which is the same inside and outside.
    #[must_use]
    pub fn path(&self, relative: &str) -> PathBuf {
        self.folder.path().join(relative)
    }

    /// Writes a file and makes the folders above it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write(&self, path: &Path, text: &str) -> Result {
        let what = || format!("writing {}", path.display());
        path.parent().map_or(Ok(()), fs::create_dir_all).trying(what())?;
        fs::write(path, text).trying(what())
    }

    /// A file or folder of the node (such as one under /run) as seen from outside.
    #[must_use]
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// A command that runs inside the node.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--",
            program,
        ]);
        command.env("PATH", self.search_path());
        command
    }

    /// The peers' programs first, then ours (1.6 finds a shim by its name only), then the system's.
    fn search_path(&self) -> String {
        let ours = places::binaries().ok().filter(|_| !self.bare);
        let ours = ours.map(|folder| format!("{}:", folder.display())).unwrap_or_default();
        format!("{}:{ours}/usr/sbin:/usr/bin:/sbin:/bin", self.programs.display())
    }

    /// Runs containerd's own client; it must succeed.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn ctr<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        succeed(&mut self.ctr_command(arguments), run::ORDINARY)
    }

    /// A command of containerd's own client.
    pub fn ctr_command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = self.command(&self.programs.join("ctr").display().to_string());
        command.args(arguments);
        command
    }

    /// Runs the CRI's client; it must succeed.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn crictl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        succeed(&mut self.crictl_command(arguments)?, run::ORDINARY)
    }

    /// A command of the CRI's client.
    ///
    /// # Errors
    /// When crictl has not been built.
    pub fn crictl_command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Command> {
        let endpoint = "unix:///run/containerd/containerd.sock";
        let mut command = self.command(&places::peers()?.join("crictl").display().to_string());
        command.args([
            "--config",
            "/dev/null",
            "--runtime-endpoint",
            endpoint,
            "--image-endpoint",
            endpoint,
        ]);
        // Each command has a deadline of its own.
        command.args(["--timeout", "240s"]).args(arguments);
        Ok(command)
    }

    /// Runs `work` in a thread whose network is the node's.
    ///
    /// # Errors
    /// Those of `work`, or when the namespace cannot be entered.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.in_network_at("/proc/1/ns/net", work)
    }

    /// Runs `work` in a thread whose network is the one at a path of the node's.
    ///
    /// # Errors
    /// When there is none, and those of the work.
    pub fn in_network_at<T: Send>(&self, path: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/proc/{}/root{path}", self.init);
        let namespace = fs::File::open(&path).trying(format!("opening {path}"))?;
        let enter = || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).trying(format!("entering the network at {path}"))?;
            work()
        };
        thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|_| Err(Failure::Claim("the thread in another network panicked".into())))
    }

    /// What containerd tells.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The cgroup folder below which this node's pods live.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// A number that no other thing of this node has.
    #[must_use]
    pub fn serial(&self) -> u32 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Remembers the identifier of a pod or task, so that nothing named after it may remain.
    pub fn remember(&self, identifier: &str) {
        self.identifiers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(identifier.to_owned());
    }

    /// Every process of the node but its first.
    #[must_use]
    pub fn processes(&self) -> Vec<procs::Process> {
        procs::in_namespace_of(self.init)
    }

    /// The processes of a pod: its shim and everything below it.
    #[must_use]
    pub fn processes_of(&self, pod: &str) -> Vec<procs::Process> {
        let everyone = self.processes();
        let is_shim = |process: &procs::Process| {
            process.program().starts_with("containerd-shim-") && process.arguments.iter().any(|word| word == pod)
        };
        let shims: Vec<_> = everyone
            .iter()
            .filter(|process| is_shim(process))
            .map(|process| process.pid)
            .collect();
        shims.iter().flat_map(|shim| procs::tree(&everyone, *shim)).collect()
    }

    /// What the node holds now.
    #[must_use]
    pub fn census(&self) -> Census {
        let identifiers = self.identifiers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Census::take(&Scope {
            init: self.init,
            cgroup: self.cgroup.clone(),
            identifiers,
        })
    }

    /// Waits until the node holds nothing that it did not hold at `before`.
    ///
    /// # Errors
    /// [`Failure::LeftBehind`] with everything that is still there at the deadline.
    pub fn nothing_left_since(&self, before: &Census, deadline: Duration) -> Result {
        let mut left = Vec::new();
        let clean = self.events.bell.until("a clean node", deadline, || {
            self.remove_empty_parents();
            left = self.census().since(before);
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
        clean.map_err(|_| Failure::LeftBehind(left))
    }

    /// Removes the pods' parent cgroups, which a kubelet makes and removes in real life. One that is not empty is somebody's leftover and stays.
    fn remove_empty_parents(&self) {
        for hierarchy in census::hierarchies() {
            let own = hierarchy.join(self.cgroup.trim_start_matches('/'));
            for parent in fs::read_dir(own).into_iter().flatten().flatten() {
                drop(fs::remove_dir(parent.path()));
            }
        }
    }

    /// Ends the node.
    ///
    /// # Errors
    /// When something of it cannot be ended or removed.
    pub fn close(mut self) -> Result {
        self.shut()
    }

    fn shut(&mut self) -> Result {
        let stopped = self.stop_containerd();
        if let Some((first, pipe)) = self.first.take() {
            drop(pipe);
            run::wait(first, Duration::from_secs(20), "the node's first process")?;
        }
        remove_cgroups(&self.cgroup)?;
        stopped
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(failure) = self.shut() {
            eprintln!("a node was not undone: {failure}");
        }
    }
}

/// Starts the namespaces and returns `unshare`, the pipe that keeps it alive, and the pid of the node's first process.
fn first_process(spec: &NodeSpec, folder: &Path) -> Result<((Child, ChildStdin), i32)> {
    let etc = if spec.bare { folder.join("etc") } else { PathBuf::new() };
    let mut command = run::in_new_namespaces();
    command
        .args(["sh", "-c", FIRST])
        .env("OPT", folder.join("opt"))
        .env("ETC", etc)
        .env("MASK_KVM", if spec.without_kvm { "yes" } else { "" });
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .trying("making the node's namespaces (needs root)")?;
    let refused = || Failure::Missing {
        what: "a node's namespaces".into(),
        remedy: "run as root".into(),
    };
    let pipe = child.stdin.take().ok_or_else(refused)?;
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().ok_or_else(refused)?);
    output
        .read_line(&mut line)
        .trying("waiting for the node's first process")?;
    if line.trim() != "ready" {
        drop(child.wait());
        return Err(refused());
    }
    let parent = child.id().cast_signed();
    let init = procs::all()
        .iter()
        .find(|process| process.parent == parent)
        .map(|process| process.pid);
    Ok(((child, pipe), init.ok_or_else(refused)?))
}

fn remove_cgroups(cgroup: &str) -> Result {
    for hierarchy in census::hierarchies() {
        let own = hierarchy.join(cgroup.trim_start_matches('/'));
        for folder in census::folders(&own).into_iter().filter(|folder| folder.exists()) {
            fs::remove_dir(&folder).trying(format!("removing {}", folder.display()))?;
        }
    }
    Ok(())
}

/// A harness that was killed could not remove its cgroups.
fn sweep_cgroups_of_the_dead() {
    for hierarchy in census::hierarchies() {
        for entry in fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name
                .strip_prefix(CGROUP)
                .and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                // Whatever still lives there is not ours to end, and shows in the next census of the machine.
                drop(remove_cgroups(&name));
            }
        }
    }
}
