//! A host in a folder: a real containerd whose root is that folder, with a restart command that lives there, too.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use installer::{files::sha256, payload::Payload};
use tests::{
    config::{self, Site},
    failure::{Failure, Result, Trying},
    namespaces::Namespaces,
    places, run,
    wait::Bell,
};

/// Furnishes the folder, and starts containerd there again and again, as a service manager would.
const FURNISH: &str = r#"ip link set lo up
cd "$ROOT"
mkdir -p proc sys dev run bin tmp opt var/lib etc/containerd/conf.d
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mkdir run/lock
cp "$(command -v busybox)" bin/sh
touch bin/containerd
mount --bind "$CONTAINERD" bin/containerd
mkfifo run/ended
(while :; do
  chroot . /bin/containerd --config /etc/containerd/config.toml >>containerd.log 2>&1 &
  echo $! >run/containerd.pid
  wait $! || :
  echo ended >run/ended
done) </dev/null >/dev/null 2>&1 &"#;

/// Ends containerd, and is back when it has ended.
const RESTART: &str = "#!/bin/sh\nread -r pid </run/containerd.pid && kill \"$pid\" && read -r _ </run/ended\n";

/// The restart command, as the host has it.
pub const RESTART_COMMAND: &str = "/bin/restart";

/// A host; its processes end with it.
pub struct Host {
    pub namespaces: Arc<Namespaces>,
    pub root: PathBuf,
}

impl Host {
    /// Makes one of an absent folder, and waits until its containerd serves.
    pub fn start(root: &Path) -> Result<Host> {
        fs::create_dir_all(root.join("etc/containerd")).trying("making a host's folder")?;
        let text = config::containerd(Path::new("/var/lib/containerd"), Site::Packages, &[]);
        let text = format!("imports = [\"/etc/containerd/conf.d/*.toml\"]\n{text}");
        fs::write(root.join("etc/containerd/config.toml"), text).trying("writing containerd's configuration")?;
        if config::accelerator() == "tcg" {
            let folder = root.join("etc/sandpod/config.d");
            fs::create_dir_all(&folder).trying("making the administrator's folder")?;
            let text = "[hypervisor.qemu]\naccelerator = \"tcg\"\n";
            fs::write(folder.join("10-tcg.toml"), text).trying("writing the administrator's configuration")?;
        }
        let containerd = places::peers()?.join("containerd");
        let namespaces = Namespaces::make(FURNISH, &[("ROOT", root), ("CONTAINERD", &containerd)])?;
        let restart = root.join(RESTART_COMMAND.trim_start_matches('/'));
        fs::write(&restart, RESTART).trying("writing the restart command")?;
        fs::set_permissions(&restart, fs::Permissions::from_mode(0o755)).trying("making it a program")?;
        let host = Host {
            namespaces: Arc::new(namespaces),
            root: root.to_owned(),
        };
        let socket = host.root.join("run/containerd/containerd.sock").display().to_string();
        let socket = host.namespaces.inside(&socket);
        Bell::default().until("a host's containerd", run::ORDINARY, || {
            let said = || fs::read_to_string(root.join("containerd.log")).unwrap_or_default();
            socket.exists().then_some(()).ok_or_else(|| run::last_of(&said(), 2000))
        })?;
        Ok(host)
    }

    /// Every file and link that an installation could have to do with, and what is in it.
    pub fn files(&self) -> Result<BTreeMap<PathBuf, String>> {
        let mut found = BTreeMap::new();
        let mut folders: Vec<PathBuf> = ["etc", "opt"].map(|name| self.root.join(name)).to_vec();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)
                .trying(format!("listing {}", folder.display()))?
                .flatten()
            {
                let path = entry.path();
                let kind = entry.file_type().trying(format!("looking at {}", path.display()))?;
                let contents = if kind.is_dir() {
                    folders.push(path.clone());
                    String::new()
                } else if kind.is_symlink() {
                    fs::read_link(&path)
                        .map(|target| target.display().to_string())
                        .unwrap_or_default()
                } else {
                    sha256(&fs::read(&path).trying(format!("reading {}", path.display()))?)
                };
                found.insert(path, contents);
            }
        }
        Ok(found)
    }
}

/// A payload with the shim alone: enough for everything but a pod, and quickly copied. Returns its folder and the
/// version that it will have.
pub fn payload(folder: &Path, version: &str) -> Result<(PathBuf, String)> {
    let folder = folder.join(format!("payload-{version}"));
    fs::create_dir_all(folder.join("bin")).trying("making a payload")?;
    let shim = places::binaries()?.join("containerd-shim-kata-v2");
    let configuration = places::workspace().join("deploy/configuration.toml");
    let mut manifest = format!("sandpod {version}\n");
    for (from, path, mode) in [
        (shim, "bin/containerd-shim-kata-v2", 755),
        (configuration, "configuration.toml", 644),
    ] {
        let bytes = fs::read(&from).trying(format!("reading {}", from.display()))?;
        fs::write(folder.join(path), &bytes).trying(format!("writing {path}"))?;
        manifest += &format!("{mode} {} {} {path}\n", bytes.len(), sha256(&bytes));
    }
    fs::write(folder.join("MANIFEST"), manifest).trying("writing a payload's manifest")?;
    let opened = Payload::open(&folder).map_err(|error| Failure::Claim(error.to_string()))?;
    Ok((folder, opened.name))
}
