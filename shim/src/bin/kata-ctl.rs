//! What an administrator asks a node about its sandboxes.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use config::Config;
use node_check::Verdict;
use shim::{
    check,
    ctl::{self, env::Env, exec, gather, monitor, top},
    error::{Context, Result},
    trace::Trace,
};

const USAGE: &str = "usage: kata-ctl check [--json]   whether this node can run pods, and what is missing
       kata-ctl config [FILE]    what a configuration changes against Sandpod's defaults, and what of it has no effect
       kata-ctl env [--json]     versions, sums and paths of everything that pods run with, and the host
       kata-ctl list             the sandboxes of this node
       kata-ctl top [--json]     what each sandbox holds of the node's memory, each page counted once, and its processor time
       kata-ctl trace SANDBOX    the start-up waterfall of a sandbox
       kata-ctl exec SANDBOX     a shell in the guest of a sandbox, where `debug_console_enabled` allows it
       kata-ctl gather [--output FILE]      what a bug report needs, as a gzipped tar; - is the standard output
       kata-ctl monitor [--listen ADDRESS] [--node NAME] [--host NAME]
                                 serves a page of all sandboxes, and their metrics to Prometheus, on 127.0.0.1:8090
       kata-ctl --version";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let answer = match words[..] {
        ["check"] => return check(false),
        ["check", "--json"] => return check(true),
        ["config"] => explain(None),
        ["config", file] => explain(Some(Path::new(file))),
        ["env"] => environment().and_then(|env| env.toml()),
        ["env", "--json"] => environment().map(|env| line(&serde_json::json!(env))),
        ["list"] => ctl::list(),
        ["top"] => in_runtime(top::measure()).map(|usages| top::render(&usages)),
        ["top", "--json"] => in_runtime(top::measure()).map(|usages| line(&serde_json::json!(usages))),
        ["trace", sandbox] => trace(sandbox),
        ["exec", sandbox] => shell(sandbox),
        ["gather"] => archive(None),
        ["gather", "--output", file] => archive(Some(Path::new(file))),
        ["monitor", ref options @ ..] => monitor::Options::parse(options)
            .and_then(|options| in_runtime(monitor::serve(options)))
            .map(|()| String::new()),
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

fn line(json: &serde_json::Value) -> String {
    format!("{json}\n")
}

fn explain(file: Option<&Path>) -> Result<String> {
    Ok(Config::load(file)?.explain())
}

fn trace(sandbox: &str) -> Result<String> {
    Ok(Trace::load(&ctl::full_id(sandbox)?)?.render())
}

fn shell(sandbox: &str) -> Result<String> {
    in_runtime(exec::exec(&ctl::full_id(sandbox)?)).map(|()| String::new())
}

fn environment() -> Result<Env> {
    Env::of(&Config::load(None)?)
}

fn archive(file: Option<&Path>) -> Result<String> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let file = file.map_or_else(
        || PathBuf::from(format!("kata-gather-{seconds}.tar.gz")),
        Path::to_owned,
    );
    let names = in_runtime(gather::gather(&file))?;
    if file == Path::new("-") {
        eprint!("{names}");
        return Ok(String::new());
    }
    Ok(format!("{names}are in {}\n", file.display()))
}

fn in_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .action("start the runtime")?
        .block_on(work)
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
