//! The conversation with the kernel, in the pod's namespace. Source: rtnetlink(7), tc-matchall(8), tc-mirred(8).

use super::{Interface, Neighbor, NetError, NextHop, Route, netlink};
use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where filters of incoming packets hang: `tc ... parent ffff:`.
const INGRESS_PARENT: u32 = 0xffff_0000;

/// The largest MTU of a tap: its largest packet less an Ethernet header (`MAX_MTU` in `drivers/net/tun.c` of Linux). A
/// veth may have 65535.
const MOST_MTU: u32 = 65521;

/// `RT_TABLE_LOCAL` of linux/rtnetlink.h, which is the kernel's own.
const LOCAL_TABLE: u32 = 255;

/// What a namespace has.
pub(super) struct Found {
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) rules: Vec<RuleMessage>,
    pub(super) neighbors: Vec<Neighbor>,
}

/// Everything of the namespace that the guest is to have.
pub(super) async fn read(handle: &Handle) -> Result<Found, NetError> {
    let asked = |action: &'static str| move |source| netlink(action.to_owned(), source);
    let links: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(asked("list the pod's interfaces"))?;
    let addresses: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(asked("list the pod's addresses"))?;

    let mut interfaces = BTreeMap::new();
    for link in links
        .iter()
        .filter(|link| !link.header.flags.contains(LinkFlags::Loopback))
    {
        let own = addresses
            .iter()
            .filter(|address| address.header.index == link.header.index);
        let all: Vec<_> = own
            .map(|address| {
                (
                    address.header.scope,
                    address_of(&address.attributes),
                    address.header.prefix_len,
                )
            })
            .collect();
        // Without an address it may be there for what is below IP. What the kernel makes in each namespace (tunl0, sit0
        // and the like) is down, or no Ethernet.
        let flags = link.header.flags;
        if all.is_empty() && !(flags.contains(LinkFlags::Up) && link.header.link_layer_type == LinkLayerType::Ether) {
            continue;
        }
        let kept = all.into_iter().filter_map(|(scope, address, length)| {
            // Every kernel makes fe80::/64 by itself, and with the same MAC the same one.
            address
                .filter(|address| !(address.is_ipv6() && scope == AddressScope::Link))
                .map(|address| (address, length))
        });
        interfaces.insert(link.header.index, interface(link, kept.collect())?);
    }

    let name = |index: u32| {
        interfaces
            .get(&index)
            .map(|interface: &Interface| interface.name.clone())
    };
    let (mut routes, mut outside) = (Vec::new(), Vec::new());
    for query in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let found: Vec<_> = handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(asked("list the pod's routes"))?;
        let carried = found.iter().filter(|message| is_the_pods(message));
        routes.extend(carried.filter_map(|message| route(message, &name)));
        outside.extend(found.iter().filter_map(left_out));
    }
    if !outside.is_empty() {
        let outside = outside.join(", ");
        tracing::warn!(outside, "the guest has no such routes of its pod");
    }
    // A gateway must be reachable before a route through it is accepted.
    routes.sort_by_key(|route| route.gateway.is_some());

    let neighbors: Vec<_> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(asked("list the pod's neighbours"))?;
    let neighbors = neighbors
        .iter()
        .filter_map(|message| neighbor(message, &name))
        .collect();
    Ok(Found {
        interfaces: interfaces.into_values().collect(),
        routes,
        rules: rules(handle).await?,
        neighbors,
    })
}

pub(super) fn interface(link: &LinkMessage, addresses: Vec<(IpAddr, u8)>) -> Result<Interface, NetError> {
    let mut name = String::new();
    let mut mac = None;
    let mut mtu = 1500;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name.clone_from(found),
            LinkAttribute::Address(found) => mac = <[u8; 6]>::try_from(found.as_slice()).ok(),
            LinkAttribute::Mtu(found) => mtu = (*found).min(MOST_MTU),
            _ => {}
        }
    }
    match mac {
        Some(mac) if link.header.link_layer_type == LinkLayerType::Ether => Ok(Interface {
            name,
            mac,
            mtu,
            addresses,
            flags: link.header.flags & (LinkFlags::Noarp | LinkFlags::Promisc | LinkFlags::Allmulti),
            index: link.header.index,
        }),
        _ => Err(NetError::NotEthernet(name)),
    }
}

/// `IFA_LOCAL` is the interface's own; on a point-to-point link `IFA_ADDRESS` is the other end's.
fn address_of(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

fn table_of(message: &RouteMessage) -> u32 {
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    table.unwrap_or(message.header.table.into())
}

/// Routes that somebody added; the kernel's own follow from the addresses.
fn is_the_pods(message: &RouteMessage) -> bool {
    const CARRIED: [RouteType; 5] = [
        RouteType::Unicast,
        RouteType::BlackHole,
        RouteType::Unreachable,
        RouteType::Prohibit,
        RouteType::Throw,
    ];
    table_of(message) != LOCAL_TABLE
        && message.header.protocol != RouteProtocol::Kernel
        && CARRIED.contains(&message.header.kind)
        // A cache entry, not a route.
        && !message.header.flags.contains(RouteFlags::Cloned)
}

/// `None` for a route over an interface that the guest does not get.
fn route(message: &RouteMessage, name: &impl Fn(u32) -> Option<String>) -> Option<Route> {
    let (mut destination, mut gateway, mut device, mut source, mut mtu, mut metric, mut next_hops) =
        (None, None, None, None, 0, 0, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Oif(index) => device = name(*index),
            RouteAttribute::MultiPath(hops) => next_hops = hops.iter().filter_map(|hop| next_hop(hop, name)).collect(),
            RouteAttribute::Priority(found) => metric = *found,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics
                    .iter()
                    .find_map(|metric| {
                        if let RouteMetric::Mtu(mtu) = metric {
                            Some(*mtu)
                        } else {
                            None
                        }
                    })
                    .unwrap_or(0);
            }
            _ => {}
        }
    }
    let destination = destination.map(|address| (address, message.header.destination_prefix_length));
    let goes_somewhere = message.header.kind == RouteType::Unicast;
    if let Some(hop) = next_hops.first() {
        // What an agent sees that knows of one path only.
        (gateway, device) = (hop.gateway, Some(hop.device.clone()));
    }
    if goes_somewhere && device.is_none() {
        return None;
    }
    Some(Route {
        destination: destination.filter(|(_, length)| *length > 0),
        gateway,
        device: device.filter(|_| goes_somewhere).unwrap_or_default(),
        source,
        scope: message.header.scope.into(),
        // The others are states (dead, link down, offloaded), not wishes.
        flags: (message.header.flags & RouteFlags::Onlink).bits(),
        mtu,
        metric,
        ipv6: message.header.address_family == AddressFamily::Inet6,
        kind: message.header.kind.into(),
        next_hops,
        table: table_of(message),
    })
}

/// `None` for a path over an interface that the guest does not get.
fn next_hop(hop: &RouteNextHop, name: &impl Fn(u32) -> Option<String>) -> Option<NextHop> {
    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        _ => None,
    });
    Some(NextHop {
        gateway,
        device: name(hop.interface_index)?,
        hops: hop.hops,
        flags: (hop.flags & RouteNextHopFlags::Onlink).bits(),
    })
}

/// What is not carried, in the words of ip-route(8) and ip-rule(8).
pub(super) fn left_out(message: &RouteMessage) -> Option<String> {
    let table = table_of(message);
    let kind = message.header.kind;
    let of_kernel = message.header.protocol == RouteProtocol::Kernel;
    let is_entry = message.header.flags.contains(RouteFlags::Cloned);
    if of_kernel || is_entry || table == LOCAL_TABLE || is_the_pods(message) {
        return None;
    }
    let to = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    let length = message.header.destination_prefix_length;
    let to = to.map_or_else(|| "default".into(), |address| format!("{address}/{length}"));
    Some(format!("{kind:?} {to} table {table}").to_lowercase())
}

/// Rules that somebody added; those that each namespace begins with are the kernel's (ip-rule(8)).
async fn rules(handle: &Handle) -> Result<Vec<RuleMessage>, NetError> {
    /// `FIB_RULE_INVERT` and `FIB_RULE_FIND_SADDR` of linux/fib_rules.h; the others are states, not wishes.
    const WISHES: u32 = 0x2 | 0x1_0000;
    let mut found = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules: Result<Vec<_>, _> = handle.rule().get(version).execute().try_collect().await;
        match rules {
            Ok(rules) => found.extend(rules),
            // A kernel without rules, or without IPv6.
            Err(rtnetlink::Error::NetlinkError(refusal))
                if matches!(-refusal.raw_code(), nix::libc::EOPNOTSUPP | nix::libc::EAFNOSUPPORT) => {}
            Err(source) => return Err(netlink("list the pod's rules".into(), source)),
        }
    }
    found.retain(|rule| {
        !rule
            .attributes
            .contains(&RuleAttribute::Protocol(RouteProtocol::Kernel))
    });
    for rule in &mut found {
        rule.header.flags = RuleFlags::from_bits_retain(rule.header.flags.bits() & WISHES);
    }
    Ok(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbor(message: &NeighbourMessage, name: &impl Fn(u32) -> Option<String>) -> Option<Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let device = name(message.header.ifindex)?;
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
        _ => None,
    })?;
    Some(Neighbor {
        address,
        device,
        mac,
        flags: message.header.flags.bits(),
    })
}

/// Gives a new tap its MTU and switches it on. It gets no address: the host's stack is not to speak on it.
pub(super) async fn prepare_tap(handle: &Handle, tap: u32, mtu: u32) -> Result<(), rtnetlink::Error> {
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let message = LinkUnspec::new_with_index(tap)
        .mtu(mtu)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![silent]));
    match handle.link().set(message.build()).execute().await {
        // Where the kernel has no IPv6 there is no address to be made.
        Err(rtnetlink::Error::NetlinkError(error)) if is(&error, nix::Error::EAFNOSUPPORT) => {
            let message = LinkUnspec::new_with_index(tap).mtu(mtu).build();
            handle.link().set(message).execute().await?;
        }
        other => other?,
    }
    let up = LinkUnspec::new_with_index(tap).up().build();
    handle.link().set(up).execute().await
}

/// Which multicast groups are joined is known to the guest's kernel only; a macvlan passes on no frame of others than
/// its own host has joined.
pub(super) async fn hear_all_groups(handle: &Handle, index: u32, all: bool) -> Result<(), rtnetlink::Error> {
    let message = LinkUnspec::new_with_index(index).allmulticast(all).build();
    handle.link().set(message).execute().await
}

/// Whatever comes in on `from` goes out on `to`, before the host's stack sees it.
pub(super) async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let from = signed(from)?;
    handle.qdisc().add(from).ingress().execute().await?;
    let every_protocol = u16::try_from(nix::libc::ETH_P_ALL).unwrap_or_default().to_be();
    handle
        .traffic_filter(from)
        .add()
        .parent(INGRESS_PARENT)
        .protocol(every_protocol)
        .redirect(to)?
        .execute()
        .await
}

/// Removes the ingress discipline of an interface, and its filters with it; fine when there is none.
pub(super) async fn remove_redirect(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut request = handle.qdisc().del(signed(index)?);
    let header = &mut request.message_mut().header;
    header.parent = TcHandle::INGRESS;
    header.handle = TcHandle::from(INGRESS_PARENT);
    match request.execute().await {
        Err(rtnetlink::Error::NetlinkError(error))
            if [nix::Error::ENOENT, nix::Error::EINVAL, nix::Error::ENODEV]
                .iter()
                .any(|known| is(&error, *known)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Interface indices are `int` in one half of rtnetlink and `u32` in the other; the kernel gives positive ones only.
fn signed(index: u32) -> Result<i32, rtnetlink::Error> {
    i32::try_from(index).map_err(|_| rtnetlink::Error::RequestFailed)
}

fn is(error: &rtnetlink::packet_core::ErrorMessage, known: nix::Error) -> bool {
    error.code.is_some_and(|code| code.get() == -(known as i32))
}
