//! What follows from the size of the guest's memory, which changes: a reserve for the guest itself, the limits that
//! Linux derives from the memory at boot, and the most that a volume in memory may hold.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{
    boot::{CGROUPS, write},
    error::{Doing, Result},
};
use crate::engine::POD_CGROUP;

/// What is kept from the pod: KiB, or a part of a small guest.
const RESERVE_KIB: u64 = 64 << 10;
const RESERVE_PART: u64 = 8;

/// Of what the pod may have, a volume in memory may have all but this part, or a full one would leave its writer no
/// memory to hear of it.
const BESIDES_A_VOLUME: u64 = 8;

/// Kept free by the kernel for itself.
const MIN_FREE: &str = "vm/min_free_kbytes";

/// Sysctls in which Linux has a share of the memory at boot (`fork_init`, `eventpoll_init`, `files_maxfiles_init`,
/// `tcp_init_mem`, `udp_table_init`, `nf_conntrack_init_start`). Some have several numbers.
const SHARES: &[&str] = &[
    "fs/epoll/max_user_watches",
    "fs/file-max",
    "kernel/threads-max",
    "net/ipv4/tcp_mem",
    "net/ipv4/udp_mem",
    "net/netfilter/nf_conntrack_max",
    "user/max_cgroup_namespaces",
    "user/max_ipc_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "user/max_time_namespaces",
    "user/max_user_namespaces",
    "user/max_uts_namespaces",
];

/// The memory at boot and what Linux derived from it.
#[derive(Debug)]
pub(super) struct Memory {
    boot_kib: u64,
    shares: Mutex<HashMap<&'static str, Share>>,
}

#[derive(Debug)]
struct Share {
    at_boot: Vec<u64>,
    /// The text that is there as long as nobody in the pod has written another.
    ours: String,
}

impl Memory {
    /// The guest as it has booted, before anybody else has a say; [`Memory::fit`] is to follow.
    pub(super) fn at_boot() -> Result<Memory> {
        let mut shares = HashMap::new();
        for name in SHARES {
            // Some are the kernel's first network namespace's alone, and a pod with a user namespace is in another.
            let Some(ours) = read(&sysctl(name))? else { continue };
            if let Some(at_boot) = numbers(&ours) {
                shares.insert(*name, Share { at_boot, ours });
            }
        }
        let memory = Memory {
            boot_kib: sizes()?.total,
            shares: Mutex::new(shares),
        };
        let pod = Path::new(CGROUPS).join(POD_CGROUP);
        fs::create_dir(&pod).doing(|| format!("make {}", pod.display()))?;
        Ok(memory)
    }

    /// To be called when memory has come or gone; answers how many bytes a volume in memory may have. Blocks.
    pub(super) fn fit(&self) -> Result<u64> {
        let sizes = sizes()?;
        limit_reserve(sizes.total)?;
        for (name, share) in &mut *self.shares.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            let path = sysctl(name);
            let scaled: Vec<_> = share
                .at_boot
                .iter()
                .map(|n| scale(*n, sizes.total, self.boot_kib))
                .collect();
            if numbers(&share.ours).as_ref() != Some(&scaled) && read(&path)?.as_deref() == Some(&share.ours) {
                let text: Vec<_> = scaled.iter().map(u64::to_string).collect();
                write(&path, &text.join(" "))?;
                share.ours = read(&path)?.unwrap_or_default();
            }
        }
        let bytes = for_the_pod(&sizes) * 1024;
        write(
            Path::new(CGROUPS).join(POD_CGROUP).join("memory.max"),
            &bytes.to_string(),
        )?;
        Ok(bytes - bytes / BESIDES_A_VOLUME)
    }
}

/// In KiB.
struct Sizes {
    total: u64,
    /// Taken out of it for huge pages, which no memory limit counts.
    huge: u64,
}

fn sizes() -> Result<Sizes> {
    let text = fs::read_to_string("/proc/meminfo").doing(|| "read /proc/meminfo".into())?;
    let of = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse().ok()
    };
    let total = of("MemTotal:").ok_or_else(|| io::Error::other("it has no MemTotal"));
    Ok(Sizes {
        total: total.doing(|| "read /proc/meminfo".into())?,
        huge: of("Hugetlb:").unwrap_or(0),
    })
}

/// How much the pod's containers may have together, so that one of them meets its end before the guest does.
fn for_the_pod(sizes: &Sizes) -> u64 {
    let left = sizes.total.saturating_sub(sizes.huge);
    left - RESERVE_KIB.min(left / RESERVE_PART)
}

fn scale(at_boot: u64, now: u64, boot: u64) -> u64 {
    // Where Linux says "as many as there can be", it is so already.
    let scaled = u128::from(at_boot) * u128::from(now) / u128::from(boot.max(1));
    i64::try_from(scaled).map_or(at_boot, i64::cast_unsigned)
}

/// Where transparent huge pages may be asked for, the kernel keeps some 35 MiB out of use to have them at hand, and
/// again with each piece of memory that comes. The pod gets them, and the kernel its usual reserve for such a machine
/// (`init_per_zone_wmark_min` in its `mm/page_alloc.c`).
fn limit_reserve(total_kib: u64) -> Result<()> {
    let path = sysctl(MIN_FREE);
    let usual = (total_kib * 16).isqrt();
    match read(&path)?.and_then(|text| text.parse::<u64>().ok()) {
        Some(now) if now > usual => write(path, &usual.to_string()),
        _ => Ok(()),
    }
}

fn sysctl(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// `None` if there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
    }
}

fn numbers(text: &str) -> Option<Vec<u64>> {
    text.split_whitespace().map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_keeps_a_part_of_a_small_memory_and_64_mib_of_a_large_one() {
        for (total, huge, expected) in [
            (2 << 20, 0, (2 << 20) - (64 << 10)),
            (2 << 20, 1 << 20, (1 << 20) - (64 << 10)),
            (256 << 10, 0, 224 << 10),
            (0, 0, 0),
        ] {
            assert_eq!(for_the_pod(&Sizes { total, huge }), expected, "{total} {huge}");
        }
    }

    #[test]
    fn a_share_grows_with_the_memory_and_endless_ones_stay() {
        assert_eq!(scale(16_000, 8, 2), 64_000);
        assert_eq!(scale(16_000, 2, 2), 16_000);
        let endless = u64::try_from(i64::MAX).unwrap();
        assert_eq!(scale(endless, 8, 2), endless);
    }
}
