//! `kata-agent`: PID 1 of a guest. Under the name `modprobe` it loads modules for the guest's kernel.

use std::{env, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments = env::args();
    let name = arguments.next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|name| name == "modprobe") {
        agent::server::modprobe(arguments);
    }
    if std::process::id() == 1 {
        agent::server::main();
    }
    if arguments.next().as_deref() == Some("--version") {
        println!("kata-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    eprintln!("kata-agent is the first process of a virtual machine, and does nothing anywhere else");
    ExitCode::FAILURE
}
