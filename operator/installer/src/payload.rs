//! What the installer carries: files, and the manifest that names each of them.
//!
//! The manifest is text. Its first line is `sandpod <version>`, each further line `<mode, octal> <bytes> <sha256>
//! <path>`, with paths relative to its folder. `deploy/payload.sh` writes it.

use std::{
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
};

use super::{
    error::{Context, InstallError, Result},
    files::{is_inside, sha256},
};

/// The manifest's own name, in a payload and in an installed version.
pub const MANIFEST: &str = "MANIFEST";
/// Names that the installer itself makes in a version's folder.
const RESERVED: &[&str] = &[MANIFEST, ".lock", "config.d"];

/// One file of a payload or of an installed version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Permission bits.
    pub mode: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// The SHA-256 of its contents, hexadecimal.
    pub sha256: String,
    /// Below the folder of the manifest.
    pub path: PathBuf,
}

/// All files of a payload or of an installed version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Such as `0.1.0`.
    pub version: String,
    /// In the manifest's order.
    pub entries: Vec<Entry>,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// A line that is none of a manifest, a path that leaves the folder or that the installer makes itself.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let version = lines.next().and_then(|line| line.strip_prefix("sandpod "));
        let version = version
            .filter(|version| is_name(version))
            .ok_or_else(|| broken("the first line of its manifest is not `sandpod <version>`".into()))?;
        let entries: Result<Vec<_>> = lines.map(entry).collect();
        Ok(Self {
            version: version.to_owned(),
            entries: entries?,
        })
    }

    /// The text of this manifest.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("sandpod {}\n", self.version);
        for entry in &self.entries {
            let path = entry.path.display();
            text += &format!("{:o} {} {} {path}\n", entry.mode, entry.bytes, entry.sha256);
        }
        text
    }

    /// What all files need, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Whether it has a file of this path.
    #[must_use]
    pub fn has(&self, path: &str) -> bool {
        self.entries.iter().any(|entry| entry.path == Path::new(path))
    }

    /// The folders that its files are in, each before those inside it.
    #[must_use]
    pub fn folders(&self) -> Vec<PathBuf> {
        let parents = self.entries.iter().flat_map(|entry| entry.path.ancestors().skip(1));
        let mut folders: Vec<_> = parents
            .filter(|folder| !folder.as_os_str().is_empty())
            .map(Path::to_owned)
            .collect();
        folders.sort();
        folders.dedup();
        folders
    }
}

/// A version is part of a folder's name, so nothing but a plain one is taken.
fn is_name(version: &str) -> bool {
    let plain = |letter: u8| letter.is_ascii_alphanumeric() || b"._-".contains(&letter);
    (1..=128).contains(&version.len()) && !version.starts_with('.') && version.bytes().all(plain)
}

fn entry(line: &str) -> Result<Entry> {
    let read = || {
        let words: Vec<_> = line.split(' ').collect();
        let [mode, bytes, sha256, path] = words[..] else {
            return None;
        };
        let entry = Entry {
            mode: u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777)?,
            bytes: bytes.parse().ok()?,
            sha256: sha256.to_owned(),
            path: path.into(),
        };
        (is_inside(&entry.path) && !RESERVED.iter().any(|name| entry.path.starts_with(name))).then_some(entry)
    };
    read().ok_or_else(|| broken(format!("its manifest has the line {line:?}")))
}

fn broken(why: String) -> InstallError {
    InstallError::Payload(why)
}

/// A payload that is open: it can be read after this process has taken the node's root for its own.
#[derive(Debug)]
pub struct Payload {
    folder: OwnedFd,
    /// Its files.
    pub manifest: Manifest,
    /// The name of the folder that it is installed in: the version and the first 8 digits of the manifest's hash.
    pub name: String,
}

impl Payload {
    /// Opens the payload in a folder and reads its manifest.
    ///
    /// # Errors
    /// There is none, or it is not readable.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(path, flags, Mode::empty()).at("open", path)?;
        let mut payload = Self {
            folder,
            manifest: Manifest {
                version: String::new(),
                entries: Vec::new(),
            },
            name: String::new(),
        };
        let text = payload.contents(Path::new(MANIFEST))?;
        payload.manifest = Manifest::parse(&String::from_utf8_lossy(&text))?;
        payload.name = format!("{}-{}", payload.manifest.version, &sha256(&text)[..8]);
        Ok(payload)
    }

    /// The contents of a file that the manifest names, as the manifest says they are.
    ///
    /// # Errors
    /// They are not, or cannot be read.
    pub fn file(&self, entry: &Entry) -> Result<Vec<u8>> {
        let bytes = self.contents(&entry.path)?;
        if sha256(&bytes) != entry.sha256 {
            let path = entry.path.display();
            return Err(broken(format!("the contents of {path} are not those of its manifest")));
        }
        Ok(bytes)
    }

    /// The text of a file that the manifest names, if it does.
    ///
    /// # Errors
    /// Those of [`Payload::file`].
    pub fn text(&self, path: &str) -> Result<Option<String>> {
        let named = self.manifest.entries.iter().find(|entry| entry.path == Path::new(path));
        named
            .map(|entry| Ok(String::from_utf8_lossy(&self.file(entry)?).into_owned()))
            .transpose()
    }

    fn contents(&self, path: &Path) -> Result<Vec<u8>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let missing = |error| broken(format!("{} cannot be read: {error}", path.display()));
        let file = openat(&self.folder, path, flags, Mode::empty()).map_err(|error| missing(error.into()))?;
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes).map_err(missing)?;
        Ok(bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    /// Writes a payload with these files; those in `bin` are programs.
    pub(in super::super) fn payload(folder: &Path, version: &str, files: &[(&str, &[u8])]) -> Payload {
        let entry = |(path, bytes): &(&str, &[u8])| {
            let place = folder.join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(&place, bytes).unwrap();
            let mode = if path.starts_with("bin/") { 0o755 } else { 0o644 };
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
            Entry {
                mode,
                bytes: bytes.len() as u64,
                sha256: sha256(bytes),
                path: path.into(),
            }
        };
        let manifest = Manifest {
            version: version.into(),
            entries: files.iter().map(entry).collect(),
        };
        fs::write(folder.join(MANIFEST), manifest.render()).unwrap();
        Payload::open(folder).unwrap()
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let text = "sandpod 0.1.0\n755 3 aa bin/shim\n644 40 bb share/qemu/bios.bin\n";
        let manifest = Manifest::parse(text).unwrap();
        assert_eq!(manifest.render(), text);
        assert_eq!(manifest.bytes(), 43);
        assert!(manifest.has("bin/shim"));
        assert_eq!(manifest.folders(), ["bin", "share", "share/qemu"].map(PathBuf::from));
    }

    #[test]
    fn a_manifest_cannot_write_elsewhere() {
        for line in [
            "755 3 aa ../shim",
            "755 3 aa /bin/shim",
            "755 3 aa .lock",
            "755 3 aa config.d/x.toml",
            "4755 3 aa bin/shim",
            "755 3 bin/shim",
        ] {
            let error = Manifest::parse(&format!("sandpod 1\n{line}\n")).unwrap_err();
            assert!(error.to_string().contains(line), "{error}");
        }
        assert!(Manifest::parse("sandpod ../1\n").is_err());
    }

    #[test]
    fn a_payload_is_named_by_its_version_and_contents_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let payload = payload(folder.path(), "0.1.0", &[("bin/shim", b"one"), ("vmlinux", b"kernel")]);
        assert!(
            payload.name.starts_with("0.1.0-") && payload.name.len() == 14,
            "{}",
            payload.name
        );
        assert_eq!(payload.text("vmlinux").unwrap().unwrap(), "kernel");
        fs::write(folder.path().join("vmlinux"), "karnel").unwrap();
        let error = payload.text("vmlinux").unwrap_err().to_string();
        assert_eq!(
            error,
            "the payload is not usable: the contents of vmlinux are not those of its manifest"
        );
        fs::remove_file(folder.path().join("vmlinux")).unwrap();
        assert!(payload.text("vmlinux").is_err());
    }
}
