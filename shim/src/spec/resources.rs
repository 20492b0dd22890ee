//! A container's resources as the guest's cgroup gets them.

use oci_spec::runtime::LinuxResources;

/// The huge pages of every x86-64 guest, as a cgroup spells their size.
pub(super) const HUGE_PAGE: &str = "2MB";

/// What the files of a container's cgroup in the guest begin with that somebody may write to.
const GUEST_FILES: &[&str] = &["memory.", "cpu.", "pids.", "hugetlb.2MB."];

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
    let is_guests = |key: &str| GUEST_FILES.iter().any(|files| key.starts_with(files));
    let mut unified = resources.unified_mut().take().unwrap_or_default();
    let mut others: Vec<_> = unified.keys().filter(|key| !is_guests(key)).cloned().collect();
    others.sort();
    for key in others {
        unified.remove(&key);
        lost(
            &format!("unified.{key}"),
            "the guest has no such controller for a container",
        );
    }
    resources
        .set_block_io(None)
        .set_network(None)
        .set_rdma(None)
        .set_unified((!unified.is_empty()).then_some(unified));
    resources
}
