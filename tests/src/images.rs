//! Container images without a registry: an OCI archive made of Debian packages.
//!
//! Two images share one archive, `images.tar`, an OCI image layout (image-spec, "OCI Image Layout"): [`PAUSE`], which only sleeps, and [`TEST`], with
//! busybox, coreutils, `inotifywait`, `setarch`, a web page under /www, and the users root and app (1000). It is the same byte for byte as long as
//! Debian's packages are, and cached by the hash of this recipe.

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

/// The image that stories run.
pub const TEST: &str = "docker.io/library/sandpod-test:latest";

/// The sandbox image, under the name that containerd is configured with.
pub const PAUSE: &str = "registry.k8s.io/pause:3.9";

/// What the web server in the test image answers to `GET /`.
pub const PAGE: &str = "hello from a pod\n";

/// Debian packages and what of them goes in: every path that starts with one of the prefixes.
const PACKAGES: &[(&str, &[&str])] = &[
    ("busybox-static", &["bin/busybox"]),
    ("coreutils", &["bin/", "usr/bin/", "usr/sbin/"]),
    ("inotify-tools", &["usr/bin/inotifywait"]),
    ("libinotifytools0", &["usr/lib/x86_64-linux-gnu/"]),
    ("util-linux", &["usr/bin/setarch"]),
    ("libacl1", &["usr/lib/x86_64-linux-gnu/"]),
    ("libattr1", &["usr/lib/x86_64-linux-gnu/"]),
    (
        "libc6",
        &["lib/x86_64-linux-gnu/ld-", "lib/x86_64-linux-gnu/libc.", "lib64/"],
    ),
    ("libgmp10", &["usr/lib/x86_64-linux-gnu/"]),
    ("libpcre2-8-0", &["usr/lib/x86_64-linux-gnu/"]),
    ("libselinux1", &["lib/x86_64-linux-gnu/"]),
];

/// Sleeps until told to end, and collects orphans: what a pause container is for.
const PAUSE_SCRIPT: &str = "trap 'exit 0' TERM INT; while :; do busybox sleep 2147483647 & wait $!; done";

const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
    ),
    ("etc/group", "root:x:0:\napp:x:1000:\nextra:x:2000:app\n"),
    ("www/index.html", PAGE),
];

/// Directories besides those that files bring along: path, mode, owner.
const FOLDERS: &[(&str, u32, u64)] = &[
    ("dev", 0o755, 0),
    ("home/app", 0o755, 1000),
    ("proc", 0o755, 0),
    ("root", 0o700, 0),
    ("run", 0o755, 0),
    ("sys", 0o755, 0),
    ("tmp", 0o1777, 0),
    ("var/tmp", 0o1777, 0),
];

/// Debian's merged /usr: old place, new place.
const MERGED: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
];

/// One thing in a layer.
enum Node {
    File { mode: u32, bytes: Vec<u8> },
    Link(String),
    Folder { mode: u32, owner: u64 },
}

type Tree = BTreeMap<String, Node>;

/// The archive's path; made now if it is not cached.
///
/// # Errors
/// When Debian's packages cannot be fetched or unpacked.
pub fn archive() -> Result<PathBuf> {
    let recipe = format!("{PACKAGES:?}{PAUSE_SCRIPT}{FILES:?}{FOLDERS:?}{MERGED:?}{TEST}{PAUSE} version 1");
    let folder = places::cache().join(format!("images-{}", &digest(recipe.as_bytes())[..16]));
    let archive = folder.join("images.tar");
    if archive.exists() {
        return Ok(archive);
    }
    fs::create_dir_all(&folder).trying(format!("making {}", folder.display()))?;
    let build = tempfile::tempdir_in(&folder).trying("making a build folder")?;
    let packages = fetch(build.path())?;
    let unfinished = build.path().join("images.tar");
    write_layout(
        &unfinished,
        &base_tree(&packages)?,
        &test_tree(&packages, build.path())?,
    )?;
    // Whoever is first wins, and both made the same.
    fs::rename(&unfinished, &archive).trying("putting the archive in its place")?;
    Ok(archive)
}

fn fetch(folder: &Path) -> Result<Vec<(&'static [&'static str], PathBuf)>> {
    let download = |deadline| {
        let mut command = Command::new("apt-get");
        command
            .current_dir(folder)
            .args(["--quiet", "download"])
            .args(PACKAGES.iter().map(|(name, _)| name));
        succeed(&mut command, deadline)
    };
    let patience = Duration::from_secs(300);
    if download(patience).is_err() {
        // A machine without package lists; any other reason shows again in the second try.
        succeed(Command::new("apt-get").args(["--quiet", "update"]), patience)?;
        download(patience)?;
    }
    let mut found = Vec::new();
    for (name, wanted) in PACKAGES {
        let prefix = format!("{name}_");
        let file = fs::read_dir(folder)
            .trying("reading the build folder")?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .ok_or_else(|| Failure::Missing {
                what: format!("package {name}"),
                remedy: "run `apt-get update`".into(),
            })?;
        found.push((*wanted, file.path()));
    }
    Ok(found)
}

fn base_tree(packages: &[(&[&str], PathBuf)]) -> Result<Tree> {
    let mut tree = Tree::new();
    for (old, new) in MERGED {
        tree.insert((*old).into(), Node::Link((*new).into()));
        tree.insert((*new).into(), Node::Folder { mode: 0o755, owner: 0 });
    }
    for (path, mode, owner) in FOLDERS {
        tree.insert(
            (*path).into(),
            Node::Folder {
                mode: *mode,
                owner: *owner,
            },
        );
    }
    let (wanted, package) = &packages[0];
    unpack(package, wanted, &mut tree)?;
    tree.insert("usr/bin/sh".into(), Node::Link("busybox".into()));
    Ok(tree)
}

fn test_tree(packages: &[(&[&str], PathBuf)], build: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    for (wanted, package) in &packages[1..] {
        unpack(package, wanted, &mut tree)?;
    }
    for applet in applets(&packages[0], build)? {
        tree.entry(format!("usr/bin/{applet}"))
            .or_insert_with(|| Node::Link("busybox".into()));
    }
    for (path, text) in FILES {
        tree.insert(
            (*path).into(),
            Node::File {
                mode: 0o644,
                bytes: text.as_bytes().to_vec(),
            },
        );
    }
    Ok(tree)
}

/// The names that busybox answers to, asked of the very program that goes in.
fn applets(busybox: &(&[&str], PathBuf), build: &Path) -> Result<Vec<String>> {
    let mut tree = Tree::new();
    unpack(&busybox.1, busybox.0, &mut tree)?;
    let program = build.join("busybox");
    if let Some(Node::File { bytes, .. }) = tree.get("usr/bin/busybox") {
        fs::write(&program, bytes).trying("writing busybox")?;
    }
    succeed(Command::new("chmod").arg("0755").arg(&program), run::ORDINARY)?;
    let list = succeed(Command::new(&program).arg("--list"), run::ORDINARY)?.text();
    Ok(list
        .lines()
        .filter(|name| *name != "busybox")
        .map(str::to_owned)
        .collect())
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
        let node = match entry.header().entry_type() {
            tar::EntryType::Regular => {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).trying(what())?;
                Node::File {
                    mode: entry.header().mode().trying(what())? & 0o7777,
                    bytes,
                }
            }
            tar::EntryType::Symlink => Node::Link(
                entry
                    .link_name()
                    .trying(what())?
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
            ),
            _ => continue,
        };
        tree.insert(merged(&path), node);
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

/// An OCI image layout with both images; their first layer is shared.
fn write_layout(path: &Path, base: &Tree, test: &Tree) -> Result {
    let mut blobs = BTreeMap::new();
    let layers = [layer(base)?, layer(test)?].map(|bytes| add_blob(&mut blobs, bytes));
    let pause = image(
        &mut blobs,
        &layers[..1],
        &["/bin/busybox", "sh", "-c", PAUSE_SCRIPT],
        PAUSE,
    );
    let shell = image(&mut blobs, &layers, &["/bin/sh"], TEST);
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [pause, shell] });
    let file = File::create(path).trying(format!("making {}", path.display()))?;
    let mut archive = tar::Builder::new(file);
    append(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut archive, "index.json", 0o644, index.to_string().as_bytes())?;
    for (digest, bytes) in &blobs {
        append(&mut archive, &format!("blobs/sha256/{digest}"), 0o644, bytes)?;
    }
    archive
        .into_inner()
        .and_then(|mut file| file.flush())
        .trying("writing the archive")
}

/// Adds configuration and manifest of an image, and returns the descriptor for the index.
fn image(blobs: &mut BTreeMap<String, Vec<u8>>, layers: &[Value], command: &[&str], name: &str) -> Value {
    let configuration = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": command, "Env": ["PATH=/usr/sbin:/usr/bin"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>() },
    });
    let mut configuration = add_blob(blobs, configuration.to_string().into_bytes());
    configuration["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": configuration,
        "layers": layers,
    });
    let mut manifest = add_blob(blobs, manifest.to_string().into_bytes());
    manifest["mediaType"] = json!("application/vnd.oci.image.manifest.v1+json");
    manifest["annotations"] = json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name });
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    manifest
}

fn add_blob(blobs: &mut BTreeMap<String, Vec<u8>>, bytes: Vec<u8>) -> Value {
    let digest = digest(&bytes);
    let descriptor = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": format!("sha256:{digest}"),
        "size": bytes.len(),
    });
    blobs.insert(digest, bytes);
    descriptor
}

fn layer(tree: &Tree) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, node) in tree {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_mode(0o777);
        let adding = format!("adding {path}");
        match node {
            Node::File { mode, bytes } => {
                header.set_mode(*mode);
                header.set_size(bytes.len() as u64);
                archive
                    .append_data(&mut header, path, bytes.as_slice())
                    .trying(adding)?;
            }
            Node::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                archive.append_link(&mut header, path, target).trying(adding)?;
            }
            Node::Folder { mode, owner } => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_uid(*owner);
                header.set_gid(*owner);
                archive
                    .append_data(&mut header, format!("{path}/"), std::io::empty())
                    .trying(adding)?;
            }
        }
    }
    archive.into_inner().trying("finishing a layer")
}

fn append(archive: &mut tar::Builder<File>, path: &str, mode: u32, bytes: &[u8]) -> Result {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_mode(mode);
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
        let tree = || Tree::from([("a".to_owned(), Node::Link("b".into()))]);
        assert_eq!(layer(&tree()).unwrap(), layer(&tree()).unwrap());
    }
}
