//! `make node`: an emulated node to look around in. Each line of standard input is a shell command that runs there.

use std::{
    io::{BufRead, stdin},
    process::ExitCode,
    time::Duration,
};

use tests::{
    failure::{Result, Trying},
    machine::{Machine, MachineSpec},
};

/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(3600);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("node: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    println!("node: booting, usually half a minute");
    let node = Machine::boot(MachineSpec::default())?;
    node.load_images()?;
    println!("node: each line runs there, until the end of input; deploy/install.sh of this checkout brings Sandpod");
    for line in stdin().lock().lines() {
        let line = line.trying("reading standard input")?;
        let output = node.start(&["sh", "-c", &line], false)?.wait(COMMAND)?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        println!("[{}]", output.code);
    }
    Ok(())
}
