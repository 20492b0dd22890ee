//! The shim proper: one process per sandbox that serves the task API until the last container is gone.

use std::{
    io::Write,
    os::{fd::AsFd, unix::net::UnixListener},
    sync::Arc,
};

use containerd_shim_protos::{
    shim_async::create_task,
    ttrpc::asynchronous::{Server, transport::Listener},
};
use nix::unistd::{dup2_stdin, dup2_stdout, setsid};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::Cli,
    error::{Context, Result},
    events::Events,
    host, log, metrics, oom, record,
    sandbox::Sandbox,
    service::Service,
    undo::{State, Undo},
    version,
};

/// What the shim reports to `start` when it serves; anything else is the sentence that says why it does not.
pub const READY: &str = "ready";

/// Serves one sandbox. Standard input is the listening socket, standard output the pipe to `start`.
pub fn serve(cli: &Cli) -> Result<()> {
    setsid().action("become a session leader")?;
    let listener: UnixListener = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .action("take the socket")?
        .into();
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .at("open", "/dev/null")?;
    dup2_stdin(&null).action("detach standard input")?;
    log::init(&cli.id, cli.debug);
    oom::below_the_daemon()?;
    let _version = version::hold()?;
    host::leave()?;
    let mut state = State::create(&cli.id)?;
    if let Some(socket) = listener.local_addr().action("name the socket")?.as_pathname() {
        state.push(Undo::File(socket.into()))?;
    }
    // One thread is enough for a pod's traffic and keeps the shim's memory small; mounts and netlink run on
    // the runtime's blocking threads, of which some may never return from a volume whose server is gone.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(32)
        .build()
        .action("start the runtime")?;
    let served = runtime.block_on(run(cli, listener, state, || {
        std::io::stdout()
            .write_all(READY.as_bytes())
            .and_then(|()| std::io::stdout().flush())
            .action("report to start")?;
        dup2_stdout(&null).action("detach standard output")
    }));
    // Those are not waited for: they end with the process.
    runtime.shutdown_background();
    served
}

async fn run(cli: &Cli, listener: UnixListener, mut state: State, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).action("hear of SIGTERM")?;
    listener.set_nonblocking(true).action("prepare the socket")?;
    let events = Events::new(
        &cli.namespace,
        std::env::var("TTRPC_ADDRESS")
            .ok()
            .filter(|address| !address.is_empty()),
    );
    let tasks = record::load(&cli.id)?;
    // A pod runs without metrics too, such as one whose id makes the socket's path too long.
    let monitor = metrics::listen(&cli.id, &mut state)
        .inspect_err(|error| tracing::warn!(%error, "this sandbox has no metrics"))
        .ok();
    let sandbox = Sandbox::new(&cli.id, events, state)?;
    if let Some(monitor) = monitor {
        metrics::serve(monitor, sandbox.clone())?;
    }
    let ended = sandbox.ended();
    match tasks.is_empty() {
        true => sandbox.expect_create(),
        false => sandbox.answer_for(tasks),
    }
    let on_signal = sandbox.clone();
    tokio::spawn(async move {
        while terminate.recv().await.is_some() {
            on_signal.end_with_the_node().await;
        }
    });
    let service: Arc<dyn containerd_shim_protos::shim_async::Task + Send + Sync> = Arc::new(Service::new(sandbox));
    // The two versions of the task API differ in the name of their package only.
    let v3 = create_task(service.clone());
    let v2 = create_task(service)
        .into_iter()
        .map(|(name, service)| (name.replace(".v3.", ".v2."), service))
        .collect();
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener).action("listen")?)
        .register_service(v3)
        .register_service(v2);
    server.start().await.map_err(std::io::Error::other).action("serve")?;
    ready()?;
    ended.await;
    server
        .shutdown()
        .await
        .map_err(std::io::Error::other)
        .action("end the server")
}
