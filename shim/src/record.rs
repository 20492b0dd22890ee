//! What CRI-O knows of a sandbox, kept in `/run/kata/<sandbox>/tasks.json` for a shim that has to answer in a dead
//! one's place.
//!
//! CRI-O calls no `delete`, and asks the address in a container's bundle for as long as it knows the container.

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    container::{Container, Kind},
    error::{Context, Result, decode},
    io::Stdio,
    process::Exit,
    undo::{dir_of, write_renamed},
};

/// One task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its streams, as `State` has to echo them.
    pub stdio: Stdio,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

impl Task {
    /// A container as it is now.
    pub fn of(container: &Container) -> Task {
        Task {
            id: container.id.clone(),
            kind: container.kind,
            bundle: container.bundle.clone(),
            stdio: container.init.stdio.clone(),
            exit: container.init.exit(),
        }
    }

    /// Whether CRI-O still has its bundle, and so may ask for it.
    pub fn is_known(&self) -> bool {
        self.bundle.is_dir()
    }
}

fn path_of(sandbox: &str) -> PathBuf {
    dir_of(sandbox).join("tasks.json")
}

/// Writes down the tasks of a sandbox.
///
/// # Errors
/// The sandbox's directory is gone, or full.
pub fn save(sandbox: &str, tasks: &[Task]) -> Result<()> {
    let text = serde_json::to_vec(tasks).map_err(decode("the tasks to write"))?;
    write_renamed(&path_of(sandbox), &text)
}

/// The tasks of a sandbox that CRI-O may ask for; none for a sandbox of another manager.
///
/// # Errors
/// The file cannot be read.
pub fn load(sandbox: &str) -> Result<Vec<Task>> {
    let path = path_of(sandbox);
    let tasks: Vec<Task> = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(decode("a sandbox's tasks.json"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).at("read", path),
    };
    Ok(tasks.into_iter().filter(Task::is_known).collect())
}
