//! The debug console: a shell in the guest itself, for an administrator of the node, where the configuration allows it
//! (`debug_console_enabled`).
//!
//! The guest's image has no shell, so one of the pod's containers lends its root file system. The shell runs there with
//! all capabilities, among the guest's own processes and in its network; the guest's root is at `/proc/1/root`. It is a
//! container to the agent and none to the CRI, and goes with its connection.

use std::{
    io,
    sync::atomic::{AtomicU32, Ordering},
};

use agent_protocol::{GUEST_PIDS, GUEST_SHARE, client::Client, protocol::agent as wire};
use oci_spec::runtime::Spec;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{
    boot::Guest,
    container::Kind,
    error::{Error, Result, decode},
    http::{self, Answer},
    io::{ProcessName, end_input, write_all},
    sandbox::Sandbox,
};

/// Bytes per request.
const CHUNK: u32 = 64 << 10;
/// A console never has the name of another.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Every capability of Linux 6.12 (capabilities(7)).
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a client asks for, in the query of its request.
struct Wish {
    /// Rows and columns of its terminal; `None` when it has none.
    terminal: Option<(u32, u32)>,
    /// `TERM`.
    kind: String,
}

impl Wish {
    fn of(target: &str) -> Wish {
        let number = |key| http::query(target, key).and_then(|text| text.parse().ok());
        Wish {
            terminal: number("rows").zip(number("columns")),
            kind: http::query(target, "term").unwrap_or("dumb").to_owned(),
        }
    }
}

/// Serves one console over the stream of a request for it, to its end.
///
/// # Errors
/// The client's.
pub async fn serve(mut stream: UnixStream, sandbox: &Sandbox, target: &str) -> io::Result<()> {
    match open(sandbox, &Wish::of(target)).await {
        Ok(console) => {
            let switched = http::switch(&mut stream).await;
            if switched.is_ok() {
                console.carry(stream).await;
            }
            console.close().await;
            switched
        }
        Err(error) => http::answer(&mut stream, &Answer::unavailable(error.to_string())).await,
    }
}

/// A running shell.
struct Console {
    agent: Client,
    name: ProcessName,
    terminal: bool,
}

async fn open(sandbox: &Sandbox, wish: &Wish) -> Result<Console> {
    let guest = sandbox.guest()?;
    if !guest.config.agent.debug_console {
        return Err(Error::Precondition(
            "the debug console is off: `debug_console_enabled = true` under [agent.kata] allows it in pods that start later".into(),
        ));
    }
    let lender = lender(sandbox, guest)?;
    let id = format!("debug-console-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let mut request = wire::CreateContainerRequest::new();
    request.container_id = id.clone();
    request.exec_id = id.clone();
    request.OCI = Some(agent_protocol::oci::spec_to_wire(&spec(&lender, &id, wish)?)).into();
    guest.agent.create_container(request).await?;
    let console = Console {
        agent: guest.agent.clone(),
        name: ProcessName {
            container: id.clone(),
            exec: id,
        },
        terminal: wish.terminal.is_some(),
    };
    match console.start(wish).await {
        Ok(()) => Ok(console),
        Err(error) => {
            console.close().await;
            Err(error)
        }
    }
}

/// The container whose root file system has a shell.
fn lender(sandbox: &Sandbox, guest: &Guest) -> Result<String> {
    let shell = |id: &str| guest.share.export().join(id).join("rootfs/bin/sh");
    let lenders = sandbox.all().into_iter().filter(|container| {
        // A link in there may lead anywhere: that it is there is all that is asked of the host.
        container.kind != Kind::Sandbox && shell(&container.id).symlink_metadata().is_ok()
    });
    let lender = lenders.map(|container| container.id.clone()).min();
    lender.ok_or_else(|| {
        Error::Precondition(
            "no container of this pod has a /bin/sh: start one that does, of any image with a shell".into(),
        )
    })
}

fn spec(lender: &str, id: &str, wish: &Wish) -> Result<Spec> {
    let terminal = wish.terminal.is_some();
    let arguments = if terminal {
        json!(["/bin/sh"])
    } else {
        // One stream carries both outputs.
        json!(["/bin/sh", "-c", "exec /bin/sh 2>&1"])
    };
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": format!("{GUEST_SHARE}/{lender}/rootfs") },
        "process": {
            "terminal": terminal,
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", format!("TERM={}", wish.kind)],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES, "inheritable": [], "ambient": [],
            },
        },
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev"]),
        ],
        "linux": {
            "namespaces": [{ "type": "mount" }],
            "cgroupsPath": format!("/kata/{id}"),
        },
        "annotations": { GUEST_PIDS: "true" },
    });
    serde_json::from_value(spec).map_err(decode("the debug console's specification"))
}

impl Console {
    async fn start(&self, wish: &Wish) -> Result<()> {
        let mut request = wire::StartContainerRequest::new();
        request.container_id = self.name.container.clone();
        self.agent.start_container(request).await?;
        if let Some((rows, columns)) = wish.terminal {
            self.agent.tty_win_resize(self.name.resize(rows, columns)).await?;
        }
        Ok(())
    }

    /// Carries bytes until the shell ends, or the client hangs up.
    async fn carry(&self, stream: UnixStream) {
        let (from, to) = stream.into_split();
        tokio::select! {
            () = self.output(to) => {}
            () = self.input(from) => {}
        }
    }

    async fn output(&self, mut client: OwnedWriteHalf) {
        loop {
            let mut request = wire::ReadStreamRequest::new();
            request.container_id = self.name.container.clone();
            request.exec_id = self.name.exec.clone();
            request.len = CHUNK;
            match self.agent.read_stdout(request).await {
                Ok(reply) if !reply.data.is_empty() && client.write_all(&reply.data).await.is_ok() => {}
                _ => return,
            }
        }
    }

    /// Returns when the client has hung up. One without a terminal may end its input and still wait for output.
    async fn input(&self, mut client: OwnedReadHalf) {
        let mut buffer = vec![0; CHUNK as usize];
        loop {
            match client.read(&mut buffer).await {
                Ok(count) if count > 0 => {
                    if write_all(&self.agent, &self.name, &buffer[..count]).await.is_err() {
                        return std::future::pending().await;
                    }
                }
                Ok(_) if !self.terminal => {
                    end_input(&self.agent, &self.name).await;
                    return std::future::pending().await;
                }
                _ => return,
            }
        }
    }

    /// Removes the shell with everything that it has started.
    async fn close(&self) {
        let mut request = wire::RemoveContainerRequest::new();
        request.container_id = self.name.container.clone();
        request.timeout = 10;
        if let Err(error) = self.agent.remove_container(request).await {
            tracing::info!(%error, "the debug console was not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_has_a_terminal_if_its_client_has_one() {
        let wish = Wish::of("/exec?rows=24&columns=80&term=xterm");
        let with = spec("web", "debug-console-0", &wish).unwrap();
        let process = with.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert!(process.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
        assert!(crate::spec::sees_the_guest(&with));

        let without = spec("web", "debug-console-0", &Wish::of("/exec")).unwrap();
        assert_eq!(without.process().as_ref().unwrap().terminal(), Some(false));
        let root = without.root().as_ref().unwrap().path().display().to_string();
        assert_eq!(root, "/run/kata-containers/shared/containers/web/rootfs");
    }
}
