//! The stories, each for the runtimes that it applies to.

mod death;
mod exec;
mod exits;
mod host;
mod hostile;
mod hostile_share;
mod lifecycle;
mod node;
mod numbers;
mod refusals;
mod restart;
mod stop;
mod storage;

use tests::failure::Result;

use crate::crio::{Crio, Runtime};

/// Something CRI-O does, and what must come of it.
pub struct Story {
    name: &'static str,
    /// What is in the place of the VM runtime.
    pub runtime: Runtime,
    /// Its course.
    pub play: fn(&Crio<'_>) -> Result,
}

impl Story {
    /// The runtime's name and its own.
    pub fn name(&self) -> String {
        format!("{}::{}", self.runtime.name(), self.name)
    }
}

/// What a story claims is true of any shim.
const BOTH: &[Runtime] = &[Runtime::Reference, Runtime::Sandpod];
/// What a story claims is CRI-O's wish, or a virtual machine's duty, and the reference does not have it.
const OURS: &[Runtime] = &[Runtime::Sandpod];

/// A module's stories: runtimes, name, course.
type Told = &'static [(&'static [Runtime], &'static str, fn(&Crio<'_>) -> Result)];

/// Every story.
pub fn all() -> impl Iterator<Item = Story> {
    let told: [Told; 13] = [
        lifecycle::TOLD,
        exec::TOLD,
        exits::TOLD,
        stop::TOLD,
        numbers::TOLD,
        restart::TOLD,
        death::TOLD,
        refusals::TOLD,
        storage::TOLD,
        node::TOLD,
        hostile::TOLD,
        hostile_share::TOLD,
        host::TOLD,
    ];
    told.into_iter().flatten().flat_map(|(runtimes, name, play)| {
        runtimes.iter().map(|runtime| Story {
            name,
            runtime: *runtime,
            play: *play,
        })
    })
}
