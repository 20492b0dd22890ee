//! Which nodes are to have kata.

use std::collections::BTreeSet;

use super::{
    selector::{Selector, SelectorError},
    world::{Host, Node},
};
use crate::api::KataConfigSpec;

/// The label of workers.
const WORKER: &str = "node-role.kubernetes.io/worker";
/// The labels of the control plane, new and old.
const CONTROL_PLANE: [&str; 2] = [
    "node-role.kubernetes.io/control-plane",
    "node-role.kubernetes.io/master",
];
/// What Node Feature Discovery or an administrator puts on nodes that can run virtual machines.
pub const ELIGIBLE: &str = "feature.node.kubernetes.io/runtime.kata";

/// The nodes that are to have kata, and how they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pool {
    /// Their names.
    pub wanted: BTreeSet<String>,
    /// Nodes that would be among them, were they of a kind that we can serve; with what they are.
    pub unsupported: Vec<(String, String)>,
    /// How many workers there are.
    pub workers: usize,
    /// How many of them the selector matches.
    pub selected: usize,
    /// How many of those carry the label of Node Feature Discovery; none where nobody asked.
    pub eligible: Option<usize>,
}

impl Pool {
    /// Chooses the nodes: those with the role of a worker, and those without the role of the control plane, since many
    /// clusters give their workers no role, or only some of them; in a cluster of control-plane nodes only, all. Then
    /// the selector, then the label of Node Feature Discovery. A node that has kata keeps it without that label, which
    /// goes for a while when Node Feature Discovery is upgraded.
    ///
    /// # Errors
    /// The selector makes no sense.
    pub fn choose(spec: &KataConfigSpec, nodes: &[Node]) -> Result<Pool, SelectorError> {
        let selector = Selector::parse(spec.kata_config_pool_selector.as_ref())?;
        let workers = workers(nodes);
        let selected: Vec<&Node> = workers
            .iter()
            .copied()
            .filter(|node| selector.matches(&node.labels))
            .collect();
        let eligible: Vec<&Node> = match spec.check_node_eligibility {
            true => selected
                .iter()
                .copied()
                .filter(|node| node.record.claimed() || node.labels.get(ELIGIBLE).is_some_and(|value| value == "true"))
                .collect(),
            false => selected.clone(),
        };
        let mut pool = Pool {
            workers: workers.len(),
            selected: selected.len(),
            eligible: spec.check_node_eligibility.then_some(eligible.len()),
            ..Pool::default()
        };
        for node in eligible {
            match unsupported(&node.host) {
                None => drop(pool.wanted.insert(node.name.clone())),
                Some(what) => pool.unsupported.push((node.name.clone(), what)),
            }
        }
        Ok(pool)
    }

    /// Why there are no nodes, in numbers.
    #[must_use]
    pub fn why_empty(&self) -> String {
        let eligible = self
            .eligible
            .map(|count| format!(", {count} of them with the label {ELIGIBLE}=true"))
            .unwrap_or_default();
        let unsupported = match self.unsupported.len() {
            0 => String::new(),
            count => format!(", {count} of those not supported"),
        };
        format!(
            "No node can have kata: {} workers, {} matched by kataConfigPoolSelector{eligible}{unsupported}",
            self.workers, self.selected
        )
    }
}

fn workers(nodes: &[Node]) -> Vec<&Node> {
    let has = |node: &Node, role: &str| node.labels.contains_key(role);
    let is_worker = |node: &&Node| has(node, WORKER) || !CONTROL_PLANE.iter().any(|role| has(node, role));
    let workers: Vec<&Node> = nodes.iter().filter(is_worker).collect();
    if workers.is_empty() {
        nodes.iter().collect()
    } else {
        workers
    }
}

/// What makes a node one that we cannot serve. A kubelet that has not reported yet is given the benefit of the doubt:
/// it is not Ready.
fn unsupported(host: &Host) -> Option<String> {
    let known = |value: &str, wanted: &[&str]| value.is_empty() || wanted.contains(&value);
    if !known(&host.operating_system, &["linux"]) {
        return Some(format!("its operating system is {}, not linux", host.operating_system));
    }
    if !known(&host.architecture, &["amd64"]) {
        return Some(format!("its architecture is {}, not amd64", host.architecture));
    }
    let runtime = host.runtime();
    (!known(runtime, &["containerd", "cri-o"]))
        .then(|| format!("its container runtime is {runtime}, neither CRI-O nor containerd"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::fixtures::node;

    fn chosen(spec: serde_json::Value, nodes: &[Node]) -> Pool {
        let spec: KataConfigSpec = serde_json::from_value(spec).unwrap();
        Pool::choose(&spec, nodes).unwrap()
    }

    fn names(pool: &Pool) -> Vec<&str> {
        pool.wanted.iter().map(String::as_str).collect()
    }

    fn with_labels(name: &str, labels: &[&str]) -> Node {
        let mut node = node(name);
        node.labels.clear();
        for label in labels {
            let (key, value) = label.split_once('=').unwrap_or((label, ""));
            node.labels.insert(key.to_owned(), value.to_owned());
        }
        node
    }

    #[test]
    fn workers_and_whoever_is_not_of_the_control_plane_or_all() {
        let mut nodes = vec![
            with_labels("a", &["node-role.kubernetes.io/control-plane"]),
            with_labels("b", &[]),
            with_labels("c", &["node-role.kubernetes.io/worker"]),
            with_labels(
                "d",
                &["node-role.kubernetes.io/master", "node-role.kubernetes.io/worker"],
            ),
        ];
        // The label on one worker takes nothing from the others.
        assert_eq!(names(&chosen(serde_json::json!({}), &nodes)), ["b", "c", "d"]);
        nodes.truncate(1);
        assert_eq!(names(&chosen(serde_json::json!({}), &nodes)), ["a"]);
    }

    #[test]
    fn a_node_with_kata_keeps_it_without_the_label_of_node_feature_discovery() {
        let mut nodes = [with_labels("a", &[]), with_labels("b", &[])];
        nodes[1].record.claim = true;
        let pool = chosen(serde_json::json!({"checkNodeEligibility": true}), &nodes);
        assert_eq!(names(&pool), ["b"]);
    }

    #[test]
    fn eligibility_is_a_label_and_counted() {
        let nodes = [
            with_labels("a", &["feature.node.kubernetes.io/runtime.kata=true", "zone=1"]),
            with_labels("b", &["feature.node.kubernetes.io/runtime.kata=false", "zone=1"]),
            with_labels("c", &["zone=2"]),
        ];
        assert_eq!(
            names(&chosen(serde_json::json!({"checkNodeEligibility": true}), &nodes)),
            ["a"]
        );
        assert_eq!(names(&chosen(serde_json::json!({}), &nodes)), ["a", "b", "c"]);
        let spec =
            serde_json::json!({"checkNodeEligibility": true, "kataConfigPoolSelector": {"matchLabels": {"zone": "2"}}});
        let none = chosen(spec, &nodes);
        assert_eq!(
            none.why_empty(),
            "No node can have kata: 3 workers, 1 matched by kataConfigPoolSelector, 0 of them with the label \
             feature.node.kubernetes.io/runtime.kata=true"
        );
    }

    #[test]
    fn nodes_of_another_kind_are_left_out_and_named() {
        let mut windows = node("windows");
        windows.host.operating_system = "windows".into();
        let mut arm = node("arm");
        arm.host.architecture = "arm64".into();
        let mut docker = node("docker");
        docker.host.container_runtime = "docker://20.10".into();
        let mut k3s = node("k3s");
        // The installer finds the containerd inside it.
        (k3s.host.kubelet, k3s.host.container_runtime) = ("v1.33.4+k3s1".into(), "containerd://2.1.4-k3s1".into());
        let mut fresh = node("fresh");
        fresh.host = Host::default();
        let pool = chosen(serde_json::json!({}), &[windows, arm, docker, k3s, fresh]);
        assert_eq!(names(&pool), ["fresh", "k3s"]);
        let said: Vec<&str> = pool.unsupported.iter().map(|(_, what)| what.as_str()).collect();
        assert_eq!(
            said,
            [
                "its operating system is windows, not linux",
                "its architecture is arm64, not amd64",
                "its container runtime is docker, neither CRI-O nor containerd"
            ]
        );
    }
}
