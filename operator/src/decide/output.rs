//! What a decision says: statuses to write, then actions to take one after another, then events to tell.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use super::world::{Order, Record};
use crate::{
    api::{KataConfigStatus, KataNodes, PodOverhead},
    report::{Code, Verb},
};

/// What to do now. Whoever acts writes the statuses first and takes the actions in their order; after a failure it
/// stops, tells what belongs to what was done, reads the world again and decides anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// By the name of the KataConfig; only those that differ from what is there. They describe the world that was read.
    pub statuses: Vec<(String, KataConfigStatus)>,
    /// In order.
    pub actions: Vec<Action>,
    /// Each to be told once the step that it belongs to was done: the next decision does not know of it any more.
    pub notes: Vec<Note>,
    /// Runs whose end is taken note of for the first time, each by its step.
    pub ends: Vec<End>,
    /// The lists of the KataConfig that is in force, written or not.
    pub nodes: KataNodes,
    /// When to decide again although nothing happens.
    pub wake: Option<Timestamp>,
    /// Pods that use kata are waited for: their ends have to be watched.
    pub awaits_pods: bool,
}

impl Decision {
    /// What is to be told when so much was done.
    pub(crate) fn told(&self, done: Step) -> impl Iterator<Item = &Note> {
        self.notes.iter().filter(move |note| note.after <= done)
    }

    /// Of the ends of runs, those that are noted with this step.
    pub(crate) fn ends_with(&self, step: Step) -> impl Iterator<Item = &End> {
        self.ends.iter().filter(move |end| end.after == step)
    }

    /// The step after everything that is said to be done so far.
    pub(super) fn written(&self) -> Step {
        match self.actions.len() {
            0 => Step::Statuses(self.statuses.len()),
            actions => Step::Actions(actions),
        }
    }
}

/// How much of a decision was done: the statuses come before the actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// So many statuses were written.
    Statuses(usize),
    /// All were, and so many actions taken.
    Actions(usize),
}

/// One step. Each is idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Puts the finalizer on the KataConfig.
    AddFinalizer(String),
    /// Takes it off.
    RemoveFinalizer(String),
    /// Writes our labels and annotations on a node.
    Mark {
        /// The node.
        node: String,
        /// All of them.
        record: Record,
    },
    /// Cordons a node for a change, or ends that.
    Cordon {
        /// The node.
        node: String,
        /// No new pods come to it.
        on: bool,
    },
    /// Makes a pod of the installer.
    StartRun {
        /// The pod's name.
        name: String,
        /// What for.
        order: Order,
    },
    /// Deletes a pod of the installer, if it still is the one with this uid.
    DeleteRun {
        /// The pod's name.
        name: String,
        /// And uid.
        uid: String,
    },
    /// Makes a RuntimeClass.
    CreateRuntimeClass {
        /// Its name, and its handler's.
        name: String,
        /// The KataConfig that owns it.
        owner: String,
        /// What it tells the scheduler.
        overhead: PodOverhead,
    },
    /// Gives one of ours another overhead.
    SetOverhead {
        /// Its name.
        name: String,
        /// What it tells the scheduler from now on.
        overhead: PodOverhead,
    },
    /// Deletes one of ours.
    DeleteRuntimeClass(String),
}

impl fmt::Display for Action {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::AddFinalizer(config) => write!(out, "putting the finalizer on {config}"),
            Action::RemoveFinalizer(config) => write!(out, "taking the finalizer off {config}"),
            Action::Mark { node, record } => {
                let ready = record
                    .ready
                    .map_or("unclaimed", |ready| if ready { "ready" } else { "not ready" });
                let version = record.version.as_deref().unwrap_or("no version");
                write!(out, "marking {node}: {ready}, {version}")
            }
            Action::Cordon { node, on: true } => write!(out, "cordoning {node}"),
            Action::Cordon { node, on: false } => write!(out, "uncordoning {node}"),
            Action::StartRun { name, order } => write!(out, "making pod {name} on {}", order.node),
            Action::DeleteRun { name, .. } => write!(out, "deleting pod {name}"),
            Action::CreateRuntimeClass { name, .. } => write!(out, "making the RuntimeClass {name}"),
            Action::SetOverhead { name, overhead } => {
                write!(out, "giving the RuntimeClass {name} the overhead {overhead}")
            }
            Action::DeleteRuntimeClass(name) => write!(out, "deleting the RuntimeClass {name}"),
        }
    }
}

/// How a run ended, for the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// What it was asked for.
    pub verb: Verb,
    /// From the pod's creation to its end.
    pub took: SignedDuration,
    /// Why it failed, where it failed; [`Code::Other`] where it did not say.
    pub failure: Option<Code>,
    /// The step that takes note of it.
    pub after: Step,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What it is about.
    pub about: About,
    /// Something is not as it should be.
    pub warning: bool,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub text: String,
    /// The step that makes it true.
    pub after: Step,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum About {
    /// The KataConfig of this name.
    Config(String),
    /// The node of this name.
    Node(String),
}
