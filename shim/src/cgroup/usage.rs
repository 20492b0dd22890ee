//! What the sandbox's cgroup has used, in the agent's terms, so that pods and containers become metrics by the same code.
//! Sources: `Documentation/admin-guide/cgroup-v1/{memory,cpuacct}.rst`, `Documentation/admin-guide/cgroup-v2.rst`.

use super::{CgroupError, SandboxCgroup, file};
use agent::protocol::agent::{CgroupStats, MemoryData};
use std::collections::HashMap;
use std::io;
use std::path::Path;

impl SandboxCgroup {
    /// What the sandbox has used so far. A controller that the host has not mounted, or that has no such file, counts as zero.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn usage(&self) -> Result<CgroupStats, CgroupError> {
        let folder = |controller: &str| {
            let leaves = &self.record.leaves;
            // On v1 controllers share a hierarchy (`cpu,cpuacct`), which has one mount point.
            let with = |leaf: &&super::Leaf| {
                let name = leaf.root.file_name().unwrap_or_default().to_string_lossy();
                self.record.v2 || name.split(',').any(|part| part == controller)
            };
            leaves.iter().find(with).map(|leaf| leaf.folder.as_path())
        };
        let mut stats = CgroupStats::new();
        if self.record.v2 {
            if let Some(folder) = folder("") {
                read_v2(folder, &mut stats)?;
            }
            return Ok(stats);
        }
        if let Some(folder) = folder("cpuacct") {
            let cpu = stats
                .cpu_stats
                .mut_or_insert_default()
                .cpu_usage
                .mut_or_insert_default();
            cpu.total_usage = number(folder, "cpuacct.usage")?;
            cpu.usage_in_usermode = number(folder, "cpuacct.usage_user")?;
            cpu.usage_in_kernelmode = number(folder, "cpuacct.usage_sys")?;
        }
        if let Some(folder) = folder("cpu") {
            let table = table(folder, "cpu.stat")?;
            throttling(&mut stats, &table, table.get("throttled_time").copied().unwrap_or(0));
        }
        if let Some(folder) = folder("memory") {
            let memory = stats.memory_stats.mut_or_insert_default();
            memory.stats = table(folder, "memory.stat")?;
            memory.cache = memory.stats.get("cache").copied().unwrap_or(0);
            memory.usage = Some(memory_v1(folder, "memory")?).into();
            memory.swap_usage = Some(memory_v1(folder, "memory.memsw")?).into();
            memory.kernel_usage = Some(memory_v1(folder, "memory.kmem")?).into();
        }
        if let Some(folder) = folder("pids") {
            pids(folder, &mut stats)?;
        }
        Ok(stats)
    }
}

fn read_v2(folder: &Path, stats: &mut CgroupStats) -> Result<(), CgroupError> {
    let cpu = table(folder, "cpu.stat")?;
    let nanoseconds = |key: &str| cpu.get(key).copied().unwrap_or(0).saturating_mul(1000);
    let used = stats
        .cpu_stats
        .mut_or_insert_default()
        .cpu_usage
        .mut_or_insert_default();
    used.total_usage = nanoseconds("usage_usec");
    used.usage_in_usermode = nanoseconds("user_usec");
    used.usage_in_kernelmode = nanoseconds("system_usec");
    throttling(stats, &cpu, nanoseconds("throttled_usec"));

    let memory = stats.memory_stats.mut_or_insert_default();
    memory.stats = table(folder, "memory.stat")?;
    memory.cache = memory.stats.get("file").copied().unwrap_or(0);
    memory.use_hierarchy = true;
    memory.usage = Some(memory_v2(folder, "memory")?).into();
    memory.swap_usage = Some(memory_v2(folder, "memory.swap")?).into();
    pids(folder, stats)
}

fn throttling(stats: &mut CgroupStats, table: &HashMap<String, u64>, nanoseconds: u64) {
    let data = stats
        .cpu_stats
        .mut_or_insert_default()
        .throttling_data
        .mut_or_insert_default();
    data.periods = table.get("nr_periods").copied().unwrap_or(0);
    data.throttled_periods = table.get("nr_throttled").copied().unwrap_or(0);
    data.throttled_time = nanoseconds;
}

fn memory_v1(folder: &Path, prefix: &str) -> Result<MemoryData, CgroupError> {
    let mut data = MemoryData::new();
    data.usage = number(folder, &format!("{prefix}.usage_in_bytes"))?;
    data.max_usage = number(folder, &format!("{prefix}.max_usage_in_bytes"))?;
    data.failcnt = number(folder, &format!("{prefix}.failcnt"))?;
    data.limit = number(folder, &format!("{prefix}.limit_in_bytes"))?;
    Ok(data)
}

fn memory_v2(folder: &Path, prefix: &str) -> Result<MemoryData, CgroupError> {
    let mut data = MemoryData::new();
    data.usage = number(folder, &format!("{prefix}.current"))?;
    data.max_usage = number(folder, &format!("{prefix}.peak"))?;
    data.failcnt = table(folder, &format!("{prefix}.events"))?
        .get("max")
        .copied()
        .unwrap_or(0);
    data.limit = number(folder, &format!("{prefix}.max"))?;
    Ok(data)
}

fn pids(folder: &Path, stats: &mut CgroupStats) -> Result<(), CgroupError> {
    let pids = stats.pids_stats.mut_or_insert_default();
    pids.current = number(folder, "pids.current")?;
    pids.limit = match number(folder, "pids.max")? {
        // The agent's zero, and containerd's, is "no limit".
        u64::MAX => 0,
        limit => limit,
    };
    Ok(())
}

/// A file with one number; `max` is the largest, and a file that the kernel does not have is zero.
fn number(folder: &Path, name: &str) -> Result<u64, CgroupError> {
    let text = text(folder, name)?;
    Ok(match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    })
}

/// A file of `key number` lines.
fn table(folder: &Path, name: &str) -> Result<HashMap<String, u64>, CgroupError> {
    let text = text(folder, name)?;
    let pairs = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    });
    Ok(pairs.collect())
}

fn text(folder: &Path, name: &str) -> Result<String, CgroupError> {
    let path = folder.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        // Kernels without swap or kernel-memory accounting have the file and refuse to read it.
        Err(error) if error.raw_os_error() == Some(nix::Error::EOPNOTSUPP as i32) => Ok(String::new()),
        Err(source) => Err(file("read", &path, source)),
    }
}
