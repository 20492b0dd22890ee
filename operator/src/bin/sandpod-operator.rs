//! The controller: installs kata on the nodes that a KataConfig asks for, one after another, and registers the
//! RuntimeClass.

use std::process::ExitCode;

use clap::Parser;
use operator::control::{Options, run};
use tracing_subscriber::filter::LevelFilter;

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(LevelFilter::INFO)
        .init();
    match run(Options::parse()).await {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
