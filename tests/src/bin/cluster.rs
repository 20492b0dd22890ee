//! `make cluster`: a whole Kubernetes with one node on this machine, Sandpod on it, until interrupted.

use std::{process::ExitCode, time::Instant};

use tests::{
    cluster::{Cluster, NODE},
    failure::{Result, Trying},
    images, places,
};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("cluster: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    let runtime = tokio::runtime::Runtime::new().trying("starting a runtime")?;
    // From now on, whoever interrupts finds everything removed.
    let (mut interrupt, mut end) = runtime.block_on(async {
        let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
        Ok::<_, tests::failure::Failure>((
            signals.0.trying("listening for an interrupt")?,
            signals.1.trying("listening for a signal to end")?,
        ))
    })?;
    let start = Instant::now();
    let cluster = Cluster::start()?;
    cluster.install_by_hand()?;
    explain(&cluster, start)?;
    runtime.block_on(async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = end.recv() => {}
        }
    });
    println!("\ncluster: removing everything");
    Ok(())
}

/// Says how to use it.
fn explain(cluster: &Cluster, start: Instant) -> Result {
    let version = cluster.api().json(["version"])?;
    let version = version["serverVersion"]["gitVersion"].as_str().unwrap_or_default();
    let kubectl = places::peers()?.join("kubectl");
    println!(
        "Kubernetes {version}, node {NODE} ready, RuntimeClass kata there, after {:.0} s\n\n  \
         export KUBECONFIG={}\n  \
         export PATH={}:$PATH\n  \
         kubectl get nodes\n\n\
         Images on the node, to be used with imagePullPolicy Never or IfNotPresent: {} and {}\n\
         Any kubectl of 1.35 or later will do. Interrupt with Ctrl-C to remove everything.",
        start.elapsed().as_secs_f64(),
        cluster.api().kubeconfig().display(),
        kubectl.parent().unwrap_or(&kubectl).display(),
        images::HELLO,
        images::TEST,
    );
    Ok(())
}
