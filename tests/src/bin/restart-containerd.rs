//! On a node of the tests, stands for `systemctl restart containerd`: back when containerd serves again, with 1 and a sentence if it does not.

use std::{io::Read, os::unix::net::UnixStream, process::ExitCode};

use tests::cluster::RESTART_SOCKET;

fn main() -> ExitCode {
    let mut said = String::new();
    match UnixStream::connect(RESTART_SOCKET).and_then(|mut harness| harness.read_to_string(&mut said)) {
        Ok(0) => return ExitCode::SUCCESS,
        Ok(_) => eprintln!("restart-containerd: {}", said.trim_end()),
        Err(error) => eprintln!("restart-containerd: asking at {RESTART_SOCKET}: {error}"),
    }
    ExitCode::FAILURE
}
