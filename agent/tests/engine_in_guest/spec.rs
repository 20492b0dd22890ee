//! Specifications as containerd's CRI plugin writes them, and changes to them.

use serde_json::{Value, json};

/// A container that runs `command`; the cgroup is named after `id`.
pub fn base(id: &str, command: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": { "path": "/rootfs" },
        "hostname": "pod",
        "process": process(command),
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
        ],
        "linux": {
            "cgroupsPath": format!("/kubepods/pod1/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/kpagecount", "/proc/keys", "/proc/acpi", "/no/such/path"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A process with containerd's default capabilities.
pub fn process(command: &[&str]) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": command,
        "env": ["PATH=/bin", "A=1"],
        "cwd": "/",
        "capabilities": { "bounding": caps, "effective": caps, "permitted": caps }
    })
}

/// A container that runs a shell script.
pub fn script(id: &str, script: &str) -> Value {
    base(id, &["sh", "-c", script])
}

/// A container that does nothing until it is killed.
pub fn idle(id: &str) -> Value {
    base(id, &["sleep", "1000"])
}

/// Changes a specification: objects are merged, anything else is replaced.
pub fn with(mut spec: Value, change: Value) -> Value {
    merge(&mut spec, change);
    spec
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}
