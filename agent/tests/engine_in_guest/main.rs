//! The container engine where it works: as PID 1 of a guest.
//!
//! The host's kernel, cgroups and privileges say nothing about the guest's, so this program packs itself as the
//! `/init` of an initial RAM disk, boots the guest kernel in QEMU, and there runs the cases below as PID 1.
//!
//! Needs `qemu-system-x86_64`, a static `/bin/busybox` (package `busybox-static`), and the guest kernel:
//! `SANDPOD_TEST_KERNEL` or else what `deploy/guest/build-kernel.sh` prints.
#![allow(clippy::unwrap_used)] // a test panics

mod guest;
mod host;
mod isolation;
mod lifecycle;
mod limits;
mod process;
mod spec;
#[path = "../support/mod.rs"]
mod support;
mod sys;

use std::sync::{Arc, OnceLock};

use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(sys::CALL) {
        return sys::make_calls(words);
    }
    let cases: Vec<guest::Case> = [process::CASES, isolation::CASES, limits::CASES, lifecycle::CASES].concat();
    if std::process::id() == 1 {
        guest::main(&cases);
    }
    let report: Arc<OnceLock<Result<host::Report, String>>> = Arc::default();
    let trials = cases.into_iter().map(|case| {
        let report = Arc::clone(&report);
        Trial::test(case.name, move || {
            let report = report.get_or_init(host::boot).as_ref().map_err(Failed::from)?;
            report.of(case.name).map_err(Failed::from)
        })
    });
    let mut arguments = Arguments::from_args();
    // One boot serves all; parallel trials would only wait for it.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
