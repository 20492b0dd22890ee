//! The processors of a pod: its VM runs where its containers may, as the kubelet's static CPU manager expects.
//!
//! The guest numbers its own processors, so a container's `cpu.cpus` means the host's and is no business of the guest's
//! cgroups. On the host all containers are one VM, and its cgroup is bound to the union of their lists. Sources:
//! `Documentation/admin-guide/cgroup-v2.rst` (List Format), cpuset(7).

use super::{CgroupError, SandboxCgroup, file, systemd, write};
use oci_spec::runtime::LinuxResources;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// More processors than any kernel is built for.
const MOST: u32 = 8192;

/// All processors that this host could ever have.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// Numbers of processors; none of them means all that there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuList(BTreeSet<u32>);

impl FromStr for CpuList {
    type Err = CgroupError;

    fn from_str(text: &str) -> Result<Self, CgroupError> {
        let number = |text: &str| text.parse().ok().filter(|cpu| *cpu < MOST);
        let range = |part: &str| -> Option<_> {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(number(first)?..=number(last)?).filter(|range| !range.is_empty())
        };
        let parts = text.trim().split(',').map(str::trim).filter(|part| !part.is_empty());
        let ranges: Option<Vec<_>> = parts.map(range).collect();
        let ranges = ranges.ok_or_else(|| CgroupError::Cpus(text.to_owned()))?;
        Ok(Self(ranges.into_iter().flatten().collect()))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(u32::to_string).collect();
        out.write_str(&numbers.join(","))
    }
}

impl CpuList {
    /// The processors of a container.
    ///
    /// # Errors
    /// `cpu.cpus` is no list.
    pub fn of(resources: &LinuxResources) -> Result<Self, CgroupError> {
        let cpus = resources.cpu().as_ref().and_then(|cpu| cpu.cpus().as_deref());
        cpus.unwrap_or_default().parse()
    }

    /// A bit for each processor, the lowest first, as systemd takes it.
    pub(super) fn mask(&self) -> Vec<u8> {
        let bytes = self.0.last().map_or(0, |last| *last as usize / 8 + 1);
        let mut mask = vec![0; bytes];
        for cpu in &self.0 {
            mask[*cpu as usize / 8] |= 1 << (cpu % 8);
        }
        mask
    }
}

/// Where a pod may run whose containers have these lists: all of them together, and anywhere as long as one may run
/// anywhere.
fn union<'a>(lists: impl IntoIterator<Item = &'a CpuList>) -> CpuList {
    let mut all = BTreeSet::new();
    for list in lists {
        if list.0.is_empty() {
            return CpuList::default();
        }
        all.extend(&list.0);
    }
    CpuList(all)
}

/// The owner of a sandbox's processors.
#[derive(Debug, Clone)]
pub struct Processors {
    cgroup: SandboxCgroup,
    bound: Arc<Mutex<Bound>>,
}

#[derive(Debug, Default)]
struct Bound {
    containers: BTreeMap<String, CpuList>,
    now: CpuList,
}

impl Processors {
    /// Of a sandbox that is bound to none yet.
    pub fn new(cgroup: SandboxCgroup) -> Self {
        Self {
            cgroup,
            bound: Arc::default(),
        }
    }

    /// Gives a container its processors, new or other ones, and binds the sandbox. Blocks while systemd does it.
    ///
    /// # Errors
    /// The kernel or systemd refuses, for example because the pod's parent has not these processors. The container is
    /// as it was before.
    pub fn set(&self, container: &str, cpus: CpuList) -> Result<(), CgroupError> {
        self.change(|containers| containers.insert(container.to_owned(), cpus))
    }

    /// Binds the sandbox without this container.
    ///
    /// # Errors
    /// The kernel or systemd refuses.
    pub fn remove(&self, container: &str) -> Result<(), CgroupError> {
        self.change(|containers| containers.remove(container))
    }

    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<String, CpuList>) -> T) -> Result<(), CgroupError> {
        // A lock whose holder panicked is still good: what it guards is replaced as a whole.
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        let mut containers = bound.containers.clone();
        change(&mut containers);
        let wanted = union(containers.values());
        if wanted != bound.now {
            self.cgroup.bind(&wanted)?;
        }
        *bound = Bound {
            containers,
            now: wanted,
        };
        Ok(())
    }
}

impl SandboxCgroup {
    fn bind(&self, cpus: &CpuList) -> Result<(), CgroupError> {
        let none = || CgroupError::NoCpuset(cpus.to_string());
        let folder = self.folder_of("cpuset").ok_or_else(none)?;
        let path = folder.join("cpuset.cpus");
        if !path.exists() {
            return Err(none());
        }
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|source| file("read", path, source));
        // A list cannot be taken back while processes are there. On v2 one that is longer than the parent's means the
        // parent's, whatever that comes to be.
        let all = match self.record.v2 {
            true => Path::new(POSSIBLE).to_owned(),
            false => folder.parent().unwrap_or(folder).join("cpuset.cpus"),
        };
        let cpus = match cpus.0.is_empty() {
            true => read(&all)?.parse()?,
            false => cpus.clone(),
        };
        match &self.scope {
            // Told to systemd, or it would take the list back when it next writes down what it knows of the scope. It
            // knows no cpuset of v1.
            Some(scope) if self.record.v2 => systemd::bind(scope, &cpus),
            _ => write(&path, &cpus.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_read_as_the_kernel_reads_them() {
        assert_eq!(list("0-2,5").to_string(), "0,1,2,5");
        assert_eq!(list(" 1, 0\n").to_string(), "0,1");
        assert_eq!(list(""), CpuList::default());
        for wrong in ["a", "3-1", "-1", "1-", "0-4294967295"] {
            let refused = wrong.parse::<CpuList>().unwrap_err().to_string();
            assert_eq!(refused, format!("`{wrong}` is no list of processors such as `0-3,8`"));
        }
    }

    #[test]
    fn systemd_takes_a_bit_for_each_processor() {
        assert_eq!(list("0,3,9").mask(), [0b1001, 0b10]);
        assert_eq!(list("").mask(), [0u8; 0]);
    }

    #[test]
    fn a_pod_runs_where_its_containers_may() {
        assert_eq!(union([&list("0-1"), &list("3")]), list("0,1,3"));
        assert_eq!(union([&list("0-1"), &list("")]), list(""));
        assert_eq!(union([]), list(""));
    }
}
