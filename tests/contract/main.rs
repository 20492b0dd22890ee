//! Holds `containerd-shim-kata-v2` to CRI-O's side of the contract, without CRI-O: this program speaks its dialect.
//!
//! `reference::` stories run with containerd's runc shim in the same place: they prove the story right. `sandpod::`
//! stories run with ours. Names or parts of names on the command line select stories, as with any Rust test program.
//! Needs root; everything happens in namespaces of its own ([`node`]).

mod bundle;
mod connection;
mod crio;
mod exec;
mod fifo;
mod namespaces;
mod node;
mod pod;
mod process;
mod rootfs;
mod stories;
mod task;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use node::{Node, Role};
use tests::{failure::Result, stage, suite};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let outcome = match Role::of_this_process() {
        // A list needs no node, and so no root.
        Role::Outside if arguments.list => {
            let names = stories::all()
                .map(|story| suite::trial(story.name(), || Ok(())))
                .collect();
            Ok(suite::run(&arguments, names).exit_code())
        }
        Role::Outside => node::outside(),
        Role::Init => node::init(),
        Role::Client => client(&mut arguments),
    };
    outcome.unwrap_or_else(|failure| {
        eprintln!("contract: {failure}");
        ExitCode::FAILURE
    })
}

fn client(arguments: &mut Arguments) -> Result<ExitCode> {
    // The node's census is the machine's to one story at a time.
    arguments.test_threads = Some(1);
    let node: &'static Node = Box::leak(Box::new(Node::here()?));
    let trial = |story: stories::Story| suite::trial(story.name(), move || node.play(&story));
    Ok(suite::run(arguments, stage::chosen(stories::all().map(trial).collect())).exit_code())
}
