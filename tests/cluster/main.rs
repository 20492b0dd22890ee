//! Sandpod in Kubernetes: real API servers, and real nodes.

use std::sync::Arc;

use libtest_mimic::Arguments;
use tests::suite;

mod book;
mod ground;
mod insight;
mod life;
mod operator;
mod packages;
mod real;
mod release;
mod server;

fn main() {
    let mut arguments = Arguments::from_args();
    // A cluster's own programs and the machines of its pods want more than one processor each.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let site = Arc::new(ground::Site::default());
    let alone = server::STORIES
        .iter()
        .map(|(name, tell)| suite::trial(format!("api-server/{name}"), *tell));
    let (of_the_operator, stage) = operator::trials();
    let life = life::STORIES
        .iter()
        .map(|(name, tell)| suite::trial(format!("life/{name}"), *tell));
    let release = release::STORIES
        .iter()
        .map(|(name, tell)| suite::trial(format!("release/{name}"), *tell));
    let real = real::STORIES.iter().chain(insight::STORIES);
    let real = real.map(|story| site.trial(*story));
    let trials = alone
        .chain(packages::trials())
        .chain(book::trials())
        .chain(of_the_operator)
        .chain(life)
        .chain(release)
        .chain(real)
        .collect();
    let conclusion = suite::run(&arguments, trials);
    stage.clear();
    // Ends the node, if a story needed it.
    drop(site);
    conclusion.exit()
}
