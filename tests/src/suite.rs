//! A test program: stories as trials, and at its end the ones that took longest.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Conclusion, Trial};

use crate::failure::Result;

/// So many stories are named at the end.
const NAMED: usize = 10;

/// How long each story took that has ended.
static DURATIONS: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// A story as a trial with a name.
pub fn trial(name: impl Into<String>, story: impl FnOnce() -> Result + Send + 'static) -> Trial {
    let name = name.into();
    Trial::test(name.clone(), move || {
        let begun = Instant::now();
        let told = story();
        let mut durations = DURATIONS.lock().unwrap_or_else(PoisonError::into_inner);
        durations.push((begun.elapsed(), name));
        Ok(told?)
    })
}

/// Plays the trials that the command line asks for, and names those that took longest.
pub fn run(arguments: &Arguments, trials: Vec<Trial>) -> Conclusion {
    let conclusion = libtest_mimic::run(arguments, trials);
    let mut durations = DURATIONS.lock().unwrap_or_else(PoisonError::into_inner);
    durations.sort_unstable();
    for (duration, name) in durations.iter().rev().take(NAMED) {
        println!("{:>5} s {name}", duration.as_secs());
    }
    conclusion
}
