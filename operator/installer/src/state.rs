//! What the installer remembers on the node between its runs.
//!
//! ```text
//!             begin                         settle
//!   settled ─────────> pending (before ...) ──────> settled
//!                         │   ^
//!                         └───┘ killed: the next run goes on, and what there was before stays what it was
//! ```

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    daemon::Daemon,
    effective::Baseline,
    error::{InstallError, Result},
    files::{self, Host, SCRATCH},
};

/// It may tell of the CRI's configuration, which only root can ask for.
const MODE: u32 = 0o600;

/// `PREFIX/state.json`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// The version that was current before this one.
    pub previous: Option<String>,
    /// What runs the pods.
    pub cri: Option<Daemon>,
    /// Folders that were not there before us, each before those inside it.
    pub made: Vec<PathBuf>,
    /// Files that we wrote where administrators write theirs, with the SHA-256 of what we wrote.
    pub written: BTreeMap<PathBuf, String>,
    /// The administrator's files that have a line of ours.
    pub edited: BTreeMap<PathBuf, Edit>,
    /// A change that has begun and is not known to have succeeded.
    pub pending: Option<Pending>,
}

/// A line that was added to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Edit {
    /// The file before; none where there was none.
    pub before: Option<String>,
    /// The SHA-256 of the file with the line.
    pub sha256: String,
    /// What is imported by it.
    pub pattern: String,
}

/// What is needed to put things back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pending {
    /// The boot in which it began: a CRI that started later needs no restart for it.
    pub boot_id: String,
    /// The version that was current.
    pub current: Option<String>,
    /// The files that are changed, as they were; none for one that was not there.
    pub files: BTreeMap<PathBuf, Option<String>>,
    /// Of these files, the sums of those that were ours and known as such ([`State::written`]).
    pub written: BTreeMap<PathBuf, String>,
    /// The CRI has to be restarted for it.
    pub restart: bool,
    /// What the CRI was like before the change.
    pub baseline: Option<Baseline>,
}

/// Where things are below the prefix.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The node.
    pub host: Host,
    /// The prefix as the node sees it.
    pub prefix: PathBuf,
}

impl Layout {
    /// The prefix, for this process.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.host.at(&self.prefix)
    }

    /// The folder of all versions.
    #[must_use]
    pub fn versions(&self) -> PathBuf {
        self.root().join("versions")
    }

    /// The link to the current version.
    #[must_use]
    pub fn current(&self) -> PathBuf {
        self.root().join("current")
    }

    /// The name of the current version.
    #[must_use]
    pub fn current_version(&self) -> Option<String> {
        let target = std::fs::read_link(self.current()).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    fn state(&self) -> PathBuf {
        self.root().join("state.json")
    }

    /// What was remembered; none where nothing was installed.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn load(&self) -> Result<Option<State>> {
        let path = self.state();
        let text = files::read_text(&path)?;
        text.map(|text| {
            serde_json::from_str(&text).map_err(|error| InstallError::ConfigInvalid {
                what: self.host.name(&path).display().to_string(),
                why: format!("{error}; uninstall, which does without it, and install again"),
            })
        })
        .transpose()
    }

    /// Remembers it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn save(&self, state: &State) -> Result<()> {
        files::replace(&self.state(), &render(state), &self.root(), MODE)
    }

    /// What was remembered; where nothing was, the prefix is made with a first state in it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn load_or_make(&self) -> Result<State> {
        if let Some(state) = self.load()? {
            return Ok(state);
        }
        let missing = files::missing_folders(&self.root());
        let state = State {
            made: missing.iter().map(|folder| self.host.name(folder)).collect(),
            ..State::default()
        };
        let Some(top) = missing.first() else {
            return self.save(&state).map(|()| state);
        };
        // In one step, or a death in between would leave folders that nobody knows to be ours.
        let scratch = beside(top);
        files::remove_tree(&scratch)?;
        let inside = self.root();
        let inside = inside.strip_prefix(top).unwrap_or(Path::new(""));
        make_folders(&scratch.join(inside))?;
        files::write(&scratch.join(inside).join("state.json"), &render(&state), MODE)?;
        rename(&scratch, top)?;
        Ok(state)
    }

    /// Forgets everything, and removes the prefix and the folders above it that were made for it. Everything else in it
    /// is gone already.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget(&self, state: &State) -> Result<()> {
        let chain: Vec<_> = state.made.iter().filter(|made| self.prefix.starts_with(made)).collect();
        let alone = |folder: &PathBuf| {
            let child = chain.iter().find(|other| other.parent() == Some(folder.as_path()));
            let only = child.map_or("state.json".into(), |child| {
                child.file_name().unwrap_or_default().to_owned()
            });
            files::names(&self.host.at(folder)).is_ok_and(|names| names.len() == 1 && *names[0] == *only)
        };
        // The topmost folder with nothing but ours in it goes in one step, as it came.
        let from = (0..chain.len()).find(|start| chain[*start..].iter().all(|folder| alone(folder)));
        if let Some(top) = from.map(|start| self.host.at(chain[start])) {
            let scratch = beside(&top);
            rename(&top, &scratch)?;
            return files::remove_tree(&scratch).map(drop);
        }
        files::remove(&self.state()).map(drop)
    }

    /// Removes what a run that was killed while it made or removed the prefix left beside it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sweep_beside(&self) -> Result<bool> {
        let root = self.root();
        let mut swept = false;
        for folder in root.ancestors().filter(|folder| folder.file_name().is_some()) {
            swept |= files::remove_tree(&beside(folder))?;
        }
        Ok(swept)
    }

    /// Makes a folder, and remembers first which ones were not there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make_folder(&self, state: &mut State, folder: &Path) -> Result<()> {
        let missing = files::missing_folders(folder);
        if missing.is_empty() {
            return Ok(());
        }
        let names = missing.iter().map(|folder| self.host.name(folder));
        let fresh: Vec<_> = names.filter(|name| !state.made.contains(name)).collect();
        state.made.extend(fresh);
        self.save(state)?;
        make_folders(folder)
    }
}

fn render(state: &State) -> Vec<u8> {
    format!("{:#}\n", serde_json::json!(state)).into_bytes()
}

/// The name beside a folder under which it comes and goes.
fn beside(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}{SCRATCH}"))
}

fn make_folders(folder: &Path) -> Result<()> {
    use super::error::Context;
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .at("create", folder)?;
    files::sync_folder(folder)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    use super::error::Context;
    std::fs::rename(from, to).at("move a folder to", to)?;
    to.parent().map_or(Ok(()), files::sync_folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn layout(root: &Path) -> Layout {
        Layout {
            host: Host::new(root),
            prefix: "/opt/sandpod".into(),
        }
    }

    #[test]
    fn a_prefix_comes_with_its_state_and_goes_with_it() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        let state = layout.load_or_make().unwrap();
        assert_eq!(state.made, ["/opt", "/opt/sandpod"].map(PathBuf::from));
        assert_eq!(layout.load().unwrap(), Some(state.clone()));
        layout.forget(&state).unwrap();
        assert!(files::names(root.path()).unwrap().is_empty());
    }

    #[test]
    fn a_state_that_is_damaged_is_named_with_its_cure() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        layout.load_or_make().unwrap();
        fs::write(layout.state(), "{").unwrap();
        let error = layout.load().unwrap_err().to_string();
        assert!(
            error.starts_with("/opt/sandpod/state.json is not valid: EOF while")
                && error.ends_with("; uninstall, which does without it, and install again"),
            "{error}"
        );
    }

    #[test]
    fn folders_of_others_stay() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        let mut state = layout.load_or_make().unwrap();
        fs::write(root.path().join("opt/theirs"), "").unwrap();
        layout
            .make_folder(&mut state, &root.path().join("etc/sandpod"))
            .unwrap();
        assert_eq!(state.made.len(), 4);
        layout.forget(&state).unwrap();
        assert_eq!(files::names(&root.path().join("opt")).unwrap(), ["theirs"]);
    }

    #[test]
    fn what_a_death_left_beside_the_prefix_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        fs::create_dir_all(root.path().join(".opt.sandpod-tmp/sandpod")).unwrap();
        assert!(layout.sweep_beside().unwrap());
        assert!(!layout.sweep_beside().unwrap());
        assert!(files::names(root.path()).unwrap().is_empty());
    }
}
