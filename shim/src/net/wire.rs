//! The pod's network in the terms of the VM and of the agent's protocol.

use std::net::IpAddr;

use agent_protocol::{
    client::{Client, ClientError},
    protocol::{
        agent::{AddARPNeighborsRequest, Sysctl, UpdateInterfaceRequest, UpdateRoutesRequest},
        types,
    },
};
use rtnetlink::{packet_core::Emitable, packet_route::rule::RuleMessage};
use vmm::spec::Nic;

use super::{Interface, Neighbor, Network, NextHop, Route, mac_text};

/// `NUD_PERMANENT` of linux/neighbour.h.
const PERMANENT: i32 = 0x80;
/// `RT_TABLE_MAIN` of linux/rtnetlink.h.
const MAIN_TABLE: u32 = 254;
/// `RTN_UNICAST` of linux/rtnetlink.h.
const UNICAST: u8 = 1;

impl Network {
    /// One network card per interface, in the order of the taps.
    pub fn nics(&self) -> Vec<Nic> {
        let nic = |interface: &Interface| Nic {
            mac: interface.mac_text(),
            mtu: interface.mtu,
        };
        self.interfaces.iter().map(nic).collect()
    }

    /// Has the guest give its cards the pod's names and addresses, and make the pod's routes and neighbours.
    ///
    /// # Errors
    /// The guest refuses, or finds no such card.
    pub async fn set_up(&self, agent: &Client) -> Result<(), ClientError> {
        for request in self.interface_requests() {
            agent.update_interface(request).await?;
        }
        let mut request = self.routes_request();
        request.sysctls = self.sysctls().await;
        let answer = agent.update_routes(request).await?;
        if !answer.refused.is_empty() {
            let refused = answer.refused.join(", ");
            tracing::warn!(refused, "the guest's kernel has no such sysctls of the pod's network");
        }
        if let Some(neighbours) = self.neighbours_request() {
            agent.add_arp_neighbors(neighbours).await?;
        }
        Ok(())
    }

    async fn sysctls(&self) -> Vec<Sysctl> {
        let sysctls = self.sysctls.clone();
        let read = tokio::task::spawn_blocking(move || sysctls.changed().iter().map(sysctl).collect());
        read.await.unwrap_or_default()
    }

    /// One request per interface: the guest gives its card the pod's name and addresses.
    pub fn interface_requests(&self) -> Vec<UpdateInterfaceRequest> {
        self.interfaces.iter().map(interface_request).collect()
    }

    /// All routes, those that others depend on first.
    pub fn routes_request(&self) -> UpdateRoutesRequest {
        let mut request = UpdateRoutesRequest::new();
        let is_upstreams = |route: &&Route| route.kind == UNICAST && route.table == MAIN_TABLE;
        let (main, further): (Vec<_>, Vec<_>) = self.routes.iter().partition(is_upstreams);
        request.routes.mut_or_insert_default().Routes = main.into_iter().map(route).collect();
        request.further_routes = further.into_iter().map(route).collect();
        request.rules = self.rules.iter().map(bytes).collect();
        request
    }

    /// The permanent neighbours; `None` when there are none.
    pub fn neighbours_request(&self) -> Option<AddARPNeighborsRequest> {
        let neighbours: Vec<_> = self.neighbors.iter().map(neighbour).collect();
        let mut request = AddARPNeighborsRequest::new();
        (!neighbours.is_empty()).then(|| {
            request.neighbors.mut_or_insert_default().ARPNeighbors = neighbours;
            request
        })
    }
}

fn interface_request(from: &Interface) -> UpdateInterfaceRequest {
    let mut request = UpdateInterfaceRequest::new();
    let interface = request.interface.mut_or_insert_default();
    interface.device = from.name.clone();
    interface.name = from.name.clone();
    interface.mtu = from.mtu.into();
    interface.hwAddr = from.mac_text();
    interface.raw_flags = from.flags.bits();
    interface.IPAddresses = from
        .addresses
        .iter()
        .map(|(ip, length)| address(ip, &length.to_string()))
        .collect();
    request
}

fn sysctl((name, value): &(String, String)) -> Sysctl {
    let mut sysctl = Sysctl::new();
    (sysctl.name, sysctl.value) = (name.clone(), value.clone());
    sysctl
}

fn route(from: &Route) -> types::Route {
    let mut route = types::Route::new();
    // The default route has no destination on the wire.
    route.dest = from
        .destination
        .map(|(ip, length)| format!("{ip}/{length}"))
        .unwrap_or_default();
    route.gateway = from.gateway.map(|ip| ip.to_string()).unwrap_or_default();
    route.source = from.source.map(|ip| ip.to_string()).unwrap_or_default();
    route.device = from.device.clone();
    route.scope = from.scope.into();
    route.family = if from.ipv6 {
        types::IPFamily::v6
    } else {
        types::IPFamily::v4
    }
    .into();
    route.flags = from.flags;
    route.mtu = from.mtu;
    route.priority = from.metric;
    route.kind = if from.kind == UNICAST { 0 } else { from.kind.into() };
    route.next_hops = from.next_hops.iter().map(next_hop).collect();
    route.table = if from.table == MAIN_TABLE { 0 } else { from.table };
    route
}

fn bytes(rule: &RuleMessage) -> Vec<u8> {
    let mut bytes = vec![0; rule.buffer_len()];
    rule.emit(&mut bytes);
    bytes
}

fn next_hop(from: &NextHop) -> types::NextHop {
    let mut hop = types::NextHop::new();
    hop.gateway = from.gateway.map(|ip| ip.to_string()).unwrap_or_default();
    hop.device = from.device.clone();
    hop.hops = from.hops.into();
    hop.flags = from.flags.into();
    hop
}

fn neighbour(from: &Neighbor) -> types::ARPNeighbor {
    let mut neighbour = types::ARPNeighbor::new();
    neighbour.toIPAddress = Some(address(&from.address, "")).into();
    neighbour.device = from.device.clone();
    neighbour.lladdr = mac_text(&from.mac);
    neighbour.state = PERMANENT;
    neighbour.flags = from.flags.into();
    neighbour
}

fn address(ip: &IpAddr, mask: &str) -> types::IPAddress {
    let mut address = types::IPAddress::new();
    address.family = if ip.is_ipv6() {
        types::IPFamily::v6
    } else {
        types::IPFamily::v4
    }
    .into();
    address.address = ip.to_string();
    address.mask = mask.into();
    address
}
