//! The CRI's configuration as a whole: who defines a handler of our name, whether our drop-in is read, and whether the
//! CRI would start with it.

use std::{
    fs::{self, File},
    io::Write,
    path::{Component, Path, PathBuf},
    process::Command,
};

use toml::{Table, Value};

use super::{
    cri::{Cri, HANDLER, Version},
    daemon::{Author, Daemon, Kind, Site},
    dropin::{self, DropIn, Format, MARK},
    effective,
    error::{Context, InstallError, Result},
    files::{self, Host},
    runtime_folder::RuntimeFolder,
};

/// The first line of a configuration that k0s writes at each start, and that has all drop-ins then.
const MANAGED: &str = "# k0s_managed=true";

/// Where a node has the programs of its administrator and of its packages, besides the PATH.
const PROGRAMS: &[&str] = &[
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// A file of the CRI's configuration.
struct Source {
    /// As the node sees it.
    path: PathBuf,
    table: Table,
}

/// Refuses a node where somebody else has a handler of our name, or where the CRI would not read ours.
///
/// # Errors
/// The file that is in the way; a file that is no TOML; the line that containerd's configuration lacks.
pub fn refuse_foreign(host: &Host, daemon: Daemon, format: Format) -> Result<()> {
    let site = daemon.site();
    let ours = dropin::places(daemon);
    let sources = match site.kind {
        Kind::Crio => crio_sources(host, site)?,
        Kind::Containerd => containerd_sources(host, site, None)?,
    };
    // What a distribution has made of our drop-in is not somebody else's.
    let is_ours = |path: &Path| {
        ours.iter().any(|place| Path::new(place.path) == path)
            || site.merged.is_some_and(|merged| Path::new(merged) == path)
    };
    for source in sources.iter().filter(|source| !is_ours(&source.path)) {
        if defines_handler(site.kind, &source.table) {
            let path = source.path.clone();
            return Err(InstallError::ForeignHandler { path });
        }
    }
    for place in ours.iter().filter(|place| place.of_cri) {
        if let Some(text) = files::read_text(&host.at(place.path))?
            && !text.starts_with(MARK)
        {
            let path = place.path.into();
            let table = text.parse::<Table>().unwrap_or_default();
            return Err(match defines_handler(site.kind, &table) {
                true => InstallError::ForeignHandler { path },
                false => InstallError::ForeignFile { path },
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
fn is_managed(host: &Host, site: &Site) -> Result<bool> {
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

fn defines_handler(kind: Kind, table: &Table) -> bool {
    let runtimes = |section: &Value| {
        let runtimes = section.get("runtimes").and_then(Value::as_table);
        runtimes.is_some_and(|runtimes| runtimes.contains_key(HANDLER))
    };
    match kind {
        Kind::Crio => {
            let runtime = table.get("crio").and_then(|crio| crio.get("runtime"));
            runtime.is_some_and(runtimes)
        }
        // The plugin's name is another one in each version of the file.
        Kind::Containerd => {
            let plugins = table.get("plugins").and_then(Value::as_table);
            let mut plugins = plugins.into_iter().flat_map(Table::values);
            plugins.any(|plugin| plugin.get("containerd").is_some_and(runtimes))
        }
    }
}

fn source(host: &Host, path: &Path) -> Result<Option<Source>> {
    let text = files::read_text(&host.at(path))?;
    text.map(|text| parsed(path, &text)).transpose()
}

fn parsed(path: &Path, text: &str) -> Result<Source> {
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

fn walk(host: &Host, folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
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
fn containerd_sources(host: &Host, site: &Site, edited: Option<&str>) -> Result<Vec<Source>> {
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
fn imports(source: &Source) -> Vec<PathBuf> {
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
    let drop_in = Path::new(site.folder(format).handler.path);
    let own_name = drop_in.file_name().unwrap_or_default().to_string_lossy();
    let mut patterns = sources.iter().flat_map(imports);
    patterns.any(|pattern| {
        let name = pattern.file_name().unwrap_or_default().to_string_lossy();
        pattern.parent() == drop_in.parent() && fits(&name, &own_name)
    })
}

/// Asks the CRI's own program whether it would start with these files, where the node has the program that is running.
/// What it is asked about lies in the installer's folder meanwhile.
///
/// # Errors
/// It says no.
pub fn validate(host: &Host, folder: &RuntimeFolder, cri: &Cri, ours: &[DropIn]) -> Result<()> {
    validate_with(host, folder, cri.daemon.site(), &cri.version, ours)
}

fn validate_with(
    host: &Host,
    folder: &RuntimeFolder,
    site: &'static Site,
    version: &Version,
    ours: &[DropIn],
) -> Result<()> {
    let Some(program) = program_of(host, site, version) else {
        return Ok(());
    };
    // Not in a folder of the CRI's, where everything is read.
    let scratch = folder.scratch()?;
    let verdict = match site.kind {
        Kind::Crio => crio_verdict(host, site, &program, scratch.path(), ours),
        Kind::Containerd => containerd_verdict(host, site, &program, scratch.path(), ours),
    };
    scratch.close().at("remove a folder in", folder.path())?;
    verdict
}

fn program_of(host: &Host, site: &Site, version: &Version) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = site.programs.iter().map(PathBuf::from);
    let folders = own
        .chain(std::env::split_paths(&path))
        .chain(PROGRAMS.iter().map(PathBuf::from));
    let programs = folders.map(|folder| host.at(folder.join(site.kind.program())));
    // A node may have several; another version may not know a key that the running one has.
    let is_running = |program: &PathBuf| {
        let said = Command::new(program).arg("--version").output();
        said.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains(&version.text))
    };
    programs.filter(|program| program.is_file()).find(is_running)
}

/// A copy of the folder of drop-ins, with ours as they shall be.
fn crio_verdict(host: &Host, site: &Site, program: &Path, scratch: &Path, ours: &[DropIn]) -> Result<()> {
    let folder = Path::new(site.folders[0].path);
    let mut paths = Vec::new();
    walk(host, folder, &mut paths)?;
    let others = paths
        .iter()
        .filter(|path| !ours.iter().any(|file| Path::new(file.place.path) == **path));
    for path in others {
        if let Some(bytes) = files::read(&host.at(path))? {
            put(scratch, path.strip_prefix(folder).unwrap_or(path), &bytes)?;
        }
    }
    for file in ours.iter().filter(|file| file.place.of_cri) {
        let name = Path::new(file.place.path).file_name().unwrap_or_default();
        if let Some(text) = &file.text {
            put(scratch, Path::new(name), text.as_bytes())?;
        }
    }
    let main = host.at(site.main);
    let main = if main.exists() { main } else { "/dev/null".into() };
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(main)
        .arg("--config-dir")
        .arg(scratch)
        .arg("config");
    verdict(&mut command, "CRI-O's configuration with the handler `kata`").map(drop)
}

/// A copy of the files that containerd reads, at their own paths below the folder, first without ours and then with it:
/// everything but our handler has to be the same.
fn containerd_verdict(host: &Host, site: &'static Site, program: &Path, scratch: &Path, ours: &[DropIn]) -> Result<()> {
    const WITHOUT: &str = "containerd's configuration";
    const WITH: &str = "containerd's configuration with the handler `kata`";
    let main = Path::new(site.main);
    let inside = |path: &Path| path.strip_prefix("/").unwrap_or(path).to_owned();
    let [without, with] = ["without", "with"].map(|name| scratch.join(name));
    let edited = ours.iter().find(|file| Path::new(file.place.path) == main);
    let edited = edited.and_then(|file| file.text.as_deref());
    // What k0s will do with our drop-in, one import more does as well.
    let more = match is_managed(host, site)? {
        true => vec![Path::new(site.folders[0].path).join("*.toml")],
        false => Vec::new(),
    };
    for (root, edited, more) in [(&without, None, &[][..]), (&with, edited, &more)] {
        let mut sources = containerd_sources(host, site, edited)?;
        if !sources.iter().any(|source| source.path == main) {
            // As good as none, and a program can be told of it.
            sources.push(parsed(main, "version = 3\n")?);
        }
        let is_ours = |path: &Path| path != main && ours.iter().any(|file| Path::new(file.place.path) == path);
        for source in sources.iter().filter(|source| !is_ours(&source.path)) {
            let more = if source.path == main { more } else { &[] };
            put(
                root,
                &inside(&source.path),
                moved(source, root, more).to_string().as_bytes(),
            )?;
        }
    }
    let mut drop_in = "";
    let drop_ins = ours
        .iter()
        .filter(|file| file.place.of_cri && Path::new(file.place.path) != main);
    for file in drop_ins {
        if let Some(text) = &file.text {
            drop_in = file.place.path;
            put(&with, &inside(Path::new(drop_in)), text.as_bytes())?;
        }
    }
    let dump = |root: &Path, what: &str| {
        let mut command = Command::new(program);
        let printed = verdict(
            command
                .arg("--config")
                .arg(root.join(inside(main)))
                .args(["config", "dump"]),
            what,
        )?;
        effective::printed(&printed).map_err(|why| InstallError::ConfigInvalid {
            what: format!("what `containerd config dump` prints of {what}"),
            why,
        })
    };
    let (without, with) = (dump(&without, WITHOUT)?, dump(&with, WITH)?);
    effective::difference(&without, &with).map_or(Ok(()), |path| {
        Err(InstallError::WouldDiffer {
            cri: site.name,
            path,
            drop_in,
            cure: match edited {
                Some(_) => "move the other files away from its folder, which are not read so far,".to_owned(),
                None => format!("give every file that {0} imports the `version` that {0} has", site.main),
            },
        })
    })
}

/// A file as it is below another root, with some imports more: what it imports is there, too.
fn moved(source: &Source, root: &Path, more: &[PathBuf]) -> Table {
    let mut table = source.table.clone();
    if table.contains_key("imports") || !more.is_empty() {
        let paths = imports(source).into_iter().chain(more.to_vec());
        let paths = paths.map(|path| root.join(path.strip_prefix("/").unwrap_or(&path)).display().to_string());
        table.insert("imports".into(), Value::Array(paths.map(Value::from).collect()));
    }
    table
}

fn put(scratch: &Path, name: &Path, bytes: &[u8]) -> Result<()> {
    let place = scratch.join(name);
    let folder = place.parent().unwrap_or(scratch);
    fs::create_dir_all(folder).at("create", folder)?;
    let mut file = File::create_new(&place).at("create", &place)?;
    file.write_all(bytes).at("write", &place)
}

/// What the CRI's program prints.
fn verdict(command: &mut Command, what: &str) -> Result<String> {
    let output = command.output().at("start", command.get_program())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(InstallError::ConfigInvalid {
        what: what.to_owned(),
        why: said.lines().last().unwrap_or("its program does not say why").to_owned(),
    })
}

#[cfg(test)]
#[path = "merged_tests.rs"]
mod tests;
