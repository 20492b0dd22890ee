//! A network namespace that nobody's runtime made.

use serde_json::{Value, json};

use crate::{
    config::CNI_PLUGINS,
    failure::Result,
    node::Node,
    run::{self, succeed},
};

/// A namespace whose eth0 is connected with the node.
pub struct Network<'n> {
    node: &'n Node,
    serial: u32,
}

impl<'n> Network<'n> {
    /// Makes it, with one address inside and one outside.
    ///
    /// # Errors
    /// What ip(8) says.
    pub fn make(node: &'n Node) -> Result<Network<'n>> {
        let serial = node.serial();
        let network = Network { node, serial };
        let (name, outside, inside) = (network.name(), network.outside(), network.ip());
        let gateway = network.address(1);
        network.shell(&format!(
            "ip netns add {name}; ip link add {outside} type veth peer name eth0 netns {name}
             ip addr add {gateway}/24 dev {outside}; ip link set {outside} up
             ip -n {name} addr add {inside}/24 dev eth0; ip -n {name} link set eth0 up; ip -n {name} link set lo up"
        ))?;
        Ok(network)
    }

    /// Its place in the node's file system.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name())
    }

    /// The address inside.
    #[must_use]
    pub fn ip(&self) -> String {
        self.address(2)
    }

    /// Has one of CNI's plugins that change what is there do so, by this part of its configuration.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn changed_by(&self, plugin: &str, settings: Value) -> Result {
        let address = json!({
            "address": format!("{}/24", self.ip()), "gateway": self.address(1), "interface": 0,
        });
        let interface = json!({"name": "eth0", "sandbox": self.path()});
        let mut configuration = json!({
            "cniVersion": "1.0.0", "name": "changed", "type": plugin, "dataDir": self.node.path("cni-data"),
            "prevResult": {"cniVersion": "1.0.0", "interfaces": [interface], "ips": [address]},
        });
        if let (Value::Object(all), Value::Object(settings)) = (&mut configuration, settings) {
            all.extend(settings);
        }
        let script = format!(
            "CNI_COMMAND=ADD CNI_CONTAINERID={} CNI_NETNS={} CNI_IFNAME=eth0 CNI_PATH={CNI_PLUGINS} {CNI_PLUGINS}/{plugin} <<'E'
{configuration}
E",
            self.name(),
            self.path(),
        );
        self.shell(&script).map(drop)
    }

    /// Its devices, queues and filters, as ip(8) and tc(8) list them.
    ///
    /// # Errors
    /// What they say.
    pub fn look(&self) -> Result<String> {
        let name = self.name();
        self.shell(&format!(
            "ip -n {name} -brief link; tc -n {name} qdisc show; tc -n {name} filter show dev eth0 ingress"
        ))
    }

    /// Removes it.
    ///
    /// # Errors
    /// What ip(8) says.
    pub fn remove(self) -> Result {
        let script = format!("ip link del {}; ip netns del {}", self.outside(), self.name());
        self.shell(&script).map(drop)
    }

    fn address(&self, host: u8) -> String {
        format!("10.99.{}.{host}", self.serial % 256)
    }

    fn name(&self) -> String {
        format!("before-{}", self.serial)
    }

    fn outside(&self) -> String {
        format!("veth{}", self.serial)
    }

    fn shell(&self, script: &str) -> Result<String> {
        let mut command = self.node.command("sh");
        succeed(command.args(["-ec", script]), run::ORDINARY).map(|done| done.text())
    }
}
