//! The versions below the prefix: staged, made current, looked at, swept.
//!
//! A version's folder is complete from the moment that it has its name, and its files never change: a shim that runs
//! from it, and its QEMU, find everything of their version until they end.

use std::{
    fs::{self, DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use super::{
    dropin::{CONFIG_FOLDER, at_prefix},
    elf,
    error::{Context, InstallError, Result},
    files::{self, SCRATCH},
    lock::{LOCK, Unused},
    payload::{Entry, MANIFEST, Manifest, Payload},
    selinux,
    state::Layout,
};

/// The payload's own loader of libraries, below a version's folder.
const INTERPRETER: &str = "lib/ld-linux-x86-64.so.2";
/// The payload's own libraries.
const LIBRARIES: &str = "lib";
/// Who may open a file may lock it, and so keep a version from being removed and pods from being started with it.
const LOCK_MODE: u32 = 0o600;
/// The link to the administrator's drop-ins, beside the version's configuration.
const CONFIG_LINK: &str = "config.d";

/// Copies a payload into a folder that nobody looks at yet, and brings it to the disk. Returns a warning about its
/// labels.
///
/// # Errors
/// The payload is damaged, the disk is full, a label is refused.
pub fn stage(layout: &Layout, payload: &Payload, selinux: selinux::Mode) -> Result<Option<String>> {
    let folder = staging(layout, &payload.name);
    files::remove_tree(&folder)?;
    let make = |folder: &Path| {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .at("create", folder)
    };
    make(&folder)?;
    for inside in payload.manifest.folders() {
        make(&folder.join(inside))?;
    }
    let mut installed = Manifest {
        version: payload.manifest.version.clone(),
        entries: Vec::new(),
    };
    let home = layout.prefix.join("versions").join(&payload.name);
    for entry in &payload.manifest.entries {
        let bytes = relocate(entry, payload.file(entry)?, layout, &home)?;
        files::write(&folder.join(&entry.path), &bytes, entry.mode)?;
        installed.entries.push(Entry {
            bytes: bytes.len() as u64,
            sha256: files::sha256(&bytes),
            ..entry.clone()
        });
    }
    files::write(&folder.join(MANIFEST), installed.render().as_bytes(), 0o644)?;
    files::write(&folder.join(LOCK), b"", LOCK_MODE)?;
    symlink(CONFIG_FOLDER, folder.join(CONFIG_LINK)).at("create the link", folder.join(CONFIG_LINK))?;
    let folders = payload.manifest.folders();
    let files_too = installed.entries.iter().map(|entry| entry.path.clone());
    let files_too = files_too.chain([MANIFEST.into(), LOCK.into()]);
    let all: Vec<_> = [PathBuf::new()]
        .into_iter()
        .chain(folders.clone())
        .chain(files_too)
        .collect();
    let warning = selinux::relabel(selinux, &folder, &all)?;
    for inside in folders.iter().rev() {
        files::sync_folder(&folder.join(inside))?;
    }
    files::sync_folder(&folder)?;
    Ok(warning)
}

/// What depends on where it is installed: the configuration's paths, and where a program's interpreter and libraries
/// are.
fn relocate(entry: &Entry, mut bytes: Vec<u8>, layout: &Layout, home: &Path) -> Result<Vec<u8>> {
    if entry.path == Path::new("configuration.toml") {
        let text = at_prefix(&String::from_utf8_lossy(&bytes), &layout.prefix);
        return Ok(text.into_bytes());
    }
    elf::set_path(&mut bytes, elf::INTERPRETER, &home.join(INTERPRETER))?;
    elf::set_path(&mut bytes, elf::LIBRARIES, &home.join(LIBRARIES))?;
    Ok(bytes)
}

/// Gives a staged version its name.
///
/// # Errors
/// The kernel's.
pub fn seal(layout: &Layout, name: &str) -> Result<()> {
    let (from, to) = (staging(layout, name), layout.versions().join(name));
    // A damaged one of the same name makes room; a shim that runs from it keeps what it has open.
    if to.exists() {
        discard(layout, name)?;
    }
    fs::rename(&from, &to).at("move a folder to", &to)?;
    files::sync_folder(&layout.versions())
}

fn staging(layout: &Layout, name: &str) -> PathBuf {
    layout.versions().join(format!(".{name}{SCRATCH}"))
}

/// Makes a version the current one, or none.
///
/// # Errors
/// The kernel's.
pub fn make_current(layout: &Layout, name: Option<&str>) -> Result<()> {
    match name {
        Some(name) => files::relink(&layout.current(), &Path::new("versions").join(name)),
        None => files::remove(&layout.current()).map(drop),
    }
}

/// Compares a version with its manifest.
///
/// # Errors
/// The first file that is not as it was installed.
pub fn inspect(layout: &Layout, name: &str) -> Result<()> {
    let folder = layout.versions().join(name);
    let damaged = |path: &Path, how| InstallError::Damaged {
        path: layout.host.name(&folder.join(path)),
        how,
    };
    let manifest = manifest(&folder)?.ok_or_else(|| damaged(Path::new(MANIFEST), "is not there"))?;
    for entry in &manifest.entries {
        let path = folder.join(&entry.path);
        let bytes = files::read(&path)?.ok_or_else(|| damaged(&entry.path, "is not there"))?;
        if files::sha256(&bytes) != entry.sha256 {
            return Err(damaged(&entry.path, "is not what was installed"));
        }
        let mode = fs::metadata(&path).at("look at", &path)?.permissions().mode();
        if mode & 0o777 != entry.mode {
            return Err(damaged(&entry.path, "has not the mode that it was installed with"));
        }
    }
    if !folder.join(LOCK).exists() {
        return Err(damaged(Path::new(LOCK), "is not there"));
    }
    if fs::symlink_metadata(folder.join(CONFIG_LINK)).is_err() {
        return Err(damaged(Path::new(CONFIG_LINK), "is not there"));
    }
    Ok(())
}

fn manifest(folder: &Path) -> Result<Option<Manifest>> {
    let text = files::read_text(&folder.join(MANIFEST))?;
    text.map(|text| Manifest::parse(&text)).transpose()
}

/// The names of all versions.
///
/// # Errors
/// The kernel's.
pub fn all(layout: &Layout) -> Result<Vec<String>> {
    let names = files::names(&layout.versions())?;
    Ok(names.into_iter().filter(|name| !name.starts_with('.')).collect())
}

/// Takes the locks of versions that an earlier installer has left open to every user away from them. Whether there were
/// any.
///
/// # Errors
/// The kernel's.
pub fn protect_locks(layout: &Layout) -> Result<bool> {
    let mut changed = false;
    for name in files::names(&layout.versions())? {
        let path = layout.versions().join(name).join(LOCK);
        let mode = match fs::symlink_metadata(&path) {
            Ok(found) => found.permissions().mode() & 0o7777,
            Err(error) if files::is_absent(&error) => continue,
            Err(error) => return Err(error).at("look at", &path),
        };
        if mode != LOCK_MODE {
            fs::set_permissions(&path, Permissions::from_mode(LOCK_MODE)).at("set the mode of", &path)?;
            changed = true;
        }
    }
    Ok(changed)
}

/// The first version that a shim runs from.
///
/// # Errors
/// The kernel's.
pub fn in_use(layout: &Layout) -> Result<Option<String>> {
    for name in all(layout)? {
        if Unused::prove(&layout.versions().join(&name))?.is_none() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Removes what a run that was killed left, and versions that are neither to be kept nor in use. Whether there were
/// any.
///
/// # Errors
/// The kernel's.
pub fn sweep(layout: &Layout, keep: &[&str]) -> Result<bool> {
    let mut swept = false;
    for name in all(layout)?.iter().filter(|name| !keep.contains(&name.as_str())) {
        let unused = Unused::prove(&layout.versions().join(name))?;
        if unused.is_some() {
            discard(layout, name)?;
            swept = true;
        }
    }
    let names = files::names(&layout.versions())?;
    for name in names
        .iter()
        .filter(|name| name.starts_with('.') && name.ends_with(SCRATCH))
    {
        let folder = layout.versions().join(name);
        // A damaged version makes room for its successor while a shim still runs from it.
        if Unused::prove(&folder)?.is_some() {
            swept |= files::remove_tree(&folder)?;
        }
    }
    Ok(swept)
}

/// Takes a version's name away, in one step; its files go with the next sweep.
fn discard(layout: &Layout, name: &str) -> Result<()> {
    let from = layout.versions().join(name);
    for number in 0.. {
        let to = layout.versions().join(format!(".{name}.{number}{SCRATCH}"));
        if !to.exists() {
            return fs::rename(&from, &to).at("move a folder to", &to);
        }
    }
    Ok(())
}

/// Removes a version: what its manifest names, and what the installer made besides. Whatever else somebody has put
/// there stays, and is returned as a warning. Where the manifest is damaged nobody can tell the two apart, and all of
/// it goes with the next sweep, which is a warning too.
///
/// # Errors
/// The kernel's.
pub fn remove(layout: &Layout, name: &str) -> Result<Option<String>> {
    let folder = layout.versions().join(name);
    let manifest = match manifest(&folder) {
        Ok(manifest) => manifest.unwrap_or(Manifest {
            version: String::new(),
            entries: Vec::new(),
        }),
        Err(InstallError::Payload(why)) => {
            discard(layout, name)?;
            let folder = layout.host.name(&folder);
            return Ok(Some(format!("{} goes with all that is in it: {why}", folder.display())));
        }
        Err(error) => return Err(error),
    };
    for entry in &manifest.entries {
        files::remove(&folder.join(&entry.path))?;
    }
    for inside in manifest.folders().iter().rev() {
        files::remove_empty(&folder.join(inside))?;
    }
    for ours in [CONFIG_LINK, LOCK] {
        files::remove(&folder.join(ours))?;
    }
    // The manifest last: a run that is killed before goes on from it.
    if files::names(&folder)?.iter().any(|name| name != MANIFEST) {
        return Ok(Some(format!(
            "{} holds files that were not installed; they stay",
            layout.host.name(&folder).display()
        )));
    }
    files::remove(&folder.join(MANIFEST))?;
    files::remove_empty(&folder)?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{files::Host, payload::tests::payload};

    struct Place {
        _root: tempfile::TempDir,
        layout: Layout,
        source: tempfile::TempDir,
    }

    fn place(prefix: &str) -> Place {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout {
            host: Host::new(root.path()),
            prefix: prefix.into(),
        };
        layout.load_or_make().unwrap();
        Place {
            layout,
            _root: root,
            source: tempfile::tempdir().unwrap(),
        }
    }

    impl Place {
        fn install(&self, version: &str) -> String {
            let files: &[(&str, &[u8])] = &[
                ("bin/shim", b"shim"),
                ("configuration.toml", b"kernel = \"/opt/sandpod/current/vmlinux\"\n"),
            ];
            let payload = payload(self.source.path(), version, files);
            stage(&self.layout, &payload, selinux::Mode::Off).unwrap();
            seal(&self.layout, &payload.name).unwrap();
            payload.name
        }

        fn all(&self) -> Vec<String> {
            all(&self.layout).unwrap()
        }
    }

    #[test]
    fn a_version_is_complete_and_at_home_where_it_is_installed() {
        let place = place("/var/lib/sandpod");
        let name = place.install("1");
        inspect(&place.layout, &name).unwrap();
        make_current(&place.layout, Some(&name)).unwrap();
        assert_eq!(place.layout.current_version(), Some(name));
        let text = fs::read_to_string(place.layout.current().join("configuration.toml")).unwrap();
        assert_eq!(text, "kernel = \"/var/lib/sandpod/current/vmlinux\"\n");
        let link = fs::read_link(place.layout.current().join("config.d")).unwrap();
        assert_eq!(link, Path::new("/etc/sandpod/config.d"));
        let mode = fs::metadata(place.layout.current().join("bin/shim"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn damage_is_found_and_repaired() {
        let place = place("/opt/sandpod");
        let name = place.install("1");
        let shim = place.layout.versions().join(&name).join("bin/shim");
        fs::write(&shim, "shem").unwrap();
        let error = inspect(&place.layout, &name).unwrap_err().to_string();
        let path = format!("/opt/sandpod/versions/{name}/bin/shim");
        assert_eq!(error, format!("{path} is not what was installed: install again"));
        place.install("1");
        inspect(&place.layout, &name).unwrap();
        assert!(sweep(&place.layout, &[&name]).unwrap());
        assert_eq!(files::names(&place.layout.versions()).unwrap(), [name]);
    }

    #[test]
    fn a_version_that_a_shim_runs_from_is_not_swept() {
        let place = place("/opt/sandpod");
        let (old, new) = (place.install("1"), place.install("2"));
        let shim = fs::File::open(place.layout.versions().join(&old).join(LOCK)).unwrap();
        shim.lock_shared().unwrap();
        assert_eq!(in_use(&place.layout).unwrap(), Some(old.clone()));
        assert!(!sweep(&place.layout, &[&new]).unwrap());
        assert_eq!(place.all(), [old, new.clone()]);
        drop(shim);
        assert!(sweep(&place.layout, &[&new]).unwrap());
        assert_eq!(place.all(), [new]);
    }

    #[test]
    fn nobody_but_root_can_lock_a_version() {
        let place = place("/opt/sandpod");
        let locks = [place.install("1"), place.install("2")].map(|name| place.layout.versions().join(name).join(LOCK));
        let modes = || {
            locks
                .clone()
                .map(|lock| fs::metadata(lock).unwrap().permissions().mode() & 0o777)
        };
        assert_eq!(modes(), [0o600, 0o600]);
        assert!(!protect_locks(&place.layout).unwrap());
        // As an earlier installer has left it.
        fs::set_permissions(&locks[0], Permissions::from_mode(0o644)).unwrap();
        assert!(protect_locks(&place.layout).unwrap());
        assert_eq!(modes(), [0o600, 0o600]);
    }

    #[test]
    fn what_somebody_else_has_put_into_a_version_stays() {
        let place = place("/opt/sandpod");
        let (one, two) = (place.install("1"), place.install("2"));
        fs::write(place.layout.versions().join(&one).join("notes"), "mine").unwrap();
        let warning = remove(&place.layout, &one).unwrap().unwrap();
        assert_eq!(
            warning,
            format!("/opt/sandpod/versions/{one} holds files that were not installed; they stay")
        );
        assert_eq!(remove(&place.layout, &two).unwrap(), None);
        assert_eq!(place.all(), [one]);
    }

    #[test]
    fn a_version_whose_manifest_is_damaged_goes_too() {
        let place = place("/opt/sandpod");
        let name = place.install("1");
        fs::write(place.layout.versions().join(&name).join(MANIFEST), "sandpod 1\n755 3\n").unwrap();
        let warning = remove(&place.layout, &name).unwrap().unwrap();
        assert_eq!(
            warning,
            format!("/opt/sandpod/versions/{name} goes with all that is in it: its manifest has the line \"755 3\"")
        );
        assert!(place.all().is_empty());
        assert!(sweep(&place.layout, &[]).unwrap());
        assert!(files::names(&place.layout.versions()).unwrap().is_empty());
    }
}
