//! `make cluster`: a whole Kubernetes with one node on this machine, ready for Sandpod's operator, until interrupted.

use std::{process::ExitCode, time::Instant};

use tests::{
    cluster::{Cluster, NODE, operator},
    failure::{Failure, Result, Trying},
    places,
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
        Ok::<_, Failure>((
            signals.0.trying("listening for an interrupt")?,
            signals.1.trying("listening for a signal to end")?,
        ))
    })?;
    let start = Instant::now();
    let cluster = Cluster::start()?;
    cluster.prepare()?;
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

/// The guide's pod, but for the pull of its image: it is on the node.
const HELLO: &str = "apiVersion: v1
kind: Pod
metadata:
  name: hello-openshift
  labels:
    app: hello-openshift
spec:
  runtimeClassName: kata
  containers:
    - name: hello-openshift
      image: quay.io/openshift/origin-hello-openshift
      imagePullPolicy: IfNotPresent
      ports:
        - containerPort: 8888
      securityContext:
        privileged: false
        allowPrivilegeEscalation: false
        runAsNonRoot: true
        runAsUser: 1001
        capabilities:
          drop:
            - ALL
        seccompProfile:
          type: RuntimeDefault
";

/// Says how to use it.
fn explain(cluster: &Cluster, start: Instant) -> Result {
    let node = cluster.node();
    let (kata_config, hello) = (node.path("cluster-kataconfig.yaml"), node.path("hello-openshift.yaml"));
    node.write(&kata_config, operator::KATA_CONFIG)?;
    node.write(&hello, HELLO)?;
    let kubectl = places::peers()?.join("kubectl");
    println!(
        "A Kubernetes with the node {NODE} is ready after {:.0} s. The operator's images are on the node. In another terminal:\n\n  \
         export KUBECONFIG={}\n  \
         export PATH={}:$PATH\n  \
         kubectl apply -f {}\n  \
         kubectl create -f {}\n  \
         watch \"kubectl describe kataconfig | sed -n /^Status:/,/^Events/p\"\n  \
         kubectl create -f {}\n\n\
         Ctrl-C here removes everything.",
        start.elapsed().as_secs_f64(),
        cluster.api().kubeconfig().display(),
        kubectl.parent().unwrap_or(&kubectl).display(),
        operator::manifest().display(),
        kata_config.display(),
        hello.display(),
    );
    Ok(())
}
