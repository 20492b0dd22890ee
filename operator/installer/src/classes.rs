//! RuntimeClasses with settings of their own. Each has a handler of its name in the CRI's drop-in, and that handler a
//! configuration file, which is laid over the configuration of the node's other pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use config::{Config, ConfigError, EXTENDS};

use super::{
    cri::HANDLER,
    dropin::Place,
    error::{InstallError, Result},
    files::{self, Host, SCRATCH},
};
use crate::handler;

/// Where their configuration files are.
pub const FOLDER: &str = "/etc/sandpod/runtime-classes";

/// What their files begin with, after which they are known.
const FIRST_LINE: &str = "# Sandpod: the settings of a RuntimeClass. The installer writes this file anew.";

/// The texts of their files, by their names.
pub type Files = BTreeMap<String, String>;

/// What is asked for on the command line: `NAME=TOML`, in which the TOML may be empty.
///
/// # Errors
/// A sentence about the name.
pub fn parse(word: &str) -> std::result::Result<(String, String), String> {
    let (name, settings) = word.split_once('=').ok_or("a RuntimeClass is given as NAME=TOML")?;
    match handler::refusal(name) {
        None => Ok((name.to_owned(), settings.to_owned())),
        Some(why) => Err(why),
    }
}

/// Where the file of a RuntimeClass is.
#[must_use]
pub fn place(name: &str) -> Place {
    Place {
        path: format!("{FOLDER}/{name}.toml").into(),
        scratch: FOLDER,
        // The CRI only names it; the shim reads it, at each pod's start.
        of_cri: false,
    }
}

/// The RuntimeClass whose file this is.
#[must_use]
pub fn name_of(path: &Path) -> Option<String> {
    let name = path.strip_prefix(FOLDER).ok()?.to_str()?.strip_suffix(".toml")?;
    handler::refusal(name).is_none().then(|| name.to_owned())
}

/// The text of a file: these settings, laid over the configuration at `base`.
#[must_use]
pub fn text(base: &Path, settings: &str) -> String {
    let base = toml::Value::from(base.display().to_string());
    format!("{FIRST_LINE}\n{EXTENDS} = {base}\n{}\n", settings.trim_end())
}

/// Whether a text in such a place is one of ours, edited or not: an administrator's settings have another place.
#[must_use]
pub fn is_ours(place: &Place, text: &str) -> bool {
    name_of(Path::new(&*place.path)).is_some() && text.starts_with(FIRST_LINE)
}

/// Our handlers, where these RuntimeClasses have settings of their own.
#[must_use]
pub fn handlers<'n>(names: impl Iterator<Item = &'n String>) -> BTreeSet<String> {
    names.cloned().chain([HANDLER.to_owned()]).collect()
}

/// The files of ours that are there although nobody remembers them.
///
/// # Errors
/// The folder cannot be read.
pub fn found(host: &Host) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for name in files::names(&host.at(FOLDER))? {
        let path = Path::new(FOLDER).join(name);
        let text = files::read_text(&host.at(&path))?.unwrap_or_default();
        if name_of(&path).is_some_and(|name| is_ours(&place(&name), &text)) {
            found.push((path, text));
        }
    }
    Ok(found)
}

/// Removes what a run that was killed had not yet moved to its place. Whether there was any.
///
/// # Errors
/// The kernel's.
pub fn sweep(host: &Host) -> Result<bool> {
    let mut swept = false;
    for name in files::names(&host.at(FOLDER))?
        .iter()
        .filter(|name| name.ends_with(SCRATCH))
    {
        swept |= files::remove(&host.at(Path::new(FOLDER).join(name)))?;
    }
    Ok(swept)
}

/// Refuses settings with which no pod could start.
///
/// # Errors
/// They are, named by their RuntimeClass.
pub fn refuse_invalid(name: &str, parsed: std::result::Result<Config, ConfigError>) -> Result<()> {
    parsed.map(drop).map_err(|error| InstallError::ConfigInvalid {
        what: format!("the configuration of the RuntimeClass {name}"),
        why: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_tells_its_class_and_extends_the_nodes_configuration() {
        let (name, settings) = parse("kata-large=[hypervisor.qemu]\ndefault_memory = 4096\n").unwrap();
        let place = place(&name);
        assert_eq!(place.path, "/etc/sandpod/runtime-classes/kata-large.toml");
        assert_eq!(name_of(Path::new(&*place.path)), Some(name));
        assert_eq!(
            name_of(Path::new("/etc/sandpod/runtime-classes/.kata-large.toml.sandpod-tmp")),
            None
        );
        assert_eq!(name_of(Path::new("/etc/sandpod/config.d/kata-large.toml")), None);
        assert_eq!(
            text(Path::new("/opt/sandpod/current/configuration.toml"), &settings),
            "# Sandpod: the settings of a RuntimeClass. The installer writes this file anew.\nextends = \"/opt/sandpod/current/configuration.toml\"\n\
             [hypervisor.qemu]\ndefault_memory = 4096\n"
        );
        assert_eq!(parse("kata-debug=").unwrap(), ("kata-debug".into(), String::new()));
        assert_eq!(parse("kata-debug").unwrap_err(), "a RuntimeClass is given as NAME=TOML");
        assert!(parse("debug=").unwrap_err().starts_with("\"debug\" is not the name"));
    }

    #[test]
    fn files_of_ours_are_known_by_their_text() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        std::fs::create_dir_all(host.at(FOLDER)).unwrap();
        let base = Path::new("/etc/kata-containers/configuration.toml");
        let ours = text(base, "[runtime]\nenable_debug = true");
        let theirs = "extends = \"/opt/sandpod/current/configuration.toml\"\n".to_owned();
        for (name, text) in [
            ("kata-a.toml", &ours),
            ("kata-b.toml", &theirs),
            (".kata-c.toml.sandpod-tmp", &ours),
        ] {
            std::fs::write(host.at(Path::new(FOLDER).join(name)), text).unwrap();
        }
        assert!(sweep(&host).unwrap() && !sweep(&host).unwrap());
        let path = Path::new(FOLDER).join("kata-a.toml");
        assert_eq!(found(&host).unwrap(), [(path, ours)]);
    }
}
