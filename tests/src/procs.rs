//! Processes as the harness sees them from outside the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// One process of a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid outside the node.
    pub pid: i32,
    /// Its parent's pid outside the node.
    pub parent: i32,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl Process {
    /// The name of its program, without the folder.
    #[must_use]
    pub fn program(&self) -> &str {
        let path = self.arguments.first().map_or("", String::as_str);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// Its resident set in KiB, as ps shows it: shared pages count in full.
    #[must_use]
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0)
    }

    /// What it holds in memory.
    #[must_use]
    pub fn memory(&self) -> Memory {
        memory_of(&fs::read_to_string(format!("/proc/{}/smaps", self.pid)).unwrap_or_default())
    }
}

/// The proportional set size (proc(5), smaps) of a process in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Shared memory objects: the guest's RAM, wherever it is mapped.
    pub guest_kib: u64,
    /// Everything else.
    pub own_kib: u64,
    /// Of that, files on disks: whoever maps the same ones holds the same pages.
    pub files_kib: u64,
}

fn memory_of(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let (mut of_guest, mut of_file) = (false, false);
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib = rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            match of_guest {
                true => memory.guest_kib += kib,
                false => memory.own_kib += kib,
            }
            memory.files_kib += if of_file { kib } else { 0 };
        } else if line.as_bytes().first().is_some_and(u8::is_ascii_hexdigit) && !line.contains(": ") {
            of_guest = line.contains("/memfd:") || line.contains("/dev/shm/");
            of_file = !of_guest && line.contains(" /");
        }
    }
    memory
}

/// Every process of the machine; one that ends meanwhile may be left out.
#[must_use]
pub fn all() -> Vec<Process> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| process(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// The pid of the one child of a process of ours, which enters namespaces for it.
#[must_use]
pub fn child_of(parent: u32) -> Option<i32> {
    let parent = parent.cast_signed();
    let child = all().into_iter().find(|process| process.parent == parent);
    child.map(|process| process.pid)
}

/// Every process that lives in the pid namespace of `init` or below it, without `init`.
#[must_use]
pub fn in_namespace_of(init: i32) -> Vec<Process> {
    let namespace = |pid| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(wanted) = namespace(init) else {
        return Vec::new();
    };
    let everyone = all();
    let mut members: BTreeSet<i32> = everyone
        .iter()
        .map(|process| process.pid)
        .filter(|pid| namespace(*pid).as_ref() == Some(&wanted))
        .collect();
    grow(&everyone, &mut members);
    members.remove(&init);
    everyone
        .into_iter()
        .filter(|process| members.contains(&process.pid))
        .collect()
}

/// Every process below `root`, with it.
#[must_use]
pub fn tree(everyone: &[Process], root: i32) -> Vec<Process> {
    let mut members = BTreeSet::from([root]);
    grow(everyone, &mut members);
    everyone
        .iter()
        .filter(|process| members.contains(&process.pid))
        .cloned()
        .collect()
}

fn grow(everyone: &[Process], members: &mut BTreeSet<i32>) {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for process in everyone {
        children.entry(process.parent).or_default().push(process.pid);
    }
    let mut fresh: Vec<i32> = members.iter().copied().collect();
    while let Some(parent) = fresh.pop() {
        fresh.extend(
            children
                .get(&parent)
                .into_iter()
                .flatten()
                .filter(|child| members.insert(**child)),
        );
    }
}

fn process(pid: i32) -> Option<Process> {
    // proc_pid_stat(5): the name is in parentheses and may hold any character, so the fields are counted from its end.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments: Vec<String> = line
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    arguments.pop();
    if arguments.is_empty() {
        let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
        arguments.push(if state == "Z" {
            format!("{name} (zombie)")
        } else {
            name.to_owned()
        });
    }
    Some(Process { pid, parent, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart_from_what_the_process_itself_holds() {
        let smaps = "7f0000000000-7f0080000000 rw-s 00000000 00:01 1027   /memfd:ram0 (deleted)\nSize: 2097152 kB\nPss:               70000 kB\n\
                     Pss_Dirty: 1 kB\n55d000000000-55d000001000 r--p 00000000 fe:00 7 /usr/bin/qemu-system-x86_64\nPss:                  12 kB\n\
                     7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]\nPss:                  3 kB\n";
        assert_eq!(
            memory_of(smaps),
            Memory {
                guest_kib: 70000,
                own_kib: 15,
                files_kib: 12
            }
        );
    }

    #[test]
    fn this_process_is_among_all() {
        let own = std::process::id().cast_signed();
        assert!(tree(&all(), own).iter().any(|process| process.pid == own));
    }
}
