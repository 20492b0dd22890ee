//! Plays stories, one at a time on each node, and fails those that leave anything behind.

use std::{
    collections::BTreeMap,
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use libtest_mimic::Trial;

use crate::{
    failure::{Failure, Result},
    node::{Node, NodeSpec},
    suite,
};

/// How long the last process, mount or socket of a pod may outlive its removal: containerd calls a shim's `delete`
/// after it has answered.
pub const SETTLE: Duration = Duration::from_secs(5);

/// The variable with the names of stories, with commas between them, that a program is to play instead of those that it
/// plays by default.
pub const STORIES: &str = "SANDPOD_STORIES";

/// The stories that are to be played: those that [`STORIES`] names, in its order, whether they are ignored by default
/// or not; or all.
#[must_use]
pub fn chosen(trials: Vec<Trial>) -> Vec<Trial> {
    let Ok(names) = env::var(STORIES) else {
        return trials;
    };
    let mut trials: BTreeMap<_, _> = trials
        .into_iter()
        .map(|trial| (trial.name().to_owned(), trial))
        .collect();
    let named = names.split(',').map(|name| match trials.remove(name) {
        Some(trial) => trial.with_ignored_flag(false),
        None => suite::trial(name, || Err(Failure::Claim("there is no such story".into()))),
    });
    named.collect()
}

/// Nodes of one kind: as many as stories play at once.
pub struct Stage {
    spec: NodeSpec,
    free: Mutex<Vec<Node>>,
}

impl Stage {
    /// A stage whose nodes are started by the stories that find none free.
    #[must_use]
    pub fn new(spec: NodeSpec) -> Arc<Stage> {
        Arc::new(Stage {
            spec,
            free: Mutex::default(),
        })
    }

    /// Plays a story and looks whether the node is as it was before. A node that is not is replaced for the next story.
    ///
    /// # Errors
    /// The story's, or [`Failure::LeftBehind`].
    pub fn play(&self, story: impl FnOnce(&Node) -> Result) -> Result {
        let free = self.free().pop();
        let node = match free {
            Some(node) => node,
            None => Node::start(&self.spec)?,
        };
        let before = node.census();
        let told = catch_unwind(AssertUnwindSafe(|| story(&node)))
            .unwrap_or_else(|_| Err(Failure::Claim("the story panicked".into())));
        match node.nothing_left_since(&before, SETTLE) {
            Ok(()) => {
                self.free().push(node);
                told
            }
            // The story's own failure tells more than what it left.
            Err(left) => {
                node.close()?;
                told.and(Err(left))
            }
        }
    }

    /// Ends the nodes.
    ///
    /// # Errors
    /// When something of one cannot be undone.
    pub fn clear(&self) -> Result {
        let nodes = std::mem::take(&mut *self.free());
        nodes.into_iter().map(Node::close).fold(Ok(()), Result::and)
    }

    fn free(&self) -> MutexGuard<'_, Vec<Node>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A story as a trial with a name.
pub fn trial(name: String, stage: &Arc<Stage>, story: impl FnOnce(&Node) -> Result + Send + 'static) -> Trial {
    let stage = Arc::clone(stage);
    suite::trial(name, move || stage.play(story))
}

/// Runs the trials, as many at once as there are processors, clears the stages, and exits.
pub fn perform(trials: Vec<Trial>, stages: &[Arc<Stage>]) -> ! {
    let mut arguments = libtest_mimic::Arguments::from_args();
    let processors = thread::available_parallelism().map_or(2, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(processors));
    let conclusion = suite::run(&arguments, chosen(trials));
    let mut clean = true;
    for stage in stages {
        if let Err(failure) = stage.clear() {
            eprintln!("a node was not undone: {failure}");
            clean = false;
        }
    }
    if !clean {
        std::process::exit(1);
    }
    conclusion.exit()
}
