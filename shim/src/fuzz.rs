//! What others write is taken or refused, whatever it is: nothing panics. Each input that ever did becomes a test of
//! its module.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use config::Config;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use proptest::{
    collection::{hash_map, vec},
    prelude::*,
    sample::{Index, select},
};
use serde_json::{Value, json};

use crate::{
    annotations::{Role, identify, pod_resources, shares_pid_namespace},
    pod::Pod,
    sizing::{Limits, Sizing},
    spec::{self, Context},
};

const SAMPLES: &[&str] = &[
    include_str!("spec/samples/crio-sandbox.json"),
    include_str!("spec/samples/crio-container.json"),
    include_str!("spec/samples/containerd-sandbox.json"),
    include_str!("spec/samples/containerd-container.json"),
];

/// Words that mean something somewhere, and some that should not.
const WORDS: &[&str] = &[
    "",
    "/",
    "..",
    "../../../etc",
    "/proc/1/ns/net",
    "/dev/../etc/passwd",
    "/var/lib/kubelet/pods/u/volumes/kubernetes.io~secret/..",
    "bind",
    "rbind",
    "rshared",
    "overlay",
    "sandbox",
    "container",
    "1e400",
    "18446744073709551616",
    "-1",
    "\0",
    "ä\u{202e}",
];

fn word() -> impl Strategy<Value = String> {
    prop_oneof![select(WORDS).prop_map(String::from), ".{0,20}", "[a-z0-9=/.,:-]{0,300}"]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        select(vec![0, 1, -1, i64::MIN, i64::MAX]).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            hash_map(word(), inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

/// The number of values in a document.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// Puts `new` in the place of the value of this number.
fn replace(value: &mut Value, number: &mut usize, new: &mut Option<Value>) {
    if *number == 0 {
        if let Some(new) = new.take() {
            *value = new;
        }
        return;
    }
    *number -= 1;
    let children: Vec<&mut Value> = match value {
        Value::Array(list) => list.iter_mut().collect(),
        Value::Object(map) => map.values_mut().collect(),
        _ => return,
    };
    for child in children {
        if new.is_some() {
            replace(child, number, new);
        }
    }
}

/// A CRI's document with some values replaced.
fn mutated() -> impl Strategy<Value = Value> {
    (select(SAMPLES), vec((any::<Index>(), value()), 1..5)).prop_map(|(sample, changes)| {
        let mut document: Value = serde_json::from_str(sample).unwrap();
        for (place, new) in changes {
            let mut number = place.index(count(&document));
            replace(&mut document, &mut number, &mut Some(new));
        }
        document
    })
}

fn annotations() -> impl Strategy<Value = HashMap<String, String>> {
    let sample: Value = serde_json::from_str(SAMPLES[1]).unwrap();
    let known = sample["annotations"].as_object().unwrap().keys().cloned();
    let more = [
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
        "io.kubernetes.cri.sandbox-memory",
        "io.kubernetes.cri.sandbox-cpu-quota",
        "io.kubernetes.cri.sandbox-cpu-period",
        "io.katacontainers.config.hypervisor.default_vcpus",
        "io.katacontainers.config.hypervisor.default_memory",
        "io.katacontainers.config.hypervisor.kernel_params",
        "pod-linux-resources.crio.io",
        "pod-linux-overhead.crio.io",
    ];
    let keys: Vec<String> = known.chain(more.map(String::from)).collect();
    hash_map(
        select(keys),
        prop_oneof![word(), value().prop_map(|value| value.to_string())],
        0..12,
    )
}

/// A configuration of known keys with any values, between any lines.
fn configuration() -> impl Strategy<Value = String> {
    let keys: Vec<String> = include_str!("../../deploy/configuration.toml")
        .lines()
        .filter_map(|line| line.trim_start_matches(['#', ' ']).split_once(" = "))
        .map(|(key, _)| key.to_owned())
        .chain(["image", "machine_type", "shared_fs"].map(String::from))
        .collect();
    let said = value().prop_map(|value| value.to_string().replace("null", "[]"));
    let line = prop_oneof![
        5 => (select(keys), said).prop_map(|(key, value)| format!("{key} = {value}")),
        2 => select(vec!["[hypervisor.qemu]", "[agent.kata]", "[runtime]", "[hypervisor]", "[[runtime]]"]).prop_map(String::from),
        1 => ".{0,40}",
    ];
    vec(line, 0..8).prop_map(|lines| lines.join("\n"))
}

/// All that the shim does with a specification before anything is started.
fn read(spec: &Spec) {
    let none = HashMap::new();
    if let (Ok(pod), Ok(config)) = (Pod::of(spec), Config::parse("", &[])) {
        let _ = Sizing::new(&config, pod.resources);
        let _ = config.with_annotations(&pod.annotations);
    }
    let maps = spec::id_maps(spec).ok().flatten();
    let _ = spec::host_rootfs(spec, Path::new("/run/bundle"));
    let _ = Limits::of(spec);
    for role in [Role::Sandbox, Role::Single, Role::Container { sandbox_id: "s".into() }] {
        let context = Context {
            container_id: "c",
            bundle: Path::new("/run/bundle"),
            role: &role,
            disable_guest_seccomp: false,
            pod_sees_guest: false,
            pod_sysctls: &none,
            pid_target: None,
            id_maps: maps.as_ref(),
            vfio_groups: &BTreeSet::new(),
            open_files: (1024, 4096),
        };
        if let Ok(container) = spec::translate(spec, &context) {
            for share in &container.shares {
                assert!(
                    share.share_path.is_relative()
                        && !share.share_path.components().any(|part| part.as_os_str() == "..")
                );
            }
            let _ = agent_protocol::oci::spec_from_wire(&agent_protocol::oci::spec_to_wire(&container.spec));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_specification_is_taken_or_refused(document in mutated()) {
        if let Ok(spec) = serde_json::from_value::<Spec>(document.clone()) {
            read(&spec);
        }
        let part = |name: &str| document[name].clone();
        if let Ok(process) = serde_json::from_value::<Process>(part("process")) {
            let _ = spec::guest_process(process, (1024, 4096));
        }
        if let Ok(resources) = serde_json::from_value::<LinuxResources>(part("linux")["resources"].clone()) {
            let _ = Limits::of_resources(&resources);
            let _ = spec::guest_resources(resources, &mut Vec::new());
        }
    }

    #[test]
    fn any_annotations_are_taken_or_refused(annotations in annotations()) {
        let _ = identify(&annotations);
        let _ = shares_pid_namespace(&annotations);
        let config = Config::parse("[hypervisor.qemu]\nenable_annotations = [\".*\"]", &[]).unwrap();
        let config = config.with_annotations(&annotations).unwrap_or(config);
        if let Ok(resources) = pod_resources(&annotations) {
            let _ = Sizing::new(&config, resources);
        }
    }

    #[test]
    fn any_configuration_is_taken_or_refused(text in configuration(), drop_in in configuration(), annotations in annotations()) {
        if let Ok(config) = Config::parse(&text, &[&drop_in]) {
            let _ = config.explain();
            let config = config.with_annotations(&annotations).unwrap_or(config);
            let _ = Sizing::new(&config, None);
        }
    }
}
