//! What CRI-O makes for a pod before its first container: network, IPC and UTS namespaces (its helper `pinns`), and
//! what CNI puts into the network.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use nix::mount::{MntFlags, umount2};
use tests::{
    failure::{Result, Trying},
    run::{self, succeed},
};

/// A pod's namespaces, each held by a mounted file as CRI-O's are.
#[derive(Debug)]
pub struct Namespaces {
    name: String,
    device: String,
    /// The pod's address.
    pub address: Ipv4Addr,
    gateway: Ipv4Addr,
    connected: bool,
}

/// Where CRI-O's `namespaces_dir` is by default.
const FOLDER: &str = "/var/run";

impl Namespaces {
    /// Makes namespaces named `name`, without a network.
    ///
    /// # Errors
    /// Those of iproute2 and util-linux.
    pub fn make(name: &str, hostname: &str, serial: u32) -> Result<Namespaces> {
        let third = u8::try_from(serial % 250).unwrap_or_default();
        let address = Ipv4Addr::new(10, 88, third, 2);
        let namespaces = Namespaces {
            name: name.into(),
            device: format!("veth{serial}"),
            address,
            gateway: Ipv4Addr::new(10, 88, third, 1),
            connected: false,
        };
        for kind in ["ipc", "uts"] {
            let path = namespaces.path(kind);
            fs::write(&path, "").trying(format!("making {}", path.display()))?;
            let option = format!("--{kind}={}", path.display());
            let program: &[&str] = if kind == "uts" {
                &["hostname", hostname]
            } else {
                &["true"]
            };
            succeed(Command::new("unshare").arg(option).args(program), run::ORDINARY)?;
        }
        Ok(namespaces)
    }

    /// Makes a network with one interface, `eth0`, whose peer stays in the node: in a namespace of its own, or in that
    /// of a process.
    ///
    /// # Errors
    /// Those of iproute2.
    pub fn connect(&mut self, process: Option<u32>) -> Result {
        let (name, device, gateway) = (self.name.as_str(), self.device.as_str(), self.gateway);
        let lines = [
            match process {
                None => format!("netns add {name}"),
                Some(pid) => format!("netns attach {name} {pid}"),
            },
            format!("link add {device} type veth peer name eth0 netns {name}"),
            format!("addr add {gateway}/24 dev {device}"),
            format!("link set {device} up"),
            format!("-n {name} link set lo up"),
            format!("-n {name} addr add {}/24 dev eth0", self.address),
            format!("-n {name} link set eth0 up"),
            format!("-n {name} route add default via {gateway}"),
        ];
        lines.iter().try_for_each(|line| ip(line))?;
        self.connected = true;
        Ok(())
    }

    /// The path of one of them, as the pod's specification names it.
    pub fn path(&self, kind: &str) -> PathBuf {
        Path::new(FOLDER).join(format!("{kind}ns")).join(&self.name)
    }

    /// What CNI's bridge plugin does for DEL: the pod's interface goes, and its peer with it.
    ///
    /// # Errors
    /// When the interface is not there any more.
    pub fn disconnect(&mut self) -> Result {
        if std::mem::take(&mut self.connected) {
            ip(&format!("-n {} link del eth0", self.name))
        } else {
            Ok(())
        }
    }

    /// Lets go of the namespaces.
    ///
    /// # Errors
    /// The kernel's: nothing may hold the files.
    pub fn remove(&self) -> Result {
        for kind in ["ipc", "uts"] {
            let path = self.path(kind);
            umount2(&path, MntFlags::empty()).trying(format!("unmounting {}", path.display()))?;
            fs::remove_file(&path).trying(format!("removing {}", path.display()))?;
        }
        ip(&format!("netns del {}", self.name))
    }
}

fn ip(line: &str) -> Result {
    succeed(Command::new("ip").args(line.split(' ')), run::ORDINARY).map(drop)
}
