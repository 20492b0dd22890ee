//! The CRI's configuration as a whole: which files it reads, who defines a handler of our name, and whether our drop-in
//! is read.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    daemon::{Author, Daemon, Kind, Site},
    dropin::{self, Format, MARK},
    error::{InstallError, Result},
    files::{self, Host},
};

/// The first line of a configuration that k0s writes at each start, and that has all drop-ins then.
const MANAGED: &str = "# k0s_managed=true";

/// A file of the CRI's configuration.
pub(super) struct Source {
    /// As the node sees it.
    pub path: PathBuf,
    /// What it says.
    pub table: Table,
}

/// Refuses a node where somebody else has a handler of one of these names, or where the CRI would not read ours.
///
/// # Errors
/// The file that is in the way; a file that is no TOML; the line that containerd's configuration lacks.
pub fn refuse_foreign(host: &Host, daemon: Daemon, format: Format, handlers: &BTreeSet<String>) -> Result<()> {
    let site = daemon.site();
    let ours = dropin::places(daemon);
    let sources = match site.kind {
        Kind::Crio => crio_sources(host, site)?,
        Kind::Containerd => containerd_sources(host, site, None)?,
    };
    // What a distribution has made of our drop-in is not somebody else's.
    let is_ours = |path: &Path| {
        ours.iter().any(|place| Path::new(&*place.path) == path)
            || site.merged.is_some_and(|merged| Path::new(merged) == path)
    };
    for source in sources.iter().filter(|source| !is_ours(&source.path)) {
        let defined = dropin::defined(site.kind, &source.table);
        if let Some(handler) = defined.intersection(handlers).next().cloned() {
            let path = source.path.clone();
            return Err(InstallError::ForeignHandler { path, handler });
        }
    }
    for place in ours.iter().filter(|place| place.of_cri) {
        if let Some(text) = files::read_text(&host.at(&*place.path))?
            && !text.starts_with(MARK)
        {
            let path = PathBuf::from(&*place.path);
            let defined = dropin::defined(site.kind, &text.parse().unwrap_or_default());
            return Err(match defined.intersection(handlers).next().cloned() {
                Some(handler) => InstallError::ForeignHandler { path, handler },
                None => InstallError::ForeignFile { path },
            });
        }
    }
    match site.kind == Kind::Crio || is_read(host, site, format, &sources)? {
        true => Ok(()),
        false => Err(not_imported(site, format, sources.is_empty())),
    }
}

/// Whether containerd would read our drop-in.
fn is_read(host: &Host, site: &Site, format: Format, sources: &[Source]) -> Result<bool> {
    Ok(covers(site, format, sources) || is_managed(host, site)?)
}

/// Whether k0s makes containerd's configuration of its own and of the drop-ins.
pub(super) fn is_managed(host: &Host, site: &Site) -> Result<bool> {
    let Some(_) = site.merged else {
        return Ok(false);
    };
    let text = files::read_text(&host.at(site.main))?;
    Ok(text.is_some_and(|text| text.lines().next() == Some(MANAGED)))
}

fn not_imported(site: &'static Site, format: Format, without_main: bool) -> InstallError {
    let folder = site.folder(format).path;
    let imports = format!("`imports = [\"{folder}/*.toml\"]`");
    let cure = match site.author {
        Author::Administrator if without_main => {
            format!("add `version = 3` and {imports} at the top of {}", site.main)
        }
        Author::Administrator => format!("add {imports} at the top of {}", site.main),
        Author::Distribution { reads } => {
            format!("{} has no {imports}; {reads}", site.main)
        }
    };
    InstallError::NotImported {
        cri: site.name,
        folder,
        cure,
    }
}

/// How our drop-in has to be written to be read together with the node's own configuration.
///
/// containerd has one version for all of its files. 2.0 to 2.2 take the one of the file that they read last, and bring
/// what the files say to their own version only if that one is older: a drop-in of a later version than the main file's
/// makes the main file's sections unknown ones. Some 2.3 do not start with one.
///
/// # Errors
/// containerd's main file has no version, or one that containerd 2 does not read.
pub fn format(host: &Host, daemon: Daemon) -> Result<Format> {
    let site = daemon.site();
    if site.kind == Kind::Crio {
        return Ok(Format::Crio);
    }
    let Some(main) = source(host, Path::new(site.main))? else {
        // Without a file it has its own newest version, which is 3 or later.
        return Ok(Format::ContainerdV3);
    };
    match main.table.get("version").and_then(Value::as_integer) {
        Some(2) => Ok(Format::ContainerdV2),
        // Whether there is such a version containerd's own program says.
        Some(version) if version > 2 => Ok(Format::ContainerdV3),
        _ => Err(InstallError::Unversioned { main: site.main }),
    }
}

fn source(host: &Host, path: &Path) -> Result<Option<Source>> {
    let text = files::read_text(&host.at(path))?;
    text.map(|text| parsed(path, &text)).transpose()
}

pub(super) fn parsed(path: &Path, text: &str) -> Result<Source> {
    let table = text
        .parse()
        .map_err(|error: toml::de::Error| InstallError::ConfigInvalid {
            what: path.display().to_string(),
            why: error.message().to_owned(),
        })?;
    Ok(Source {
        path: path.to_owned(),
        table,
    })
}

/// CRI-O's main file and every file below its folder, whatever their names (crio.conf.d(5)).
fn crio_sources(host: &Host, site: &Site) -> Result<Vec<Source>> {
    let mut paths = vec![PathBuf::from(site.main)];
    walk(host, Path::new(site.folders[0].path), &mut paths)?;
    let sources: Result<Vec<_>> = paths.iter().map(|path| source(host, path)).collect();
    Ok(sources?.into_iter().flatten().collect())
}

pub(super) fn walk(host: &Host, folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for name in files::names(&host.at(folder))? {
        let path = folder.join(name);
        if host.at(&path).is_dir() {
            walk(host, &path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// containerd's main file and what it imports, directly or not (containerd-config.toml(5)); of k0s, what it makes of
/// the drop-ins and they themselves. The main file is as it is, or as it shall be.
pub(super) fn containerd_sources(host: &Host, site: &Site, edited: Option<&str>) -> Result<Vec<Source>> {
    let mut pending = vec![PathBuf::from(site.main)];
    if is_managed(host, site)? {
        pending.extend(matches(host, &Path::new(site.folders[0].path).join("*.toml"))?);
    }
    let mut sources: Vec<Source> = Vec::new();
    while let Some(path) = pending.pop() {
        if sources.iter().any(|source| source.path == path) {
            continue;
        }
        let edited = edited.filter(|_| path == Path::new(site.main));
        let source = match edited {
            Some(text) => Some(parsed(&path, text)?),
            None => source(host, &path)?,
        };
        let Some(source) = source else {
            continue;
        };
        for pattern in imports(&source) {
            pending.extend(matches(host, &pattern)?);
        }
        sources.push(source);
    }
    Ok(sources)
}

/// The patterns of a file's imports, absolute.
pub(super) fn imports(source: &Source) -> Vec<PathBuf> {
    let folder = source.path.parent().unwrap_or(Path::new("/"));
    let words = source.table.get("imports").and_then(Value::as_array);
    let words = words.into_iter().flatten().filter_map(Value::as_str);
    words.map(|word| cleaned(&folder.join(word))).collect()
}

/// A path without `.` and `..`, as containerd takes it: what is a link is not looked at.
fn cleaned(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(cleaned.pop()),
            _ => cleaned.push(part),
        }
    }
    cleaned
}

/// The files of a pattern whose last part may have stars.
fn matches(host: &Host, pattern: &Path) -> Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name()) else {
        return Ok(Vec::new());
    };
    let names = files::names(&host.at(folder))?.into_iter();
    let fits = names.filter(|found| fits(&name.to_string_lossy(), found));
    Ok(fits.map(|found| folder.join(found)).collect())
}

/// Whether a name fits a pattern with stars.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name
            .strip_prefix(head)
            .is_some_and(|rest| (0..=rest.len()).any(|at| rest.is_char_boundary(at) && fits(tail, &rest[at..]))),
    }
}

/// Whether one of the imports would read our drop-in.
fn covers(site: &Site, format: Format, sources: &[Source]) -> bool {
    let drop_in = Path::new(&*site.folder(format).handler.path);
    let own_name = drop_in.file_name().unwrap_or_default().to_string_lossy();
    let mut patterns = sources.iter().flat_map(imports);
    patterns.any(|pattern| {
        let name = pattern.file_name().unwrap_or_default().to_string_lossy();
        pattern.parent() == drop_in.parent() && fits(&name, &own_name)
    })
}

#[cfg(test)]
#[path = "merged_tests.rs"]
mod tests;
