//! The configurations of a node: containerd's, CNI's and Kata's.

use std::{fs, path::Path};

use serde_json::json;

use crate::{failure::Result, images, places};

/// The folder of a node in which containerd looks for the hosts that stand for a registry (its docs/hosts.md), at each
/// pull.
pub const REGISTRIES: &str = "registries";

/// Where Debian has CNI's plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Where a node's containerd has its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// Where packages have them.
    Packages,
    /// Where k3s has them, which writes the main file at each start.
    K3s,
}

impl Site {
    /// The socket of containerd.
    #[must_use]
    pub fn socket(self) -> &'static str {
        match self {
            Site::Packages => "/run/containerd/containerd.sock",
            Site::K3s => "/run/k3s/containerd/containerd.sock",
        }
    }

    /// The folder of containerd's state.
    #[must_use]
    pub fn state(self) -> &'static str {
        match self {
            Site::Packages => "/run/containerd",
            Site::K3s => "/run/k3s/containerd",
        }
    }

    /// The main file of containerd's configuration on a bare node.
    #[must_use]
    pub fn main(self) -> &'static str {
        match self {
            Site::Packages => "/etc/containerd/config.toml",
            Site::K3s => "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
        }
    }

    /// Where a bare node's containerd looks for further configuration, if its main file has this version.
    #[must_use]
    pub fn drop_ins(self, version: u32) -> &'static str {
        match (self, version) {
            (Site::Packages, _) => "/etc/containerd/conf.d",
            (Site::K3s, 2) => "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.d",
            (Site::K3s, _) => "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d",
        }
    }
}

/// The guest images that Sandpod builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Our own kernel, everything built in.
    Own,
    /// The same for eBPF agents and tracers.
    Tracing,
    /// Debian's prebuilt cloud kernel with its modules.
    Debian,
}

impl Guest {
    /// The name of its folder and of its handler's suffix.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Guest::Own => "own",
            Guest::Tracing => "tracing",
            Guest::Debian => "debian",
        }
    }

    /// Kata's configuration.toml for this guest on this machine.
    ///
    /// # Errors
    /// When the guest image or virtiofsd has not been built.
    pub fn configuration(self) -> Result<String> {
        let folder = places::guest(self.name())?;
        Ok(configuration(
            &folder,
            &places::virtiofsd()?,
            accelerator(),
            self != Guest::Debian,
        ))
    }
}

/// What runs the containers of a story.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The reference, which proves the story itself.
    Runc,
    /// Sandpod with one of its guests.
    Kata(Guest),
}

impl Runtime {
    /// The name of the CRI's runtime handler.
    #[must_use]
    pub fn handler(self) -> String {
        match self {
            Runtime::Runc => "runc".into(),
            Runtime::Kata(guest) => format!("kata-{}", guest.name()),
        }
    }

    /// Fails when what this runtime needs has not been built.
    ///
    /// # Errors
    /// One that names what is missing.
    pub fn require(self) -> Result {
        if let Runtime::Kata(guest) = self {
            places::binaries()?;
            guest.configuration()?;
        }
        Ok(())
    }
}

/// `kvm` where this machine's processor and device allow it, else `tcg`.
#[must_use]
pub fn accelerator() -> &'static str {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualizes = flags
        .lines()
        .any(|line| line.starts_with("flags") && line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if virtualizes && device.is_ok() { "kvm" } else { "tcg" }
}

/// A configuration.toml with the keys that differ from Sandpod's defaults.
#[must_use]
pub fn configuration(guest: &Path, virtiofsd: &Path, accelerator: &str, virtio_mem: bool) -> String {
    format!(
        "[hypervisor.qemu]\n\
         path = \"/usr/bin/qemu-system-x86_64\"\n\
         accelerator = \"{accelerator}\"\n\
         kernel = \"{guest}/vmlinux\"\n\
         initrd = \"{guest}/initrd\"\n\
         virtio_fs_daemon = \"{virtiofsd}\"\n\
         enable_virtio_mem = {virtio_mem}\n",
        guest = guest.display(),
        virtiofsd = virtiofsd.display(),
    )
}

/// A bridge with addresses of its own for the pods of a node.
#[must_use]
pub fn cni() -> String {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-addresses",
                    "ranges": [[{ "subnet": "10.88.0.0/16" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
    .to_string()
}

/// containerd's configuration, understood by 1.6 and (by its migration) by 2.x. `handlers` have names and paths of
/// their configuration.toml, unless the shim is to find one.
#[must_use]
pub fn containerd(node: &Path, site: Site, handlers: &[(String, Option<String>)]) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let node = node.display();
    let mut text = format!(
        "version = 2\n\
         root = \"{node}/root\"\n\
         state = \"{state}\"\n\
         disabled_plugins = [\"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\", \"io.containerd.internal.v1.tracing\"]\n\
         [grpc]\naddress = \"{socket}\"\n\
         [{cri}]\n\
         sandbox_image = \"{pause}\"\n\
         restrict_oom_score_adj = true\n\
         disable_tcp_service = true\n\
         [{cri}.registry]\n\
         config_path = \"{node}/{REGISTRIES}\"\n\
         [{cri}.cni]\n\
         bin_dir = \"{CNI_PLUGINS}\"\n\
         conf_dir = \"{node}/cni\"\n\
         [{cri}.containerd]\n\
         snapshotter = \"overlayfs\"\n\
         default_runtime_name = \"runc\"\n\
         [{cri}.containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [{cri}.containerd.runtimes.runc.options]\n\
         SystemdCgroup = false\n",
        pause = images::PAUSE,
        state = site.state(),
        socket = site.socket(),
    );
    for (name, path) in handlers {
        text += &format!(
            "[{cri}.containerd.runtimes.{name}]\n\
             runtime_type = \"io.containerd.kata.v2\"\n\
             privileged_without_host_devices = true\n\
             privileged_without_host_devices_all_devices_allowed = true\n\
             pod_annotations = [\"io.katacontainers.*\"]\n\
             container_annotations = [\"io.katacontainers.*\"]\n"
        );
        if let Some(path) = path {
            text += &format!("[{cri}.containerd.runtimes.{name}.options]\nConfigPath = \"{path}\"\n");
        }
    }
    text
}

/// The same without handlers in version 3, or in version 4, which containerd 2.3 and later take.
#[must_use]
pub fn containerd_of_version(version: u32, node: &Path, site: Site) -> String {
    let (runtime, images) = (
        "plugins.'io.containerd.cri.v1.runtime'",
        "plugins.'io.containerd.cri.v1.images'",
    );
    let socket = site.socket();
    let sockets = match version {
        3 => format!("[grpc]\naddress = \"{socket}\"\n"),
        _ => format!(
            "[plugins.'io.containerd.server.v1.grpc']\naddress = \"{socket}\"\n\
             [plugins.'io.containerd.server.v1.ttrpc']\naddress = \"{socket}.ttrpc\"\n"
        ),
    };
    format!(
        "version = {version}\n\
         root = \"{node}/root\"\n\
         state = \"{state}\"\n\
         disabled_plugins = [\"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\", \"io.containerd.internal.v1.tracing\"]\n\
         {sockets}\
         [plugins.'io.containerd.grpc.v1.cri']\n\
         disable_tcp_service = true\n\
         [{images}]\n\
         snapshotter = \"overlayfs\"\n\
         [{images}.pinned_images]\n\
         sandbox = \"{pause}\"\n\
         [{images}.registry]\n\
         config_path = \"{node}/{REGISTRIES}\"\n\
         [{runtime}]\n\
         restrict_oom_score_adj = true\n\
         [{runtime}.cni]\n\
         bin_dirs = [\"{CNI_PLUGINS}\"]\n\
         conf_dir = \"{node}/cni\"\n\
         [{runtime}.containerd]\n\
         default_runtime_name = \"runc\"\n\
         [{runtime}.containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [{runtime}.containerd.runtimes.runc.options]\n\
         SystemdCgroup = false\n",
        pause = images::PAUSE,
        state = site.state(),
        node = node.display(),
    )
}
