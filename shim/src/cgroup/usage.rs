//! What the sandbox's cgroup has used, in the agent's terms, so that pods and containers become metrics by the same
//! code. Sources: `Documentation/admin-guide/cgroup-v1/{memory,cpuacct}.rst`,
//! `Documentation/admin-guide/cgroup-v2.rst`.

use super::{CgroupError, Leaf, SandboxCgroup, file};
use agent_protocol::protocol::agent::{CgroupStats, MemoryData};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

impl SandboxCgroup {
    /// What the sandbox has used so far. A controller that the host has not, or a file that its kernel has not, counts
    /// as zero.
    ///
    /// # Errors
    /// A file that cannot be read; a controller that the host has and the sandbox has not: zero would be taken for its
    /// usage.
    pub fn usage(&self) -> Result<CgroupStats, CgroupError> {
        let folder = |controller: &str| self.folder_of(controller);
        let mut stats = CgroupStats::new();
        if self.record.v2 {
            if let Some(leaf) = self.record.leaves.first() {
                counted(leaf)?;
                read_v2(&leaf.folder, &mut stats)?;
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

    /// How many of the sandbox's processes the kernel has killed for want of memory, the pod's or the host's.
    fn oom_kills(&self) -> Result<u64, CgroupError> {
        let name = if self.record.v2 {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let table = self.folder_of("memory").map(|folder| table(folder, name)).transpose()?;
        Ok(table.and_then(|table| table.get("oom_kill").copied()).unwrap_or(0))
    }
}

/// Whether the host's kernel has killed a sandbox's processes for want of memory. It counts a kill before it kills, so
/// whoever sees the end of the process sees the count.
#[derive(Debug)]
pub struct OomKills {
    cgroup: SandboxCgroup,
    before: u64,
    /// Outlives the cgroup.
    seen: AtomicBool,
}

impl OomKills {
    /// Counts from now on.
    pub fn new(cgroup: SandboxCgroup) -> Self {
        let before = cgroup.oom_kills().unwrap_or_default();
        Self {
            cgroup,
            before,
            seen: AtomicBool::new(false),
        }
    }

    /// Whether there was one.
    pub fn any(&self) -> bool {
        match self.cgroup.oom_kills() {
            Ok(kills) if kills > self.before => self.seen.store(true, Ordering::SeqCst),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot tell whether the host was out of memory"),
        }
        self.seen.load(Ordering::SeqCst)
    }
}

/// Whether the controllers that v2's numbers come from are the sandbox's, as far as the host has them.
fn counted(leaf: &Leaf) -> Result<(), CgroupError> {
    let (host, own) = (
        text(&leaf.root, "cgroup.controllers")?,
        text(&leaf.folder, "cgroup.controllers")?,
    );
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    match ["memory", "pids"]
        .into_iter()
        .find(|name| has(&host, name) && !has(&own, name))
    {
        Some(controller) => Err(CgroupError::NotCounted {
            controller,
            folder: leaf.folder.clone(),
        }),
        None => Ok(()),
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
