//! Metrics of the agent and of the guest as Prometheus text, under the names that Kata's dashboards know
//! (`docs/design/kata-2-0-metrics.md` there).

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

use super::error::{Doing, Result};
use agent_protocol::exposition::{Exposition, NETWORK, Stat, number, read};

/// How often somebody has asked.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// Processors that are told one by one: a shim takes answers of 128 KiB, and ends the VM of an agent that sends more.
const MOST_PROCESSORS: usize = 64;

/// Interfaces, and disks, that are told: a pod that runs containers of its own may have hundreds.
const MOST_DEVICES: usize = 16;

/// Measures.
pub(super) fn text() -> Result<String> {
    let mut out = Exposition::default();
    agent(&mut out)?;
    guest(&mut out)?;
    Ok(out.into_text())
}

fn file(path: &str) -> Result<String> {
    read(path).doing(|| "read a file of the kernel".into())
}

fn agent(out: &mut Exposition) -> Result<()> {
    let measuring = || "measure the agent".into();
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed) + 1;
    out.single(
        "kata_agent_scrape_count",
        "counter",
        "Metrics scrape count",
        scrapes as f64,
    );
    out.process("kata_agent", "self", str::to_ascii_lowercase)
        .doing(measuring)?;
    out.process_totals("kata_agent", "self").doing(measuring)?;
    let stat = Stat::of("self").doing(measuring)?;
    let mut total = |name: &str, help: &str, value: f64| out.single(name, "gauge", help, value);
    total(
        "kata_agent_total_time",
        "Agent process total time, in ticks",
        stat.busy(),
    );
    total(
        "kata_agent_total_vm",
        "Agent process total VM size, in bytes",
        stat.field(23),
    );
    total(
        "kata_agent_total_rss",
        "Agent process total resident size, in bytes",
        stat.resident(),
    );
    Ok(())
}

fn guest(out: &mut Exposition) -> Result<()> {
    let load = file("/proc/loadavg")?;
    let words: Vec<_> = load.split_whitespace().collect();
    out.family("kata_guest_load", "gauge", "Guest system load");
    for (item, word) in ["load1", "load5", "load15"].into_iter().zip(&words) {
        out.sample("kata_guest_load", &[("item", item)], number(word));
    }
    out.family("kata_guest_tasks", "gauge", "Guest system tasks");
    let (running, all) = words.get(3).and_then(|word| word.split_once('/')).unwrap_or_default();
    out.sample("kata_guest_tasks", &[("item", "cur")], number(running));
    out.sample("kata_guest_tasks", &[("item", "max")], number(all));
    out.keyed(
        "kata_guest_meminfo",
        "Guest memory, in bytes",
        (snake, 1024.0),
        &file("/proc/meminfo")?,
    );
    out.family("kata_guest_vm_stat", "gauge", "Guest virtual memory");
    for (item, value) in file("/proc/vmstat")?.lines().filter_map(|line| line.split_once(' ')) {
        out.sample("kata_guest_vm_stat", &[("item", item)], number(value));
    }
    processors(out, &file("/proc/stat")?);
    out.table(
        "kata_guest_netdev_stat",
        ("Guest network", "interface"),
        &NETWORK,
        &interfaces(&file("/proc/net/dev")?),
    );
    let disks = fs::read_to_string("/proc/diskstats").unwrap_or_default();
    // `<major> <minor> <name> <counts>`, in the form of the other table.
    let disks: Vec<_> = disks
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2).map(|name| (name, line)))
        .collect();
    let disks: String = disks
        .iter()
        .take(MOST_DEVICES)
        .map(|(name, line)| format!("{}\n", colon(name, line)))
        .collect();
    out.table("kata_guest_diskstat", ("Guest disks", "disk"), &DISK, &disks);
    Ok(())
}

/// The first of them: the pod's own come before those that a container makes.
fn interfaces(text: &str) -> String {
    let lines = text.lines().filter(|line| line.contains(':')).take(MOST_DEVICES);
    lines.map(|line| format!("{line}\n")).collect()
}

fn colon(name: &str, line: &str) -> String {
    let counts: Vec<_> = line.split_whitespace().skip(3).collect();
    format!("{name}: {}", counts.join(" "))
}

fn processors(out: &mut Exposition, text: &str) {
    const ITEMS: [&str; 10] = [
        "user",
        "nice",
        "system",
        "idle",
        "iowait",
        "irq",
        "softirq",
        "steal",
        "guest",
        "guest_nice",
    ];
    out.family("kata_guest_cpu_time", "gauge", "Guest CPU time, in ticks");
    // The first line is the sum of all.
    for line in text
        .lines()
        .filter(|line| line.starts_with("cpu"))
        .take(1 + MOST_PROCESSORS)
    {
        let mut words = line.split_whitespace();
        let cpu = match words.next() {
            Some("cpu") | None => "total",
            Some(one) => one.trim_start_matches("cpu"),
        };
        for (item, word) in ITEMS.into_iter().zip(words) {
            out.sample("kata_guest_cpu_time", &[("cpu", cpu), ("item", item)], number(word));
        }
    }
}

/// Columns of `/proc/diskstats` after the name (proc_diskstats(5)).
const DISK: [&str; 17] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];

/// A key of `/proc/meminfo` in the spelling of its metric: `Active(anon)` is `active_anon`, `MemTotal` is `mem_total`.
fn snake(key: &str) -> String {
    let key = key.replace("HugePages", "Hugepages").replace("Percpu", "PerCpu");
    let key: Vec<char> = key.replace('(', "_").replace(')', "").chars().collect();
    let mut item = String::new();
    for (at, &c) in key.iter().enumerate() {
        let before = at.checked_sub(1).map(|before| key[before]);
        let word = c.is_uppercase() && key.get(at + 1).is_some_and(char::is_ascii_lowercase);
        let begins = match before {
            None | Some('_') => false,
            Some(before) if c.is_ascii_digit() => before.is_alphabetic(),
            Some(before) if c.is_uppercase() => before.is_lowercase() || word && before.is_uppercase(),
            Some(_) => false,
        };
        if begins {
            item.push('_');
        }
        // `direct_map_1G`
        let kept = before.is_some_and(|before| before.is_ascii_digit());
        item.push(if kept { c } else { c.to_ascii_lowercase() });
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_samples_with_their_units() {
        let mut out = Exposition::default();
        let text = "MemTotal:  2 kB\nState:\tS (sleeping)\nThreads:\t3\nGroups:\t1 2\n";
        out.keyed("m", "Help", (snake, 1024.0), text);
        let expected = "# HELP m Help.\n# TYPE m gauge\nm{item=\"mem_total\"} 2048\nm{item=\"threads\"} 3\n";
        assert_eq!(out.into_text(), expected);
    }

    #[test]
    fn hundreds_of_interfaces_do_not_fill_an_answer() {
        let line = |number: u32| format!("interface{number:06}: {}\n", ["18446744073709551615"; 16].join(" "));
        let text: String = (0..300).map(line).collect();
        let mut out = Exposition::default();
        let head = "Inter-|   Receive\n face |bytes\n";
        let told = interfaces(&format!("{head}{text}"));
        out.table(
            "kata_guest_netdev_stat",
            ("Guest network", "interface"),
            &NETWORK,
            &told,
        );
        let told = out.into_text();
        assert!(told.contains("interface000015") && !told.contains("interface000016"));
        assert!(told.len() < 32 << 10, "{}", told.len());
    }

    #[test]
    fn keys_are_spelled_as_metrics() {
        for (key, item) in [
            ("Active(anon)", "active_anon"),
            ("SReclaimable", "s_reclaimable"),
            ("AnonHugePages", "anon_hugepages"),
            ("HugePages_Total", "hugepages_total"),
            ("Hugepagesize", "hugepagesize"),
            ("NFS_Unstable", "nfs_unstable"),
            ("DirectMap4k", "direct_map_4k"),
            ("DirectMap1G", "direct_map_1G"),
            ("Committed_AS", "committed_as"),
            ("Percpu", "per_cpu"),
        ] {
            assert_eq!(snake(key), item);
        }
    }

    #[test]
    fn every_scrape_has_the_agent_and_its_machine() {
        let text = text().unwrap();
        for name in [
            "kata_agent_scrape_count",
            "kata_agent_threads",
            "kata_guest_load",
            "kata_guest_meminfo{item=\"mem_total\"}",
        ] {
            assert!(text.contains(name), "{name}");
        }
        let malformed = text.lines().find(|line| {
            !line.starts_with('#') && line.rsplit_once(' ').is_none_or(|(_, v)| v.parse::<f64>().is_err())
        });
        assert_eq!(malformed, None);
    }
}
