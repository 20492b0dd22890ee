//! The `systemctl` of a node of the tests: `restart containerd` is back when containerd serves again, with 1 and a
//! sentence if it does not.

use std::{env, io::Read, os::unix::net::UnixStream, process::ExitCode};

use tests::cluster::{RESTART, RESTART_SOCKET};

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    if words != RESTART {
        eprintln!("systemctl: this one understands only `{}`", RESTART.join(" "));
        return ExitCode::FAILURE;
    }
    let mut said = String::new();
    match UnixStream::connect(RESTART_SOCKET).and_then(|mut harness| harness.read_to_string(&mut said)) {
        Ok(0) => return ExitCode::SUCCESS,
        Ok(_) => eprintln!("systemctl: {}", said.trim_end()),
        Err(error) => eprintln!("systemctl: asking at {RESTART_SOCKET}: {error}"),
    }
    ExitCode::FAILURE
}
