//! The `start`, `delete`, `features` and `-info` actions: short-lived processes that talk to the caller by
//! standard output. And `sweep`, which `start` leaves behind where dead shims have left something.

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use nix::unistd::setsid;
use oci_spec::runtime::Spec;
use sha2::{Digest, Sha256};

use crate::{
    annotations::{Role, identify},
    cli::Cli,
    error::{Context, Error, Result, decode},
    log, options,
    process::Exit,
    record,
    service::timestamp,
    sys,
    trace::{Mark, Trace},
    undo,
};

/// Where shims' sockets are, for containerd of every version and CRI-O.
const SOCKET_DIR: &str = "/run/containerd/s";
/// More than this is no options message.
const MAX_STDIN: u64 = 10 << 20;

/// Finds or starts the sandbox's shim; returns the address to print.
pub fn start(cli: &Cli) -> Result<String> {
    let exec_at = SystemTime::now();
    sys::close_inherited().action("close what the caller has left open")?;
    let mut stdin = Vec::new();
    std::io::stdin()
        .take(MAX_STDIN)
        .read_to_end(&mut stdin)
        .action("read standard input")?;
    let bundle = std::env::current_dir().action("find the bundle")?;
    let sandbox = sandbox_of(&bundle, &cli.id)?;
    let socket = socket_path(cli, &sandbox);
    let address = format!("unix://{}", socket.display());
    if sandbox == cli.id {
        if undo::is_to_sweep() {
            begin_sweep(cli)?;
        }
        let events = options::event_address(cli, &stdin, std::env::var("TTRPC_ADDRESS").ok());
        spawn(cli, &bundle, &socket, events)?;
        let mut trace = Trace::default();
        trace.set(Mark::ShimExec, exec_at);
        trace.set(Mark::AddressPrinted, SystemTime::now());
        // The shim serves; a waterfall without its beginning is no reason to end it.
        trace.keep(&sandbox);
    } else if !socket.exists() {
        return Err(Error::NotFound(format!("the shim of sandbox {sandbox}")));
    }
    fs::write("address", &address).at("write", bundle.join("address"))?;
    Ok(address)
}

/// Starts a process that sweeps: it may have to wait for others that cannot be killed, and `start` may not. It is not
/// the new pod's shim, which is killed with its pod.
fn begin_sweep(cli: &Cli) -> Result<()> {
    let mut command = command(cli, "sweep")?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().action("start the sweep").map(drop)
}

/// Removes what dead shims have left on this node. CRI-O, which calls no `delete`, goes on asking for what it knows:
/// for such a sandbox a new shim takes the place of the dead one. It answers that everything has ended, so that CRI-O
/// can remove the pod.
pub fn sweep(cli: &Cli) -> Result<()> {
    setsid().action("become a session leader")?;
    log::init(&cli.id, cli.debug);
    undo::sweep(|sandbox| {
        let tasks = record::load(sandbox)?;
        let Some(task) = tasks.first() else {
            return undo::remove_if_dead(sandbox);
        };
        if undo::unwind_if_dead(sandbox)? {
            let cli = Cli {
                id: sandbox.to_owned(),
                ..cli.clone()
            };
            spawn(&cli, &task.bundle, &socket_path(&cli, sandbox), None)?;
        }
        Ok(())
    })
}

/// Removes what a dead shim left; returns the message to print. Also called after every ordinary end, where there is
/// nothing to do.
pub fn delete(cli: &Cli) -> Result<Vec<u8>> {
    let bundle = match &cli.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().action("find the bundle")?,
    };
    // The bundle may be gone already: then the id itself may still name a sandbox.
    let sandbox = sandbox_of(&bundle, &cli.id).unwrap_or_else(|_| cli.id.clone());
    undo::remove_if_dead(&sandbox)?;
    let exit = Exit::now(137);
    let mut response = DeleteResponse::new();
    response.set_exit_status(exit.status);
    response.exited_at = Some(timestamp(exit.at)).into();
    response.write_to_bytes().map_err(decode("the answer to delete"))
}

/// The OCI features document: what CRI-O and containerd may offer to pods of this handler.
pub fn features() -> String {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [],
        "mountOptions": ["bind", "rbind", "ro", "rro", "rw", "rprivate", "private", "rslave", "slave",
            "nosuid", "nodev", "noexec", "relatime", "noatime", "idmap", "ridmap"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        },
        "annotations": { "io.sandpod.version": env!("CARGO_PKG_VERSION") }
    })
    .to_string()
}

/// The `containerd.types.RuntimeInfo` message.
pub fn info() -> Result<Vec<u8>> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        ..RuntimeVersion::default()
    };
    let features = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into(),
        value: features().into_bytes(),
        ..Any::default()
    };
    let info = RuntimeInfo {
        name: "io.containerd.kata.v2".into(),
        version: Some(version).into(),
        features: Some(features).into(),
        annotations: HashMap::new(),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().map_err(decode("the runtime information"))
}

/// Reads a bundle's `config.json`.
pub fn read_spec(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).at("read", &path)?;
    serde_json::from_slice(&text).map_err(decode("the bundle's config.json"))
}

/// The sandbox that a container belongs to: itself, unless its annotations name another.
fn sandbox_of(bundle: &Path, id: &str) -> Result<String> {
    let spec = read_spec(bundle)?;
    let sandbox = match identify(spec.annotations().as_ref().unwrap_or(&HashMap::new()))?.role {
        Role::Container { sandbox_id } => sandbox_id,
        Role::Sandbox | Role::Single => id.to_owned(),
    };
    if crate::cli::is_name(&sandbox) {
        Ok(sandbox)
    } else {
        Err(Error::Invalid(format!("sandbox id '{sandbox}' is not a name")))
    }
}

/// The socket's name is computed, not looked up, so a container's `start` finds its sandbox without any state.
fn socket_path(cli: &Cli, sandbox: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{}/{}/{sandbox}", cli.address, cli.namespace));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SOCKET_DIR).join(name)
}

/// Binds the socket, hands it to a new shim as its standard input, and waits until that shim serves. The shim
/// reports on its standard output, which is ours alone: it must not inherit the caller's, which is read to its end.
fn spawn(cli: &Cli, bundle: &Path, socket: &Path, events: Option<String>) -> Result<()> {
    // As containerd's own library makes it.
    let folder = fs::DirBuilder::new().recursive(true).mode(0o711).create(SOCKET_DIR);
    folder.at("create", SOCKET_DIR)?;
    if socket.exists() {
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Err(Error::AlreadyExists(format!("a shim of sandbox {}", cli.id)));
        }
        fs::remove_file(socket).at("remove the dead socket", socket)?;
    }
    let listener = UnixListener::bind(socket).at("bind", socket)?;
    // Whoever may write to it commands the pod; by itself it has what the caller's umask leaves.
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).at("set the mode of", socket)?;
    let mut command = command(cli, "serve")?;
    command
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", events.unwrap_or_default())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().action("start the shim")?;
    let mut report = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut report).action("hear from the shim")?;
    }
    if report == crate::serve::READY {
        return Ok(());
    }
    let status = child.wait().action("wait for the shim")?;
    fs::remove_file(socket).at("remove", socket)?;
    let why = if report.is_empty() {
        format!("it ended with {status}")
    } else {
        report
    };
    Err(Error::Precondition(format!(
        "the shim of sandbox {} did not start: {why}",
        cli.id
    )))
}

/// This program again, for one of its own actions.
fn command(cli: &Cli, action: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().action("find this program")?);
    command.args(["-namespace", &cli.namespace, "-address", &cli.address, "-id", &cli.id]);
    if cli.debug {
        command.arg("-debug");
    }
    command.arg(action);
    Ok(command)
}

/// Writes an answer to standard output without a newline, as containerd and CRI-O want it.
pub fn print(answer: &[u8]) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(answer)
        .and_then(|()| out.flush())
        .action("write the answer")
}
