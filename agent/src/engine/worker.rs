//! What a worker does: one request, in a process of its own, with libcontainer.
//!
//! libcontainer's builders are left out; a worker calls what is below them (`container_main_process`). They
//! would write the specification and the state to files and read them again for each exec, find sockets by
//! path, and drop fields of an exec (see `spec::for_exec`).

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::{
    container::{Container, ContainerStatus, State},
    hooks::run_hooks,
    notify_socket::NotifyListener,
    process::{
        args::{ContainerArgs, ContainerType},
        channel::ChannelError,
        container_main_process::{ProcessError, container_main_process},
    },
    syscall::syscall::SyscallType,
    user_ns::UserNamespaceConfig,
};
use nix::{
    fcntl::OFlag,
    sys::{
        resource::{Resource, getrlimit},
        signal::{Signal, kill},
    },
    unistd::{Pid, Uid, fchown, pipe2},
};
use oci_spec::runtime::{Box as Size, Hook, Linux, LinuxResources, Process, Spec};

use super::{
    Stdio, cgroup,
    executor::Program,
    inside,
    seccomp::{Confinement, Filter},
    spec as edit, sys,
    trace::Trace,
    wire::{Answer, Stage},
};

/// An answer with its descriptors, or one sentence about what went wrong.
pub(super) type Outcome = Result<(Answer, Vec<OwnedFd>), String>;

/// Creates a container whose init waits on the socket `notify` to be started.
pub(super) fn create(id: &str, mut spec: Spec, filter: Option<Filter>, notify: &Path, stdio: Stdio) -> Outcome {
    let root = root_of(&spec)?;
    let mut process = spec.process().clone().ok_or("the specification has no process")?;
    inside::ensure_cwd(&root, &spec, process.cwd());
    prepare(&mut process, &root)?;
    spec.set_process(Some(process));
    if let Some(linux) = spec.linux_mut() {
        check_sysctls(linux)?;
        if let Some(resources) = linux.resources_mut() {
            edit::limit_swap(resources, cgroup::has_swap());
        }
    }
    let path = cgroup_of(&spec)?;
    let launch = Launch {
        id,
        root: &root,
        notify,
        cgroup: path.clone(),
        kind: Kind::Init,
        filter,
    };
    match launch.run(spec, stdio) {
        Ok(launched) => {
            let pidfd = sys::pidfd_open(launched.pid).map_err(|e| format!("opening a pidfd: {}", e.desc()))?;
            let fds = [Some(pidfd), Some(launched.status), launched.pty]
                .into_iter()
                .flatten()
                .collect();
            Ok((Answer::Started { pid: launched.pid }, fds))
        }
        Err(error) => {
            // libcontainer leaves what it had made when a step fails; the first error is the one to tell.
            if cgroup::remove(&cgroup::folder(&path)).is_ok() {
                reap();
            }
            let _ = fs::remove_file(notify);
            Err(error.text)
        }
    }
}

/// Starts a further process in the container whose init has the pid `init`.
pub(super) fn exec(
    id: &str,
    container: &Spec,
    filter: Option<Filter>,
    process: Process,
    init: i32,
    notify: &Path,
    stdio: Stdio,
) -> Outcome {
    let root = PathBuf::from(format!("/proc/{init}/root"));
    let mut spec = edit::for_exec(container, process, init).map_err(|e| e.to_string())?;
    let mut process = spec.process().clone().ok_or("the specification has no process")?;
    prepare(&mut process, &root)?;
    spec.set_process(Some(process));
    let path = cgroup_of(&spec)?;
    let path = cgroup::for_exec(&path, init).map_err(|e| format!("the cgroup of container {id}: {e}"))?;
    let launch = Launch {
        id,
        root: &root_of(container)?,
        notify,
        cgroup: path,
        kind: Kind::Exec,
        filter,
    };
    let launched = launch.run(spec, stdio);
    let started = launched.and_then(|launched| {
        start(notify)?;
        match read_status(launched.status)? {
            problem if problem.is_empty() => Ok((launched.pid, launched.pty)),
            problem => Err(Failure {
                text: problem,
                ends: true,
            }),
        }
    });
    let _ = fs::remove_file(notify);
    match started {
        Ok((pid, pty)) => Ok((Answer::Started { pid }, pty.into_iter().collect())),
        Err(failure) => {
            if failure.ends {
                reap();
            }
            Err(failure.text)
        }
    }
}

/// Applies new limits to a container's cgroup.
pub(super) fn update(id: &str, container: &Spec, mut resources: LinuxResources) -> Outcome {
    edit::complete_resources(&mut resources);
    edit::limit_swap(&mut resources, cgroup::has_swap());
    let config = cgroup_config(id, cgroup_of(container)?);
    let manager = create_cgroup_manager(config).map_err(|e| e.to_string())?;
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&options).map_err(|e| e.to_string())?;
    Ok((Answer::Done, Vec::new()))
}

/// Runs the hooks of a stage that libcontainer leaves to its builders, each of them; the first that fails is the one to
/// tell.
pub(super) fn hooks(id: &str, container: &Spec, init: i32, stage: Stage) -> Outcome {
    let hooks = container.hooks().as_ref();
    let (list, status) = match stage {
        Stage::Poststart => (hooks.and_then(|h| h.poststart().as_ref()), ContainerStatus::Running),
        Stage::Poststop => (hooks.and_then(|h| h.poststop().as_ref()), ContainerStatus::Stopped),
    };
    let mut state = state(id, container, status);
    state.state.pid = Some(init);
    let run = |hook: &Hook| {
        run_hooks(Some(&vec![hook.clone()]), Some(&state.state), None, None, None)
            .map_err(|e| failed_hook(&[hook], &chain(&e)))
    };
    let outcomes: Vec<_> = list.into_iter().flatten().map(run).collect();
    outcomes.into_iter().collect::<Result<(), _>>()?;
    Ok((Answer::Done, Vec::new()))
}

/// A hook's failure with its name, or those of all that it may have been.
fn failed_hook(hooks: &[&Hook], cause: &str) -> String {
    let names: Vec<_> = hooks.iter().map(|hook| hook.path().display().to_string()).collect();
    format!("the hook {}: {cause}", names.join(" or "))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Init,
    Exec,
}

struct Launch<'a> {
    id: &'a str,
    root: &'a Path,
    notify: &'a Path,
    cgroup: PathBuf,
    kind: Kind,
    filter: Option<Filter>,
}

struct Launched {
    pid: i32,
    /// Exec status (see `executor`).
    status: OwnedFd,
    pty: Option<OwnedFd>,
}

struct Failure {
    text: String,
    /// The processes that were made end by themselves.
    ends: bool,
}

impl From<String> for Failure {
    fn from(text: String) -> Failure {
        Failure { text, ends: false }
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Failure {
        Failure::from(text.to_owned())
    }
}

impl Launch<'_> {
    fn run(self, mut spec: Spec, stdio: Stdio) -> Result<Launched, Failure> {
        let _held = hold_namespaces(&mut spec)?;
        let mut process = spec.process().clone().ok_or("the specification has no process")?;
        let confinement = Confinement::of(&mut process, self.filter);
        let console_size = process.console_size();
        let linux = spec.linux().as_ref();
        let uid = edit::guest_id(linux.map_or(&None, |l| l.uid_mappings()), process.user().uid());
        let cwd = process.cwd().clone();
        spec.set_process(Some(process));
        let (status, status_end) = pipe2(OFlag::O_CLOEXEC).map_err(|e| format!("making a pipe: {}", e.desc()))?;
        let console = UnixStream::pair().map_err(|e| format!("making a socket: {e}"))?;
        let streams = streams(stdio, uid)?;
        let terminal = streams.is_none();
        // libcontainer closes it in the intermediate process; what it writes there it also answers.
        let unused = null(OFlag::O_WRONLY)?;
        let (container_type, phase) = match self.kind {
            Kind::Init => (ContainerType::InitContainer, ContainerStatus::Creating),
            Kind::Exec => {
                let exec_notify_fd = unused.as_raw_fd();
                (
                    ContainerType::TenantContainer { exec_notify_fd },
                    ContainerStatus::Running,
                )
            }
        };
        let args = ContainerArgs {
            container_type,
            syscall: SyscallType::Linux,
            rootfs: self.root.to_owned(),
            console_socket: terminal.then(|| console.1.as_raw_fd()),
            notify_listener: NotifyListener::new(self.notify).map_err(|e| chain(&e))?,
            preserve_fds: 0,
            container: Some(state(self.id, &spec, phase)),
            user_ns_config: UserNamespaceConfig::new(&spec).map_err(|e| chain(&e))?,
            cgroup_config: cgroup_config(self.id, self.cgroup),
            detached: true,
            executor: Box::new(Program::new(self.id, status_end, confinement)),
            no_pivot: false,
            stdin: streams.as_ref().map(|s| s[0].as_raw_fd()),
            stdout: streams.as_ref().map(|s| s[1].as_raw_fd()),
            stderr: streams.as_ref().map(|s| s[2].as_raw_fd()),
            as_sibling: false,
            pid_file: None,
            spec: Rc::new(spec),
        };
        let hooks = edit::hooks_of_creation(&args.spec);
        let trace = Trace::new().map_err(|e| format!("making a pipe: {e}"))?;
        let made = trace.record(|| container_main_process(&args));
        drop(args); // and with it this process's end of the status pipe
        let pid = match made {
            Ok(pid) => pid.as_raw(),
            Err(error) => {
                let text = match &error {
                    ProcessError::Hooks(cause) => failed_hook(&hooks.iter().collect::<Vec<_>>(), &chain(cause)),
                    other => inside::name_cwd(explain(&chain(other), &status, &trace), &cwd),
                };
                let ends = matches!(error, ProcessError::Channel(ChannelError::ExecError(_)));
                return Err(Failure { text, ends });
            }
        };
        let pty = terminal
            .then(|| receive_terminal(&console.0, console_size, uid))
            .transpose();
        let pty = pty.map_err(|text| {
            // It would wait for ever to be started.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            Failure { text, ends: true }
        })?;
        Ok(Launched { pid, status, pty })
    }
}

/// Opens the namespaces that a process is to join, and names them by their descriptors: libcontainer joins the user
/// namespace first, and from in there may not look at the processes by which the others are named.
fn hold_namespaces(spec: &mut Spec) -> Result<Vec<OwnedFd>, String> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(Vec::new());
    };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut held = Vec::new();
    for namespace in &mut namespaces {
        let Some(path) = namespace.path().clone() else { continue };
        let file = File::open(&path).map_err(|e| format!("the namespace {}: {e}", path.display()))?;
        namespace.set_path(Some(format!("/proc/self/fd/{}", file.as_raw_fd()).into()));
        held.push(file.into());
    }
    linux.set_namespaces(Some(namespaces));
    Ok(held)
}

/// Prefers what the program's last step said, then libcontainer's first complaint, to its generic error.
fn explain(error: &str, status: &OwnedFd, trace: &Trace) -> String {
    // Without waiting: a process that did not fail itself may still live, and hold its end.
    let flags = nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
    let mut text = [0; 4096];
    match nix::fcntl::fcntl(status, flags).and_then(|_| nix::unistd::read(status, &mut text)) {
        Ok(n) if n > 0 => String::from_utf8_lossy(&text[..n]).into_owned(),
        _ => trace
            .first()
            .map_or_else(|| error.to_owned(), |cause| format!("{error}: {cause}")),
    }
}

/// Names a sysctl that does not exist, which libcontainer would not. All are allowed: the kernel is the pod's own.
fn check_sysctls(linux: &Linux) -> Result<(), String> {
    let mut names = linux.sysctl().iter().flat_map(|sysctls| sysctls.keys());
    match names.find(|name| !Path::new("/proc/sys").join(name.replace('.', "/")).exists()) {
        Some(name) => Err(format!("the guest's kernel has no sysctl {name}")),
        None => Ok(()),
    }
}

fn prepare(process: &mut Process, root: &Path) -> Result<(), String> {
    if !edit::has_home(process) {
        let home = inside::home(root, process.user().uid());
        edit::set_home(process, &home);
    }
    // libcontainer raises this limit to load the device filter, and the container would inherit that.
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(|e| format!("reading a limit: {}", e.desc()))?;
    edit::set_memlock(process, soft, hard);
    // Inherited by the processes to come. Before the next line, after which only a privileged process may.
    let adjustment = process.oom_score_adj().unwrap_or(0).to_string();
    fs::write("/proc/self/oom_score_adj", adjustment).map_err(|e| format!("setting the OOM score: {e}"))?;
    // So that nothing in a joined namespace can look into the agent's memory before `execve`.
    nix::sys::prctl::set_dumpable(false).map_err(|e| format!("hiding the process: {}", e.desc()))
}

/// The three descriptors of a process without a terminal.
fn streams(stdio: Stdio, uid: u32) -> Result<Option<[OwnedFd; 3]>, String> {
    let Stdio::Pipes { stdin, stdout, stderr } = stdio else {
        return Ok(None);
    };
    let stdin = match stdin {
        Some(stdin) => stdin,
        None => null(OFlag::O_RDONLY)?,
    };
    let all = [stdin, stdout, stderr];
    for fd in &all {
        let kind = nix::sys::stat::fstat(fd).map_err(|e| format!("a standard stream: {}", e.desc()))?;
        // Else a user other than root cannot open /dev/stdout.
        if kind.st_mode & libc::S_IFMT == libc::S_IFIFO {
            own(fd, uid)?;
        }
    }
    Ok(Some(all))
}

fn receive_terminal(console: &UnixStream, size: Option<Size>, uid: u32) -> Result<OwnedFd, String> {
    let (_, mut fds) =
        sys::receive(console.as_fd(), &mut [0; 64]).map_err(|e| format!("the terminal: {}", e.desc()))?;
    let master = fds.pop().ok_or("the terminal did not come")?;
    let peer = sys::terminal_peer(&master).map_err(|e| format!("the terminal: {}", e.desc()))?;
    own(&peer, uid)?;
    if let Some(size) = size.filter(|size| size.height() > 0 && size.width() > 0) {
        let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        sys::set_window_size(master.as_fd(), clamp(size.height()), clamp(size.width()))
            .map_err(|e| format!("the terminal's size: {}", e.desc()))?;
    }
    Ok(master)
}

fn own(fd: &OwnedFd, uid: u32) -> Result<(), String> {
    fchown(fd, Some(Uid::from_raw(uid)), None)
        .map_err(|e| format!("giving a standard stream to user {uid}: {}", e.desc()))
}

fn null(flags: OFlag) -> Result<OwnedFd, String> {
    nix::fcntl::open("/dev/null", flags | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
        .map_err(|e| format!("opening /dev/null: {}", e.desc()))
}

/// Waits for all children, so that a failure leaves not even a zombie. All must be about to end.
fn reap() {
    while nix::sys::wait::wait().is_ok() {}
}

/// Lets a process go that waits on `notify`.
fn start(notify: &Path) -> Result<(), String> {
    let mut socket = UnixStream::connect(notify).map_err(|e| format!("the process ended early: {e}"))?;
    socket
        .write_all(b"start container")
        .map_err(|e| format!("the process ended early: {e}"))
}

fn read_status(status: OwnedFd) -> Result<String, String> {
    let mut text = String::new();
    File::from(status)
        .read_to_string(&mut text)
        .map_err(|e| format!("reading the exec status: {e}"))?;
    Ok(text)
}

fn root_of(spec: &Spec) -> Result<PathBuf, String> {
    let root = spec.root().as_ref().ok_or("the specification has no root")?.path();
    fs::canonicalize(root).map_err(|e| format!("the root {}: {e}", root.display()))
}

fn cgroup_of(spec: &Spec) -> Result<PathBuf, String> {
    let path = spec.linux().as_ref().and_then(|l| l.cgroups_path().clone());
    path.ok_or_else(|| "the specification has no cgroup path".to_owned())
}

fn cgroup_config(id: &str, cgroup_path: PathBuf) -> CgroupConfig {
    CgroupConfig {
        cgroup_path,
        systemd_cgroup: false,
        container_name: id.to_owned(),
    }
}

/// The state that hooks are told.
fn state(id: &str, spec: &Spec, status: ContainerStatus) -> Container {
    let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let bundle = root.parent().unwrap_or(&root).to_owned();
    let mut state = State::new(id, status, None, bundle);
    state.annotations = spec.annotations().clone();
    Container { state, root }
}

/// An error and its causes in one sentence.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
