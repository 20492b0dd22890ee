//! A node: a real containerd with its own mounts, network, processes and images, undone when it is dropped.
//!
//! A node lives in [`Namespaces`] of its own. Its /run is a tmpfs, so nodes do not see each other's sockets and state.
//! Only cgroups are the machine's: they live below one folder per node, which is removed last.

mod daemon;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

use self::daemon::Daemon;
use crate::{
    census::{self, Census, Scope},
    config::{self, Guest, Runtime, Site},
    events::Events,
    failure::{Failure, Result, Trying, same},
    images,
    namespaces::Namespaces,
    places, procs,
    run::{self, Output, succeed},
    wait::patient,
};

/// What the node's first process does first.
const FIRST: &str = "mount --make-rshared /
own() { mount -t overlay -o \"lowerdir=/$1,upperdir=$OWN/$2,workdir=$OWN/$2-work\" overlay \"/$1\"; }
[ -z \"$BARE\" ] || own etc etc
[ -z \"$BARE\" ] || own usr/local usr-local
[ -z \"$BARE\" ] || own var/lib var-lib
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/cni /run/kata /var/lib/cni
mount --bind /run/cni /var/lib/cni
mount --bind /run/netns /run/netns
mount --make-shared /run/netns
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
mount --bind \"$OWN/opt\" /opt
[ -z \"$MASK_KVM\" ] || ! [ -e /dev/kvm ] || mount --bind /dev/null /dev/kvm";

/// The handler whose configuration the shim finds by itself, where it is installed: with our own kernel. Only with such
/// a handler, containerd runs pods with user namespaces.
pub const INSTALLED: &str = "kata-installed";

/// How long the CRI's client waits by itself: longer than any command's own deadline.
const CRI: Duration = Duration::from_secs(240);

/// The prefix of the cgroup folders of nodes; the harness's pid follows.
const CGROUP: &str = "sandpod-test-";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The containerd of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Containerd {
    /// Debian's 1.6.
    Debian,
    /// 2.0, built from its Go module. The files of its configuration have one version for all.
    First,
    /// 2.2, built likewise, and of the same kind.
    Earlier,
    /// 2.3, built likewise. This one does not start with a drop-in of a later version than its main file's.
    Strict,
    /// 2.4, built likewise. Each file is migrated for itself.
    Newest,
}

impl Containerd {
    /// The name that trials carry.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Containerd::Debian => "containerd-1.6",
            Containerd::First => "containerd-2.0",
            Containerd::Earlier => "containerd-2.2",
            Containerd::Strict => "containerd-2.3",
            Containerd::Newest => "containerd-2.4",
        }
    }

    /// The folder with its programs.
    fn folder(self) -> Result<PathBuf> {
        match self {
            Containerd::Debian => Ok(PathBuf::from("/usr/bin")),
            Containerd::First => places::containerd("2.0"),
            Containerd::Earlier => places::containerd("2.2"),
            Containerd::Strict => places::containerd("2.3"),
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
    /// Nothing of Sandpod is there: a node to install it on. Its /etc, /usr/local and /var/lib are its own, as far as
    /// they differ from the machine's, and containerd's configuration is where packages have it.
    pub bare: bool,
    /// Where its containerd has its files.
    pub site: Site,
    /// The `version` of containerd's main file.
    pub version: u32,
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
            site: Site::Packages,
            version: 2,
        }
    }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    folder: TempDir,
    search_path: String,
    programs: PathBuf,
    configuration: PathBuf,
    site: Site,
    /// The main file, where the distribution writes it at each start.
    generated: Option<String>,
    cgroup: String,
    namespaces: Namespaces,
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
        let path = folder.path();
        for own in ["opt", "etc", "usr-local", "var-lib"] {
            for folder in [own.to_owned(), format!("{own}-work")] {
                fs::create_dir(path.join(folder)).trying("making the node's own folders")?;
            }
        }
        let yes = |holds: bool| Path::new(if holds { "yes" } else { "" });
        let variables = [
            ("OWN", folder.path()),
            ("BARE", yes(spec.bare)),
            ("MASK_KVM", yes(spec.without_kvm)),
        ];
        let namespaces = Namespaces::make(FIRST, &variables)?;
        let programs = spec.containerd.folder()?;
        let mut node = Node {
            search_path: search_path(&programs, spec.bare),
            programs,
            site: spec.site,
            generated: None,
            configuration: match spec.bare {
                true => PathBuf::from(spec.site.main()),
                false => folder.path().join("containerd.toml"),
            },
            cgroup: format!(
                "/{CGROUP}{}-{}",
                std::process::id(),
                COUNTER.fetch_add(1, Ordering::Relaxed)
            ),
            namespaces,
            daemon: Mutex::default(),
            identifiers: Mutex::default(),
            serial: AtomicU32::new(0),
            events: Arc::default(),
            folder,
        };
        let text = node.configure(spec)?;
        node.generated = (spec.site == Site::K3s).then_some(text);
        node.start_containerd()?;
        let archive = images::archive()?.display().to_string();
        for namespace in ["k8s.io", "default"] {
            node.ctr(["-n", namespace, "images", "import", &archive])?;
        }
        node.settle_in()?;
        Ok(node)
    }

    /// Runs a first pod and a first task with runc: what a node keeps ever after (its bridge, the folders of its
    /// programs) is there from then on.
    fn settle_in(&self) -> Result {
        let pod = self.pod(Runtime::Runc, "first")?.run()?;
        pod.shell("first", "exit 0").run()?.wait_exit()?;
        pod.remove()?;
        let task = self.task(Runtime::Runc, "first")?.run(&["true"])?;
        same("the first task's exit code", task.code, 0)
    }

    /// Writes the node's configuration, and returns containerd's.
    fn configure(&self, spec: &NodeSpec) -> Result<String> {
        self.write(&self.path("cni/pods.conflist"), &config::cni())?;
        let handlers = if spec.bare { Vec::new() } else { self.handlers(spec)? };
        let text = match spec.bare {
            true => self.bare_configuration(spec.version),
            false => config::containerd(self.folder.path(), spec.site, &handlers),
        };
        self.write(&self.inside(&self.configuration.display().to_string()), &text)?;
        Ok(text)
    }

    /// containerd's main file of a version on a bare node, with the import of its drop-ins in the first line.
    #[must_use]
    pub fn bare_configuration(&self, version: u32) -> String {
        let folder = self.folder.path();
        let text = match version {
            2 => config::containerd(folder, self.site, &[]),
            version => config::containerd_of_version(version, folder, self.site),
        };
        format!("imports = [\"{}/*.toml\"]\n{text}", self.site.drop_ins(version))
    }

    /// Where this node's containerd has its files.
    #[must_use]
    pub fn site(&self) -> Site {
        self.site
    }

    /// Writes the configurations of the runtime handlers, and returns their names and paths.
    fn handlers(&self, spec: &NodeSpec) -> Result<Vec<(String, Option<String>)>> {
        let mut handlers = Vec::new();
        let known = [Guest::Own, Guest::Tracing, Guest::Debian].map(|guest| {
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
        Ok(handlers)
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
        self.namespaces.inside(path)
    }

    /// A command that runs inside the node.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.namespaces.command(program);
        command.env("PATH", &self.search_path);
        command
    }

    /// The namespaces that the node lives in.
    #[must_use]
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
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
        command.args(["--address", self.site.socket()]).args(arguments);
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
        let endpoint = &format!("unix://{}", self.site.socket());
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
        let timeout = format!("{}s", patient(CRI).as_secs());
        command.args(["--timeout", &timeout]).args(arguments);
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
        self.namespaces.in_network_at(path, work)
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
        procs::in_namespace_of(self.namespaces.init())
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
            init: self.namespaces.init(),
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

    /// Removes the pods' parent cgroups, which a kubelet makes and removes in real life. One that is not empty is
    /// somebody's leftover and stays.
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
        self.namespaces.end()?;
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

/// The peers' programs first, then ours unless they are to be installed (1.6 finds a shim by its name only), then the
/// system's.
fn search_path(programs: &Path, bare: bool) -> String {
    let ours = match places::binaries() {
        Ok(folder) if !bare => format!("{}:", folder.display()),
        _ => String::new(),
    };
    format!("{}:{ours}/usr/sbin:/usr/bin:/sbin:/bin", programs.display())
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
