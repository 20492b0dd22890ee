//! Where a file's pages are after a container has read it: in the guest, in QEMU, in virtiofsd, on the host, in the
//! pod's cgroup.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    config::Runtime,
    cri::{Access, Container, Pod},
    failure::{Failure, Result, Trying, claim},
    footprint::{Charge, Footprint},
    node::Node,
    run::{self, succeed},
};

/// The file's size.
pub const FILE_MIB: u64 = 300;

/// How long the pod's memory may take to come to rest.
const REST: Duration = Duration::from_secs(30);

/// What each place shows at one moment, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    /// `Cached` in the guest's /proc/meminfo.
    pub guest_cached: u64,
    /// QEMU's resident set, as ps shows it, guest RAM included.
    pub qemu_resident: u64,
    /// virtiofsd's.
    pub virtiofsd_resident: u64,
    /// The file's pages in the host's page cache.
    pub host_cache: u64,
    /// The pod's cgroup on the host.
    pub charge: Charge,
    /// The pod's memory with each page once.
    pub footprint: Footprint,
}

/// A reading.
#[derive(Debug, Clone, Copy)]
pub struct ColdRead {
    /// Before it, with a cold file.
    pub before: View,
    /// After it.
    pub after: View,
    /// How long it took, exec included.
    pub took: Duration,
}

impl ColdRead {
    /// Lets a container read a file that nobody has in memory.
    ///
    /// # Errors
    /// What the peers answer, or when the host keeps the file in its cache.
    pub fn perform(node: &Node, runtime: Runtime) -> Result<ColdRead> {
        let folder = node.path(&format!("cold-{}", node.serial()));
        let file = folder.join("file");
        make_cold(&file)?;
        let pod = node.pod(runtime, "cold")?.run()?;
        let container = pod
            .container("reader", &["sleep", "infinity"])
            .volume(&folder, "/cold", Access::ReadOnly)
            .run()?;
        let view = || View::take(&pod, &container, &file);
        at_rest(node, pod.id())?;
        let before = view()?;
        claim(
            before.host_cache < 1024,
            format!("the file is cold, with {} KiB in the host's cache", before.host_cache),
        )?;
        let start = Instant::now();
        container.shell("dd if=/cold/file of=/dev/null bs=1M 2>/dev/null")?;
        let took = start.elapsed();
        let after = view()?;
        pod.remove()?;
        fs::remove_dir_all(&folder).trying("removing the cold file")?;
        Ok(ColdRead { before, after, took })
    }
}

impl View {
    fn take(pod: &Pod<'_>, container: &Container<'_>, file: &Path) -> Result<View> {
        let cached = container.shell("grep ^Cached: /proc/meminfo")?;
        let processes = pod.processes();
        let resident = |name: &str| {
            let named = processes.iter().filter(|process| process.program().starts_with(name));
            named.map(|process| process.resident_kib()).max().unwrap_or(0)
        };
        Ok(View {
            guest_cached: number(&cached)?,
            qemu_resident: resident("qemu-system-"),
            virtiofsd_resident: resident("virtiofsd"),
            host_cache: in_cache(file)?,
            charge: Charge::of(&pod.cgroup())?,
            footprint: Footprint::of(&processes),
        })
    }
}

/// Waits until the guest has not taken or given back memory for a second, and returns what the pod holds then.
///
/// # Errors
/// When it never rests.
pub fn at_rest(node: &Node, pod: &str) -> Result<Footprint> {
    let look = || Footprint::of(&node.processes_of(pod));
    let mut earlier = (Instant::now(), look());
    node.events().bell.until("a pod at rest", REST, || {
        if earlier.0.elapsed() < Duration::from_secs(1) {
            return Err("less than a second to compare".into());
        }
        let (before, now) = (earlier.1, look());
        earlier = (Instant::now(), now);
        if now.guest_kib.abs_diff(before.guest_kib) < 512 {
            Ok(now)
        } else {
            Err(format!("{} KiB, then {} KiB", before.guest_kib, now.guest_kib))
        }
    })
}

/// Writes the file to the disk and out of the cache.
fn make_cold(path: &Path) -> Result {
    let making = || format!("making {}", path.display());
    path.parent().map_or(Ok(()), fs::create_dir_all).trying(making())?;
    let mut file = File::create(path).trying(making())?;
    // Not zeros, which a file system might not store.
    let mebibyte: Vec<u8> = (0..1u32 << 18)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    for _ in 0..FILE_MIB {
        file.write_all(&mebibyte).trying(making())?;
    }
    file.sync_all().trying(making())?;
    // dd(1): with nothing to copy, nocache asks the kernel to drop the whole file.
    let mut command = Command::new("dd");
    command
        .arg(format!("if={}", path.display()))
        .args(["iflag=nocache", "count=0", "status=none"]);
    succeed(&mut command, run::ORDINARY).map(drop)
}

/// KiB of the file in the host's page cache (fincore(1)).
fn in_cache(path: &Path) -> Result<u64> {
    let mut command = Command::new("fincore");
    command.args(["--bytes", "--noheadings", "--output", "RES"]).arg(path);
    Ok(number(&format!("- {}", succeed(&mut command, run::ORDINARY)?.text()))? >> 10)
}

/// The second word of a line.
fn number(line: &str) -> Result<u64> {
    let word = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    word.ok_or_else(|| Failure::Claim(format!("{line:?} has no number")))
}
