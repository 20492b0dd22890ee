//! `kata-ctl top`: what each pod holds of the node's memory, each page counted once, and the processor time it has
//! used.
//!
//! Guest RAM is one memory object that QEMU and virtiofsd both map. What `ps` shows of the two counts its pages twice;
//! here they are taken from the object itself, and the processes count with their proportional share of everything
//! else. Sources: memfd_create(2), stat(2), proc_pid_smaps(5), proc_pid_stat(5).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    time::Duration,
};

use futures::future::join_all;
use procfs::{
    ProcError,
    process::{FDTarget, MMapPath, MemoryMaps, Process, Stat, all_processes},
};
use serde::Serialize;

use super::{how, pod_name, sandboxes, table};
use crate::{
    error::{Error, Result},
    http,
    metrics::{self, Task},
    undo::{PodName, ProcessId, State},
};

/// How long a shim may take to count its containers.
const SHIM: Duration = Duration::from_secs(1);

/// What one sandbox holds and has used.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Usage {
    /// Its id.
    pub sandbox: String,
    /// Its pod.
    pub pod: Option<PodName>,
    /// `running`, or why there is nothing to measure.
    pub state: &'static str,
    /// Containers that its shim knows, ended ones too; `None` when it does not answer.
    pub containers: Option<usize>,
    /// Bytes of memory.
    pub memory: Memory,
    /// Processor time of the shim, QEMU with its guest, and virtiofsd since their start.
    pub cpu_seconds: f64,
}

/// Bytes of memory, each page once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Guest RAM that the host has given: what the guest ever touched and has not given back. `None` without a guest.
    pub guest: Option<u64>,
    /// QEMU without it.
    pub qemu: Option<u64>,
    /// virtiofsd without it.
    pub virtiofsd: Option<u64>,
    /// The shim.
    pub shim: u64,
    /// All of these.
    pub total: u64,
}

/// Measures every sandbox of this node.
///
/// # Errors
/// A state file or `/proc` that cannot be read.
pub async fn measure() -> Result<Vec<Usage>> {
    let processes = processes().map_err(|error| system("list the processes", error))?;
    let sandboxes = sandboxes()?;
    // All are asked at once: one that does not answer holds up no other.
    let counts = join_all(sandboxes.iter().map(|(sandbox, _)| containers(sandbox))).await;
    let measured = sandboxes.into_iter().zip(counts).map(|((sandbox, state), containers)| {
        Ok(Usage {
            containers,
            ..usage_of(sandbox, state, &processes)?
        })
    });
    measured.collect()
}

impl Usage {
    /// The beginning of its id, as `crictl` shows it.
    pub(super) fn short(&self) -> String {
        self.sandbox.chars().take(13).collect()
    }

    /// Its containers in a table.
    pub(super) fn counted(&self) -> String {
        self.containers
            .map_or_else(|| "-".to_owned(), |count| count.to_string())
    }
}

/// How many containers a shim says that it has.
async fn containers(sandbox: &str) -> Option<usize> {
    let answer = http::get(&metrics::socket(sandbox), "/containers", SHIM).await.ok()?;
    let tasks: Vec<Task> = serde_json::from_str(&answer).ok()?;
    Some(tasks.iter().filter(|task| !task.sandbox).count())
}

/// The table for people: mebibytes and seconds.
pub fn render(usages: &[Usage]) -> String {
    let header = [
        "SANDBOX",
        "POD",
        "STATE",
        "CONTAINERS",
        "GUEST",
        "QEMU",
        "VIRTIOFSD",
        "SHIM",
        "TOTAL MiB",
        "CPU s",
    ];
    let row = |usage: &Usage| {
        let memory = &usage.memory;
        let part = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), mib);
        vec![
            usage.short(),
            pod_name(usage.pod.as_ref()),
            usage.state.to_owned(),
            usage.counted(),
            part(memory.guest),
            part(memory.qemu),
            part(memory.virtiofsd),
            mib(memory.shim),
            mib(memory.total),
            format!("{:.1}", usage.cpu_seconds),
        ]
    };
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(usages.iter().map(row));
    table(&rows, 3)
}

/// Mebibytes in a table.
pub(super) fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// Every process of the machine by its number; one that ends meanwhile is left out.
type Processes = BTreeMap<u32, Stat>;

fn processes() -> std::result::Result<Processes, ProcError> {
    let stats = all_processes()?.flatten().filter_map(|process| process.stat().ok());
    Ok(stats.map(|stat| (stat.pid.unsigned_abs(), stat)).collect())
}

fn usage_of(sandbox: String, state: State, processes: &Processes) -> Result<Usage> {
    let part = |process: Option<ProcessId>| {
        let alive = process.filter(ProcessId::alive);
        alive.map(|process| tree(process.pid, processes))
    };
    let (qemu, virtiofsd) = (part(state.qemu), part(state.virtiofsd));
    let below: BTreeSet<u32> = qemu.iter().chain(&virtiofsd).flatten().copied().collect();
    let all = part(Some(state.shim)).unwrap_or_default();
    let shim: BTreeSet<u32> = all.difference(&below).copied().collect();

    let own = |pids: &BTreeSet<u32>| pids.iter().map(|pid| own_bytes_of(*pid)).sum::<Result<u64>>();
    let guest = match &qemu {
        Some(_) => Some(objects(&below)?),
        None => None,
    };
    let mut memory = Memory {
        guest,
        qemu: qemu.as_ref().map(own).transpose()?,
        virtiofsd: virtiofsd.as_ref().map(own).transpose()?,
        shim: own(&shim)?,
        total: 0,
    };
    memory.total = [memory.guest, memory.qemu, memory.virtiofsd, Some(memory.shim)]
        .into_iter()
        .flatten()
        .sum();
    let ticks: u64 = all
        .iter()
        .filter_map(|pid| processes.get(pid))
        .map(|stat| stat.utime + stat.stime)
        .sum();
    Ok(Usage {
        state: how(&state),
        sandbox,
        pod: state.pod,
        containers: None,
        memory,
        cpu_seconds: ticks as f64 / procfs::ticks_per_second() as f64,
    })
}

/// A process and everything below it.
fn tree(root: u32, processes: &Processes) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut fresh = vec![root];
    while let Some(parent) = fresh.pop() {
        if found.insert(parent) {
            let children = processes.values().filter(|stat| stat.ppid.unsigned_abs() == parent);
            fresh.extend(children.map(|stat| stat.pid.unsigned_abs()));
        }
    }
    found
}

/// What a process holds besides guest RAM; nothing when it has ended meanwhile.
fn own_bytes_of(pid: u32) -> Result<u64> {
    match process(pid).and_then(|process| process.smaps()) {
        Ok(maps) => Ok(own_bytes(&maps)),
        Err(ProcError::NotFound(_)) => Ok(0),
        Err(error) => Err(system("read the memory maps of a process", error)),
    }
}

/// The proportional share of everything but memory objects.
fn own_bytes(maps: &MemoryMaps) -> u64 {
    let own = maps.iter().filter(|map| match &map.pathname {
        MMapPath::Path(path) => !path.starts_with("/dev/shm") && !path.to_string_lossy().starts_with("/memfd:"),
        _ => true,
    });
    own.filter_map(|map| map.extension.map.get("Pss")).sum()
}

/// Bytes of the memory objects that some processes have open, each object once.
fn objects(pids: &BTreeSet<u32>) -> Result<u64> {
    let mut objects = BTreeMap::new();
    for pid in pids {
        let open = match process(*pid).and_then(|process| process.fd()) {
            Ok(open) => open,
            Err(ProcError::NotFound(_)) => continue,
            Err(error) => return Err(system("read the open files of a process", error)),
        };
        let memory = open.flatten().filter(|file| matches!(file.target, FDTarget::MemFD(_)));
        let metadata = memory.filter_map(|file| fs::metadata(format!("/proc/{pid}/fd/{}", file.fd)).ok());
        // stat(2): blocks are of 512 bytes.
        objects.extend(metadata.map(|object| (object.ino(), object.blocks() * 512)));
    }
    Ok(objects.values().sum())
}

fn process(pid: u32) -> std::result::Result<Process, ProcError> {
    Process::new(pid.cast_signed())
}

fn system(action: &'static str, error: ProcError) -> Error {
    Error::Os {
        action,
        source: std::io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use procfs::FromRead;

    use super::*;

    #[test]
    fn guest_ram_is_not_the_processes_own() {
        let smaps = "7f0000000000-7f0080000000 rw-s 00000000 00:01 1027                       /memfd:ram0 (deleted)\n\
                     Size:            2097152 kB\nPss:               70000 kB\nVmFlags: rd wr\n\
                     55d000000000-55d000001000 r--p 00000000 fe:00 7                          /usr/bin/qemu-system-x86_64\n\
                     Size:                  4 kB\nPss:                  12 kB\nVmFlags: rd\n\
                     7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]\n\
                     Size:                  4 kB\nPss:                   3 kB\nVmFlags: rd wr\n";
        let maps = MemoryMaps::from_read(smaps.as_bytes()).unwrap();
        assert_eq!(own_bytes(&maps), 15 << 10);
    }

    #[test]
    fn this_process_is_measured() {
        let own = std::process::id();
        assert!(own_bytes_of(own).unwrap() > 0);
        let parent = std::os::unix::process::parent_id();
        assert!(tree(parent, &processes().unwrap()).contains(&own));
    }

    #[test]
    fn a_pod_without_a_guest_says_so() {
        let running = Usage {
            sandbox: "0123456789abcdef".into(),
            pod: Some(PodName {
                namespace: "shop".into(),
                name: "web-0".into(),
            }),
            state: "running",
            containers: Some(2),
            memory: Memory {
                guest: Some(76 << 20),
                qemu: Some(116 << 20),
                virtiofsd: Some(3 << 20),
                shim: 6 << 20,
                total: 201 << 20,
            },
            cpu_seconds: 3.25,
        };
        let ended = Usage {
            state: "no guest",
            pod: None,
            containers: None,
            memory: Memory {
                shim: 6 << 20,
                total: 6 << 20,
                ..Memory::default()
            },
            ..running.clone()
        };
        let text = render(&[running, ended]);
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            words[1],
            [
                "0123456789abc",
                "shop/web-0",
                "running",
                "2",
                "76.0",
                "116.0",
                "3.0",
                "6.0",
                "201.0",
                "3.2"
            ]
        );
        assert_eq!(words[2][2..], ["no", "guest", "-", "-", "-", "-", "6.0", "6.0", "3.2"]);
    }
}
