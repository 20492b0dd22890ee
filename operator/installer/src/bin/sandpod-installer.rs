//! Installs Sandpod on one node, without Kubernetes: see the crate `installer`.

use std::{fs::File, io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use installer::{Options, classes, daemon::Kind, dropin::DEFAULT_PREFIX, log_level::LogLevel, report::Verb, run};

/// Puts Sandpod on this node, looks after it, or takes it away.
#[derive(Debug, Parser)]
#[command(name = "sandpod-installer", version)]
struct Cli {
    /// What to do.
    verb: Word,
    /// Where the node's root folder is.
    #[arg(long, default_value = "/")]
    host_root: PathBuf,
    /// The folder of the files to install.
    #[arg(long)]
    payload: Option<PathBuf>,
    /// A file for the result, as JSON.
    #[arg(long)]
    result: Option<PathBuf>,
    /// How much is logged: fatal, panic, error, warn, info, debug or trace.
    #[arg(long, default_value = "info")]
    log_level: LogLevel,
    /// TOML that is laid over the installed configuration of pods, before the files in /etc/sandpod/config.d.
    #[arg(long, default_value = "", hide_default_value = true)]
    configuration: String,
    /// One more handler, kata-..., with settings of its own, which are laid over all others. May be repeated; one that
    /// is left out goes.
    #[arg(long = "runtime-class", value_name = "NAME=TOML", value_parser = classes::parse)]
    runtime_classes: Vec<(String, String)>,
    /// Where on the node it is installed.
    #[arg(long, default_value = DEFAULT_PREFIX)]
    prefix: PathBuf,
    /// What runs the node's pods.
    #[arg(long, default_value = "auto")]
    cri: Runtime,
    /// Where containerd's main file does not import the folder of drop-ins, add the line to it.
    #[arg(long)]
    add_imports: bool,
    /// The command that restarts it, words separated by spaces; by default systemctl.
    #[arg(long)]
    restart_command: Option<String>,
    /// The node's boot, as /proc/sys/kernel/random/boot_id names it: the run is for no other one.
    #[arg(long)]
    boot_id: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Word {
    /// Put the payload's version on the node and make it the current one.
    Install,
    /// Look whether the node is as the last install left it.
    Verify,
    /// Take everything away.
    Uninstall,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Runtime {
    Crio,
    Containerd,
    /// The one that the node's kubelet uses, or else the first that answers.
    Auto,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What QEMU reads it reads as another user, whatever the caller's umask is.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // Opened first: in the node's root it has another name.
    let result = match cli.result.as_ref().map(File::create).transpose() {
        Ok(result) => result,
        Err(error) => {
            eprintln!("sandpod-installer: --result cannot be written: {error}");
            return ExitCode::FAILURE;
        }
    };
    let words = |command: String| command.split_whitespace().map(str::to_owned).collect();
    let report = run(&Options {
        verb: match cli.verb {
            Word::Install => Verb::Install,
            Word::Verify => Verb::Verify,
            Word::Uninstall => Verb::Uninstall,
        },
        payload: cli.payload,
        host_root: cli.host_root,
        prefix: cli.prefix,
        log_level: cli.log_level,
        configuration: cli.configuration,
        runtime_classes: cli.runtime_classes.into_iter().collect(),
        cri: match cli.cri {
            Runtime::Crio => Some(Kind::Crio),
            Runtime::Containerd => Some(Kind::Containerd),
            Runtime::Auto => None,
        },
        add_imports: cli.add_imports,
        restart: cli.restart_command.map(words),
        boot_id: cli.boot_id,
    });
    for warning in &report.warnings {
        eprintln!("installer: warning: {warning}");
    }
    let code = match &report.error {
        None => ExitCode::SUCCESS,
        Some(problem) => {
            eprintln!("installer: {}", problem.text);
            ExitCode::FAILURE
        }
    };
    let told = match result {
        Some(mut file) => file.write_all(report.to_json().as_bytes()),
        None => writeln!(std::io::stdout(), "{}", report.to_json()),
    };
    match told {
        Ok(()) => code,
        Err(error) => {
            eprintln!("installer: the result cannot be written: {error}");
            ExitCode::FAILURE
        }
    }
}
