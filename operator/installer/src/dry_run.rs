//! What the CRI's own program says of a configuration before it is written: whether it would start with it, and whether
//! everything but our handlers would stay as it is.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use toml::{Table, Value};

use super::{
    cri::{Cri, Version},
    daemon::{Kind, Site},
    dropin::{self, DropIn},
    effective,
    error::{Context, InstallError, Result},
    files::{self, Host},
    merged::{Source, containerd_sources, imports, is_managed, parsed, walk},
    runtime_folder::RuntimeFolder,
};

/// Where a node has the programs of its administrator and of its packages, besides the PATH.
const PROGRAMS: &[&str] = &[
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Asks the CRI's own program whether it would start with these files, where the node has the program that is running.
/// What it is asked about lies in the installer's folder meanwhile.
///
/// # Errors
/// It says no.
pub fn validate(host: &Host, folder: &RuntimeFolder, cri: &Cri, ours: &[DropIn]) -> Result<()> {
    validate_with(host, folder, cri.daemon.site(), &cri.version, ours)
}

pub(super) fn validate_with(
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
        .filter(|path| !ours.iter().any(|file| Path::new(&*file.place.path) == **path));
    for path in others {
        if let Some(bytes) = files::read(&host.at(path))? {
            put(scratch, path.strip_prefix(folder).unwrap_or(path), &bytes)?;
        }
    }
    for file in ours.iter().filter(|file| file.place.of_cri) {
        let name = Path::new(&*file.place.path).file_name().unwrap_or_default();
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
    verdict(&mut command, "CRI-O's configuration with the handlers of Sandpod").map(drop)
}

/// A copy of the files that containerd reads, at their own paths below the folder, first without ours and then with it:
/// everything but our handlers has to be the same.
fn containerd_verdict(host: &Host, site: &'static Site, program: &Path, scratch: &Path, ours: &[DropIn]) -> Result<()> {
    const WITHOUT: &str = "containerd's configuration";
    const WITH: &str = "containerd's configuration with the handlers of Sandpod";
    let main = Path::new(site.main);
    let inside = |path: &Path| path.strip_prefix("/").unwrap_or(path).to_owned();
    let [without, with] = ["without", "with"].map(|name| scratch.join(name));
    let edited = ours.iter().find(|file| Path::new(&*file.place.path) == main);
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
        let is_ours = |path: &Path| path != main && ours.iter().any(|file| Path::new(&*file.place.path) == path);
        for source in sources.iter().filter(|source| !is_ours(&source.path)) {
            let more = if source.path == main { more } else { &[] };
            put(
                root,
                &inside(&source.path),
                moved(source, root, more).to_string().as_bytes(),
            )?;
        }
    }
    let texts = ours.iter().filter_map(|file| file.text.as_deref());
    let handlers = texts.flat_map(|text| dropin::handlers_of(site.kind, text)).collect();
    let mut drop_in = String::new();
    let drop_ins = ours
        .iter()
        .filter(|file| file.place.of_cri && Path::new(&*file.place.path) != main);
    for file in drop_ins {
        if let Some(text) = &file.text {
            drop_in = file.place.path.clone().into_owned();
            put(&with, &inside(Path::new(&drop_in)), text.as_bytes())?;
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
        effective::printed(&printed, &handlers).map_err(|why| InstallError::ConfigInvalid {
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
