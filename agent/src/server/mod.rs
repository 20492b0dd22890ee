//! The agent's server: PID 1 of the guest, which serves the host.
//!
//! ```text
//! boot ──▶ zygote is forked ──▶ runtime ──▶ channels are served ──▶ the host ends the VM
//!                                    └──▶ the other drivers are loaded meanwhile
//! ```

mod boot;
mod channel;
mod container;
mod error;
mod freezer;
mod guest;
mod metrics;
mod modules;
mod network;
mod oom;
mod process;
mod reaper;
mod route;
mod rpc;
mod sandbox;
mod signal;
mod stats;
mod stdio;
mod storage;
mod sys;
mod uevent;

use std::{fs, future, io, path::Path, sync::Arc, time::Duration};

use nix::sys::reboot::{RebootMode, reboot};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

use self::{
    error::{Doing, Error, Result},
    network::Network,
    oom::Oom,
    reaper::Reaper,
    rpc::Service,
    sandbox::{Sandbox, blocking},
};
use crate::engine::Engine;

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
    let modules = boot::set_up()?;
    // Before there is a thread.
    let engine = Engine::spawn(Path::new(ENGINE))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.doing(|| "make the runtime".into())?;
    runtime.block_on(serve(engine, modules, began))
}

async fn serve(engine: Engine, modules: modules::Boot, began: Duration) -> Result<()> {
    let reaper = Arc::new(Reaper::default());
    let oom = Oom::new().doing(|| "watch for OOM kills".into())?;
    let (loaded, drivers) = watch::channel(modules.is_done());
    let service = Arc::new(Service {
        sandbox: Sandbox::new(engine, Arc::clone(&reaper), oom, drivers),
        network: Network::default(),
        began,
    });
    let listener = Listener::new(channel::connections(ready_port()?));
    let mut server = rpc::server(&service).add_listener(listener);
    server
        .start()
        .await
        .map_err(io::Error::other)
        .doing(|| "serve".into())?;
    if !modules.is_done() {
        if let Err(error) = blocking(move || modules.load_rest()).await {
            eprintln!("kata-agent: {error}");
        }
        loaded.send_replace(true);
    }
    reaper.run().await.doing(|| "wait for processes".into())?;
    future::pending().await
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
