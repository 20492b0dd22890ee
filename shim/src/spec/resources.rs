//! A container's resources as the guest's cgroup gets them.

use oci_spec::runtime::LinuxResources;

/// The huge pages of every x86-64 guest, as a cgroup spells their size.
pub(super) const HUGE_PAGE: &str = "2MB";

/// Keeps what a cgroup of the guest can hold: memory, CPU time, pids, huge pages and device rules.
pub fn guest_resources(mut resources: LinuxResources, warnings: &mut Vec<String>) -> LinuxResources {
    let mut lost = |what: &str, why: &str| warnings.push(format!("`{what}` is left out: {why}."));
    if let Some(memory) = resources.memory_mut() {
        // Nothing is lost with these: the guest has no swap, and it is cgroup v2, which counts kernel memory as memory.
        memory
            .set_swap(None)
            .set_swappiness(None)
            .set_kernel_tcp(None)
            .set_use_hierarchy(None);
        memory.set_kernel(None);
        if memory.disable_oom_killer() == Some(true) {
            lost("memory.disableOOMKiller", "cgroup v2 has no such switch");
        }
        memory.set_disable_oom_killer(None);
    }
    if let Some(cpu) = resources.cpu_mut() {
        // The processors of `cpu.cpus` are the host's, and it is there that the VM is bound to them.
        if cpu.mems().as_ref().is_some_and(|list| !list.is_empty()) {
            lost("cpu.mems", "it names memory of the host");
        }
        cpu.set_cpus(None).set_mems(None);
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
            lost("cpu.realtimeRuntime", "cgroup v2 has no such limit");
        }
        cpu.set_realtime_runtime(None).set_realtime_period(None);
        if cpu.idle().is_some_and(|idle| idle != 0) || cpu.burst().is_some_and(|burst| burst != 0) {
            lost("cpu.idle and cpu.burst", "the agent's protocol does not carry them");
        }
        cpu.set_idle(None).set_burst(None);
    }
    // A limit of nothing for pages that a guest's processor may not know; others are refused.
    if let Some(limits) = resources.hugepage_limits_mut() {
        limits.retain(|limit| limit.page_size() == HUGE_PAGE);
    }
    if resources.block_io().is_some() {
        lost("blockIO", "it names devices of the host, whose limits hold for the pod");
    }
    if resources.network().is_some() {
        lost("network", "classes and priorities are the host's");
    }
    if resources.rdma().is_some() {
        lost("rdma", "the guest has no such device");
    }
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        lost("unified", "the agent's protocol does not carry it");
    }
    resources
        .set_block_io(None)
        .set_network(None)
        .set_rdma(None)
        .set_unified(None);
    resources
}
