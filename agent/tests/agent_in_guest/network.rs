//! The guest's network.

use std::{net::Ipv4Addr, sync::Arc};

use agent_protocol::protocol::{
    agent::*,
    types::{ARPNeighbor, IPAddress, IPFamily, Interface, NextHop, Route},
};
use rtnetlink::{
    packet_core::Emitable,
    packet_route::{
        AddressFamily,
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use serde_json::json;

use super::pod::{Pod, base, create};

super::cases![
    an_interface_becomes_the_hosts,
    routes_go_over_it,
    sysctls_are_set_in_their_order,
    neighbours_are_permanent,
    the_kernel_loads_what_is_first_used,
    what_cannot_be_is_refused
];

/// The hardware address that QEMU was given.
const MAC: &str = "02:00:00:00:00:01";

fn interface(name: &str, addresses: &[(&str, &str)]) -> UpdateInterfaceRequest {
    let mut interface = Interface::new();
    (interface.device, interface.name, interface.hwAddr) = (name.into(), name.into(), MAC.into());
    interface.mtu = 1400;
    interface.IPAddresses = addresses.iter().map(|(ip, mask)| address(ip, mask)).collect();
    let mut request = UpdateInterfaceRequest::new();
    request.interface = Some(interface).into();
    request
}

fn address(ip: &str, mask: &str) -> IPAddress {
    let mut address = IPAddress::new();
    address.family = if ip.contains(':') {
        IPFamily::v6.into()
    } else {
        IPFamily::v4.into()
    };
    (address.address, address.mask) = (ip.into(), mask.into());
    address
}

async fn an_interface_becomes_the_hosts(pod: Arc<Pod>) {
    pod.client
        .update_interface(interface("first0", &[("10.1.2.3", "24"), ("10.9.9.9", "32")]))
        .await
        .unwrap();
    // Again, with another name, and without one of the addresses.
    let wanted = interface("pod0", &[("10.1.2.3", "24"), ("fd00::2", "64")]);
    for _ in 0..2 {
        pod.client.update_interface(wanted.clone()).await.unwrap();
    }
    let all = pod
        .client
        .list_interfaces(ListInterfacesRequest::new())
        .await
        .unwrap()
        .Interfaces;
    let found = all.iter().find(|interface| interface.hwAddr == MAC).unwrap();
    assert_eq!((found.name.as_str(), found.mtu), ("pod0", 1400));
    let addresses: Vec<_> = found
        .IPAddresses
        .iter()
        .map(|a| format!("{}/{}", a.address, a.mask))
        .collect();
    assert!(addresses.contains(&"10.1.2.3/24".to_owned()), "{addresses:?}");
    assert!(addresses.contains(&"fd00::2/64".to_owned()), "{addresses:?}");
    assert!(!addresses.contains(&"10.9.9.9/32".to_owned()), "{addresses:?}");
    let lo = all.iter().find(|interface| interface.name == "lo").unwrap();
    assert_eq!(lo.IPAddresses[0].address, "127.0.0.1");
}

/// `RTN_BLACKHOLE` of rtnetlink(7).
const BLACKHOLE: u32 = 6;

async fn sysctls_are_set_in_their_order(pod: Arc<Pod>) {
    let ask = |sysctls: &[(&str, &str)]| {
        let mut request = UpdateRoutesRequest::new();
        request.sysctls = sysctls
            .iter()
            .map(|(name, value)| {
                let mut sysctl = Sysctl::new();
                (sysctl.name, sysctl.value) = ((*name).into(), (*value).into());
                sysctl
            })
            .collect();
        request
    };
    let (before, backlog) = ("4096", "core/somaxconn");
    let request = ask(&[
        (backlog, "77"),
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/lo/forwarding", "0"),
        ("ipv4/of_a_newer_kernel", "1"),
        ("ipv4/tcp_congestion_control", "nobody's"),
    ]);
    let answer = pod.client.update_routes(request).await.unwrap();
    assert_eq!(
        answer.refused,
        [
            "ipv4/of_a_newer_kernel = 1: No such file or directory (os error 2)",
            "ipv4/tcp_congestion_control = nobody's: No such file or directory (os error 2)"
        ]
    );
    pod.try_create(create("c", base("sleep 600"))).await.unwrap();
    pod.start("c").await;
    let script = "cd /proc/sys/net; cat core/somaxconn ipv4/ip_forward ipv4/conf/lo/forwarding";
    assert_eq!(pod.exec("c", script).await.1, "77\n1\n0\n");
    pod.remove("c").await;
    for path in ["", "../kernel/core_pattern", "/proc/sys/kernel/core_pattern"] {
        let refused = pod
            .client
            .update_routes(ask(&[(path, "x")]))
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("a sysctl's path is"), "{refused}");
    }
    let again = ask(&[(backlog, before), ("ipv4/ip_forward", "0")]);
    assert!(pod.client.update_routes(again).await.unwrap().refused.is_empty());
}

async fn routes_go_over_it(pod: Arc<Pod>) {
    pod.client
        .update_interface(interface("pod0", &[("10.1.2.3", "24"), ("fd00::2", "64")]))
        .await
        .unwrap();
    let route = |dest: &str, gateway: &str, scope: u32| {
        let mut route = Route::new();
        (route.dest, route.gateway, route.device) = (dest.into(), gateway.into(), "pod0".into());
        (route.scope, route.mtu) = (scope, 1300);
        route
    };
    let mut request = UpdateRoutesRequest::new();
    let mut spare = route("", "10.1.2.1", 0);
    spare.priority = 100;
    // The gateway is reachable by a route that comes after it.
    let all = vec![
        spare,
        route("", "10.200.0.1", 0),
        route("10.200.0.1/32", "", 253),
        route("fd01::/64", "fd00::1", 0),
        route("", "10.1.2.9", 0),
    ];
    let mut nowhere = Route::new();
    (nowhere.dest, nowhere.kind) = ("10.50.0.0/16".into(), BLACKHOLE);
    let hops = [("10.1.2.1", 0), ("10.1.2.9", 2)].map(|(gateway, hops)| {
        let mut hop = NextHop::new();
        (hop.gateway, hop.device, hop.hops) = (gateway.into(), "pod0".into(), hops);
        hop
    });
    let mut several = route("10.60.0.0/16", "10.1.2.1", 0);
    several.next_hops = hops.to_vec();
    let all = [all, vec![nowhere, several.clone()]].concat();
    request.routes = Some(Routes {
        Routes: all,
        ..Default::default()
    })
    .into();
    request.further_routes = [100, 1000]
        .map(|table| {
            let mut elsewhere = route("10.70.0.0/16", "10.1.2.1", 0);
            elsewhere.table = table;
            elsewhere
        })
        .to_vec();
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = RuleAction::ToTable;
    rule.header.table = 100;
    rule.header.src_len = 24;
    rule.attributes = vec![
        RuleAttribute::Priority(9),
        RuleAttribute::Source(Ipv4Addr::new(10, 1, 2, 0).into()),
    ];
    request.rules = vec![vec![0; rule.buffer_len()]];
    rule.emit(&mut request.rules[0]);
    for _ in 0..2 {
        pod.client.update_routes(request.clone()).await.unwrap();
    }
    pod.run("c", "ip rule; ip route show table 100; ip route show table 1000")
        .await;
    let seen = String::from_utf8(pod.output("c", "").await).unwrap();
    assert!(seen.matches("10.70.0.0/16 via 10.1.2.1").count() == 2, "{seen}");
    assert!(seen.contains("9:\tfrom 10.1.2.0/24 lookup 100"), "{seen}");
    assert_eq!(seen.matches("lookup 100").count(), 1, "{seen}");
    pod.remove("c").await;
    let routes = pod.client.list_routes(ListRoutesRequest::new()).await.unwrap().Routes;
    let find = |dest: &str| routes.iter().find(|route| route.dest == dest && route.device == "pod0");
    let default = find("").unwrap();
    assert_eq!((default.gateway.as_str(), default.mtu), ("10.200.0.1", 1300));
    let defaults = routes
        .iter()
        .filter(|route| route.dest.is_empty() && route.device == "pod0");
    let defaults: Vec<_> = defaults.map(|route| (route.gateway.as_str(), route.priority)).collect();
    assert_eq!(defaults, [("10.200.0.1", 0), ("10.1.2.9", 0), ("10.1.2.1", 100)]);
    let to = |dest: &str| routes.iter().find(|route| route.dest == dest).unwrap();
    assert_eq!(to("10.50.0.0/16").kind, BLACKHOLE);
    let told = to("10.60.0.0/16").next_hops.iter();
    let told: Vec<_> = told
        .map(|hop| (hop.gateway.as_str(), hop.device.as_str(), hop.hops))
        .collect();
    assert_eq!(told, [("10.1.2.1", "pod0", 0), ("10.1.2.9", "pod0", 2)]);
    assert_eq!(find("10.200.0.1/32").unwrap().scope, 253);
    assert_eq!(find("fd01::/64").unwrap().gateway, "fd00::1");
}

async fn neighbours_are_permanent(pod: Arc<Pod>) {
    let mut neighbour = ARPNeighbor::new();
    neighbour.toIPAddress = Some(address("10.1.2.77", "")).into();
    (neighbour.device, neighbour.lladdr, neighbour.state) = ("pod0".into(), "02:00:00:00:00:77".into(), 0x80);
    let mut request = AddARPNeighborsRequest::new();
    request.neighbors = Some(ARPNeighbors {
        ARPNeighbors: vec![neighbour],
        ..Default::default()
    })
    .into();
    for _ in 0..2 {
        pod.client.add_arp_neighbors(request.clone()).await.unwrap();
    }
    pod.run("c", "cat /proc/net/arp").await;
    let table = String::from_utf8(pod.output("c", "").await).unwrap();
    assert!(
        table
            .lines()
            .any(|line| line.starts_with("10.1.2.77 ") && line.contains("0x6")),
        "{table}"
    );
    pod.remove("c").await;
}

async fn the_kernel_loads_what_is_first_used(pod: Arc<Pod>) {
    let mut spec =
        base("ip link add dummy7 type dummy && ip link set dummy7 name seven && ip link del seven && echo ok");
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
    }
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    let output = pod.output("c", "").await;
    assert_eq!(
        String::from_utf8(output).unwrap(),
        "ok\n",
        "{}",
        pod.errors("c", "").await
    );
    pod.remove("c").await;
}

async fn what_cannot_be_is_refused(pod: Arc<Pod>) {
    let error = pod
        .client
        .update_interface(interface("much-too-long-a-name", &[]))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("an interface's name is \"much-too-long-a-name\""),
        "{error}"
    );
    let error = pod
        .client
        .update_interface(interface("pod0", &[("10.0.0.300", "8")]))
        .await
        .unwrap_err();
    assert!(error.to_string().starts_with("an address is \"10.0.0.300\""), "{error}");
    let mut route = Route::new();
    (route.dest, route.device) = ("10.0.0.0/8".into(), "nothing0".into());
    let mut request = UpdateRoutesRequest::new();
    request.routes = Some(Routes {
        Routes: vec![route],
        ..Default::default()
    })
    .into();
    let error = pod.client.update_routes(request).await.unwrap_err();
    assert!(
        error.to_string().starts_with("the guest has no interface \"nothing0\""),
        "{error}"
    );
}
