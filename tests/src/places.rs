//! Where the things under test and their peers are: environment variables set by the Makefile, else the conventional
//! places.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::failure::{Failure, Result};

/// Where expensive things are cached: `$SANDPOD_CACHE`, else `/var/cache/sandpod`.
#[must_use]
pub fn cache() -> PathBuf {
    env::var_os("SANDPOD_CACHE").map_or_else(|| PathBuf::from("/var/cache/sandpod"), PathBuf::from)
}

/// The folder with `containerd-shim-kata-v2`: `$SANDPOD_BIN`, else the release build's.
///
/// # Errors
/// When the shim has not been built.
pub fn binaries() -> Result<PathBuf> {
    let folder = env::var_os("SANDPOD_BIN").map_or_else(
        || workspace().join("target/x86_64-unknown-linux-gnu/release"),
        PathBuf::from,
    );
    holding(folder, "containerd-shim-kata-v2", "cargo build --release --workspace")
}

/// A test program of this workspace, the one that was linked last.
///
/// # Errors
/// When it has not been built.
pub fn test_program(name: &str) -> Result<PathBuf> {
    let remedy = "cargo build --release --workspace --bins --tests";
    let folder = binaries()?.join("deps");
    let is_it = |file: &str| {
        let hash = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        hash.is_some_and(|hash| !hash.is_empty() && hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
    };
    let programs = folder.read_dir().into_iter().flatten().flatten();
    programs
        .filter(|entry| is_it(&entry.file_name().to_string_lossy()))
        .max_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok())
        .map(|entry| entry.path())
        .ok_or_else(|| missing(&folder.join(format!("{name}-*")), remedy))
}

/// The folder with `vmlinux` and `initrd` of a guest: `$SANDPOD_GUEST_OWN` or `$SANDPOD_GUEST_DEBIAN`, else
/// `target/guest/<name>`.
///
/// # Errors
/// When that image has not been built.
pub fn guest(name: &str) -> Result<PathBuf> {
    let variable = format!("SANDPOD_GUEST_{}", name.to_uppercase());
    let folder = env::var_os(variable).map_or_else(|| workspace().join("target/guest").join(name), PathBuf::from);
    let folder = holding(folder, "vmlinux", "make guest")?;
    holding(folder, "initrd", "make guest")
}

/// The virtiofsd program: `$SANDPOD_VIRTIOFSD`, else the cached one.
///
/// # Errors
/// When it has not been built.
pub fn virtiofsd() -> Result<PathBuf> {
    match env::var_os("SANDPOD_VIRTIOFSD") {
        Some(path) => exists(PathBuf::from(path), "make virtiofsd"),
        None => newest("virtiofsd-", "bin/virtiofsd", "make virtiofsd"),
    }
}

/// The payload of the installer: `$SANDPOD_PAYLOAD`, else `target/payload`.
///
/// # Errors
/// When it has not been made.
pub fn payload() -> Result<PathBuf> {
    let folder = env::var_os("SANDPOD_PAYLOAD").map_or_else(|| workspace().join("target/payload"), PathBuf::from);
    holding(folder, "MANIFEST", "make payload")
}

/// The folder with containerd 2.4, its runc shim, ctr and crictl: `$SANDPOD_PEERS`, else the cached one.
///
/// # Errors
/// When they have not been built.
pub fn peers() -> Result<PathBuf> {
    match env::var_os("SANDPOD_PEERS") {
        Some(path) => holding(PathBuf::from(path), "crictl", "make peers"),
        None => {
            let crictl = newest("peers-", "bin/crictl", "make peers")?;
            Ok(crictl.parent().map(Path::to_path_buf).unwrap_or_default())
        }
    }
}

/// The folder with another version of containerd, such as `2.2`, its runc shim and ctr, which lies beside the one of the
/// other peers.
///
/// # Errors
/// When they have not been built.
pub fn containerd(version: &str) -> Result<PathBuf> {
    holding(
        peers()?.with_file_name(format!("containerd-{version}")).join("bin"),
        "containerd",
        "make peers",
    )
}

/// The folder with the disk and kernel of an emulated node: `$SANDPOD_NODE_IMAGE`, else the newest cached one.
///
/// # Errors
/// When it has not been made.
pub fn node_image() -> Result<PathBuf> {
    match env::var_os("SANDPOD_NODE_IMAGE") {
        Some(path) => holding(PathBuf::from(path), "root.img", "make node-image"),
        None => {
            let disk = newest("node-", "root.img", "make node-image")?;
            Ok(disk.parent().map(Path::to_path_buf).unwrap_or_default())
        }
    }
}

/// The folder with the operator's container images: `$SANDPOD_IMAGES`, else `target/images`.
///
/// # Errors
/// When they have not been made.
pub fn operator_images() -> Result<PathBuf> {
    let folder = env::var_os("SANDPOD_IMAGES").map_or_else(|| workspace().join("target/images"), PathBuf::from);
    holding(folder, "installer.tar", "make images")
}

/// What a publisher publishes: `$SANDPOD_RELEASE`, else `target/release-<version>`.
///
/// # Errors
/// When it has not been made.
pub fn release() -> Result<PathBuf> {
    let made = || workspace().join(concat!("target/release-", env!("CARGO_PKG_VERSION")));
    let folder = env::var_os("SANDPOD_RELEASE").map_or_else(made, PathBuf::from);
    holding(folder, "SHA256SUMS", "make release")
}

/// The root of this repository.
#[must_use]
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

fn newest(prefix: &str, inside: &str, remedy: &str) -> Result<PathBuf> {
    let folders = cache().read_dir().into_iter().flatten().flatten();
    folders
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(inside))
        .filter(|path| path.exists())
        .max_by_key(|path| path.metadata().and_then(|metadata| metadata.modified()).ok())
        .ok_or_else(|| missing(&cache().join(format!("{prefix}*/{inside}")), remedy))
}

fn holding(folder: PathBuf, file: &str, remedy: &str) -> Result<PathBuf> {
    exists(folder.join(file), remedy)?;
    // The programs run in other working directories than ours.
    Ok(folder.canonicalize().unwrap_or(folder))
}

fn exists(path: PathBuf, remedy: &str) -> Result<PathBuf> {
    if path.exists() {
        Ok(path)
    } else {
        Err(missing(&path, remedy))
    }
}

fn missing(path: &Path, remedy: &str) -> Failure {
    Failure::Missing {
        what: path.display().to_string(),
        remedy: format!("run `{remedy}`"),
    }
}
