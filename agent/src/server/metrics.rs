//! Metrics of the agent and of the guest as Prometheus text, under the names that Kata's dashboards know
//! (`docs/design/kata-2-0-metrics.md` there).

use std::{
    fmt::Write,
    fs,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::unistd::{SysconfVar, sysconf};

use super::{
    boot,
    error::{Doing, Result},
};

/// How often somebody has asked.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// Measures.
pub(super) fn text() -> Result<String> {
    let mut out = Exposition::default();
    agent(&mut out)?;
    guest(&mut out)?;
    Ok(out.0)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).doing(|| format!("read {path}"))
}

/// A setting of the system that every Linux has.
fn setting(name: SysconfVar) -> u64 {
    sysconf(name)
        .ok()
        .flatten()
        .and_then(|value| u64::try_from(value).ok())
        .unwrap_or(0)
}

fn agent(out: &mut Exposition) -> Result<()> {
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed) + 1;
    out.family("kata_agent_scrape_count", "counter", "Metrics scrape count");
    out.sample("kata_agent_scrape_count", &[], scrapes as f64);
    let stat = Stat::parse(&read("/proc/self/stat")?);
    totals(out, &stat)?;
    out.family("kata_agent_proc_stat", "gauge", "Agent process stat, in ticks");
    for (item, field) in [("utime", 14), ("stime", 15), ("cutime", 16), ("cstime", 17)] {
        out.sample("kata_agent_proc_stat", &[("item", item)], stat.field(field));
    }
    let as_it_is: Spelling = (str::to_ascii_lowercase, 1.0);
    let status = read("/proc/self/status")?;
    out.keyed(
        "kata_agent_proc_status",
        "Agent process status, sizes in KiB",
        as_it_is,
        &status,
    );
    // The kernel may be built without it.
    let io = read("/proc/self/io").unwrap_or_default();
    out.keyed("kata_agent_io_stat", "Agent process I/O", as_it_is, &io);
    Ok(())
}

/// What is one number for the whole process.
fn totals(out: &mut Exposition, stat: &Stat) -> Result<()> {
    let ticks = setting(SysconfVar::CLK_TCK).max(1) as f64;
    let page = setting(SysconfVar::PAGE_SIZE) as f64;
    let age = boot::clock().as_secs_f64() - stat.field(22) / ticks;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let open = fs::read_dir("/proc/self/fd")
        .doing(|| "read /proc/self/fd".into())?
        .count();
    let limits = read("/proc/self/limits")?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let limit = limit
        .and_then(|line| line.split_whitespace().next())
        .map_or(0.0, number);
    let (busy, resident) = (stat.field(14) + stat.field(15), stat.field(24) * page);
    let mut total = |name: &str, kind: &str, help: &str, value: f64| {
        let name = format!("kata_agent_{name}");
        out.family(&name, kind, help);
        out.sample(&name, &[], value);
    };
    total("threads", "gauge", "Agent process threads", stat.field(20));
    total("total_time", "gauge", "Agent process total time, in ticks", busy);
    total(
        "total_vm",
        "gauge",
        "Agent process total VM size, in bytes",
        stat.field(23),
    );
    total(
        "total_rss",
        "gauge",
        "Agent process total resident size, in bytes",
        resident,
    );
    let cpu = "Total user and system CPU time, in seconds";
    total("process_cpu_seconds_total", "counter", cpu, busy / ticks);
    total(
        "process_max_fds",
        "gauge",
        "Maximum number of open file descriptors",
        limit,
    );
    total(
        "process_open_fds",
        "gauge",
        "Number of open file descriptors",
        open as f64,
    );
    total(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory size, in bytes",
        resident,
    );
    let start = "Start time since the epoch, in seconds";
    total("process_start_time_seconds", "gauge", start, now.as_secs_f64() - age);
    total(
        "process_virtual_memory_bytes",
        "gauge",
        "Virtual memory size, in bytes",
        stat.field(23),
    );
    Ok(())
}

fn guest(out: &mut Exposition) -> Result<()> {
    let load = read("/proc/loadavg")?;
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
        &read("/proc/meminfo")?,
    );
    out.family("kata_guest_vm_stat", "gauge", "Guest virtual memory");
    for (item, value) in read("/proc/vmstat")?.lines().filter_map(|line| line.split_once(' ')) {
        out.sample("kata_guest_vm_stat", &[("item", item)], number(value));
    }
    processors(out, &read("/proc/stat")?);
    table(
        out,
        "kata_guest_netdev_stat",
        ("Guest network", "interface"),
        &NETWORK,
        &read("/proc/net/dev")?,
    );
    let disks = read("/proc/diskstats").unwrap_or_default();
    // `<major> <minor> <name> <counts>`, in the form of the other table.
    let disks: Vec<_> = disks
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2).map(|name| (name, line)))
        .collect();
    let disks: String = disks
        .iter()
        .map(|(name, line)| format!("{}\n", colon(name, line)))
        .collect();
    table(out, "kata_guest_diskstat", ("Guest disks", "disk"), &DISK, &disks);
    Ok(())
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
    for line in text.lines().filter(|line| line.starts_with("cpu")) {
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

/// Columns of `/proc/net/dev` (proc_pid_net(5)).
const NETWORK: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
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

/// Lines `<name>: <counts>`, a sample per count.
fn table(out: &mut Exposition, name: &str, (help, label): (&str, &str), items: &[&str], text: &str) {
    out.family(name, "gauge", help);
    for (row, counts) in text.lines().filter_map(|line| line.split_once(':')) {
        for (item, count) in items.iter().zip(counts.split_whitespace()) {
            out.sample(name, &[(label, row.trim()), ("item", item)], number(count));
        }
    }
}

fn number(text: &str) -> f64 {
    text.trim().parse().unwrap_or(0.0)
}

/// `/proc/<pid>/stat` (proc_pid_stat(5)).
struct Stat(Vec<f64>);

impl Stat {
    fn parse(text: &str) -> Stat {
        // The second field, the name, may hold anything, also blanks and parentheses.
        let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        Stat(rest.split_whitespace().map(number).collect())
    }

    /// A field by its number in the manual, from 3 on.
    fn field(&self, number: usize) -> f64 {
        self.0.get(number - 3).copied().unwrap_or(0.0)
    }
}

/// How a key becomes an item, and what a "kB" is worth.
type Spelling = (fn(&str) -> String, f64);

/// Prometheus' text format.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0 += &format!("# HELP {name} {help}.\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, text)| format!("{key}=\"{}\"", escaped(text)))
            .collect();
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    /// Lines `<key>: <number> [kB]`, a sample per line; other lines say nothing here.
    fn keyed(&mut self, name: &str, help: &str, (item, kibibyte): Spelling, text: &str) {
        self.family(name, "gauge", help);
        for (key, rest) in text.lines().filter_map(|line| line.split_once(':')) {
            let mut words = rest.split_whitespace();
            let Some(value) = words.next().and_then(|word| word.parse::<f64>().ok()) else {
                continue;
            };
            let unit = match words.next() {
                None => 1.0,
                Some("kB") => kibibyte,
                Some(_) => continue,
            };
            self.sample(name, &[("item", &item(key))], value * unit);
        }
    }
}

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
        assert_eq!(out.0, expected);
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
    fn a_process_name_may_hold_anything() {
        let stat = Stat::parse("7 (a) b) S 1 7 7");
        assert_eq!((stat.field(4), stat.field(5), stat.field(40)), (1.0, 7.0, 0.0));
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
