//! The pod's network on its way into the guest.
//!
//! ```text
//!   host ── veth ══ eth0 (addresses stay, traffic does not reach them)
//!                     │ ▲      ingress of each is redirected to the egress of the other
//!                     ▼ │
//!                   tap0_kata ══ virtio-net ══ eth0 in the guest: same name, MAC, MTU, addresses, routes
//! ```
//!
//! What the CNI has set up is read once ([`snapshot`]); then each interface gets a tap ([`Snapshot::attach`]), which
//! lives as long as QEMU holds its file descriptor. A namespace that is the host's is refused before anything is looked
//! at. Source of the model: `docs/design/architecture/networking.md` of kata-containers ("tcfilter").

mod links;
mod loopback;
mod namespace;
mod sysctls;
mod wire;

pub use loopback::Loopback;
use namespace::Namespace;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::rule::RuleMessage;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use sysctls::Sysctls;

/// An interface of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name in the pod's network namespace, and in the guest.
    pub name: String,
    /// Ethernet address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// Addresses and their prefix lengths, without the link-local ones that every kernel makes for itself.
    pub addresses: Vec<(IpAddr, u8)>,
    /// `IFF_NOARP`, `IFF_PROMISC` and `IFF_ALLMULTI` of netdevice(7), if it has them.
    pub flags: LinkFlags,
    index: u32,
}

impl Interface {
    /// The Ethernet address as text, `02:00:0a:01:02:03`.
    pub fn mac_text(&self) -> String {
        mac_text(&self.mac)
    }
}

/// A route of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination and prefix length; `None` for the default route.
    pub destination: Option<(IpAddr, u8)>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Name of the interface.
    pub device: String,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// `rt_scope` of rtnetlink(7).
    pub scope: u8,
    /// `rtm_flags` of rtnetlink(7), of which only `RTNH_F_ONLINK` survives a snapshot.
    pub flags: u32,
    /// MTU of the route; zero when it has none.
    pub mtu: u32,
    /// Its metric: of two routes to one destination the one with the lower is taken.
    pub metric: u32,
    /// The route is one of IPv6.
    pub ipv6: bool,
    /// `rtm_type` of rtnetlink(7): `RTN_UNICAST`, or a kind of route that goes nowhere and has no interface, such as
    /// `RTN_BLACKHOLE`.
    pub kind: u8,
    /// The paths of a multipath route; empty when there is one.
    pub next_hops: Vec<NextHop>,
    /// Its table, as ip-route(8) numbers them.
    pub table: u32,
}

/// One of several paths to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextHop {
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Name of the interface.
    pub device: String,
    /// `rtnh_hops` of rtnetlink(7): the weight, less one.
    pub hops: u8,
    /// `rtnh_flags`, of which only `RTNH_F_ONLINK` survives a snapshot.
    pub flags: u8,
}

/// A permanent entry of the pod's neighbour table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbor {
    /// Its address.
    pub address: IpAddr,
    /// Name of the interface it is behind.
    pub device: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// `ndm_flags` of rtnetlink(7).
    pub flags: u8,
}

/// What the CNI has set up, as it was when the sandbox was made. Later changes do not reach the guest.
#[derive(Debug)]
pub struct Snapshot {
    namespace: Namespace,
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    rules: Vec<RuleMessage>,
    neighbors: Vec<Neighbor>,
}

/// The pod's network, attached to taps.
#[derive(Debug)]
pub struct Network {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    rules: Vec<RuleMessage>,
    neighbors: Vec<Neighbor>,
    taps: Vec<OwnedFd>,
    loopback: Option<Loopback>,
    sysctls: Arc<Sysctls>,
}

/// What `attach` changes on the host, for whoever has to take it back later, in another process if need be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    netns: PathBuf,
    device: u64,
    inode: u64,
    interfaces: Vec<String>,
    /// Those of them that did not hear all multicast groups before.
    #[serde(default)]
    deaf: Vec<String>,
}

/// Why a pod's network cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The namespace cannot be opened.
    #[error("cannot open network namespace {path}: {source}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path leads to something else.
    #[error("{0} is not a network namespace")]
    NotANamespace(PathBuf),
    /// The namespace is the host's.
    #[error("network namespace {0} is the host's: a pod in a VM cannot use the host's network")]
    Host(PathBuf),
    /// An interface without Ethernet frames.
    #[error("interface {0} is not an Ethernet device: a VM cannot be connected to it")]
    NotEthernet(String),
    /// The kernel refused a change or a question.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// What was tried.
        action: String,
        /// What it said.
        source: rtnetlink::Error,
    },
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl NetError {
    fn system(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            action: action.into(),
            source: source.into(),
        }
    }
}

/// Reads the network namespace at `netns`: every interface but the loopback that has an address, its routes, rules and
/// permanent neighbours. Blocks for some milliseconds.
///
/// # Errors
/// [`NetError::Host`] when it is the host's, or this process's own; something in it that no guest can have.
pub fn snapshot(netns: &Path) -> Result<Snapshot, NetError> {
    let namespace = Namespace::open(netns)?;
    let found = namespace.inside(async |handle| links::read(&handle).await)?;
    let links::Found {
        interfaces,
        routes,
        rules,
        neighbors,
    } = found;
    Ok(Snapshot {
        namespace,
        interfaces,
        routes,
        rules,
        neighbors,
    })
}

impl Snapshot {
    /// Whether the pod has no interface yet.
    pub fn is_empty(&self) -> bool {
        self.interfaces.is_empty()
    }

    /// What [`Snapshot::attach`] is going to change.
    pub fn record(&self) -> Record {
        let (device, inode) = self.namespace.id();
        let name = |interface: &Interface| interface.name.clone();
        Record {
            netns: self.namespace.path().to_owned(),
            device,
            inode,
            interfaces: self.interfaces.iter().map(name).collect(),
            deaf: self
                .interfaces
                .iter()
                .filter(|interface| !interface.flags.contains(LinkFlags::Allmulti))
                .map(name)
                .collect(),
        }
    }

    /// Makes a tap for each interface and redirects the traffic of the one to the other, both ways. Blocks for some
    /// milliseconds. A thread goes on to read the namespace's sysctls, which takes as long again.
    ///
    /// # Errors
    /// No `/dev/net/tun`, or the kernel refuses a queueing discipline or a filter; [`Record::remove`] takes back what
    /// was done.
    pub fn attach(self) -> Result<Network, NetError> {
        let Self {
            namespace,
            interfaces,
            routes,
            rules,
            neighbors,
        } = self;
        let (taps, loopback) = namespace.inside(async |handle| {
            let mut taps = Vec::with_capacity(interfaces.len());
            for (number, interface) in interfaces.iter().enumerate() {
                taps.push(connect(&handle, interface, number).await?);
            }
            let loopback = Loopback::take().inspect_err(
                |error| tracing::warn!(%error, "no port can be forwarded into the pod: its loopback cannot be taken"),
            );
            Ok((taps, loopback.ok()))
        })?;
        let names = interfaces.iter().map(|interface| interface.name.clone()).collect();
        Ok(Network {
            interfaces,
            routes,
            rules,
            neighbors,
            taps,
            loopback,
            sysctls: Sysctls::read(namespace, names)?,
        })
    }
}

/// In the pod's namespace: a tap for `interface`, connected to it.
async fn connect(handle: &rtnetlink::Handle, interface: &Interface, number: usize) -> Result<OwnedFd, NetError> {
    let name = format!("tap{number}_kata");
    let tap = crate::sys::open_tap(&name).map_err(|error| NetError::system(format!("make {name}"), error))?;
    let index = if_nametoindex(name.as_str()).map_err(|error| NetError::system(format!("find {name}"), error))?;
    links::prepare_tap(handle, index, interface.mtu)
        .await
        .map_err(|source| netlink(format!("set up {name}"), source))?;
    links::hear_all_groups(handle, interface.index, true)
        .await
        .map_err(|source| netlink(format!("have {} hear all multicast groups", interface.name), source))?;
    for (from, to) in [(interface.index, index), (index, interface.index)] {
        links::redirect(handle, from, to)
            .await
            .map_err(|source| netlink(format!("connect {} with {name}", interface.name), source))?;
    }
    Ok(tap)
}

impl Network {
    /// The interfaces, in the order of the taps.
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// The routes, those that others depend on first.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// The permanent neighbours.
    pub fn neighbors(&self) -> &[Neighbor] {
        &self.neighbors
    }

    /// The taps, one for each interface, opened with `IFF_VNET_HDR`: duplicates, for QEMU. A tap vanishes with its last
    /// duplicate.
    ///
    /// # Errors
    /// Too many open files.
    pub fn taps(&self) -> io::Result<Vec<OwnedFd>> {
        self.taps.iter().map(OwnedFd::try_clone).collect()
    }

    /// The pod's loopback, once; `None` on a host that cannot have it taken.
    pub fn take_loopback(&mut self) -> Option<Loopback> {
        self.loopback.take()
    }
}

impl Record {
    /// Gives the pod's interfaces their traffic back. Succeeds on what is already gone; the taps have gone with QEMU.
    /// Blocks for some milliseconds.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self) -> Result<(), NetError> {
        let namespace = match Namespace::open(&self.netns) {
            // The path now leads to nothing, or to something that cannot be the pod's.
            Err(NetError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(NetError::NotANamespace(_) | NetError::Host(_)) => return Ok(()),
            other => other?,
        };
        if namespace.id() != (self.device, self.inode) {
            return Ok(());
        }
        namespace.inside(async |handle| {
            for name in &self.interfaces {
                if let Ok(index) = if_nametoindex(name.as_str()) {
                    links::remove_redirect(&handle, index)
                        .await
                        .map_err(|source| netlink(format!("disconnect {name}"), source))?;
                    if self.deaf.contains(name) {
                        links::hear_all_groups(&handle, index, false)
                            .await
                            .map_err(|source| netlink(format!("give {name} its flags back"), source))?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// A new network namespace with nothing but a loopback that is down. It lives as long as somebody holds it or is in it.
///
/// # Errors
/// No right to make one.
pub fn empty_namespace() -> Result<OwnedFd, NetError> {
    namespace::new_anonymous()
}

fn netlink(action: String, source: rtnetlink::Error) -> NetError {
    NetError::Netlink { action, source }
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests;
