//! The agent where it works: as PID 1 of a guest, driven by the client over a virtio-serial port.
//!
//! One guest serves all cases, which leave it as they found it. Its containers' files come through virtiofs.
//!
//! Needs `qemu-system-x86_64`, a static `/bin/busybox` (package `busybox-static`), virtiofsd
//! (`SANDPOD_TEST_VIRTIOFSD`), and the guest kernel: `SANDPOD_TEST_KERNEL` or else what
//! `deploy/guest/build-kernel.sh` prints.
#![allow(clippy::unwrap_used)] // a test panics

mod boot;
mod lifecycle;
mod network;
mod pod;
mod protocol;
mod replay;
mod resources;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod watcher;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use libtest_mimic::{Arguments, Failed, Trial};

use pod::Pod;

/// For one case; the slowest takes some seconds.
const DEADLINE: Duration = Duration::from_secs(600);

/// A test in the guest.
#[derive(Clone, Copy)]
pub struct Case {
    name: &'static str,
    run: fn(Arc<Pod>) -> Outcome,
}

type Outcome = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Names async functions as cases.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// The cases of this module.
        pub const CASES: &[$crate::Case] = &[$($crate::Case {
            name: stringify!($name),
            run: |pod| Box::pin($name(pod)),
        }),*];
    };
}

fn main() {
    watcher::serve(std::env::args());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let runtime = Arc::new(runtime);
    let guest: Arc<OnceLock<Result<Arc<Pod>, String>>> = Arc::default();
    let cases = [
        lifecycle::CASES,
        streams::CASES,
        resources::CASES,
        network::CASES,
        protocol::CASES,
        replay::CASES,
    ]
    .concat();
    let trials = cases.into_iter().map(|case| {
        let (guest, runtime) = (Arc::clone(&guest), Arc::clone(&runtime));
        Trial::test(case.name, move || {
            let pod = guest.get_or_init(|| runtime.block_on(Pod::boot("")));
            let pod = Arc::clone(pod.as_ref().map_err(Failed::from)?);
            runtime.block_on(async {
                match tokio::time::timeout(DEADLINE, tokio::spawn((case.run)(Arc::clone(&pod)))).await {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error)) => Err(Failed::from(format!("{error}\n{}", pod.console()))),
                    Err(_) => Err(Failed::from(format!("not done after {DEADLINE:?}\n{}", pod.console()))),
                }
            })
        })
    });
    let mut arguments = Arguments::from_args();
    // The cases share one processor of the guest: in parallel they would only wait for each other.
    arguments.test_threads = Some(1);
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(Ok(pod)) = guest.get() {
        pod.end();
    }
    conclusion.exit();
}
