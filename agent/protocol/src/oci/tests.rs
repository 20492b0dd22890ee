//! Round trips: what the messages have a field for arrives as it was sent.

use std::collections::HashMap;

use proptest::{collection, option, prelude::*, sample, sample::select};
use protobuf::Message;
use serde_json::{Map, Value, json};

use super::*;
use crate::protocol;

/// Strings, without the empty one, which is unset.
fn word() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9/_.=:-]{1,12}"
}

fn words() -> impl Strategy<Value = Value> {
    collection::vec(word(), 1..4).prop_map(Value::from)
}

fn map() -> impl Strategy<Value = Value> {
    collection::hash_map(word(), word(), 1..4).prop_map(|map| json!(map))
}

/// A positive number: zero is unset.
fn count() -> impl Strategy<Value = Value> {
    (1..i64::MAX).prop_map(Value::from)
}

fn small() -> impl Strategy<Value = Value> {
    (1..u32::MAX).prop_map(Value::from)
}

fn name(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    select(names).prop_map(Value::from)
}

fn list(of: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    collection::vec(of, 1..4).prop_map(Value::from)
}

type Fields = Vec<(&'static str, BoxedStrategy<Value>)>;

/// An object with all of `required` and any of `optional`.
fn object(required: Fields, optional: Fields) -> BoxedStrategy<Value> {
    let required: Vec<_> = required
        .into_iter()
        .map(|(name, value)| value.prop_map(move |value| Some((name, value))).boxed())
        .collect();
    let optional = optional
        .into_iter()
        .map(|(name, value)| option::of(value.prop_map(move |value| (name, value))).boxed());
    let all: Vec<_> = required.into_iter().chain(optional).collect();
    let object = |fields: Vec<Option<(&str, Value)>>| {
        let fields = fields.into_iter().flatten();
        Value::Object(
            fields
                .map(|(name, value)| (name.to_owned(), value))
                .collect::<Map<_, _>>(),
        )
    };
    all.prop_map(object).boxed()
}

macro_rules! fields {
    ($($name:literal: $value:expr),* $(,)?) => { vec![$(($name, $value.boxed())),*] };
}

fn text() -> impl Strategy<Value = Value> {
    word().prop_map(Value::from)
}

fn yes() -> impl Strategy<Value = Value> {
    Just(Value::Bool(true))
}

const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_KILL",
    "CAP_NET_RAW",
    "CAP_SYS_ADMIN",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

fn capabilities() -> impl Strategy<Value = Value> {
    let set = || collection::btree_set(select(CAPABILITIES), 0..4).prop_map(|set| json!(set));
    let sets =
        fields! { "bounding": set(), "effective": set(), "inheritable": set(), "permitted": set(), "ambient": set() };
    object(sets, Vec::new())
}

fn process() -> BoxedStrategy<Value> {
    let user = object(
        fields! { "uid": any::<u32>().prop_map(Value::from), "gid": any::<u32>().prop_map(Value::from) },
        fields! { "additionalGids": list(small()), "username": text(), "umask": any::<u32>().prop_map(Value::from) },
    );
    let size = object(fields! { "height": small(), "width": small() }, Vec::new());
    let limit = object(
        fields! { "type": name(&["RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_MEMLOCK"]), "hard": count(), "soft": count() },
        Vec::new(),
    );
    let optional = fields! {
        "terminal": yes(), "consoleSize": size, "args": words(), "env": words(), "capabilities": capabilities(),
        "rlimits": list(limit), "noNewPrivileges": yes(), "apparmorProfile": text(), "selinuxLabel": text(),
        "oomScoreAdj": (-1000..1000).prop_filter("unset", |score| *score != 0).prop_map(Value::from),
    };
    object(fields! { "user": user, "cwd": text() }, optional)
}

fn resources() -> BoxedStrategy<Value> {
    let number = || (0..1000i64).prop_map(Value::from);
    let device = object(
        fields! { "allow": any::<bool>().prop_map(Value::from) },
        fields! { "type": name(&["a", "b", "c"]), "major": number(), "minor": number(), "access": name(&["r", "rw", "rwm"]) },
    );
    let memory = object(
        Vec::new(),
        fields! {
            "limit": count(), "reservation": count(), "swap": count(), "kernel": count(), "kernelTCP": count(),
            "swappiness": count(), "disableOOMKiller": yes(),
        },
    );
    let cpu = object(
        Vec::new(),
        fields! {
            "shares": count(), "quota": count(), "period": count(), "realtimeRuntime": count(),
            "realtimePeriod": count(), "cpus": text(), "mems": text(), "burst": count(), "idle": count(),
        },
    );
    let throttle = || {
        list(object(
            fields! { "major": number(), "minor": number(), "rate": count() },
            Vec::new(),
        ))
    };
    let weight = || (1..1000u16).prop_map(Value::from);
    let weights = object(
        fields! { "major": number(), "minor": number() },
        fields! { "weight": weight(), "leafWeight": weight() },
    );
    let io = object(
        Vec::new(),
        fields! {
            "weight": weight(), "leafWeight": weight(), "weightDevice": list(weights),
            "throttleReadBpsDevice": throttle(), "throttleWriteBpsDevice": throttle(),
            "throttleReadIOPSDevice": throttle(), "throttleWriteIOPSDevice": throttle(),
        },
    );
    let pages = object(fields! { "pageSize": text(), "limit": count() }, Vec::new());
    let priority = object(fields! { "name": text(), "priority": small() }, Vec::new());
    let network = object(Vec::new(), fields! { "classID": small(), "priorities": list(priority) });
    let pids = object(fields! { "limit": any::<i64>().prop_map(Value::from) }, Vec::new());
    let optional = fields! {
        "devices": list(device), "memory": memory, "cpu": cpu, "pids": pids, "blockIO": io,
        "hugepageLimits": list(pages), "network": network, "unified": map(),
    };
    object(Vec::new(), optional)
}

fn seccomp() -> BoxedStrategy<Value> {
    let action = || {
        name(&[
            "SCMP_ACT_ALLOW",
            "SCMP_ACT_ERRNO",
            "SCMP_ACT_KILL_PROCESS",
            "SCMP_ACT_LOG",
        ])
    };
    let argument = object(
        fields! {
            "index": (0..6u32).prop_map(Value::from), "value": any::<u64>().prop_map(Value::from),
            "op": name(&["SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"]),
        },
        fields! { "valueTwo": count() },
    );
    let errno = || any::<u32>().prop_map(Value::from);
    let call = object(
        fields! { "names": words(), "action": action() },
        fields! { "errnoRet": errno(), "args": list(argument) },
    );
    let optional = fields! {
        "defaultErrnoRet": errno(), "architectures": list(name(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])),
        "flags": list(name(&["SECCOMP_FILTER_FLAG_LOG"])), "syscalls": list(call),
    };
    object(fields! { "defaultAction": action() }, optional)
}

fn linux() -> BoxedStrategy<Value> {
    let mapping = || {
        list(object(
            fields! { "hostID": small(), "containerID": small(), "size": small() },
            Vec::new(),
        ))
    };
    let kinds = &["mount", "pid", "ipc", "uts", "network", "cgroup", "user", "time"];
    let namespace = object(fields! { "type": name(kinds) }, fields! { "path": text() });
    let device = object(
        fields! { "path": text(), "type": name(&["c", "b", "u", "p"]), "major": count(), "minor": count() },
        fields! { "fileMode": small(), "uid": small(), "gid": small() },
    );
    let optional = fields! {
        "uidMappings": mapping(), "gidMappings": mapping(), "sysctl": map(), "resources": resources(),
        "cgroupsPath": text(), "namespaces": list(namespace), "devices": list(device), "seccomp": seccomp(),
        "rootfsPropagation": text(), "maskedPaths": words(), "readonlyPaths": words(), "mountLabel": text(),
        "intelRdt": object(fields! { "l3CacheSchema": text() }, Vec::new()),
    };
    object(Vec::new(), optional)
}

fn spec() -> BoxedStrategy<Value> {
    let hook = || {
        list(object(
            fields! { "path": text() },
            fields! { "args": words(), "env": words(), "timeout": count() },
        ))
    };
    let hooks = object(
        Vec::new(),
        fields! {
            "prestart": hook(), "poststart": hook(), "poststop": hook(), "createRuntime": hook(),
            "createContainer": hook(), "startContainer": hook(),
        },
    );
    let mount = object(
        fields! { "destination": text() },
        fields! { "source": text(), "type": text(), "options": words() },
    );
    let optional = fields! {
        "process": process(), "root": object(fields! { "path": text() }, fields! { "readonly": yes() }),
        "hostname": text(), "mounts": list(mount), "hooks": hooks, "annotations": map(), "linux": linux(),
    };
    object(fields! { "ociVersion": text() }, optional)
}

/// What a message is after a journey.
fn sent<M: Message>(message: &M) -> M {
    M::parse_from_bytes(&message.write_to_bytes().unwrap()).unwrap()
}

/// The same in the form of `config.json`, in which sets have an order.
fn ordered(spec: &impl serde::Serialize) -> Value {
    fn sort(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let is_set =
                        ["bounding", "effective", "inheritable", "permitted", "ambient"].contains(&name.as_str());
                    match value {
                        Value::Array(names) if is_set => names.sort_by_key(Value::to_string),
                        value => sort(value),
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(sort),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(spec).unwrap();
    sort(&mut value);
    value
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_specification_arrives_as_it_was_sent(json in spec()) {
        let spec: Spec = serde_json::from_value(json).unwrap();
        let expected: Vec<&str> = Vec::new();
        prop_assert_eq!(not_carried(&spec), expected);
        let arrived = spec_from_wire(&sent(&spec_to_wire(&spec))).unwrap();
        prop_assert_eq!(ordered(&arrived), ordered(&spec));
    }

    #[test]
    fn a_process_arrives_as_it_was_sent(json in process()) {
        let process: Process = serde_json::from_value(json).unwrap();
        let arrived = process_from_wire(&sent(&process_to_wire(&process))).unwrap();
        prop_assert_eq!(ordered(&arrived), ordered(&process));
    }

    #[test]
    fn resources_arrive_as_they_were_sent(json in resources()) {
        let resources: LinuxResources = serde_json::from_value(json).unwrap();
        let arrived = resources_from_wire(&sent(&resources_to_wire(&resources))).unwrap();
        prop_assert_eq!(ordered(&arrived), ordered(&resources));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Messages of others, right but for some bytes.
    #[test]
    fn any_message_is_taken_or_refused(json in spec(), changes in collection::vec((any::<sample::Index>(), any::<u8>()), 0..8)) {
        let spec: Spec = serde_json::from_value(json).unwrap();
        let mut bytes = spec_to_wire(&spec).write_to_bytes().unwrap();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Ok(message) = protocol::oci::Spec::parse_from_bytes(&bytes) {
            let _taken_or_refused = spec_from_wire(&message).is_ok();
        }
    }
}

#[test]
fn what_is_zero_or_empty_arrives_as_unset() {
    let json = json!({
        "user": { "uid": 0, "gid": 0, "additionalGids": [], "username": "" }, "cwd": "/", "args": [], "terminal": false,
        "oomScoreAdj": 0,
    });
    let process: Process = serde_json::from_value(json).unwrap();
    let arrived = process_from_wire(&process_to_wire(&process)).unwrap();
    assert_eq!(ordered(&arrived), json!({ "user": { "uid": 0, "gid": 0 }, "cwd": "/" }));
}

#[test]
fn an_unknown_name_is_told_with_its_field() {
    let mut process = protocol::oci::Process::new();
    process
        .Capabilities
        .mut_or_insert_default()
        .Bounding
        .push("CAP_FLY".into());
    let error = process_from_wire(&process).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the specification's process.capabilities is \"CAP_FLY\", which OCI does not know"
    );
}

#[test]
fn what_the_messages_have_no_field_for_is_named() {
    let json = json!({
        "ociVersion": "1.2.0", "domainname": "d",
        "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 1 } },
        "linux": {
            "personality": { "domain": "LINUX32" },
            "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s" },
            "timeOffsets": HashMap::from([("monotonic", json!({ "secs": 1, "nanosecs": 0 }))]),
        },
    });
    let spec: Spec = serde_json::from_value(json).unwrap();
    let mut fields = not_carried(&spec);
    fields.sort_unstable();
    let expected = [
        "domainname",
        "linux.personality",
        "linux.seccomp.listenerPath",
        "linux.timeOffsets",
        "process.ioPriority",
    ];
    assert_eq!(fields, expected);
}

/// A shim that is written in Rust may send a value by its `Display`, one that is written in Go by its name in
/// `config.json`.
#[test]
fn each_name_is_taken_as_it_is_displayed_and_as_config_json_has_it() {
    use oci_spec::runtime::{
        Arch, LinuxNamespaceType, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    };

    let mut spec = protocol::oci::Spec::new();
    let linux = spec.Linux.mut_or_insert_default();
    let mut expected = Vec::new();
    let kinds = ["mount", "pid", "ipc", "uts", "network", "cgroup", "user", "time"];
    for (kind, name) in both::<LinuxNamespaceType>(&kinds) {
        let mut namespace = protocol::oci::LinuxNamespace::new();
        namespace.Type = name;
        linux.Namespaces.push(namespace);
        expected.push(kind);
    }
    let seccomp = linux.Seccomp.mut_or_insert_default();
    let actions = [
        "KILL",
        "KILL_THREAD",
        "KILL_PROCESS",
        "TRAP",
        "ERRNO",
        "NOTIFY",
        "TRACE",
        "LOG",
        "ALLOW",
    ];
    let actions = both::<LinuxSeccompAction>(&actions.map(|name| format!("SCMP_ACT_{name}")));
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let operators = both::<LinuxSeccompOperator>(&operators.map(|name| format!("SCMP_CMP_{name}")));
    let architectures = [
        "X86",
        "X86_64",
        "X32",
        "ARM",
        "AARCH64",
        "MIPS64N32",
        "MIPSEL64N32",
        "PPC64LE",
        "S390X",
        "RISCV64",
    ];
    let architectures = both::<Arch>(&architectures.map(|name| format!("SCMP_ARCH_{name}")));
    let flags = ["LOG", "TSYNC", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"];
    let flags = both::<LinuxSeccompFilterFlag>(&flags.map(|name| format!("SECCOMP_FILTER_FLAG_{name}")));
    seccomp.DefaultAction = actions[0].1.clone();
    seccomp.Architectures = architectures.iter().map(|(_, name)| name.clone()).collect();
    seccomp.Flags = flags.iter().map(|(_, name)| name.clone()).collect();
    for (_, name) in &actions {
        let mut call = protocol::oci::LinuxSyscall::new();
        call.Action = name.clone();
        call.Args = operators
            .iter()
            .map(|(_, name)| protocol::oci::LinuxSeccompArg {
                Op: name.clone(),
                ..Default::default()
            })
            .collect();
        seccomp.Syscalls.push(call);
    }

    let arrived = spec_from_wire(&spec).unwrap().linux().clone().unwrap();
    let seen: Vec<_> = arrived.namespaces().iter().flatten().map(|one| one.typ()).collect();
    assert_eq!(seen, expected);
    let seccomp = arrived.seccomp().clone().unwrap();
    let values = |all: &Vec<(Arch, String)>| all.iter().map(|(value, _)| *value).collect::<Vec<_>>();
    assert_eq!(seccomp.architectures().clone().unwrap(), values(&architectures));
    let seen: Vec<_> = seccomp.flags().iter().flatten().copied().collect();
    assert_eq!(seen, flags.iter().map(|(value, _)| *value).collect::<Vec<_>>());
    for (call, (action, _)) in seccomp.syscalls().iter().flatten().zip(&actions) {
        assert_eq!(call.action(), *action);
        let seen: Vec<_> = call.args().iter().flatten().map(|argument| argument.op()).collect();
        assert_eq!(seen, operators.iter().map(|(value, _)| *value).collect::<Vec<_>>());
    }
}

#[test]
fn limits_and_capabilities_are_taken_as_they_are_displayed_and_as_config_json_has_them() {
    use oci_spec::runtime::{Capability, PosixRlimitType};

    let limits = [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "RTTIME",
        "SIGPENDING",
        "STACK",
    ];
    let limits = both::<PosixRlimitType>(&limits.map(|name| format!("RLIMIT_{name}")));
    let names = ["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_SYSLOG", "CAP_BPF"];
    let mut process = protocol::oci::Process::new();
    process.Rlimits = limits
        .iter()
        .map(|(_, name)| protocol::oci::POSIXRlimit {
            Type: name.clone(),
            ..Default::default()
        })
        .collect();
    let capabilities = both::<Capability>(&names);
    let sets = process.Capabilities.mut_or_insert_default();
    sets.Bounding = capabilities.iter().map(|(_, name)| name.clone()).collect();
    let arrived = process_from_wire(&process).unwrap();
    let seen: Vec<_> = arrived.rlimits().iter().flatten().map(|limit| limit.typ()).collect();
    assert_eq!(seen, limits.iter().map(|(value, _)| *value).collect::<Vec<_>>());
    let bounding = arrived.capabilities().clone().unwrap().bounding().clone().unwrap();
    assert_eq!(bounding, capabilities.iter().map(|(value, _)| *value).collect());
}

/// Each value twice: under its name in `config.json`, and as it is displayed.
fn both<T: Copy + serde::de::DeserializeOwned + std::fmt::Display>(names: &[impl AsRef<str>]) -> Vec<(T, String)> {
    let both = |name: &str| {
        let value: T = serde_json::from_value(json!(name)).unwrap();
        [(value, name.to_owned()), (value, value.to_string())]
    };
    names.iter().flat_map(|name| both(name.as_ref())).collect()
}
