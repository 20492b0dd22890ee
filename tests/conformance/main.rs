//! Conformance: critest, the CRI's own validation suite, against the newest containerd with our runtime and our own
//! kernel, and with runc, which proves that the node and the images are fit for it.
//!
//! critest runs once for each runtime, both at the same time, each on a node of its own. Each of its specs is a trial,
//! `<runtime>/<spec>`, whose result must be the one that [`expected`] gives. A filter runs only the specs that it
//! selects. Reports and logs are kept in target/conformance.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock},
    thread,
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tests::{
    config::{Guest, Runtime},
    places,
};

mod critest;
mod expected;
mod images;
mod registry;

use critest::{Outcome, Report};
use expected::{ALWAYS, Exception, Instead, RUNC, SANDPOD};

/// A run of critest that starts when it is first asked for, or what became of it.
type Run = LazyLock<Result<Report, String>, Box<dyn FnOnce() -> Result<Report, String> + Send>>;

fn main() {
    let arguments = Arguments::from_args();
    let specs = critest::specs().unwrap_or_else(|failure| {
        eprintln!("conformance: {failure}");
        std::process::exit(1);
    });
    let mut trials = Vec::new();
    let mut runs = Vec::new();
    for (kind, runtime, exceptions) in [
        ("own", Runtime::Kata(Guest::Own), SANDPOD),
        ("runc", Runtime::Runc, RUNC),
    ] {
        let selected = selected(&arguments, kind, &specs);
        let wanted = !selected.is_empty() && !arguments.list && !arguments.ignored;
        let run = Arc::new(later(
            runtime,
            selected,
            places::workspace().join("target/conformance").join(kind),
        ));
        trials.extend(self::trials(kind, &specs, exceptions, &run));
        if wanted {
            runs.push(thread::spawn(move || {
                LazyLock::force(&run);
            }));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Each undoes its node.
    for run in runs {
        drop(run.join());
    }
    conclusion.exit()
}

/// The specs that the command line asks for.
fn selected(arguments: &Arguments, kind: &str, specs: &[String]) -> Vec<String> {
    let asked = |spec: &&String| !arguments.is_filtered_out(&Trial::test(format!("{kind}/{spec}"), || Ok(())));
    specs.iter().filter(asked).cloned().collect()
}

fn later(runtime: Runtime, specs: Vec<String>, logs: PathBuf) -> Run {
    LazyLock::new(Box::new(move || {
        let specs: Vec<_> = specs.iter().map(String::as_str).collect();
        critest::run(runtime, &specs, &logs).map_err(|failure| failure.to_string())
    }))
}

/// A trial for each spec, one for each exception that is about no spec, and one for what critest's pods left behind.
fn trials(kind: &str, specs: &[String], exceptions: &'static [Exception], run: &Arc<Run>) -> Vec<Trial> {
    let exceptions = || ALWAYS.iter().chain(exceptions);
    let mut trials = Vec::new();
    for spec in specs {
        let exception = exceptions().find(|exception| spec.starts_with(exception.specs));
        let (run, name) = (Arc::clone(run), spec.clone());
        trials.push(Trial::ignorable_test(format!("{kind}/{spec}"), move || {
            let report = run.as_ref().as_ref().map_err(Failed::from)?;
            let outcome = report.outcomes.get(&name).ok_or("critest does not report it")?;
            verdict(outcome, exception).map_err(Failed::from)
        }));
    }
    for exception in exceptions().filter(|exception| !specs.iter().any(|spec| spec.starts_with(exception.specs))) {
        trials.push(Trial::test(format!("{kind}/{}", exception.specs), || {
            Err("critest has no such spec".into())
        }));
    }
    let run = Arc::clone(run);
    trials.push(Trial::test(format!("{kind}/nothing is left behind"), move || {
        let report = run.as_ref().as_ref().map_err(Failed::from)?;
        report.left.clone().map_err(Failed::from)
    }));
    trials
}

/// Whether a spec ended as expected.
fn verdict(outcome: &Outcome, exception: Option<&Exception>) -> Result<Completion, String> {
    match (
        outcome,
        exception.map(|exception| (exception.instead, exception.reason)),
    ) {
        (Outcome::Passed, None) => Ok(Completion::Completed),
        (Outcome::Failed(_), Some((Instead::Fails, reason)))
        | (Outcome::Skipped(_), Some((Instead::Skips, reason))) => Ok(Completion::ignored_with(reason)),
        (Outcome::Passed, Some((_, reason))) => Err(format!("it passes, and is listed as one that does not: {reason}")),
        (Outcome::Skipped(message), _) => Err(format!("critest skipped it: {message}")),
        (Outcome::Failed(message), _) => Err(message.clone()),
    }
}
