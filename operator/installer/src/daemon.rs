//! The container runtimes that nodes have, as packages and distributions lay them out.
//!
//! A [`Site`] is all that the installer knows of a layout. A distribution's containerd has its socket, its
//! configuration and its program in places of its own, and often another containerd beside it, such as Docker's.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::dropin::{Format, Place};

/// A program that serves the CRI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// CRI-O.
    Crio,
    /// containerd, whoever brings it.
    Containerd,
}

impl Kind {
    /// The name of its program.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Crio => "crio",
            Self::Containerd => "containerd",
        }
    }
}

/// A container runtime of a node, as somebody lays it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Daemon {
    /// CRI-O, of packages.
    Crio,
    /// containerd, of packages.
    Containerd,
    /// The containerd inside k3s.
    K3s,
    /// The containerd inside RKE2.
    Rke2,
    /// The containerd that k0s starts.
    K0s,
    /// The containerd of the snap.
    Microk8s,
}

/// Who writes the main file of a configuration, and so whether somebody can add a line to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// The administrator.
    Administrator,
    /// The distribution, at each start. `reads` says what to do where the file does not import the drop-ins.
    Distribution {
        /// A whole clause for a sentence.
        reads: &'static str,
    },
}

/// Where drop-ins of containerd's or CRI-O's configuration are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// The folder.
    pub path: &'static str,
    /// The drop-in of our handler in it.
    pub handler: Place,
    /// The formats that are read there.
    pub formats: &'static [Format],
}

/// All that there is to know of a layout. Paths are the node's.
#[derive(Debug, PartialEq, Eq)]
pub struct Site {
    /// Which it is.
    pub daemon: Daemon,
    /// What people call it.
    pub name: &'static str,
    /// What serves the CRI.
    pub kind: Kind,
    /// The socket of its CRI.
    pub socket: &'static str,
    /// The main file of its configuration.
    pub main: &'static str,
    /// Who writes that one.
    pub author: Author,
    /// The folders of drop-ins.
    pub folders: &'static [Folder],
    /// A file that the distribution makes of its own configuration and of the drop-ins, and that the main file imports;
    /// later ones of k0s import the folder itself and have none.
    pub merged: Option<&'static str>,
    /// Where its program is, besides the usual folders.
    pub programs: &'static [&'static str],
    /// The units of systemd that may run it.
    pub units: &'static [&'static str],
    /// What to do about a version that is too old.
    pub update: &'static str,
}

const CONTAINERD_FORMATS: &[Format] = &[Format::ContainerdV2, Format::ContainerdV3];

/// The place of our handler's drop-in, and the folder above that of the drop-ins, where a file is written first.
const fn handler(path: &'static str, scratch: &'static str) -> Place {
    Place {
        path: Cow::Borrowed(path),
        scratch,
        of_cri: true,
    }
}

static K3S: Site = Site {
    daemon: Daemon::K3s,
    name: "k3s's containerd",
    kind: Kind::Containerd,
    socket: "/run/k3s/containerd/containerd.sock",
    main: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    author: Author::Distribution {
        reads: "update k3s to a version whose containerd does, or begin its template with that line",
    },
    folders: &[
        Folder {
            path: "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d",
            handler: handler(
                "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/50-kata.toml",
                "/var/lib/rancher/k3s/agent/etc/containerd",
            ),
            formats: &[Format::ContainerdV3],
        },
        Folder {
            path: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.d",
            handler: handler(
                "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.d/50-kata.toml",
                "/var/lib/rancher/k3s/agent/etc/containerd",
            ),
            formats: &[Format::ContainerdV2],
        },
    ],
    merged: None,
    programs: &["/var/lib/rancher/k3s/data/current/bin"],
    units: &["k3s", "k3s-agent"],
    update: "update k3s to v1.31.6+k3s1, v1.32.2+k3s1 or later",
};

static RKE2: Site = Site {
    daemon: Daemon::Rke2,
    name: "RKE2's containerd",
    kind: Kind::Containerd,
    socket: "/run/k3s/containerd/containerd.sock",
    main: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
    author: Author::Distribution {
        reads: "update RKE2 to a version whose containerd does, or begin its template with that line",
    },
    folders: &[
        Folder {
            path: "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d",
            handler: handler(
                "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d/50-kata.toml",
                "/var/lib/rancher/rke2/agent/etc/containerd",
            ),
            formats: &[Format::ContainerdV3],
        },
        Folder {
            path: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml.d",
            handler: handler(
                "/var/lib/rancher/rke2/agent/etc/containerd/config.toml.d/50-kata.toml",
                "/var/lib/rancher/rke2/agent/etc/containerd",
            ),
            formats: &[Format::ContainerdV2],
        },
    ],
    merged: None,
    programs: &["/var/lib/rancher/rke2/bin"],
    units: &["rke2-server", "rke2-agent"],
    update: "update RKE2 to v1.31.6+rke2r1, v1.32.2+rke2r1 or later",
};

static K0S: Site = Site {
    daemon: Daemon::K0s,
    name: "k0s's containerd",
    kind: Kind::Containerd,
    socket: "/run/k0s/containerd.sock",
    main: "/etc/k0s/containerd.toml",
    // A file without the mark of k0s is the administrator's: `merged::is_managed`.
    author: Author::Administrator,
    folders: &[Folder {
        path: "/etc/k0s/containerd.d",
        handler: handler("/etc/k0s/containerd.d/50-kata.toml", "/etc/k0s"),
        formats: CONTAINERD_FORMATS,
    }],
    merged: Some("/run/k0s/containerd-cri.toml"),
    programs: &["/var/lib/k0s/bin"],
    units: &["k0sworker", "k0scontroller"],
    update: "update k0s to a version that brings containerd 2.0 or later",
};

static MICROK8S: Site = Site {
    daemon: Daemon::Microk8s,
    name: "MicroK8s's containerd",
    kind: Kind::Containerd,
    socket: "/var/snap/microk8s/common/run/containerd.sock",
    // The file that containerd reads is made of this one at each start.
    main: "/var/snap/microk8s/current/args/containerd-template.toml",
    author: Author::Administrator,
    folders: &[Folder {
        // A folder of the snap that a refresh keeps as it is.
        path: "/var/snap/microk8s/common/containerd/conf.d",
        handler: handler(
            "/var/snap/microk8s/common/containerd/conf.d/50-kata.toml",
            "/var/snap/microk8s/common/containerd",
        ),
        formats: CONTAINERD_FORMATS,
    }],
    merged: None,
    programs: &["/snap/microk8s/current/bin"],
    units: &["snap.microk8s.daemon-containerd"],
    update: "refresh the snap to a channel that brings containerd 2.0 or later",
};

static CRIO: Site = Site {
    daemon: Daemon::Crio,
    name: "CRI-O",
    kind: Kind::Crio,
    socket: "/run/crio/crio.sock",
    main: "/etc/crio/crio.conf",
    author: Author::Administrator,
    folders: &[Folder {
        path: "/etc/crio/crio.conf.d",
        handler: handler("/etc/crio/crio.conf.d/50-kata", "/etc/crio"),
        formats: &[Format::Crio],
    }],
    merged: None,
    programs: &[],
    units: &["crio"],
    update: "update it to 1.24 or later",
};

static CONTAINERD: Site = Site {
    daemon: Daemon::Containerd,
    name: "containerd",
    kind: Kind::Containerd,
    socket: "/run/containerd/containerd.sock",
    main: "/etc/containerd/config.toml",
    author: Author::Administrator,
    folders: &[Folder {
        path: "/etc/containerd/conf.d",
        handler: handler("/etc/containerd/conf.d/50-kata.toml", "/etc/containerd"),
        formats: CONTAINERD_FORMATS,
    }],
    merged: None,
    programs: &[],
    units: &["containerd"],
    update: "update it to 2.0 or later, or add the handler to /etc/containerd/config.toml by hand as Sandpod's \
             deploy/cri/50-kata.containerd-1.toml shows",
};

/// Every layout. Where the kubelet does not say which one it uses, the first whose socket is served is taken: what a
/// distribution starts before what packages start, and CRI-O before a containerd that may serve others.
const ORDER: [Daemon; 6] = [
    Daemon::K3s,
    Daemon::Rke2,
    Daemon::K0s,
    Daemon::Microk8s,
    Daemon::Crio,
    Daemon::Containerd,
];

impl Daemon {
    /// Every one, in the order in which they are looked for.
    #[must_use]
    pub fn all() -> [Self; 6] {
        ORDER
    }

    /// Where everything of it is.
    #[must_use]
    pub fn site(self) -> &'static Site {
        match self {
            Self::Crio => &CRIO,
            Self::Containerd => &CONTAINERD,
            Self::K3s => &K3S,
            Self::Rke2 => &RKE2,
            Self::K0s => &K0S,
            Self::Microk8s => &MICROK8S,
        }
    }

    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.site().name
    }

    /// What serves the CRI.
    #[must_use]
    pub fn kind(self) -> Kind {
        self.site().kind
    }
}

impl Site {
    /// The folder where a drop-in of this format is read.
    #[must_use]
    pub fn folder(&self, format: Format) -> &'static Folder {
        let reads = |folder: &&Folder| folder.formats.contains(&format);
        self.folders.iter().find(reads).unwrap_or(&self.folders[0])
    }

    /// The main file of its configuration, as one of ours.
    #[must_use]
    pub fn main_place(&self) -> Place {
        Place {
            path: self.main.into(),
            scratch: self.folders[0].handler.scratch,
            of_cri: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn each_layout_is_whole() {
        for daemon in Daemon::all() {
            let site = daemon.site();
            assert_eq!(site.daemon, daemon);
            let mut formats = Vec::new();
            for folder in site.folders {
                let handler = &folder.handler;
                assert_eq!(Path::new(&*handler.path).parent(), Some(Path::new(folder.path)));
                // Nothing is written first where its reader would read it.
                assert_eq!(Path::new(folder.path).parent(), Some(Path::new(handler.scratch)));
                formats.extend(folder.formats);
            }
            let expected: &[Format] = match site.kind {
                Kind::Crio => &[Format::Crio],
                Kind::Containerd => CONTAINERD_FORMATS,
            };
            assert_eq!(formats.len(), expected.len(), "{daemon:?}");
            assert!(expected.iter().all(|format| formats.contains(format)), "{daemon:?}");
        }
    }

    #[test]
    fn a_layout_is_remembered_by_a_name_that_earlier_versions_wrote_too() {
        let name = |daemon| serde_json::to_value(daemon).unwrap();
        assert_eq!(name(Daemon::Crio), "crio");
        assert_eq!(name(Daemon::Containerd), "containerd");
        assert_eq!(name(Daemon::Rke2), "rke2");
    }
}
