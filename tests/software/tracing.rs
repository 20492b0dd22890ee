//! What eBPF agents and tracers ask of a kernel: types (BTF), probes and trace points.

use tests::{
    config::Runtime,
    failure::{Result, claim, contains},
    node::Node,
};

use crate::{Story, at_length, large};

pub const STORIES: &[Story] = &[("bpftrace_sees_the_other_container", bpftrace_sees_the_other_container)];

/// Each kind of probe, with what a program of the neighbour's makes it say.
const PROBES: &[(&str, &str)] = &[
    ("tracepoint:syscalls:sys_enter_openat", "str(args->filename)"),
    ("kprobe:do_sys_openat2", "str(uptr(arg1))"),
    // By the kernel's own types, which are in /sys/kernel/btf/vmlinux.
    ("kfunc:do_sys_openat2", "str(uptr(args->filename))"),
];

/// A tracer in a privileged sidecar, as observability agents run.
fn bpftrace_sees_the_other_container(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "traced")?.privileged().run()?;
    large(
        &pod,
        "traced",
        "while :; do cat /etc/hostname >/dev/null; sleep 1; done",
    )?
    .run()?;
    let tracer = large(&pod, "tracer", "exec sleep infinity")?.privileged().run()?;
    at_length(
        &tracer,
        "mount -t tracefs none /sys/kernel/tracing && mount -t debugfs none /sys/kernel/debug",
    )?;
    for (probe, value) in PROBES {
        let program = format!(
            "{probe} /comm == \"cat\" && {value} == \"/etc/hostname\"/ {{ printf(\"%s opens %s\\n\", comm, {value}); exit(); }}"
        );
        let seen = at_length(&tracer, &format!("bpftrace -e '{program}'"))?;
        contains(probe, &seen, "cat opens /etc/hostname")?;
    }
    let size = at_length(&tracer, "wc -c </sys/kernel/btf/vmlinux")?;
    claim(
        size.trim().parse().is_ok_and(|bytes: u64| bytes > 1 << 20),
        format!("types of the kernel: {size} bytes"),
    )?;
    pod.remove()
}
