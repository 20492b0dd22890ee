//! The guest's network: interfaces, addresses and neighbours as the host has them.

use std::{fs, io, net::IpAddr, path::Path, time::Duration};

use agent_protocol::protocol::{
    agent::{ARPNeighbors, Interfaces, Sysctl},
    types::{ARPNeighbor, IPAddress, IPFamily, Interface},
};
use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkMessage},
        neighbour::{NeighbourFlags, NeighbourState},
    },
};
use tokio::sync::OnceCell;

use super::{
    beneath,
    error::{Doing, Error, Result},
    namespaces,
    uevent::Uevents,
};
/// How long an interface may take to appear after the host has named it: it may be one that is being plugged.
const APPEARS: Duration = Duration::from_secs(3);
/// The flags of an interface that the host passes on.
const OF_THE_HOST: LinkFlags = LinkFlags::Noarp.union(LinkFlags::Promisc).union(LinkFlags::Allmulti);
/// The most bytes of an interface's name (`IFNAMSIZ` without the final NUL).
const LONGEST_NAME: usize = 15;

/// Speaks to the kernel's network.
#[derive(Debug, Default)]
pub(super) struct Network(OnceCell<Handle>);

impl Network {
    pub(super) async fn handle(&self) -> Result<&Handle> {
        let connect = || async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            Ok::<_, io::Error>(handle)
        };
        self.0
            .get_or_try_init(connect)
            .await
            .doing(|| "speak to the kernel's network".into())
    }

    /// Gives an interface, found by its hardware address or else its name, the name, addresses and MTU of the
    /// host's. Idempotent.
    pub(super) async fn update_interface(&self, interface: Interface) -> Result<Interface> {
        let wanted = Wanted::parse(&interface)?;
        let link = find(&wanted).await?;
        let what = || format!("configure the interface {:?}", wanted.name);
        let handle = self.handle().await?;
        if link.name != wanted.name {
            self.make_room(&wanted.name).await?;
        }
        let mut message = LinkUnspec::new_with_index(link.index)
            .arp(!wanted.flags.contains(LinkFlags::Noarp))
            .promiscuous(wanted.flags.contains(LinkFlags::Promisc))
            .allmulticast(wanted.flags.contains(LinkFlags::Allmulti));
        if link.name != wanted.name || link.mac != wanted.mac {
            // The kernel renames only an interface that is down.
            let down = LinkUnspec::new_with_index(link.index).down().build();
            handle.link().change(down).execute().await.doing(what)?;
            message = message.name(wanted.name.clone());
            if let Some(mac) = wanted.mac.filter(|mac| link.mac != Some(*mac)) {
                message = message.address(mac.to_vec());
            }
        }
        if let Some(mtu) = wanted.mtu {
            message = message.mtu(mtu);
        }
        handle.link().change(message.up().build()).execute().await.doing(what)?;
        self.update_addresses(link.index, &wanted).await?;
        Ok(interface)
    }

    /// Sets sysctls of the network, in their order. Returns those that the kernel has not, or not with such values.
    pub(super) fn set_sysctls(&self, sysctls: &[Sysctl]) -> Result<Vec<String>> {
        let mut refused = Vec::new();
        for Sysctl { name, value, .. } in sysctls {
            let all = Path::new(SYSCTLS);
            let path = all.join(name);
            if !beneath::is_below(all, &path) {
                return Err(bad("a sysctl's path", name));
            }
            if let Err(error) = fs::write(path, value) {
                refused.push(format!("{name} = {value}: {error}"));
            }
        }
        Ok(refused)
    }

    /// Renames the interface that holds a name another is to get.
    async fn make_room(&self, name: &str) -> Result<()> {
        let Some(index) = index_of(name) else { return Ok(()) };
        let away: String = format!("{name}_temp").chars().take(LONGEST_NAME).collect();
        let away = if away == name { format!("temp{index}") } else { away };
        let down = LinkUnspec::new_with_index(index).down().build();
        let rename = LinkUnspec::new_with_index(index).name(away).build();
        let links = self.handle().await?.link();
        let what = || format!("rename the interface that is called {name:?}");
        links.change(down).execute().await.doing(what)?;
        links.change(rename).execute().await.doing(what)
    }

    async fn update_addresses(&self, index: u32, wanted: &Wanted) -> Result<()> {
        let what = || format!("set the addresses of {:?}", wanted.name);
        let addresses = self.handle().await?.address();
        let present: Vec<_> = addresses
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .doing(what)?;
        let mut missing = wanted.addresses.clone();
        for message in present {
            let Some(address) = address_of(&message) else { continue };
            let kept = missing.iter().position(|wanted| *wanted == address);
            match kept {
                Some(kept) => drop(missing.swap_remove(kept)),
                // The kernel's own: an IPv6 interface always has one.
                None if message.header.scope == AddressScope::Link && address.0.is_ipv6() => {}
                None => addresses.del(message).execute().await.doing(what)?,
            }
        }
        for (address, prefix) in missing {
            let mut request = addresses.add(index, address, prefix).replace();
            if address.is_ipv6() {
                // The host's interface has it: no other will, and it is of use at once.
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            }
            request
                .execute()
                .await
                .doing(|| format!("give {:?} the address {address}/{prefix}", wanted.name))?;
        }
        Ok(())
    }

    /// The interfaces and their addresses.
    pub(super) async fn list_interfaces(&self) -> Result<Interfaces> {
        let what = || "list the interfaces".to_owned();
        let handle = self.handle().await?;
        let links: Vec<_> = handle.link().get().execute().try_collect().await.doing(what)?;
        let addresses: Vec<_> = handle.address().get().execute().try_collect().await.doing(what)?;
        let mut list = Interfaces::new();
        list.Interfaces = links.iter().map(|link| describe(link, &addresses)).collect();
        Ok(list)
    }

    /// Adds neighbours.
    pub(super) async fn add_neighbours(&self, neighbours: ARPNeighbors) -> Result<()> {
        for neighbour in &neighbours.ARPNeighbors {
            self.add_neighbour(neighbour).await?;
        }
        Ok(())
    }

    async fn add_neighbour(&self, neighbour: &ARPNeighbor) -> Result<()> {
        let address = neighbour
            .toIPAddress
            .as_ref()
            .map(|to| to.address.as_str())
            .unwrap_or_default();
        // Upstream's shims may send it with its prefix length.
        let address = address.split('/').next().unwrap_or_default();
        let address: IpAddr = address.parse().map_err(|_| bad("a neighbour's address", address))?;
        let index = device(&neighbour.device)?;
        let mut request = self.handle().await?.neighbours().add(index, address).replace();
        if let Some(mac) = parse_mac(&neighbour.lladdr)? {
            request = request.link_layer_address(&mac);
        }
        if let Ok(state @ 1..) = u16::try_from(neighbour.state) {
            request = request.state(NeighbourState::from(state));
        }
        request = request.flags(NeighbourFlags::from_bits_retain(neighbour.flags as u8));
        request
            .execute()
            .await
            .doing(|| format!("add the neighbour {address} of {:?}", neighbour.device))
    }
}

/// What an interface is to become.
#[derive(Debug)]
struct Wanted {
    name: String,
    mac: Option<[u8; 6]>,
    mtu: Option<u32>,
    flags: LinkFlags,
    addresses: Vec<(IpAddr, u8)>,
}

impl Wanted {
    fn parse(interface: &Interface) -> Result<Wanted> {
        let name = match interface.name.as_str() {
            "" => interface.device.as_str(),
            name => name,
        };
        let legal = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':' | '\0');
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(legal) || matches!(name, "." | "..") {
            return Err(bad("an interface's name", name));
        }
        let mtu = match interface.mtu {
            0 => None,
            mtu => Some(u32::try_from(mtu).map_err(|_| bad("an MTU", &mtu.to_string()))?),
        };
        let mut addresses = interface
            .IPAddresses
            .iter()
            .map(parse_address)
            .collect::<Result<Vec<_>>>()?;
        if !has_ipv6() {
            addresses.retain(|(address, _)| address.is_ipv4());
        }
        Ok(Wanted {
            name: name.to_owned(),
            mac: parse_mac(&interface.hwAddr)?,
            mtu,
            flags: LinkFlags::from_bits_retain(interface.raw_flags) & OF_THE_HOST,
            addresses,
        })
    }
}

/// An interface that is there.
#[derive(Debug)]
struct Link {
    name: String,
    index: u32,
    mac: Option<[u8; 6]>,
}

/// By its hardware address, if it has one, and only if nothing of that address comes by its name: the interface that
/// has the name may be another, which is to keep its own address, while the one that is wanted is still being plugged.
async fn find(wanted: &Wanted) -> Result<Link> {
    let found = Uevents::until(|| match (look_for(wanted)?, namespaces::of_pod(), wanted.mac) {
        (None, Some(pod), Some(mac)) => pod.adopt(mac).and_then(|()| look_for(wanted)),
        (found, _, _) => Ok(found),
    });
    let what = || match wanted.mac {
        Some(mac) => format!(
            "find the interface {:?} with the address {}",
            wanted.name,
            show_mac(&mac)
        ),
        None => format!("find the interface {:?}", wanted.name),
    };
    match tokio::time::timeout(APPEARS, found).await {
        Ok(found) => found.doing(what),
        Err(_) => {
            let named = wanted.mac.and_then(|_| link(&wanted.name));
            named
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
                .doing(what)
        }
    }
}

fn look_for(wanted: &Wanted) -> io::Result<Option<Link>> {
    if wanted.mac.is_none() {
        return Ok(link(&wanted.name));
    }
    for entry in fs::read_dir(CLASS)? {
        let found = link(&entry?.file_name().to_string_lossy());
        if let Some(found) = found.filter(|link| link.mac == wanted.mac) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The interface of this name.
fn link(name: &str) -> Option<Link> {
    let text = fs::read_to_string(Path::new(CLASS).join(name).join("address")).unwrap_or_default();
    Some(Link {
        index: index_of(name)?,
        mac: parse_mac(text.trim()).ok().flatten(),
        name: name.to_owned(),
    })
}

const CLASS: &str = "/sys/class/net";

const SYSCTLS: &str = "/proc/sys/net";

/// The index of an interface.
pub(super) fn index_of(name: &str) -> Option<u32> {
    let path = Path::new(CLASS).join(name).join("ifindex");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The index of an interface that must be there.
pub(super) fn device(name: &str) -> Result<u32> {
    let plain = !name.is_empty() && !name.contains('/');
    let index = plain.then(|| index_of(name)).flatten();
    index.ok_or_else(|| Error::Invalid(format!("the guest has no interface {name:?}")))
}

/// Whether interfaces can have IPv6 addresses.
pub(super) fn has_ipv6() -> bool {
    let disabled = fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6");
    disabled.is_ok_and(|text| text.trim() == "0")
}

fn parse_address(address: &IPAddress) -> Result<(IpAddr, u8)> {
    let ip: IpAddr = address
        .address
        .parse()
        .map_err(|_| bad("an address", &address.address))?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let prefix: u8 = address
        .mask
        .parse()
        .map_err(|_| bad("a prefix length", &address.mask))?;
    if prefix > longest {
        return Err(bad("a prefix length", &address.mask));
    }
    Ok((ip, prefix))
}

fn parse_mac(text: &str) -> Result<Option<[u8; 6]>> {
    if text.is_empty() {
        return Ok(None);
    }
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let mac = bytes.and_then(|bytes| bytes.try_into().ok());
    mac.map(Some).ok_or_else(|| bad("a hardware address", text))
}

fn show_mac(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// The error of a value that does not mean anything.
pub(super) fn bad(what: &str, value: &str) -> Error {
    Error::Invalid(format!("{what} is {value:?}, which it cannot be"))
}

fn address_of(message: &AddressMessage) -> Option<(IpAddr, u8)> {
    let mut local = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the peer's.
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => local = local.or(Some(*address)),
            _ => {}
        }
    }
    local.map(|address| (address, message.header.prefix_len))
}

fn describe(link: &LinkMessage, addresses: &[AddressMessage]) -> Interface {
    let mut interface = Interface::new();
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name.clone(),
            LinkAttribute::Mtu(mtu) => interface.mtu = (*mtu).into(),
            LinkAttribute::Address(mac) => interface.hwAddr = show_mac(mac),
            _ => {}
        }
    }
    interface.device = interface.name.clone();
    interface.raw_flags = (link.header.flags & OF_THE_HOST).bits();
    let own = addresses
        .iter()
        .filter(|address| address.header.index == link.header.index);
    interface.IPAddresses = own
        .filter_map(address_of)
        .map(|(ip, prefix)| wire_address(ip, prefix))
        .collect();
    interface
}

fn wire_address(ip: IpAddr, prefix: u8) -> IPAddress {
    let mut address = IPAddress::new();
    address.family = family(ip).into();
    address.address = ip.to_string();
    address.mask = prefix.to_string();
    address
}

/// The protocol's name of an address's family.
pub(super) fn family(ip: IpAddr) -> IPFamily {
    if ip.is_ipv4() { IPFamily::v4 } else { IPFamily::v6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_checked_before_anything_is_touched() {
        let mut interface = Interface::new();
        let error = |interface: &Interface| Wanted::parse(interface).unwrap_err().to_string();
        assert_eq!(error(&interface), "an interface's name is \"\", which it cannot be");
        interface.device = "eth0".into();
        interface.hwAddr = "02:00:00:00:00".into();
        assert_eq!(
            error(&interface),
            "a hardware address is \"02:00:00:00:00\", which it cannot be"
        );
        interface.hwAddr = "02:00:00:00:00:01".into();
        interface.IPAddresses = vec![wire_address("10.0.0.1".parse().unwrap(), 33)];
        assert_eq!(error(&interface), "a prefix length is \"33\", which it cannot be");
        interface.IPAddresses[0].mask = "24".into();
        interface.raw_flags = 0x1080;
        let wanted = Wanted::parse(&interface).unwrap();
        assert_eq!(wanted.name, "eth0");
        assert_eq!(wanted.mac, Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(wanted.addresses, [("10.0.0.1".parse().unwrap(), 24)]);
        assert!(wanted.flags == LinkFlags::Noarp && wanted.mtu.is_none());
    }
}
