//! Sandpod in Kubernetes: real API servers.

use libtest_mimic::{Arguments, Trial};

mod operator;
mod server;

fn main() {
    let mut arguments = Arguments::from_args();
    // A cluster's own programs and the machines of its pods want more than one processor each.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let alone = server::STORIES
        .iter()
        .map(|(name, tell)| Trial::test(format!("api-server/{name}"), move || Ok(tell()?)));
    let (of_the_operator, stage) = operator::trials();
    let conclusion = libtest_mimic::run(&arguments, alone.chain(of_the_operator).collect());
    stage.clear();
    conclusion.exit()
}
