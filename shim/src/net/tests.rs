//! Real namespaces, real links, real frames: these tests need root.

use super::*;
use futures::TryStreamExt;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::link::MacVlanMode;
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::{LinkMacVlan, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

const OUTSIDE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A pod's namespace with `eth0`, whose other end is in a namespace that plays the node.
struct Cluster {
    pod: OwnedFd,
    node: OwnedFd,
}

/// The path that a CRI would put in the spec.
fn path_of(namespace: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd()))
}

fn inside<T: Send>(namespace: &OwnedFd, work: impl AsyncFnOnce(rtnetlink::Handle) -> Result<T, NetError> + Send) -> T {
    Namespace::open(&path_of(namespace)).unwrap().inside(work).unwrap()
}

async fn apply(handle: &rtnetlink::Handle, link: LinkMessage) {
    handle.link().set(link).execute().await.unwrap();
}

fn by_index(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

/// A namespace whose loopback is up.
fn namespace() -> OwnedFd {
    let namespace = empty_namespace().unwrap();
    inside(&namespace, async |handle| {
        apply(&handle, by_index(1).up().build()).await;
        Ok(())
    });
    namespace
}

/// What a CNI does for a pod with 10.9.0.2/24 and fd09::2/64.
fn cluster() -> Cluster {
    let (pod, node) = (namespace(), namespace());
    let pod_fd = pod.as_raw_fd();
    inside(&node, async |handle| {
        handle
            .link()
            .add(LinkVeth::new("node0", "eth0").build())
            .execute()
            .await
            .unwrap();
        let node0 = if_nametoindex("node0").unwrap();
        let eth0 = if_nametoindex("eth0").unwrap();
        apply(
            &handle,
            by_index(eth0)
                .address(POD_MAC.to_vec())
                .mtu(1400)
                .setns_by_fd(pod_fd)
                .build(),
        )
        .await;
        apply(
            &handle,
            by_index(node0).address(OUTSIDE_MAC.to_vec()).mtu(1400).up().build(),
        )
        .await;
        add_address(&handle, node0, Ipv4Addr::new(10, 9, 0, 1).into(), 24).await;
        add_address(&handle, node0, "fd09::1".parse().unwrap(), 64).await;
        Ok(())
    });
    inside(&pod, async |handle| {
        let eth0 = if_nametoindex("eth0").unwrap();
        apply(&handle, by_index(eth0).up().build()).await;
        add_address(&handle, eth0, Ipv4Addr::new(10, 9, 0, 2).into(), 24).await;
        add_address(&handle, eth0, "fd09::2".parse().unwrap(), 64).await;
        let gateway = Ipv4Addr::new(10, 9, 0, 1);
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        handle.route().add(default).execute().await.unwrap();
        let default = RouteMessageBuilder::<Ipv6Addr>::new()
            .gateway("fd09::1".parse().unwrap())
            .build();
        handle.route().add(default).execute().await.unwrap();
        let onlink = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::new(169, 254, 1, 1), 32)
            .output_interface(eth0)
            .scope(rtnetlink::packet_route::route::RouteScope::Link)
            .build();
        handle.route().add(onlink).execute().await.unwrap();
        handle
            .neighbours()
            .add(eth0, Ipv4Addr::new(169, 254, 1, 1).into())
            .link_layer_address(&OUTSIDE_MAC)
            .execute()
            .await
            .unwrap();
        // A link that is down is nothing the guest needs.
        handle
            .link()
            .add(LinkVeth::new("spare", "spare-end").build())
            .execute()
            .await
            .unwrap();
        Ok(())
    });
    Cluster { pod, node }
}

async fn add_address(handle: &rtnetlink::Handle, index: u32, address: IpAddr, length: u8) {
    let mut request = handle.address().add(index, address, length);
    // Without duplicate address detection the address can be used at once.
    request.message_mut().header.flags = rtnetlink::packet_route::address::AddressHeaderFlags::Nodad;
    request.execute().await.unwrap();
}

/// The guest's network card: frames with a `virtio_net_hdr` of 10 bytes before each.
struct Card(File);

impl Card {
    fn of(network: &Network, number: usize) -> Self {
        Self(network.taps().unwrap().remove(number).into())
    }

    fn send(&mut self, frame: &[u8]) {
        let mut buffer = vec![0; 10];
        buffer.extend_from_slice(frame);
        self.0.write_all(&buffer).unwrap();
    }

    /// The first frame within two seconds that `wanted` accepts.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, u16::try_from(left.as_millis()).unwrap()).unwrap() == 0 {
                return None;
            }
            let mut buffer = [0; 2048];
            let length = self.0.read(&mut buffer).unwrap();
            if wanted(&buffer[10..length]) {
                return Some(buffer[10..length].to_vec());
            }
        }
        None
    }
}

fn frame(to: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &POD_MAC, &kind.to_be_bytes(), payload].concat()
}

fn arp_request() -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    frame(
        [255; 6],
        0x0806,
        &[&head[..], &POD_MAC, &[10, 9, 0, 2], &[0; 6], &[10, 9, 0, 1]].concat(),
    )
}

/// Asks for the Ethernet address of fd09::1 (RFC 4861).
fn neighbour_solicitation() -> Vec<u8> {
    let source: Ipv6Addr = "fd09::2".parse().unwrap();
    let target: Ipv6Addr = "fd09::1".parse().unwrap();
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let mut body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &POD_MAC].concat();
    let length = u8::try_from(body.len()).unwrap();
    let pseudo = [
        &source.octets()[..],
        &group.octets(),
        &[0, 0, 0, length, 0, 0, 0, 58],
        &body,
    ]
    .concat();
    let mut sum: u32 = pseudo
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    body[2..4].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    let header = [
        &[0x60, 0, 0, 0, 0, length, 58, 255][..],
        &source.octets(),
        &group.octets(),
    ]
    .concat();
    frame([0x33, 0x33, 0xff, 0, 0, 1], 0x86dd, &[header, body].concat())
}

#[test]
fn the_snapshot_holds_what_the_cni_set_up() {
    let cluster = cluster();
    let snapshot = snapshot(&path_of(&cluster.pod)).unwrap();
    let [eth0] = snapshot.interfaces.as_slice() else {
        panic!("{:?}", snapshot.interfaces)
    };
    assert_eq!(
        (eth0.name.as_str(), eth0.mac_text().as_str(), eth0.mtu),
        ("eth0", "02:00:00:00:00:02", 1400)
    );
    assert_eq!(
        eth0.addresses,
        [("10.9.0.2".parse().unwrap(), 24), ("fd09::2".parse().unwrap(), 64)]
    );

    let texts: Vec<_> = snapshot
        .routes
        .iter()
        .map(|route| {
            (
                route.destination.map(|(a, l)| format!("{a}/{l}")),
                route.gateway.map(|g| g.to_string()),
                route.scope,
            )
        })
        .collect();
    assert_eq!(
        texts,
        [
            (Some("169.254.1.1/32".to_owned()), None, 253),
            (None, Some("10.9.0.1".to_owned()), 0),
            (None, Some("fd09::1".to_owned()), 0),
        ]
    );
    assert!(
        snapshot
            .routes
            .iter()
            .all(|route| route.device == "eth0" && route.flags == 0)
    );
    let metrics: Vec<_> = snapshot.routes.iter().map(|route| route.metric).collect();
    assert_eq!(
        metrics,
        [0, 0, 1024],
        "what the kernel gives IPv6 by default is told as any other"
    );
    let [neighbor] = snapshot.neighbors.as_slice() else {
        panic!("{:?}", snapshot.neighbors)
    };
    assert_eq!(
        (neighbor.address.to_string().as_str(), neighbor.mac),
        ("169.254.1.1", OUTSIDE_MAC)
    );
}

#[test]
fn routes_that_go_nowhere_and_over_several_paths_are_the_pods_too() {
    use rtnetlink::{
        RouteNextHopBuilder,
        packet_core::Parseable,
        packet_route::{
            route::{RouteProtocol, RouteType},
            rule::{RuleAction, RuleAttribute, RuleMessage},
        },
    };
    let cluster = cluster();
    let route =
        |third: u8| RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::new(10, 50, third, 0), 24);
    inside(&cluster.pod, async |handle| {
        let eth0 = if_nametoindex("eth0").unwrap();
        let hop = |last: u8, hops: u8| {
            let hop = RouteNextHopBuilder::new_ipv4().interface(eth0).weight(hops);
            hop.via(Ipv4Addr::new(10, 9, 0, last).into()).unwrap().build()
        };
        let several = route(3).multipath(vec![hop(1, 0), hop(9, 2)]).build();
        let elsewhere = |third: u8, table| route(third).output_interface(eth0).table_id(table).build();
        for message in [
            route(1).kind(RouteType::BlackHole).build(),
            route(2).kind(RouteType::Prohibit).build(),
            several,
            elsewhere(4, 100),
            elsewhere(5, 1000),
        ] {
            handle.route().add(message).execute().await.unwrap();
        }
        let rule = handle
            .rule()
            .add()
            .v4()
            .source_prefix(Ipv4Addr::new(10, 9, 0, 0), 24)
            .table_id(100);
        rule.priority(9).action(RuleAction::ToTable).execute().await.unwrap();
        Ok(())
    });
    let snapshot = snapshot(&path_of(&cluster.pod)).unwrap();
    let find = |to: &str| {
        let is_to = |route: &&Route| route.destination.is_some_and(|(address, _)| address.to_string() == to);
        snapshot.routes.iter().find(is_to)
    };
    let nowhere = ["10.50.1.0", "10.50.2.0"].map(|to| find(to).unwrap());
    assert_eq!(
        nowhere.map(|route| (route.kind, route.device.as_str())),
        [(6, ""), (8, "")]
    );
    let several = find("10.50.3.0").unwrap();
    let hops: Vec<_> = several
        .next_hops
        .iter()
        .map(|hop| (hop.gateway.unwrap().to_string(), hop.device.as_str(), hop.hops))
        .collect();
    assert_eq!(
        hops,
        [("10.9.0.1".to_owned(), "eth0", 0), ("10.9.0.9".to_owned(), "eth0", 2)]
    );
    assert_eq!(several.gateway, Some(Ipv4Addr::new(10, 9, 0, 1).into()));

    // Those of other tables too, and the rules that lead there.
    let tables = ["10.50.3.0", "10.50.4.0", "10.50.5.0"].map(|to| find(to).unwrap().table);
    assert_eq!(tables, [254, 100, 1000]);
    let network = snapshot.attach().unwrap();
    let request = network.routes_request();
    let further: Vec<_> = request
        .further_routes
        .iter()
        .map(|route| (route.dest.as_str(), route.table))
        .collect();
    let expected = [
        ("10.50.4.0/24", 100),
        ("10.50.5.0/24", 1000),
        ("10.50.1.0/24", 0),
        ("10.50.2.0/24", 0),
    ];
    assert_eq!(further, expected);
    let [rule] = request.rules.as_slice() else {
        panic!("{:?}", request.rules)
    };
    let rule = RuleMessage::parse(rule.as_slice()).unwrap();
    assert_eq!((rule.header.table, rule.header.src_len), (100, 24));
    assert!(rule.attributes.contains(&RuleAttribute::Priority(9)));

    // What stays outside is told.
    let mut outside = route(6)
        .table_id(100)
        .kind(RouteType::Multicast)
        .protocol(RouteProtocol::Static)
        .build();
    assert_eq!(links::left_out(&outside).unwrap(), "multicast 10.50.6.0/24 table 100");
    outside.header.protocol = RouteProtocol::Kernel;
    assert_eq!(links::left_out(&outside), None);
}

#[test]
fn an_interface_has_the_largest_packets_that_its_tap_can_have() {
    let cluster = cluster();
    inside(&cluster.pod, async |handle| {
        let eth0 = if_nametoindex("eth0").unwrap();
        apply(&handle, by_index(eth0).mtu(65535).build()).await;
        Ok(())
    });
    let network = snapshot(&path_of(&cluster.pod)).unwrap().attach().unwrap();
    assert_eq!(network.interfaces()[0].mtu, 65521);
}

#[test]
fn an_interface_that_is_up_needs_no_address() {
    let pod = namespace();
    inside(&pod, async |handle| {
        let pair = LinkVeth::new("net1", "end1").build();
        handle.link().add(pair).execute().await.unwrap();
        // It would have an address of its own otherwise.
        std::fs::write("/proc/sys/net/ipv6/conf/net1/disable_ipv6", "1").unwrap();
        apply(&handle, by_index(if_nametoindex("net1").unwrap()).up().build()).await;
        Ok(())
    });
    let snapshot = snapshot(&path_of(&pod)).unwrap();
    let found: Vec<_> = snapshot
        .interfaces
        .iter()
        .map(|found| (found.name.as_str(), found.addresses.len()))
        .collect();
    assert_eq!(found, [("net1", 0)]);
}

#[test]
fn frames_pass_between_the_guests_card_and_the_node_in_both_families() {
    let cluster = cluster();
    let network = snapshot(&path_of(&cluster.pod)).unwrap().attach().unwrap();
    inside(&cluster.pod, async |handle| {
        let eth0 = handle
            .link()
            .get()
            .match_index(if_nametoindex("eth0").unwrap())
            .execute()
            .try_next()
            .await
            .unwrap();
        assert!(eth0.unwrap().header.flags.contains(LinkFlags::Allmulti));
        Ok(())
    });
    let mut card = Card::of(&network, 0);
    card.send(&arp_request());
    let reply = card
        .receive(|frame| frame[12..14] == [8, 6] && frame[21] == 2)
        .expect("an ARP reply");
    assert_eq!((&reply[..6], &reply[22..28]), (&POD_MAC[..], &OUTSIDE_MAC[..]));

    card.send(&neighbour_solicitation());
    let advert = card.receive(|frame| frame[12..14] == [0x86, 0xdd] && frame.get(54) == Some(&136));
    assert!(advert.is_some(), "a neighbour advertisement");
}

/// A macvlan passes on the groups that have been joined on it, and those that a guest joins are not.
#[test]
fn groups_reach_a_guest_behind_a_macvlan() {
    const GROUP: Ipv4Addr = Ipv4Addr::new(239, 7, 7, 7);
    let (pod, sender, parent) = (namespace(), namespace(), namespace());
    let children = [("eth0", pod.as_raw_fd()), ("eth1", sender.as_raw_fd())];
    inside(&parent, async |handle| {
        let veth = LinkVeth::new("parent", "other").build();
        handle.link().add(veth).execute().await.unwrap();
        let [parent, other] = ["parent", "other"].map(|name| if_nametoindex(name).unwrap());
        for index in [parent, other] {
            apply(&handle, by_index(index).up().build()).await;
        }
        for (name, namespace) in children {
            let child = LinkMacVlan::new(name, parent, MacVlanMode::Bridge).build();
            handle.link().add(child).execute().await.unwrap();
            let index = if_nametoindex(name).unwrap();
            apply(&handle, by_index(index).setns_by_fd(namespace).build()).await;
        }
        Ok(())
    });
    for (namespace, name, last) in [(&pod, "eth0", 2), (&sender, "eth1", 1)] {
        inside(namespace, async |handle| {
            let index = if_nametoindex(name).unwrap();
            apply(&handle, by_index(index).up().build()).await;
            add_address(&handle, index, Ipv4Addr::new(10, 8, 0, last).into(), 24).await;
            let all = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).build();
            handle.route().add(all).execute().await.unwrap();
            Ok(())
        });
    }
    let network = snapshot(&path_of(&pod)).unwrap().attach().unwrap();
    let mut card = Card::of(&network, 0);
    inside(&sender, async |_| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"to all", (GROUP, 7777)).unwrap();
        Ok(())
    });
    let heard = card.receive(|frame| frame[..6] == [1, 0, 0x5e, 7, 7, 7]);
    assert!(heard.is_some_and(|frame| frame.ends_with(b"to all")));
}

#[test]
fn the_tap_goes_with_its_last_descriptor_and_the_record_gives_the_traffic_back() {
    let cluster = cluster();
    let path = path_of(&cluster.pod);
    let snapshot = snapshot(&path).unwrap();
    let record = snapshot.record();
    let network = snapshot.attach().unwrap();
    let tap = |cluster: &Cluster| inside(&cluster.pod, async |_| Ok(if_nametoindex("tap0_kata").is_ok()));
    assert!(tap(&cluster));

    // As `delete` does it: another process, from the state file alone, while QEMU may still be there.
    let text = serde_json::to_string(&record).unwrap();
    let record: Record = serde_json::from_str(&text).unwrap();
    record.remove().unwrap();
    record.remove().unwrap();
    let mut card = Card::of(&network, 0);
    card.send(&arp_request());
    assert!(
        card.receive(|frame| frame[12..14] == [8, 6] && frame[21] == 2)
            .is_none(),
        "nothing is redirected"
    );

    drop((card, network));
    assert!(!tap(&cluster));
    // The same pod can be attached again.
    assert_eq!(
        super::snapshot(&path).unwrap().attach().unwrap().taps().unwrap().len(),
        1
    );
}

#[test]
fn taking_back_succeeds_when_nothing_is_left() {
    let cluster = cluster();
    let record = snapshot(&path_of(&cluster.pod)).unwrap().record();
    let gone = Record {
        netns: "/var/run/netns/no-such-namespace".into(),
        ..record.clone()
    };
    gone.remove().unwrap();
    let reused = Record {
        netns: path_of(&cluster.node),
        ..record.clone()
    };
    reused.remove().unwrap();
    let hosts = Record {
        netns: "/proc/self/ns/net".into(),
        ..record
    };
    hosts.remove().unwrap();
}

#[test]
fn the_hosts_namespace_is_refused_before_anything_is_looked_at() {
    let error = snapshot(Path::new("/proc/self/ns/net")).unwrap_err();
    assert!(matches!(error, NetError::Host(_)), "{error}");
    // Process 1's may not even be opened from within a container.
    let error = snapshot(Path::new("/proc/1/ns/net")).unwrap_err();
    assert!(matches!(error, NetError::Host(_) | NetError::Open { .. }), "{error}");
    assert!(matches!(
        snapshot(Path::new("/etc/passwd")),
        Err(NetError::NotANamespace(_))
    ));
    assert!(matches!(
        snapshot(Path::new("/var/run/netns/none")),
        Err(NetError::Open { .. })
    ));
    // A bind mount of the host's namespace has another path and the same inode.
    let own = File::open("/proc/self/ns/net").unwrap();
    let disguised = PathBuf::from(format!("/proc/self/fd/{}", own.as_raw_fd()));
    assert!(matches!(snapshot(&disguised), Err(NetError::Host(_))));
}

#[test]
fn a_pod_without_a_network_has_an_empty_snapshot() {
    let empty = namespace();
    let network = snapshot(&path_of(&empty)).unwrap().attach().unwrap();
    assert!(network.interfaces().is_empty() && network.routes().is_empty() && network.taps().unwrap().is_empty());
}

#[test]
fn an_interface_without_ethernet_frames_is_refused_by_name() {
    use rtnetlink::packet_route::link::{LinkAttribute, LinkLayerType};
    let mut tunnel = LinkMessage::default();
    tunnel.header.link_layer_type = LinkLayerType::Tunnel;
    tunnel.attributes = vec![
        LinkAttribute::IfName("tunl0".into()),
        LinkAttribute::Address(vec![0; 4]),
    ];
    let error = links::interface(&tunnel, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("interface tunl0 is not an Ethernet device"), "{error}");
}

#[test]
fn this_process_stays_where_it_is() {
    let before = std::fs::read_link("/proc/self/ns/net").unwrap();
    let cluster = cluster();
    snapshot(&path_of(&cluster.pod)).unwrap().attach().unwrap();
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
    // A thread that is in another namespace can tell.
    let fd: BorrowedFd<'_> = cluster.pod.as_fd();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            setns(fd, CloneFlags::CLONE_NEWNET).unwrap();
            assert_ne!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
        });
    });
}
