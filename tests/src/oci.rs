//! Container images without a registry: file trees made of Debian packages, their layers, and an archive of images that
//! share layers.
//!
//! An archive is an OCI image layout (image-spec, "OCI Image Layout") in a tar file, which `ctr images import` reads.
//! It is the same byte for byte as long as Debian's packages are, and cached by the hash of its recipe.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    failure::{Failure, Result, Trying},
    places,
    run::{self, succeed},
};

/// A Debian package and what of it goes into a tree: every path that starts with one of the prefixes.
pub type Package = (&'static str, &'static [&'static str]);

/// Debian's merged /usr: old place, new place.
const MERGED: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
];

/// One thing in a tree.
#[derive(Debug)]
enum Entry {
    File { mode: u32, bytes: Vec<u8> },
    Symlink(String),
    HardLink(String),
    Folder { mode: u32, owner: u64 },
}

/// The files of one layer. Paths have no slash in front.
#[derive(Debug, Default)]
pub struct Tree(BTreeMap<String, Entry>);

impl Tree {
    /// A tree with Debian's merged /usr, for the lowest layer of an image.
    #[must_use]
    pub fn lowest() -> Self {
        let mut tree = Tree::default();
        for (old, new) in MERGED {
            tree.symlink(old, new);
            tree.folder(new, 0o755, 0);
        }
        tree
    }

    /// Adds a folder; `owner` is a user and the group of the same number.
    pub fn folder(&mut self, path: &str, mode: u32, owner: u64) {
        self.0.insert(path.into(), Entry::Folder { mode, owner });
    }

    /// Adds a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        self.0.insert(path.into(), Entry::File { mode, bytes });
    }

    /// Adds a symbolic link, unless there is something of that name.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let link = Entry::Symlink(target.into());
        self.0.entry(path.into()).or_insert(link);
    }

    /// Adds a further name of a file of this tree, unless there is something of that name.
    pub fn hard_link(&mut self, path: &str, target: &str) {
        let link = Entry::HardLink(target.into());
        self.0.entry(path.into()).or_insert(link);
    }

    /// Makes a file run as its owner, whoever starts it.
    pub fn set_user_id(&mut self, path: &str) {
        if let Some(Entry::File { mode, .. }) = self.0.get_mut(path) {
            *mode |= 0o4000;
        }
    }

    /// The names that the busybox of this tree answers to, asked of it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn applets(&self, build: &Path) -> Result<Vec<String>> {
        let program = build.join("busybox");
        if let Some(Entry::File { bytes, .. }) = self.0.get("usr/bin/busybox") {
            fs::write(&program, bytes).trying("writing busybox")?;
        }
        succeed(Command::new("chmod").arg("0755").arg(&program), run::ORDINARY)?;
        let list = succeed(Command::new(&program).arg("--list"), run::ORDINARY)?.text();
        let names = list.lines().filter(|name| *name != "busybox");
        Ok(names.map(str::to_owned).collect())
    }

    /// The layer as a tar file.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        // A hard link is made of what is there already.
        let (links, others): (Vec<_>, Vec<_>) = self
            .0
            .iter()
            .partition(|(_, entry)| matches!(entry, Entry::HardLink(_)));
        for (path, entry) in others.into_iter().chain(links) {
            append_entry(&mut archive, path, entry).trying(format!("adding {path}"))?;
        }
        archive.into_inner().trying("finishing a layer")
    }
}

fn append_entry(archive: &mut tar::Builder<Vec<u8>>, path: &str, entry: &Entry) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mode(0o777);
    match entry {
        Entry::File { mode, bytes } => {
            header.set_mode(*mode);
            header.set_size(bytes.len() as u64);
            archive.append_data(&mut header, path, bytes.as_slice())
        }
        Entry::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            archive.append_link(&mut header, path, target)
        }
        Entry::HardLink(target) => {
            header.set_entry_type(tar::EntryType::Link);
            archive.append_link(&mut header, path, target)
        }
        Entry::Folder { mode, owner } => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(*mode);
            header.set_uid(*owner);
            header.set_gid(*owner);
            archive.append_data(&mut header, format!("{path}/"), std::io::empty())
        }
    }
}

/// Debian packages, fetched into a folder.
#[derive(Debug)]
pub struct Packages(PathBuf);

impl Packages {
    /// Fetches packages into `folder`.
    ///
    /// # Errors
    /// What apt says.
    pub fn fetch<'a>(folder: &Path, packages: impl IntoIterator<Item = &'a Package>) -> Result<Self> {
        let names: Vec<_> = packages.into_iter().map(|(name, _)| *name).collect();
        let download = |deadline| {
            let mut command = Command::new("apt-get");
            command.current_dir(folder).args(["--quiet", "download"]).args(&names);
            succeed(&mut command, deadline)
        };
        let patience = Duration::from_secs(300);
        if download(patience).is_err() {
            // A machine without package lists; any other reason shows again in the second try.
            succeed(Command::new("apt-get").args(["--quiet", "update"]), patience)?;
            download(patience)?;
        }
        Ok(Packages(folder.to_path_buf()))
    }

    /// Adds what is wanted of these packages to a tree.
    ///
    /// # Errors
    /// When one was not fetched or is no package.
    pub fn unpack<'a>(&self, packages: impl IntoIterator<Item = &'a Package>, tree: &mut Tree) -> Result {
        for (name, wanted) in packages {
            let prefix = format!("{name}_");
            let file = fs::read_dir(&self.0)
                .trying("reading the build folder")?
                .flatten()
                .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
                .ok_or_else(|| Failure::Missing {
                    what: format!("package {name}"),
                    remedy: "run `apt-get update`".into(),
                })?;
            unpack(&file.path(), wanted, tree)?;
        }
        Ok(())
    }
}

fn unpack(package: &Path, wanted: &[&str], tree: &mut Tree) -> Result {
    let stream = succeed(
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package),
        run::ORDINARY,
    )?
    .stdout;
    let what = || format!("unpacking {}", package.display());
    for entry in tar::Archive::new(stream.as_slice()).entries().trying(what())? {
        let mut entry = entry.trying(what())?;
        let path = entry
            .path()
            .trying(what())?
            .to_string_lossy()
            .trim_start_matches("./")
            .to_owned();
        if path.ends_with('/') || !wanted.iter().any(|prefix| path.starts_with(prefix)) {
            continue;
        }
        let unpacked = match entry.header().entry_type() {
            tar::EntryType::Regular => {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).trying(what())?;
                let mode = entry.header().mode().trying(what())? & 0o7777;
                Entry::File { mode, bytes }
            }
            tar::EntryType::Symlink => {
                let target = entry.link_name().trying(what())?.unwrap_or_default();
                Entry::Symlink(target.to_string_lossy().into_owned())
            }
            _ => continue,
        };
        tree.0.insert(merged(&path), unpacked);
    }
    Ok(())
}

fn merged(path: &str) -> String {
    let moved = MERGED.iter().find_map(|(old, new)| {
        path.strip_prefix(old)
            .filter(|rest| rest.starts_with('/'))
            .map(|rest| format!("{new}{rest}"))
    });
    moved.unwrap_or_else(|| path.to_owned())
}

/// A layer of a layout: its descriptor.
#[derive(Debug, Clone)]
pub struct Layer(Value);

/// Images and everything they consist of.
#[derive(Debug, Default)]
pub struct Layout {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Value>,
}

impl Layout {
    /// Adds a layer.
    ///
    /// # Errors
    /// When a path is too long for a tar file.
    pub fn layer(&mut self, tree: &Tree) -> Result<Layer> {
        Ok(self.layer_of(tree.layer()?))
    }

    /// Adds a layer that somebody else made: a tar file without compression.
    pub fn layer_of(&mut self, archive: Vec<u8>) -> Layer {
        Layer(self.blob(archive, "layer.v1.tar"))
    }

    /// Adds an image: its name with registry and tag, its layers from the lowest up, the command it runs, and the user
    /// that runs it (empty: root).
    pub fn image(&mut self, name: &str, layers: &[&Layer], command: &[&str], user: &str) {
        let layers: Vec<_> = layers.iter().map(|layer| &layer.0).collect();
        let configuration = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": command, "Env": ["PATH=/usr/sbin:/usr/bin"], "User": user, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>() },
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(configuration.to_string().into_bytes(), "config.v1+json"),
            "layers": layers,
        });
        let mut manifest = self.blob(manifest.to_string().into_bytes(), "manifest.v1+json");
        manifest["annotations"] =
            json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name });
        manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        self.manifests.push(manifest);
    }

    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, bytes: Vec<u8>, kind: &str) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{digest}"),
            "size": bytes.len(),
        });
        self.blobs.insert(digest, bytes);
        descriptor
    }

    fn write(&self, path: &Path) -> Result {
        let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": self.manifests });
        let file = File::create(path).trying(format!("making {}", path.display()))?;
        let mut archive = tar::Builder::new(file);
        append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut archive, "index.json", index.to_string().as_bytes())?;
        for (digest, bytes) in &self.blobs {
            append(&mut archive, &format!("blobs/sha256/{digest}"), bytes)?;
        }
        archive
            .into_inner()
            .and_then(|mut file| file.flush())
            .trying("writing the archive")
    }
}

/// The archive of this recipe; made now, in a build folder that goes afterwards, if it is not cached.
///
/// # Errors
/// Those of `make`, or when it cannot be written.
pub fn archive(recipe: &str, make: impl FnOnce(&Path) -> Result<Layout>) -> Result<PathBuf> {
    let folder = places::cache().join(format!("images-{}", &digest(recipe.as_bytes())[..16]));
    let archive = folder.join("images.tar");
    if archive.exists() {
        return Ok(archive);
    }
    fs::create_dir_all(&folder).trying(format!("making {}", folder.display()))?;
    let build = tempfile::tempdir_in(&folder).trying("making a build folder")?;
    let unfinished = build.path().join("images.tar");
    make(build.path())?.write(&unfinished)?;
    // Whoever is first wins, and both made the same.
    fs::rename(&unfinished, &archive).trying("putting the archive in its place")?;
    Ok(archive)
}

fn append(archive: &mut tar::Builder<File>, path: &str, bytes: &[u8]) -> Result {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_mode(0o644);
    header.set_size(bytes.len() as u64);
    archive
        .append_data(&mut header, path, bytes)
        .trying(format!("adding {path}"))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_moves_under_usr_as_debian_merges_it() {
        assert_eq!(merged("bin/busybox"), "usr/bin/busybox");
        assert_eq!(merged("lib64/ld-linux-x86-64.so.2"), "usr/lib64/ld-linux-x86-64.so.2");
        assert_eq!(merged("binary"), "binary");
    }

    #[test]
    fn the_same_tree_gives_the_same_layer() {
        let layer = || {
            let mut tree = Tree::default();
            tree.symlink("a", "b");
            tree.layer().unwrap()
        };
        assert_eq!(layer(), layer());
    }

    #[test]
    fn a_hard_link_comes_after_its_file() {
        let mut tree = Tree::default();
        tree.hard_link("a", "b");
        tree.file("b", 0o755, "program");
        let layer = tree.layer().unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let paths: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(paths, ["b", "a"]);
    }
}
