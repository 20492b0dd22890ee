//! The test programs of this workspace inside an emulated node: the same stories, with pods by KVM.

use std::{env, time::Duration};

use super::Machine;
use crate::{failure::Result, images, places, stage, wait};

/// How much slower everything is in the node, with a machine that has other work.
const SLOWNESS: u32 = 20;

impl Machine {
    /// Plays stories of a test program in the node, one after another: those with these names, or with no names those
    /// that it plays by default.
    ///
    /// # Errors
    /// When the program is missing, a story fails, or all of them take longer than the deadline.
    pub fn play(&self, program: &str, names: &[&str], deadline: Duration) -> Result {
        let path = places::test_program(program)?.display().to_string();
        // What is made on demand is made here: the node cannot write into the cache.
        images::archive()?;
        let mut words = vec!["env".to_owned()];
        let given = env::vars().filter(|(name, _)| name.starts_with("SANDPOD_"));
        words.extend(given.map(|(name, value)| format!("{name}={value}")));
        words.push(format!("{}={SLOWNESS}", wait::SLOWNESS));
        if !names.is_empty() {
            words.push(format!("{}={}", stage::STORIES, names.join(",")));
        }
        words.extend([path, "--test-threads=1".to_owned()]);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.start(&words, false)?.succeed(deadline).map(drop)
    }
}
