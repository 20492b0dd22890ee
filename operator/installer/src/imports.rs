//! The line by which containerd's main file imports our folder, for an administrator who has asked for it.
//!
//! The file is his: everything else in it stays byte for byte, comments and blanks too.

use std::{fs, path::Path};

use toml_edit::{Array, DocumentMut, Item, RawString, Value};

use super::{
    daemon::Site,
    dropin::{DropIn, Format},
    error::{Context, InstallError, Result},
    files::{self, Host},
};

const KEY: &str = "imports";

/// The pattern that is imported.
#[must_use]
pub fn pattern(site: &Site, format: Format) -> String {
    format!("{}/*.toml", site.folder(format).path)
}

/// The main file with the import, and its text before, none where there is no such file yet: then it is as good as
/// containerd's own defaults.
///
/// # Errors
/// It cannot be edited.
pub fn edit(host: &Host, site: &Site, format: Format) -> Result<(DropIn, Option<String>)> {
    let invalid = |why: String| InstallError::ConfigInvalid {
        what: site.main.to_owned(),
        why,
    };
    let path = host.at(site.main);
    if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
        let why = format!(
            "it is a link, and a line is added to a file only; add `{KEY} = [\"{}\"]` where it leads to",
            pattern(site, format)
        );
        return Err(invalid(why));
    }
    let before = files::read(&path)?.map(String::from_utf8).transpose();
    let before = before.map_err(|error| invalid(error.to_string()))?;
    let text = match &before {
        Some(before) => added(before, &pattern(site, format)).map_err(invalid)?,
        None => format!("version = 3\n{KEY} = [\"{}\"]\n", pattern(site, format)),
    };
    let place = site.main_place();
    Ok((
        DropIn {
            place,
            text: Some(text),
        },
        before,
    ))
}

/// A text with one more import.
///
/// # Errors
/// Why it cannot have one.
fn added(text: &str, pattern: &str) -> std::result::Result<String, String> {
    let mut document: DocumentMut = text
        .parse()
        .map_err(|error: toml_edit::TomlError| error.message().to_owned())?;
    // It ends as it did, with a newline or without.
    let end = &text[text.trim_end_matches('\n').len()..];
    let written = |document: &DocumentMut| format!("{}{end}", document.to_string().trim_end_matches('\n'));
    if written(&document) != text {
        return Err("it cannot be written again as it is; add the `imports` line by hand".to_owned());
    }
    match document.get_mut(KEY) {
        None => {
            let array: Array = [pattern].into_iter().collect();
            document.insert(KEY, Item::Value(Value::Array(array)));
        }
        Some(found) => {
            let array = found.as_array_mut().ok_or("`imports` is not a list of paths")?;
            let value = like_the_last(array, pattern);
            array.push_formatted(value);
        }
    }
    Ok(written(&document))
}

/// One more value of a list, with the blanks of the one before it, which it follows.
fn like_the_last(array: &mut Array, pattern: &str) -> Value {
    let mut value = Value::from(pattern);
    let last = array.len().checked_sub(1).and_then(|at| array.get_mut(at));
    let Some(decor) = last.map(Value::decor_mut) else {
        return value;
    };
    let blanks = |text: Option<&RawString>| text.and_then(RawString::as_str).unwrap_or_default().to_owned();
    let (before, after) = (blanks(decor.prefix()), blanks(decor.suffix()));
    decor.set_suffix("");
    let own_line = !before.is_empty() && !before.contains('#');
    value.decor_mut().set_prefix(if own_line { &before } else { " " });
    value.decor_mut().set_suffix(after);
    value
}

/// A text that somebody has edited since without our import; none where it has none. `alone`: the list of imports was
/// ours, and goes when nothing else is in it.
#[must_use]
pub fn removed(text: &str, pattern: &str, alone: bool) -> Option<String> {
    let mut document: DocumentMut = text.parse().ok()?;
    let array = document.get_mut(KEY)?.as_array_mut()?;
    let at = array.iter().position(|value| value.as_str() == Some(pattern))?;
    array.remove(at);
    if alone && array.is_empty() {
        document.remove(KEY);
    }
    Some(document.to_string())
}

/// Whether a text has a list of imports.
#[must_use]
pub fn has_list(text: &str) -> bool {
    let document = text.parse::<DocumentMut>();
    document.is_ok_and(|document| document.contains_key(KEY))
}

/// The mode of a file that is to be replaced, or that of a new one.
///
/// # Errors
/// The kernel's.
pub fn mode(path: &Path) -> Result<u32> {
    use std::os::unix::fs::PermissionsExt;
    match fs::metadata(path) {
        Ok(found) => Ok(found.permissions().mode() & 0o7777),
        Err(error) if files::is_absent(&error) => Ok(0o644),
        Err(error) => Err(error).at("look at", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::Daemon;

    const PATTERN: &str = "/etc/containerd/conf.d/*.toml";

    #[test]
    fn a_line_is_added_and_all_else_stays() {
        for (before, after) in [
            (
                "# mine\nversion = 2   # of 1.7\n\n# the CRI\n[plugins.x]\na = 1\n",
                "# mine\nversion = 2   # of 1.7\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n\n\
                 # the CRI\n[plugins.x]\na = 1\n",
            ),
            (
                "imports = [ '/a.toml' ] # theirs\nversion = 3\n",
                "imports = [ '/a.toml', \"/etc/containerd/conf.d/*.toml\" ] # theirs\nversion = 3\n",
            ),
            (
                "imports = [\n  \"/a.toml\",\n  \"/b.toml\", # theirs\n]\nversion = 3\n",
                "imports = [\n  \"/a.toml\",\n  \"/b.toml\",\n  \"/etc/containerd/conf.d/*.toml\", # theirs\n]\n\
                 version = 3\n",
            ),
            (
                "version = 3\nimports = []\nroot = \"/data\"",
                "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\nroot = \"/data\"",
            ),
        ] {
            assert_eq!(added(before, PATTERN).unwrap(), after);
        }
        assert_eq!(
            added("imports = 1\n", PATTERN).unwrap_err(),
            "`imports` is not a list of paths"
        );
        assert!(added("version = [\n", PATTERN).is_err());
    }

    #[test]
    fn only_our_import_is_taken_out_of_an_edited_file() {
        let list = |inside: &str| format!("version = 2\nimports = [{inside}]\n[x]\n");
        let ours = format!("\"{PATTERN}\"");
        assert_eq!(
            removed(&list(&format!("\"/a\", {ours}")), PATTERN, true).unwrap(),
            list("\"/a\"")
        );
        assert_eq!(removed(&list(&ours), PATTERN, true).unwrap(), "version = 2\n[x]\n");
        assert_eq!(removed(&list(&ours), PATTERN, false).unwrap(), list(""));
        assert_eq!(removed(&list("\"/a\""), PATTERN, true), None);
        assert_eq!(removed("version = 2\n", PATTERN, true), None);
        assert!(has_list(&list("")) && !has_list("version = 2\n"));
    }

    #[test]
    fn a_file_that_is_not_there_is_made_and_a_link_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        let site = Daemon::Containerd.site();
        let (made, before) = edit(&host, site, Format::ContainerdV3).unwrap();
        assert_eq!(before, None);
        assert_eq!(made.text.unwrap(), format!("version = 3\nimports = [\"{PATTERN}\"]\n"));
        fs::create_dir_all(host.at("/etc/containerd")).unwrap();
        std::os::unix::fs::symlink("/elsewhere", host.at(site.main)).unwrap();
        let error = edit(&host, site, Format::ContainerdV3).unwrap_err().to_string();
        assert!(
            error.starts_with("/etc/containerd/config.toml is not valid: it is a link, and a line is added to a file "),
            "{error}"
        );
    }
}
