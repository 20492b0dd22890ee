//! The agent's server: PID 1 of the guest, which serves the host.
//!
//! ```text
//! begin ──▶ the zygote is forked ──▶ the runtime ──▶ the channels are served ──▶ the host ends the VM
//!                                          └─(first question)─▶ finish, other drivers ──▶ ready
//! ```

mod beneath;
mod boot;
mod channel;
mod clock;
mod container;
mod copy;
mod copy_up;
mod devices;
mod disk;
mod error;
mod freezer;
mod guest;
mod hooks;
mod huge;
mod iptables;
mod members;
mod memory;
mod metrics;
mod modules;
mod namespaces;
mod network;
mod oom;
mod process;
mod reaper;
mod relay;
mod route;
mod rpc;
mod sandbox;
mod signal;
mod sources;
mod stats;
mod stdio;
mod storage;
mod sys;
mod uevent;
mod volume;
mod watchable;

use std::{fs, future, io, path::Path, sync::Arc, time::Duration};

use nix::sys::reboot::{RebootMode, reboot};
use tokio::sync::{Notify, watch};
use ttrpc::asynchronous::transport::Listener;

use self::{
    error::{Doing, Error, Result},
    network::Network,
    oom::Oom,
    reaper::Reaper,
    relay::Relay,
    rpc::Service,
    sandbox::{Sandbox, blocking},
};
use crate::engine::Engine;

/// The question is mostly there before the agent; over vsock it may need a driver that is still to be loaded.
const FIRST_QUESTION: Duration = Duration::from_millis(10);
/// Where the engine keeps its sockets.
const ENGINE: &str = "/run/kata-agent";

/// Runs as PID 1 until the VM ends; what makes that impossible ends the VM.
pub fn main() -> ! {
    let began = boot::clock();
    let outcome = std::panic::catch_unwind(|| run(began));
    match outcome {
        Ok(Ok(())) => eprintln!("kata-agent: it has ended"),
        Ok(Err(error)) => eprintln!("kata-agent: {error}"),
        // The hook has said why.
        Err(_) => {}
    }
    nix::unistd::sync();
    // The host's VMM ends on a reboot as on a shutdown, and every kernel can reboot.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    std::process::exit(1)
}

/// The program that the kernel runs to have a module loaded.
pub fn modprobe(arguments: impl Iterator<Item = String>) -> ! {
    std::process::exit(modules::serve_kernel(arguments))
}

fn run(began: Duration) -> Result<()> {
    let modules = boot::begin()?;
    // Before there is a thread.
    let engine = Engine::spawn(Path::new(ENGINE))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.doing(|| "make the runtime".into())?;
    runtime.block_on(serve(engine, modules, began))
}

async fn serve(engine: Engine, modules: modules::Boot, began: Duration) -> Result<()> {
    let reaper = Arc::new(Reaper::default());
    let oom = Oom::new().doing(|| "watch for OOM kills".into())?;
    let (done, ready) = watch::channel(false);
    let zygote = reaper.expect().claim(engine.pid());
    let service = Arc::new(Service {
        sandbox: Sandbox::new(engine, Arc::clone(&reaper), oom),
        network: Network::default(),
        relay: Relay::default(),
        began,
        asked: Notify::new(),
        ready: ready.clone(),
    });
    let listener = Listener::new(channel::connections(ready_port()?, ready));
    let mut server = rpc::server(&service).add_listener(listener);
    server
        .start()
        .await
        .map_err(io::Error::other)
        .doing(|| "serve".into())?;
    // The host's first question is whether the agent is there. The rest is done while the host thinks of the next one.
    let _ = tokio::time::timeout(FIRST_QUESTION, service.asked.notified()).await;
    for _ in 0..2 {
        // Once for the call, which has its answer by now, and once for the task that writes it.
        tokio::task::yield_now().await;
    }
    service.sandbox.begin(boot::finish()?).await?;
    if !modules.is_done() {
        blocking(move || modules.load_rest()).await?;
    }
    done.send_replace(true);
    tokio::spawn(clock::keep());
    let reaped = async {
        reaper.run().await.doing(|| "wait for processes".into())?;
        future::pending().await
    };
    tokio::select! {
        ended = reaped => ended,
        // A pod without it would look healthy, and refuse every probe and every new container.
        exited = zygote.wait() => Err(Error::Helper(exited.status)),
    }
}

/// The host's port that is to be told when vsock is served: `sandpod.ready_port=` on the kernel's command line.
fn ready_port() -> Result<Option<u32>> {
    let line = fs::read_to_string("/proc/cmdline").doing(|| "read the kernel's command line".into())?;
    let port = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("sandpod.ready_port="));
    let port = port.map(|port| {
        port.parse()
            .map_err(|_| Error::Invalid(format!("the ready port {port:?} is no number")))
    });
    port.transpose()
}
