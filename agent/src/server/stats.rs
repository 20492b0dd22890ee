//! A container's statistics from its cgroup (v2), in the terms of v1, which the protocol speaks.

use std::{collections::HashMap, fs, io, path::Path};

use super::error::{Doing, Result};
use agent_protocol::protocol::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryStats, NetworkStats,
    PidsStats, StatsContainerResponse, ThrottlingData,
};

/// Measures a container. What its kernel does not count is zero.
pub(super) fn of(cgroup: &Path) -> Result<StatsContainerResponse> {
    let files = Files(cgroup);
    let mut stats = CgroupStats::new();
    stats.cpu_stats = Some(files.cpu()?).into();
    stats.memory_stats = Some(files.memory()?).into();
    stats.pids_stats = Some(files.pids()?).into();
    stats.blkio_stats = Some(files.io()?).into();
    stats.hugetlb_stats = files.huge_pages()?;
    let mut response = StatsContainerResponse::new();
    response.cgroup_stats = Some(stats).into();
    response.network_stats = fs::read_to_string("/proc/net/dev")
        .map(|text| network(&text))
        .unwrap_or_default();
    Ok(response)
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    /// The text of a file; nothing if the controller is not there.
    fn text(&self, name: &str) -> Result<String> {
        let path = self.0.join(name);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other.doing(|| format!("read {}", path.display())),
        }
    }

    /// The value of a file; "max" is the largest.
    fn value(&self, name: &str) -> Result<u64> {
        Ok(match self.text(name)?.trim() {
            "max" => u64::MAX,
            text => text.parse().unwrap_or(0),
        })
    }

    fn pairs(&self, name: &str) -> Result<HashMap<String, u64>> {
        Ok(pairs(&self.text(name)?))
    }

    fn cpu(&self) -> Result<CpuStats> {
        const MICROSECOND: u64 = 1000;
        let stat = self.pairs("cpu.stat")?;
        let count = |key: &str| stat.get(key).copied().unwrap_or(0);
        let mut usage = CpuUsage::new();
        usage.total_usage = count("usage_usec") * MICROSECOND;
        usage.usage_in_usermode = count("user_usec") * MICROSECOND;
        usage.usage_in_kernelmode = count("system_usec") * MICROSECOND;
        let mut throttling = ThrottlingData::new();
        throttling.periods = count("nr_periods");
        throttling.throttled_periods = count("nr_throttled");
        throttling.throttled_time = count("throttled_usec") * MICROSECOND;
        let mut stats = CpuStats::new();
        stats.cpu_usage = Some(usage).into();
        stats.throttling_data = Some(throttling).into();
        Ok(stats)
    }

    fn memory(&self) -> Result<MemoryStats> {
        let mut all = self.pairs("memory.stat")?;
        let events = self.pairs("memory.events")?;
        let event = |key: &str| events.get(key).copied().unwrap_or(0);
        let data = |name: &str, failures: u64| -> Result<MemoryData> {
            let mut data = MemoryData::new();
            data.usage = self.value(&format!("{name}.current"))?;
            data.max_usage = self.value(&format!("{name}.peak"))?.max(data.usage);
            data.limit = self.value(&format!("{name}.max"))?;
            data.failcnt = failures;
            Ok(data)
        };
        let mut stats = MemoryStats::new();
        stats.cache = all.get("file").copied().unwrap_or(0);
        stats.usage = Some(data("memory", event("max"))?).into();
        let swap = self.pairs("memory.swap.events")?;
        stats.swap_usage = Some(data("memory.swap", swap.get("fail").copied().unwrap_or(0))?).into();
        let mut kernel = MemoryData::new();
        kernel.usage = all.get("kernel").copied().unwrap_or_else(|| {
            // Kernels before 5.18 do not add it up.
            ["kernel_stack", "pagetables", "percpu", "slab"]
                .iter()
                .filter_map(|key| all.get(*key))
                .sum()
        });
        kernel.max_usage = kernel.usage;
        kernel.limit = u64::MAX;
        stats.kernel_usage = Some(kernel).into();
        stats.use_hierarchy = true;
        for key in ["low", "high", "max", "oom", "oom_kill", "oom_group_kill"] {
            all.insert(key.into(), event(key));
        }
        stats.stats = all;
        Ok(stats)
    }

    fn pids(&self) -> Result<PidsStats> {
        let mut stats = PidsStats::new();
        stats.current = self.value("pids.current")?;
        // No limit is 0 there.
        stats.limit = Some(self.value("pids.max")?)
            .filter(|limit| *limit != u64::MAX)
            .unwrap_or(0);
        Ok(stats)
    }

    fn io(&self) -> Result<BlkioStats> {
        Ok(io_stats(&self.text("io.stat")?))
    }

    fn huge_pages(&self) -> Result<HashMap<String, HugetlbStats>> {
        let mut all = HashMap::new();
        for entry in fs::read_dir(self.0).doing(|| format!("read {}", self.0.display()))? {
            let name = entry.doing(|| format!("read {}", self.0.display()))?.file_name();
            let name = name.to_string_lossy();
            let size = name
                .strip_prefix("hugetlb.")
                .and_then(|name| name.strip_suffix(".current"));
            let Some(size) = size.filter(|size| !size.ends_with(".rsvd")) else {
                continue;
            };
            let mut stats = HugetlbStats::new();
            stats.usage = self.value(&name)?;
            stats.max_usage = stats.usage;
            let events = self.pairs(&format!("hugetlb.{size}.events"))?;
            stats.failcnt = events.get("max").copied().unwrap_or(0);
            all.insert(size.to_owned(), stats);
        }
        Ok(all)
    }
}

/// `<key> <number>` on each line.
fn pairs(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

/// `<major>:<minor> rbytes=<n> wbytes=<n> rios=<n> wios=<n> dbytes=<n> dios=<n>` on each line.
fn io_stats(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().and_then(|device| device.split_once(':'));
        let number = |text: &str| text.parse::<u64>().ok();
        let Some((Some(major), Some(minor))) = device.map(|(major, minor)| (number(major), number(minor))) else {
            continue;
        };
        let values: HashMap<_, _> = words.filter_map(|word| word.split_once('=')).collect();
        let entry = |key: &str, op: &str| {
            let mut entry = BlkioStatsEntry::new();
            (entry.major, entry.minor, entry.op) = (major, minor, op.into());
            entry.value = values.get(key).and_then(|value| number(value)).unwrap_or(0);
            entry
        };
        let bytes = [
            entry("rbytes", "Read"),
            entry("wbytes", "Write"),
            entry("dbytes", "Discard"),
        ];
        let operations = [entry("rios", "Read"), entry("wios", "Write"), entry("dios", "Discard")];
        stats.io_service_bytes_recursive.extend(bytes);
        stats.io_serviced_recursive.extend(operations);
    }
    stats
}

/// The most interfaces that are told; a pod that runs containers of its own has one for each of them. The shim takes
/// 16 KiB.
const MOST_INTERFACES: usize = 64;

/// From the text of `/proc/net/dev` (proc_pid_net(5)); the pod's, as its containers share one network.
fn network(text: &str) -> Vec<NetworkStats> {
    let interfaces = text.lines().filter_map(|line| line.split_once(':'));
    let interfaces = interfaces
        .map(|(name, counts)| (name.trim(), counts))
        .filter(|(name, _)| *name != "lo")
        .take(MOST_INTERFACES);
    let stats = interfaces.map(|(name, counts)| {
        let counts: Vec<u64> = counts
            .split_whitespace()
            .map(|count| count.parse().unwrap_or(0))
            .collect();
        let count = |index: usize| counts.get(index).copied().unwrap_or(0);
        let mut stats = NetworkStats::new();
        stats.name = name.to_owned();
        (stats.rx_bytes, stats.rx_packets, stats.rx_errors, stats.rx_dropped) =
            (count(0), count(1), count(2), count(3));
        (stats.tx_bytes, stats.tx_packets, stats.tx_errors, stats.tx_dropped) =
            (count(8), count(9), count(10), count(11));
        stats
    });
    stats.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_is_counted_by_device_and_operation() {
        let stats = io_stats("253:0 rbytes=4096 wbytes=8 rios=1 wios=2 dbytes=0 dios=0\n8:16\n");
        let bytes: Vec<_> = stats
            .io_service_bytes_recursive
            .iter()
            .map(|e| (e.major, e.op.as_str(), e.value))
            .collect();
        assert_eq!(
            bytes[..3],
            [(253, "Read", 4096), (253, "Write", 8), (253, "Discard", 0)]
        );
        assert_eq!(stats.io_serviced_recursive[1].value, 2);
        assert_eq!(bytes.len(), 6);
    }

    #[test]
    fn the_network_is_without_loopback() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";
        let stats = network(text);
        assert_eq!(stats.len(), 1);
        let many: String = (0..300).map(|number| format!("veth{number}: 1\n")).collect();
        assert_eq!(network(&many).len(), MOST_INTERFACES);
        assert_eq!(
            (
                stats[0].rx_bytes,
                stats[0].rx_dropped,
                stats[0].tx_bytes,
                stats[0].tx_dropped
            ),
            (10, 4, 50, 8)
        );
    }

    #[test]
    fn a_container_is_measured_by_its_files() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 5\nnr_throttled 2\nthrottled_usec 9\n",
            ),
            ("memory.current", "100\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 60\nfile 30\nkernel_stack 4\nslab 6\n"),
            (
                "memory.events",
                "low 0\nhigh 0\nmax 8\noom 1\noom_kill 1\noom_group_kill 0\n",
            ),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.2MB.events", "max 4\n"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let stats = of(folder.path()).unwrap().cgroup_stats.unwrap();
        assert_eq!(stats.cpu_stats.cpu_usage.total_usage, 7000);
        assert_eq!(stats.cpu_stats.throttling_data.throttled_time, 9000);
        let memory = stats.memory_stats.unwrap();
        assert_eq!(
            (memory.usage.usage, memory.usage.limit, memory.usage.failcnt),
            (100, u64::MAX, 8)
        );
        assert_eq!((memory.cache, memory.kernel_usage.usage), (30, 10));
        assert_eq!((memory.stats["oom_kill"], memory.stats["anon"]), (1, 60));
        assert_eq!((stats.pids_stats.current, stats.pids_stats.limit), (3, 0));
        assert_eq!(stats.hugetlb_stats.len(), 1);
        assert_eq!(stats.hugetlb_stats["2MB"].failcnt, 4);
    }
}
