//! The guest's routes.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use agent_protocol::protocol::{
    agent::Routes,
    types::{IPFamily, NextHop, Route},
};
use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Parseable},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
            RouteNextHopFlags, RouteProtocol, RouteScope, RouteType,
        },
        rule::RuleMessage,
    },
};

use super::{
    error::{Doing, Result},
    network::{Network, bad, device, family, has_ipv6},
};
impl Network {
    /// Adds routes, those to links before those over gateways, which the first make reachable; what is there stays.
    /// Of several to one destination with one metric the first is the one that is taken, as where they come from.
    /// Idempotent.
    pub(super) async fn update_routes(&self, mut routes: Routes) -> Result<Routes> {
        routes.Routes.sort_by_key(|route| !route.gateway.is_empty());
        let parsed = routes.Routes.iter().map(parse).collect::<Result<Vec<_>>>()?;
        let mut seen = HashSet::new();
        for (route, message) in routes.Routes.iter().zip(parsed) {
            let family = message.header.address_family;
            if family == AddressFamily::Inet6 && !has_ipv6() {
                continue;
            }
            let handle = self.handle().await?;
            let is_first = seen.insert((u8::from(family), route.table, &route.dest, route.priority));
            let added = match is_first {
                true => handle.route().add(message).replace().execute().await,
                false => append(handle.clone(), message).await,
            };
            match added {
                Err(rtnetlink::Error::NetlinkError(refusal)) if refusal.raw_code() == -libc::EEXIST => {}
                other => other.doing(|| show(route))?,
            }
        }
        self.list_routes().await
    }

    /// Adds rules, each a message of the kernel's without its header. Idempotent.
    pub(super) async fn add_rules(&self, rules: &[Vec<u8>]) -> Result<()> {
        for bytes in rules {
            let rule = RuleMessage::parse(bytes.as_slice()).map_err(|error| bad("a rule", &error.to_string()))?;
            if rule.header.family == AddressFamily::Inet6 && !has_ipv6() {
                continue;
            }
            let mut request = self.handle().await?.rule().add();
            *request.message_mut() = rule.clone();
            match request.execute().await {
                Err(rtnetlink::Error::NetlinkError(refusal)) if refusal.raw_code() == -libc::EEXIST => {}
                other => other.doing(|| format!("add the rule {rule:?}"))?,
            }
        }
        Ok(())
    }

    /// The routes of the main table.
    pub(super) async fn list_routes(&self) -> Result<Routes> {
        let routes = self.handle().await?.route();
        let mut list = Routes::new();
        for query in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let found: Vec<_> = routes
                .get(query)
                .execute()
                .try_collect()
                .await
                .doing(|| "list the routes".into())?;
            let main = found
                .iter()
                .filter(|route| route.header.table == RouteHeader::RT_TABLE_MAIN);
            list.Routes.extend(main.map(describe));
        }
        Ok(list)
    }
}

/// Adds a route behind those to the same destination.
async fn append(mut handle: Handle, message: RouteMessage) -> std::result::Result<(), rtnetlink::Error> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
    let mut answers = handle.request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(refusal) = answer.payload
            && refusal.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(refusal));
        }
    }
    Ok(())
}

fn show(route: &Route) -> String {
    let to = if route.dest.is_empty() { "default" } else { &route.dest };
    let mut text = format!("add the route to {to}");
    for (word, value) in [("via", &route.gateway), ("on", &route.device), ("from", &route.source)] {
        if !value.is_empty() {
            text += &format!(" {word} {value}");
        }
    }
    text
}

fn parse(route: &Route) -> Result<RouteMessage> {
    let destination = parse_network(&route.dest)?;
    let gateway = parse_host("a route's gateway", &route.gateway)?;
    let source = parse_host("a route's source", &route.source)?;
    let told = match route.family.enum_value_or_default() {
        IPFamily::v4 => AddressFamily::Inet,
        IPFamily::v6 => AddressFamily::Inet6,
    };
    // A family of zero is IPv4, or was not said.
    let seen = gateway.or(destination.map(|(ip, _)| ip)).or(source);
    let mut message = RouteMessage::default();
    message.header.address_family = match seen {
        Some(IpAddr::V4(_)) => AddressFamily::Inet,
        Some(IpAddr::V6(_)) => AddressFamily::Inet6,
        None => told,
    };
    // The number that has no room in the header stands in an attribute, and then the header's is not looked at.
    message.header.table = match route.table {
        0 => RouteHeader::RT_TABLE_MAIN,
        table => u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC),
    };
    if route.table > u8::MAX.into() {
        message.attributes.push(RouteAttribute::Table(route.table));
    }
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = parse_kind(route.kind)?;
    message.header.scope =
        RouteScope::from(u8::try_from(route.scope).map_err(|_| bad("a scope", &route.scope.to_string()))?);
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    let attributes = &mut message.attributes;
    if let Some((ip, prefix)) = destination.filter(|(_, prefix)| *prefix > 0) {
        message.header.destination_prefix_length = prefix;
        attributes.push(RouteAttribute::Destination(ip.into()));
    }
    attributes.extend(source.map(|ip| RouteAttribute::PrefSource(ip.into())));
    if route.next_hops.is_empty() {
        attributes.extend(gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
        // Where nothing goes out there is no device.
        if message.header.kind == RouteType::Unicast {
            attributes.push(RouteAttribute::Oif(device(&route.device)?));
        }
    } else {
        let hops = route.next_hops.iter().map(parse_hop).collect::<Result<_>>()?;
        attributes.push(RouteAttribute::MultiPath(hops));
    }
    if route.priority > 0 {
        attributes.push(RouteAttribute::Priority(route.priority));
    }
    if route.mtu > 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

/// 0 for a route to somewhere, or one that goes nowhere.
fn parse_kind(number: u32) -> Result<RouteType> {
    let kind = u8::try_from(number).map(RouteType::from);
    match kind {
        Ok(RouteType::Unspec) => Ok(RouteType::Unicast),
        Ok(
            kind @ (RouteType::Unicast
            | RouteType::BlackHole
            | RouteType::Unreachable
            | RouteType::Prohibit
            | RouteType::Throw),
        ) => Ok(kind),
        _ => Err(bad("a route's kind", &number.to_string())),
    }
}

fn parse_hop(hop: &NextHop) -> Result<RouteNextHop> {
    let mut parsed = RouteNextHop::default();
    parsed.hops = u8::try_from(hop.hops).map_err(|_| bad("a next hop's weight", &hop.hops.to_string()))?;
    parsed.flags = RouteNextHopFlags::from_bits_retain(hop.flags.to_le_bytes()[0]);
    parsed.interface_index = device(&hop.device)?;
    let gateway = parse_host("a next hop's gateway", &hop.gateway)?;
    parsed
        .attributes
        .extend(gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
    Ok(parsed)
}

/// A network in CIDR form, or a host; nothing for the default route.
fn parse_network(text: &str) -> Result<Option<(IpAddr, u8)>> {
    if matches!(text, "" | "default") {
        return Ok(None);
    }
    let error = || bad("a route's destination", text);
    let (ip, prefix) = match text.split_once('/') {
        Some((ip, prefix)) => (ip, Some(prefix.parse().map_err(|_| error())?)),
        None => (text, None),
    };
    let ip: IpAddr = ip.parse().map_err(|_| error())?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    match prefix.unwrap_or(longest) {
        prefix if prefix <= longest => Ok(Some((ip, prefix))),
        _ => Err(error()),
    }
}

fn parse_host(what: &str, text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    // Upstream's shims may send it with its prefix length.
    let ip = text.split('/').next().unwrap_or_default();
    ip.parse().map(Some).map_err(|_| bad(what, text))
}

fn text(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(ip) => ip.to_string(),
        RouteAddress::Inet6(ip) => ip.to_string(),
        _ => String::new(),
    }
}

fn describe_hop(hop: &RouteNextHop) -> NextHop {
    let mut told = NextHop::new();
    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(via) => Some(text(via)),
        _ => None,
    });
    told.gateway = gateway.unwrap_or_default();
    told.device = name_of(hop.interface_index);
    told.hops = hop.hops.into();
    told.flags = hop.flags.bits().into();
    told
}

fn describe(message: &RouteMessage) -> Route {
    let mut route = Route::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.dest = format!("{}/{}", text(to), message.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(via) => route.gateway = text(via),
            RouteAttribute::PrefSource(from) => route.source = text(from),
            RouteAttribute::Oif(index) => route.device = name_of(*index),
            RouteAttribute::Priority(metric) => route.priority = *metric,
            RouteAttribute::MultiPath(hops) => route.next_hops = hops.iter().map(describe_hop).collect(),
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtu.unwrap_or(0);
            }
            _ => {}
        }
    }
    if message.header.kind != RouteType::Unicast {
        route.kind = u8::from(message.header.kind).into();
    }
    route.scope = u8::from(message.header.scope).into();
    route.flags = message.header.flags.bits();
    let unspecified: IpAddr = match message.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    route.family = family(unspecified).into();
    route
}

fn name_of(index: u32) -> String {
    let name = nix::net::if_::if_indextoname(index);
    name.ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_networks_hosts_or_the_default() {
        assert_eq!(parse_network("").unwrap(), None);
        assert_eq!(
            parse_network("10.1.0.0/16").unwrap(),
            Some(("10.1.0.0".parse().unwrap(), 16))
        );
        assert_eq!(
            parse_network("fe80::1").unwrap(),
            Some(("fe80::1".parse().unwrap(), 128))
        );
        for wrong in ["10.0.0.0/33", "x", "10.0.0.0/", "/8"] {
            assert!(parse_network(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_route_says_its_family_by_its_addresses() {
        let mut route = Route::new();
        route.device = "lo".into();
        route.gateway = "fe80::1".into();
        route.scope = 253;
        route.mtu = 1400;
        let message = parse(&route).unwrap();
        assert_eq!(message.header.address_family, AddressFamily::Inet6);
        assert_eq!(u8::from(message.header.scope), 253);
        assert!(
            message
                .attributes
                .contains(&RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]))
        );
        route.device = "nix9".into();
        assert_eq!(
            parse(&route).unwrap_err().to_string(),
            "the guest has no interface \"nix9\""
        );
    }
}
