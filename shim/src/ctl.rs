//! The commands of `kata-ctl`: what an administrator asks a node about its sandboxes.

pub mod env;
pub mod exec;
pub mod gather;
pub mod monitor;
mod page;
mod report;
pub mod top;

use crate::{
    error::{Error, Result},
    undo::{self, PodName, State},
};

/// Every sandbox of this node with its state, in the order of their ids.
///
/// # Errors
/// A state file that cannot be read; one that vanishes meanwhile is left out.
pub fn sandboxes() -> Result<Vec<(String, State)>> {
    let load = |id: String| State::load(&id).map(|state| state.map(|state| (id, state)));
    undo::names()?
        .into_iter()
        .map(load)
        .filter_map(Result::transpose)
        .collect()
}

/// The full id of the sandbox that this is the beginning of, such as the letters that `top` and `crictl` show.
///
/// # Errors
/// None or several begin so.
pub fn full_id(beginning: &str) -> Result<String> {
    the_one(beginning, undo::names()?)
}

fn the_one(beginning: &str, ids: Vec<String>) -> Result<String> {
    if ids.iter().any(|id| id == beginning) {
        return Ok(beginning.to_owned());
    }
    let mut found = ids.into_iter().filter(|id| id.starts_with(beginning));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(Error::NotFound(format!("sandbox {beginning}"))),
        (Some(_), Some(_)) => Err(Error::Invalid(format!("more than one sandbox begins with {beginning}"))),
    }
}

/// One line a sandbox: its id, its pod, its shim's process, and how it is.
///
/// # Errors
/// Those of [`sandboxes`].
pub fn list() -> Result<String> {
    let row = |(id, state): (String, State)| {
        vec![
            id,
            pod_name(state.pod.as_ref()),
            how(&state).to_owned(),
            state.shim.pid.to_string(),
        ]
    };
    let mut rows = vec![["SANDBOX", "POD", "STATE", "SHIM"].map(str::to_owned).to_vec()];
    rows.extend(sandboxes()?.into_iter().map(row));
    Ok(table(&rows, 3))
}

/// What a person calls the pod; a dash for a task that no CRI has made.
fn pod_name(pod: Option<&PodName>) -> String {
    pod.map_or_else(|| "-".to_owned(), PodName::to_string)
}

/// How a sandbox is that has all its parts.
const RUNNING: &str = "running";

/// How a sandbox is, in words.
fn how(state: &State) -> &'static str {
    let alive = |process: Option<undo::ProcessId>| process.is_some_and(|process| process.alive());
    if !state.shim.alive() {
        "dead, to be swept"
    } else if alive(state.qemu) {
        RUNNING
    } else {
        "no guest"
    }
}

/// Rows as aligned columns: the first `texts` to the left, the others, numbers, to the right.
fn table(rows: &[Vec<String>], texts: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let cell = |(column, (text, width)): (usize, (&String, &usize))| {
        if column < texts {
            format!("{text:<width$}")
        } else {
            format!("{text:>width$}")
        }
    };
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).enumerate().map(cell).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_found_by_the_beginning_of_its_id() {
        let ids = || ["0a1", "0a2", "0a", "b1"].map(str::to_owned).to_vec();
        let full = |beginning| the_one(beginning, ids()).map_err(|error| error.to_string());
        assert_eq!(full("b"), Ok("b1".into()));
        assert_eq!(full("0a"), Ok("0a".into()));
        assert_eq!(full("0"), Err("more than one sandbox begins with 0".into()));
        assert_eq!(full("c"), Err("sandbox c not found".into()));
    }

    #[test]
    fn texts_are_aligned_to_the_left_and_numbers_to_the_right() {
        let rows = [["POD", "MiB"], ["default/web", "7.5"], ["-", "116.8"]];
        let rows: Vec<Vec<String>> = rows.map(|row| row.map(str::to_owned).to_vec()).to_vec();
        assert_eq!(
            table(&rows, 1),
            "POD            MiB\ndefault/web    7.5\n-            116.8\n"
        );
    }
}
