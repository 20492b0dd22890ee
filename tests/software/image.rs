//! The images with the software that stories run: Debian's packages, as mmdebstrap(1) installs them.

use std::{fs, path::Path, process::Command, time::Duration};

use tests::{
    failure::{Result, Trying},
    node::Node,
    oci::{self, Layout},
    run::succeed,
};

/// How long fetching and installing the packages may take, or unpacking an image.
const PATIENCE: Duration = Duration::from_secs(900);

/// Which release of Debian they are of.
const RELEASE: &str = "bookworm";

/// An image, which a node gets when a story first asks for it.
#[derive(Debug)]
pub struct Image {
    name: &'static str,
    packages: &'static [&'static str],
    mirrored: &'static [&'static str],
}

/// What the stories of every day need.
pub const SOFTWARE: Image = Image {
    name: "docker.io/library/sandpod-software:latest",
    packages: &[
        "busybox-static",
        "curl",
        "dbus",
        "git",
        "gunicorn",
        "iproute2",
        "ipset",
        "iptables",
        "ipvsadm",
        "libcap2-bin",
        "nftables",
        "nginx-light",
        "postfix",
        "postgresql",
        "procps",
        "redis-server",
        "samba",
        "smbclient",
        "systemd-sysv",
        "wireguard-tools",
    ],
    mirrored: MIRRORED,
};

/// What only the long stories need.
pub const LARGE: Image = Image {
    name: "docker.io/library/sandpod-large:latest",
    packages: &[
        "bpftrace",
        "busybox-static",
        "crun",
        "fuse-overlayfs",
        "git",
        "iproute2",
        "mariadb-server",
        "npm",
        "podman",
    ],
    mirrored: &[],
};

/// The packages that are not installed: [`MIRROR`] has them, and what they depend on.
pub const MIRRORED: &[&str] = &[
    "bc",
    "file",
    "iputils-ping",
    "jq",
    "less",
    "lsof",
    "mtr-tiny",
    "rsync",
    "sqlite3",
    "tree",
];

/// A repository of Debian packages in [`SOFTWARE`], without signatures.
pub const MIRROR: &str = "/srv/mirror";

/// What nobody reads.
const LEFT_OUT: &[&str] = &["doc", "locale", "man"];

/// Makes the repository and takes away the databases that packages make. Hooks get the root folder.
const LAST: &str = r#"
rm -rf "$1"/var/lib/postgresql/* "$1"/var/lib/mysql/* "$1"/var/cache/apt/archives/*.deb
mkdir -p "$1$MIRROR"
[ -n "$MIRRORED" ] || return 0
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --yes --download-only install $MIRRORED
mv "$1"/var/cache/apt/archives/*.deb "$1$MIRROR"
cd "$1$MIRROR"
for package in *.deb; do
  dpkg-deb --field "$package"
  echo "Filename: ./$package"
  echo "Size: $(stat -c %s "$package")"
  echo "SHA256: $(sha256sum "$package" | cut -d ' ' -f 1)"
  echo
done >Packages
"#;

impl Image {
    /// Its name on this node, which has it from now on.
    ///
    /// # Errors
    /// When Debian's packages cannot be fetched or installed, or containerd does not take the image.
    pub fn on(&self, node: &Node) -> Result<&'static str> {
        let known = node.ctr(["-n", "k8s.io", "images", "list", "--quiet"])?.text();
        if !known.lines().any(|name| name == self.name) {
            let archive = self.archive()?.display().to_string();
            let mut import = node.ctr_command(["-n", "k8s.io", "images", "import", &archive]);
            succeed(&mut import, PATIENCE)?;
            // The CRI hears of it from containerd.
            let known = || {
                node.crictl(["inspecti", "--quiet", self.name])
                    .map_err(|failure| failure.to_string())
            };
            node.events()
                .bell
                .until("the CRI's knowledge of the image", PATIENCE, known)?;
        }
        Ok(self.name)
    }

    fn archive(&self) -> Result<std::path::PathBuf> {
        oci::archive(&format!("{self:?}{RELEASE}{LEFT_OUT:?}{LAST}"), |build| {
            self.make(build)
        })
    }

    fn make(&self, build: &Path) -> Result<Layout> {
        eprintln!(
            "software: installing Debian packages for {}, usually 2 minutes",
            self.name
        );
        let root = build.join("root.tar");
        let hook = build.join("last.sh");
        fs::write(&hook, LAST).trying("writing the last step")?;
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--quiet", "--mode=root", "--variant=minbase"])
            .arg(format!("--include={}", self.packages.join(",")))
            // apt's own user cannot fetch into a folder that is root's alone.
            .args(["--aptopt=APT::Sandbox::User \"root\"", "--dpkgopt=force-unsafe-io"])
            .args(
                LEFT_OUT
                    .iter()
                    .map(|folder| format!("--dpkgopt=path-exclude=/usr/share/{folder}/*")),
            )
            .arg(format!("--customize-hook=sh -ec '. {}' hook \"$1\"", hook.display()))
            .arg(RELEASE)
            .arg(&root)
            .env("MIRROR", MIRROR)
            .env("MIRRORED", self.mirrored.join(" "))
            .env("TMPDIR", build);
        succeed(&mut command, PATIENCE)?;
        let mut layout = Layout::default();
        let layer = layout.layer_of(fs::read(&root).trying("reading the root folder's archive")?);
        layout.image(self.name, &[&layer], &["/bin/sh"], "");
        Ok(layout)
    }
}
