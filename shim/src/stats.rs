//! Statistics as containerd and CRI-O take them: a cgroup's numbers, in the version of the host's cgroups.
//!
//! CRI-O reads the v1 or v2 message by the host's mode and follows sub-messages without looking whether they are there,
//! so every one is filled. Sources: `metrics.proto` of containerd/cgroups; `internal/oci/runtime_vm.go` of CRI-O.

use std::collections::HashMap;

use agent_protocol::protocol::agent::{BlkioStatsEntry, CgroupStats, MemoryData, NetworkStats, StatsContainerResponse};
use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{Message, MessageFull, well_known_types::any::Any},
};

use crate::{
    cgroup::{SandboxCgroup, is_v2},
    error::{Error, Result, decode},
};

/// The longest answer about a container that is kept, in bytes on the wire. A true one has some 4 KiB.
const LONGEST: u64 = 16 << 10;

/// Whether a guest's statistics are such as a cgroup has. They are kept, and in memory they are many times as large as
/// on the wire.
pub fn check(stats: &StatsContainerResponse) -> Result<()> {
    match stats.compute_size() {
        0..=LONGEST => Ok(()),
        size => Err(Error::Precondition(format!(
            "the guest sent {size} bytes of statistics for one container, of which no more than {LONGEST} are taken"
        ))),
    }
}

/// A container's statistics, from its cgroup in the guest. `oom_killed` outlives the cgroup's own counter.
pub fn of_guest(stats: &StatsContainerResponse, oom_killed: bool) -> Result<Any> {
    let usage = Usage::new(&stats.cgroup_stats, &stats.network_stats, oom_killed);
    usage.encode(is_v2())
}

/// The sandbox's statistics, from its cgroup on the host; zeros without one.
pub fn of_host(cgroup: Option<&SandboxCgroup>) -> Result<Any> {
    let stats = cgroup.map(SandboxCgroup::usage).transpose()?.unwrap_or_default();
    Usage::new(&stats, &[], false).encode(is_v2())
}

/// One cgroup's numbers, whichever version its kernel has.
struct Usage<'a> {
    cgroup: &'a CgroupStats,
    network: &'a [NetworkStats],
    oom_killed: bool,
}

impl<'a> Usage<'a> {
    fn new(cgroup: &'a CgroupStats, network: &'a [NetworkStats], oom_killed: bool) -> Usage<'a> {
        Usage {
            cgroup,
            network,
            oom_killed,
        }
    }

    fn encode(&self, v2: bool) -> Result<Any> {
        if v2 { pack(&self.v2()) } else { pack(&self.v1()) }
    }

    /// A number of `memory.stat` by its name in v2 and its names in v1, whichever is there.
    fn memory_stat(&self, names: [&str; 2]) -> u64 {
        let table: &HashMap<String, u64> = &self.cgroup.memory_stats.stats;
        let total = format!("total_{}", names[1]);
        [names[0], &total, names[1]]
            .iter()
            .find_map(|name| table.get(*name).copied())
            .unwrap_or(0)
    }

    fn oom_kills(&self) -> u64 {
        let counted = self.cgroup.memory_stats.stats.get("oom_kill").copied().unwrap_or(0);
        counted.max(u64::from(self.oom_killed))
    }

    fn v1(&self) -> v1::Metrics {
        let mut metrics = v1::Metrics::new();
        let cpu = metrics.cpu.mut_or_insert_default();
        let used = &self.cgroup.cpu_stats.cpu_usage;
        let usage = cpu.usage.mut_or_insert_default();
        usage.total = used.total_usage;
        usage.kernel = used.usage_in_kernelmode;
        usage.user = used.usage_in_usermode;
        usage.per_cpu = used.percpu_usage.clone();
        let throttled = &self.cgroup.cpu_stats.throttling_data;
        let throttling = cpu.throttling.mut_or_insert_default();
        throttling.periods = throttled.periods;
        throttling.throttled_periods = throttled.throttled_periods;
        throttling.throttled_time = throttled.throttled_time;
        metrics.memory = Some(self.memory_v1()).into();
        let pids = metrics.pids.mut_or_insert_default();
        pids.current = self.cgroup.pids_stats.current;
        pids.limit = self.cgroup.pids_stats.limit;
        metrics.memory_oom_control.mut_or_insert_default().oom_kill = self.oom_kills();
        let blkio = metrics.blkio.mut_or_insert_default();
        blkio.io_service_bytes_recursive = self
            .cgroup
            .blkio_stats
            .io_service_bytes_recursive
            .iter()
            .map(entry_v1)
            .collect();
        blkio.io_serviced_recursive = self
            .cgroup
            .blkio_stats
            .io_serviced_recursive
            .iter()
            .map(entry_v1)
            .collect();
        metrics.hugetlb = self.hugetlb_v1();
        metrics.network = self.network.iter().map(network_v1).collect();
        metrics
    }

    fn memory_v1(&self) -> v1::MemoryStat {
        let from = &self.cgroup.memory_stats;
        let mut memory = v1::MemoryStat::new();
        memory.cache = self.memory_stat(["file", "cache"]);
        memory.rss = self.memory_stat(["anon", "rss"]);
        memory.rss_huge = self.memory_stat(["anon_thp", "rss_huge"]);
        memory.mapped_file = self.memory_stat(["file_mapped", "mapped_file"]);
        memory.dirty = self.memory_stat(["file_dirty", "dirty"]);
        memory.writeback = self.memory_stat(["file_writeback", "writeback"]);
        memory.pg_fault = self.memory_stat(["pgfault", "pgfault"]);
        memory.pg_maj_fault = self.memory_stat(["pgmajfault", "pgmajfault"]);
        memory.inactive_anon = self.memory_stat(["inactive_anon", "inactive_anon"]);
        memory.active_anon = self.memory_stat(["active_anon", "active_anon"]);
        memory.inactive_file = self.memory_stat(["inactive_file", "inactive_file"]);
        memory.active_file = self.memory_stat(["active_file", "active_file"]);
        memory.unevictable = self.memory_stat(["unevictable", "unevictable"]);
        memory.hierarchical_memory_limit = from.usage.limit;
        memory.total_cache = memory.cache;
        memory.total_rss = memory.rss;
        memory.total_rss_huge = memory.rss_huge;
        memory.total_mapped_file = memory.mapped_file;
        memory.total_dirty = memory.dirty;
        memory.total_writeback = memory.writeback;
        memory.total_pg_fault = memory.pg_fault;
        memory.total_pg_maj_fault = memory.pg_maj_fault;
        memory.total_inactive_anon = memory.inactive_anon;
        memory.total_active_anon = memory.active_anon;
        memory.total_inactive_file = memory.inactive_file;
        memory.total_active_file = memory.active_file;
        memory.total_unevictable = memory.unevictable;
        memory.usage = Some(memory_entry(&from.usage)).into();
        memory.swap = Some(memory_entry(&from.swap_usage)).into();
        memory.kernel = Some(memory_entry(&from.kernel_usage)).into();
        memory.kernel_tcp = Some(v1::MemoryEntry::new()).into();
        memory
    }

    fn hugetlb_v1(&self) -> Vec<v1::HugetlbStat> {
        let sizes = self.cgroup.hugetlb_stats.iter();
        sizes
            .map(|(pagesize, stat)| {
                let mut hugetlb = v1::HugetlbStat::new();
                hugetlb.pagesize = pagesize.clone();
                hugetlb.usage = stat.usage;
                hugetlb.max = stat.max_usage;
                hugetlb.failcnt = stat.failcnt;
                hugetlb
            })
            .collect()
    }

    fn v2(&self) -> v2::Metrics {
        let mut metrics = v2::Metrics::new();
        let used = &self.cgroup.cpu_stats.cpu_usage;
        let throttled = &self.cgroup.cpu_stats.throttling_data;
        let cpu = metrics.cpu.mut_or_insert_default();
        cpu.usage_usec = used.total_usage / 1000;
        cpu.user_usec = used.usage_in_usermode / 1000;
        cpu.system_usec = used.usage_in_kernelmode / 1000;
        cpu.nr_periods = throttled.periods;
        cpu.nr_throttled = throttled.throttled_periods;
        cpu.throttled_usec = throttled.throttled_time / 1000;
        metrics.memory = Some(self.memory_v2()).into();
        let pids = metrics.pids.mut_or_insert_default();
        pids.current = self.cgroup.pids_stats.current;
        pids.limit = self.cgroup.pids_stats.limit;
        metrics.memory_events.mut_or_insert_default().oom_kill = self.oom_kills();
        metrics.io.mut_or_insert_default().usage = self.io_v2();
        metrics.hugetlb = self.hugetlb_v2();
        metrics.network = self.network.iter().map(network_v2).collect();
        metrics
    }

    fn memory_v2(&self) -> v2::MemoryStat {
        let from = &self.cgroup.memory_stats;
        let mut memory = v2::MemoryStat::new();
        memory.anon = self.memory_stat(["anon", "rss"]);
        memory.file = self.memory_stat(["file", "cache"]);
        memory.kernel_stack = self.memory_stat(["kernel_stack", "kernel_stack"]);
        memory.slab = self.memory_stat(["slab", "slab"]);
        memory.slab_reclaimable = self.memory_stat(["slab_reclaimable", "slab_reclaimable"]);
        memory.slab_unreclaimable = self.memory_stat(["slab_unreclaimable", "slab_unreclaimable"]);
        memory.sock = self.memory_stat(["sock", "sock"]);
        memory.shmem = self.memory_stat(["shmem", "shmem"]);
        memory.file_mapped = self.memory_stat(["file_mapped", "mapped_file"]);
        memory.file_dirty = self.memory_stat(["file_dirty", "dirty"]);
        memory.file_writeback = self.memory_stat(["file_writeback", "writeback"]);
        memory.anon_thp = self.memory_stat(["anon_thp", "rss_huge"]);
        memory.inactive_anon = self.memory_stat(["inactive_anon", "inactive_anon"]);
        memory.active_anon = self.memory_stat(["active_anon", "active_anon"]);
        memory.inactive_file = self.memory_stat(["inactive_file", "inactive_file"]);
        memory.active_file = self.memory_stat(["active_file", "active_file"]);
        memory.unevictable = self.memory_stat(["unevictable", "unevictable"]);
        memory.pgfault = self.memory_stat(["pgfault", "pgfault"]);
        memory.pgmajfault = self.memory_stat(["pgmajfault", "pgmajfault"]);
        memory.usage = from.usage.usage;
        memory.usage_limit = from.usage.limit;
        memory.max_usage = from.usage.max_usage;
        memory.swap_usage = from.swap_usage.usage;
        memory.swap_limit = from.swap_usage.limit;
        memory.swap_max_usage = from.swap_usage.max_usage;
        memory
    }

    fn io_v2(&self) -> Vec<v2::IOEntry> {
        let mut devices: HashMap<(u64, u64), v2::IOEntry> = HashMap::new();
        let blkio = &self.cgroup.blkio_stats;
        let bytes = blkio.io_service_bytes_recursive.iter().map(|entry| (entry, true));
        for (entry, is_bytes) in bytes.chain(blkio.io_serviced_recursive.iter().map(|entry| (entry, false))) {
            let device = devices.entry((entry.major, entry.minor)).or_default();
            (device.major, device.minor) = (entry.major, entry.minor);
            match (entry.op.to_ascii_lowercase().as_str(), is_bytes) {
                ("read", true) => add(&mut device.rbytes, entry.value),
                ("write", true) => add(&mut device.wbytes, entry.value),
                ("read", false) => add(&mut device.rios, entry.value),
                ("write", false) => add(&mut device.wios, entry.value),
                _ => {}
            }
        }
        devices.into_values().collect()
    }

    fn hugetlb_v2(&self) -> Vec<v2::HugeTlbStat> {
        let sizes = self.cgroup.hugetlb_stats.iter();
        sizes
            .map(|(pagesize, stat)| {
                let mut hugetlb = v2::HugeTlbStat::new();
                hugetlb.pagesize = pagesize.clone();
                hugetlb.current = stat.usage;
                hugetlb.max = stat.max_usage;
                hugetlb.failcnt = stat.failcnt;
                hugetlb
            })
            .collect()
    }
}

fn add(sum: &mut u64, value: u64) {
    *sum = sum.saturating_add(value);
}

fn memory_entry(from: &MemoryData) -> v1::MemoryEntry {
    let mut entry = v1::MemoryEntry::new();
    entry.limit = from.limit;
    entry.usage = from.usage;
    entry.max = from.max_usage;
    entry.failcnt = from.failcnt;
    entry
}

fn entry_v1(from: &BlkioStatsEntry) -> v1::BlkIOEntry {
    let mut entry = v1::BlkIOEntry::new();
    entry.op = from.op.clone();
    entry.major = from.major;
    entry.minor = from.minor;
    entry.value = from.value;
    entry
}

/// The two versions of this message have the same fields.
macro_rules! network {
    ($name:ident, $version:ident) => {
        fn $name(from: &NetworkStats) -> $version::NetworkStat {
            let mut network = $version::NetworkStat::new();
            network.name = from.name.clone();
            network.rx_bytes = from.rx_bytes;
            network.rx_packets = from.rx_packets;
            network.rx_errors = from.rx_errors;
            network.rx_dropped = from.rx_dropped;
            network.tx_bytes = from.tx_bytes;
            network.tx_packets = from.tx_packets;
            network.tx_errors = from.tx_errors;
            network.tx_dropped = from.tx_dropped;
            network
        }
    };
}
network!(network_v1, v1);
network!(network_v2, v2);

/// The type is looked up by its bare name: with a host in front CRI-O does not find it.
fn pack<M: MessageFull>(metrics: &M) -> Result<Any> {
    let value = metrics.write_to_bytes().map_err(decode("the metrics"))?;
    Ok(Any {
        type_url: M::descriptor().full_name().into(),
        value,
        ..Any::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage_of(names: &[(&str, u64)]) -> CgroupStats {
        let mut stats = CgroupStats::new();
        let memory = stats.memory_stats.mut_or_insert_default();
        memory.usage.mut_or_insert_default().usage = 9;
        memory.stats = names.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        stats
            .cpu_stats
            .mut_or_insert_default()
            .cpu_usage
            .mut_or_insert_default()
            .total_usage = 5_000;
        stats
    }

    #[test]
    fn a_container_that_never_ran_has_every_sub_message_in_both_versions() {
        let nothing = CgroupStats::new();
        let usage = Usage::new(&nothing, &[], false);
        let any = usage.encode(true).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert!(metrics.cpu.is_some() && metrics.memory.is_some() && metrics.pids.is_some());
        let any = usage.encode(false).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert!(metrics.cpu.usage.is_some() && metrics.cpu.throttling.is_some() && metrics.pids.is_some());
        let memory = metrics.memory.unwrap();
        assert!(
            memory.usage.is_some() && memory.swap.is_some() && memory.kernel.is_some() && memory.kernel_tcp.is_some()
        );
    }

    #[test]
    fn either_kernel_fills_either_message() {
        let guest = usage_of(&[("anon", 4), ("inactive_file", 3), ("oom_kill", 2)]);
        let host = usage_of(&[("total_rss", 4), ("total_inactive_file", 3), ("rss", 1)]);
        for stats in [&guest, &host] {
            let usage = Usage::new(stats, &[], false);
            assert_eq!(
                (usage.v1().memory.total_rss, usage.v1().memory.total_inactive_file),
                (4, 3)
            );
            assert_eq!((usage.v2().memory.anon, usage.v2().memory.inactive_file), (4, 3));
            assert_eq!((usage.v1().cpu.usage.total, usage.v2().cpu.usage_usec), (5_000, 5));
        }
        assert_eq!(Usage::new(&guest, &[], false).v2().memory_events.oom_kill, 2);
        assert_eq!(Usage::new(&host, &[], true).v1().memory_oom_control.oom_kill, 1);
    }

    #[test]
    fn no_number_of_a_guests_is_too_large_and_no_list_too_long() {
        let mut stats = StatsContainerResponse::new();
        let blkio = stats
            .cgroup_stats
            .mut_or_insert_default()
            .blkio_stats
            .mut_or_insert_default();
        let mut entry = BlkioStatsEntry::new();
        (entry.op, entry.value) = ("Read".into(), u64::MAX);
        blkio.io_service_bytes_recursive = vec![entry.clone(); 3];
        check(&stats).unwrap();
        let usage = Usage::new(&stats.cgroup_stats, &[], true);
        assert_eq!(usage.v2().io.usage[0].rbytes, u64::MAX);
        usage.encode(false).unwrap();

        let blkio = stats
            .cgroup_stats
            .mut_or_insert_default()
            .blkio_stats
            .mut_or_insert_default();
        blkio.io_service_bytes_recursive = vec![entry; 10_000];
        let refused = check(&stats).unwrap_err().to_string();
        assert!(refused.contains("bytes of statistics"), "{refused}");
    }

    #[test]
    fn reads_and_writes_of_a_device_become_one_entry() {
        let mut stats = CgroupStats::new();
        let blkio = stats.blkio_stats.mut_or_insert_default();
        for (op, value) in [("Read", 10), ("Write", 20)] {
            let mut entry = BlkioStatsEntry::new();
            (entry.major, entry.op, entry.value) = (254, op.into(), value);
            blkio.io_service_bytes_recursive.push(entry);
        }
        let io = Usage::new(&stats, &[], false).v2().io.unwrap();
        assert_eq!(io.usage.len(), 1);
        assert_eq!((io.usage[0].rbytes, io.usage[0].wbytes), (10, 20));
    }
}
