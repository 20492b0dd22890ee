//! What an administrator asks a node about its sandboxes.

use std::{path::Path, process::ExitCode};

use shim::{
    check::{self, Verdict},
    config::Config,
    error::{Error, Result},
    trace::Trace,
    undo::{RUN_DIR, State},
};

const USAGE: &str = "usage: kata-ctl check [--json]   whether this node can run pods, and what is missing
       kata-ctl config [FILE]    what a configuration changes against Sandpod's defaults, and what of it has no effect
       kata-ctl list             the sandboxes of this node
       kata-ctl trace SANDBOX    the start-up waterfall of a sandbox
       kata-ctl --version";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let answer = match words[..] {
        ["check"] => return check(false),
        ["check", "--json"] => return check(true),
        ["config"] => explain(None),
        ["config", file] => explain(Some(Path::new(file))),
        ["list"] => list(),
        ["trace", sandbox] => Trace::load(sandbox).map(|trace| trace.render()),
        ["--version"] => Ok(format!("kata-ctl {}\n", env!("CARGO_PKG_VERSION"))),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match answer {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kata-ctl: {error}");
            ExitCode::FAILURE
        }
    }
}

fn explain(file: Option<&Path>) -> Result<String> {
    Ok(Config::load(file)?.explain())
}

/// Fails when something is missing without which no pod runs.
fn check(json: bool) -> ExitCode {
    let config = match Config::load(None) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("kata-ctl: {error}");
            return ExitCode::FAILURE;
        }
    };
    let findings = check::check(&config);
    if json {
        println!("{}", serde_json::json!(findings));
    } else {
        findings.iter().for_each(|finding| println!("{finding}"));
    }
    if findings.iter().any(|finding| finding.verdict == Verdict::Missing) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// One line a sandbox: its id, its shim's pid, and whether that shim lives.
fn list() -> Result<String> {
    let entries = match std::fs::read_dir(RUN_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(source) => {
            return Err(Error::Path {
                action: "read",
                path: RUN_DIR.into(),
                source,
            });
        }
    };
    let mut lines = Vec::new();
    for name in entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        if let Some(state) = State::load(&name)? {
            let word = if state.shim.alive() {
                "running"
            } else {
                "dead, to be swept"
            };
            lines.push(format!("{name}  shim {}  {word}\n", state.shim.pid));
        }
    }
    lines.sort();
    Ok(lines.concat())
}
