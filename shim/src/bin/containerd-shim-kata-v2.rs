//! The program that containerd and CRI-O start: see the crate `shim`.

use std::process::ExitCode;

use shim::{
    cli::{Action, Cli},
    error::Result,
    serve, start,
};

fn main() -> ExitCode {
    let cli = match Cli::parse(std::env::args().skip(1)) {
        Ok(cli) => cli,
        Err(error) => return fail(&error),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if cli.action == Action::Serve => {
            // `start` reads the sentence from our standard output and prints it for the caller.
            print!("{error}");
            ExitCode::FAILURE
        }
        Err(error) => fail(&error),
    }
}

fn run(cli: &Cli) -> Result<()> {
    match cli.action {
        Action::Start => start::print(start::start(cli)?.as_bytes()),
        Action::Delete => start::print(&start::delete(cli)?),
        Action::Serve => serve::serve(cli),
        Action::Sweep => start::sweep(cli),
        Action::Version => start::print(format!("containerd-shim-kata-v2 {}\n", env!("CARGO_PKG_VERSION")).as_bytes()),
        Action::Features => start::print(format!("{}\n", start::features()).as_bytes()),
        Action::Info => start::print(&start::info()?),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("containerd-shim-kata-v2: {error}");
    ExitCode::FAILURE
}
