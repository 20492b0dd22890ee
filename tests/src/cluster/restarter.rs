//! What a service manager is for: restarts the node's containerd when a command on the node asks.

use std::{
    io::Write,
    os::unix::{
        fs::symlink,
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use super::{RESTART_SOCKET, SYSTEMCTL};
use crate::{
    failure::{Result, Trying},
    node::Node,
    places,
};

/// Answers the requests; it stops with this value.
#[derive(Debug)]
pub(super) struct Restarter {
    socket: PathBuf,
    stopping: Arc<AtomicBool>,
    clerk: Option<JoinHandle<()>>,
}

impl Restarter {
    /// Puts the command on the node, and somebody behind it.
    pub(super) fn start(node: &Arc<Node>) -> Result<Restarter> {
        let program = places::binaries()?.join("restart-containerd");
        symlink(&program, node.inside(SYSTEMCTL)).trying(format!("making {SYSTEMCTL}"))?;
        let socket = node.inside(RESTART_SOCKET);
        let listener = UnixListener::bind(&socket).trying(format!("listening at {RESTART_SOCKET}"))?;
        let stopping = Arc::new(AtomicBool::new(false));
        let (node, stopped) = (Arc::clone(node), Arc::clone(&stopping));
        let clerk = thread::spawn(move || {
            for request in listener.incoming().flatten() {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                answer(&node, request);
            }
        });
        Ok(Restarter {
            socket,
            stopping,
            clerk: Some(clerk),
        })
    }
}

impl Drop for Restarter {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Wakes the clerk. Where nobody listens any more, nobody needs to be woken.
        drop(UnixStream::connect(&self.socket));
        drop(self.clerk.take().map(JoinHandle::join));
    }
}

/// Says nothing when all went well, else why it did not. Who has gone meanwhile hears neither.
fn answer(node: &Node, mut request: UnixStream) {
    if let Err(failure) = node.restart_containerd() {
        drop(writeln!(request, "{failure}"));
    }
}
