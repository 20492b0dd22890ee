//! Prometheus' text format (`docs/instrumenting/exposition_formats.md` there), and processes in it: what agent and shim
//! both tell about themselves, under the names that Kata's dashboards know (`docs/design/kata-2-0-metrics.md` there).

use std::{
    fmt::Write,
    fs, io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};

/// Upper bounds of a histogram's buckets, in milliseconds: those of Kata's.
const BOUNDS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// How a key becomes an item, and what a "kB" is worth.
pub type Spelling = (fn(&str) -> String, f64);

/// A key in small letters, and sizes as they are, in KiB.
pub const AS_IT_IS: Spelling = (str::to_ascii_lowercase, 1.0);

/// Metrics as text.
#[derive(Default)]
pub struct Exposition(String);

impl Exposition {
    /// The text so far.
    pub fn into_text(self) -> String {
        self.0
    }

    /// Begins a family: all samples of one name follow it.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0 += &format!("# HELP {name} {help}.\n# TYPE {name} {kind}\n");
    }

    /// A sample with its labels.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{name}{} {value}", braced(labels));
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// Lines `<key>: <number> [kB]`, a sample per line; other lines say nothing here.
    pub fn keyed(&mut self, name: &str, help: &str, (item, kibibyte): Spelling, text: &str) {
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

    /// Lines `<name>: <counts>`, a sample per count.
    pub fn table(&mut self, name: &str, (help, label): (&str, &str), items: &[&str], text: &str) {
        self.family(name, "gauge", help);
        for (row, counts) in text.lines().filter_map(|line| line.split_once(':')) {
            for (item, count) in items.iter().zip(counts.split_whitespace()) {
                self.sample(name, &[(label, row.trim()), ("item", item)], number(count));
            }
        }
    }

    /// One histogram of a family that has begun.
    pub fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(histogram.counts) {
            below += count;
            let bound = bound.to_string();
            self.sample(&bucket, &[labels, &[("le", &bound)]].concat(), below as f64);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), histogram.count as f64);
        self.sample(&format!("{name}_sum"), labels, histogram.sum);
        self.sample(&format!("{name}_count"), labels, histogram.count as f64);
    }

    /// A process's times, status and I/O, as the kernel has them: ticks, and KiB.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn process(&mut self, prefix: &str, pid: &str, io_item: fn(&str) -> String) -> io::Result<()> {
        let stat = Stat::of(pid)?;
        let name = |what: &str| format!("{prefix}_{what}");
        self.single(&name("threads"), "gauge", "Threads of the process", stat.field(20));
        self.family(&name("proc_stat"), "gauge", "Times of the process, in ticks");
        for (item, field) in [("utime", 14), ("stime", 15), ("cutime", 16), ("cstime", 17)] {
            self.sample(&name("proc_stat"), &[("item", item)], stat.field(field));
        }
        let status = read(&format!("/proc/{pid}/status"))?;
        let help = "Status of the process, sizes in KiB";
        self.keyed(&name("proc_status"), help, AS_IT_IS, &status);
        // The kernel may be built without it.
        let io = read(&format!("/proc/{pid}/io")).unwrap_or_default();
        self.keyed(&name("io_stat"), "I/O of the process", (io_item, 1.0), &io);
        Ok(())
    }

    /// What every Prometheus client tells of its process.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn process_totals(&mut self, prefix: &str, pid: &str) -> io::Result<()> {
        let stat = Stat::of(pid)?;
        let ticks = setting(SysconfVar::CLK_TCK).max(1) as f64;
        // CLOCK_BOOTTIME exists in every kernel that has pidfds.
        let up = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        let age = up.as_secs_f64() - stat.field(22) / ticks;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let limits = read(&format!("/proc/{pid}/limits"))?;
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let limit = limit
            .and_then(|line| line.split_whitespace().next())
            .map_or(0.0, number);
        let mut gauge = |name: &str, help: &str, value: f64| {
            self.single(&format!("{prefix}_process_{name}"), "gauge", help, value);
        };
        gauge("max_fds", "Maximum number of open file descriptors", limit);
        gauge("open_fds", "Number of open file descriptors", open_files(pid)? as f64);
        gauge(
            "resident_memory_bytes",
            "Resident memory size, in bytes",
            stat.resident(),
        );
        let start = "Start time since the epoch, in seconds";
        gauge("start_time_seconds", start, now.as_secs_f64() - age);
        gauge("virtual_memory_bytes", "Virtual memory size, in bytes", stat.field(23));
        let cpu = "Total user and system CPU time, in seconds";
        let name = format!("{prefix}_process_cpu_seconds_total");
        self.single(&name, "counter", cpu, stat.busy() / ticks);
        Ok(())
    }
}

/// Labels as they are written after a name.
pub fn braced(labels: &[(&str, &str)]) -> String {
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<_> = labels
        .iter()
        .map(|(key, text)| format!("{key}=\"{}\"", escaped(text)))
        .collect();
    if labels.is_empty() {
        String::new()
    } else {
        format!("{{{}}}", labels.join(","))
    }
}

/// Durations, counted by their length.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    counts: [u64; BOUNDS.len()],
    count: u64,
    /// In milliseconds.
    sum: f64,
}

impl Histogram {
    /// Counts one more.
    pub fn observe(&mut self, took: Duration) {
        let milliseconds = took.as_secs_f64() * 1000.0;
        let fits = BOUNDS.iter().position(|bound| milliseconds <= *bound as f64);
        if let Some(count) = fits.and_then(|at| self.counts.get_mut(at)) {
            *count += 1;
        }
        self.count += 1;
        self.sum += milliseconds;
    }
}

/// Columns of `/proc/net/dev` (proc_pid_net(5)).
pub const NETWORK: [&str; 16] = [
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

/// `/proc/<pid>/stat` (proc_pid_stat(5)).
pub struct Stat(Vec<f64>);

impl Stat {
    /// Reads that of a process: its number, or `self`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(pid: &str) -> io::Result<Stat> {
        read(&format!("/proc/{pid}/stat")).map(|text| Stat::parse(&text))
    }

    fn parse(text: &str) -> Stat {
        // The second field, the name, may hold anything, also blanks and parentheses.
        let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        Stat(rest.split_whitespace().map(number).collect())
    }

    /// A field by its number in the manual, from 3 on.
    pub fn field(&self, number: usize) -> f64 {
        self.0.get(number - 3).copied().unwrap_or(0.0)
    }

    /// User and system time, in ticks.
    pub fn busy(&self) -> f64 {
        self.field(14) + self.field(15)
    }

    /// Resident bytes.
    pub fn resident(&self) -> f64 {
        self.field(24) * setting(SysconfVar::PAGE_SIZE) as f64
    }
}

/// How many files a process has open.
///
/// # Errors
/// When the process is gone.
pub fn open_files(pid: &str) -> io::Result<usize> {
    let path = format!("/proc/{pid}/fd");
    fs::read_dir(&path).map(Iterator::count).map_err(named(&path))
}

/// A text of numbers; what is none is zero.
pub fn number(text: &str) -> f64 {
    text.trim().parse().unwrap_or(0.0)
}

/// Reads a file of the kernel's; the error names it.
///
/// # Errors
/// The kernel's.
pub fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(path).map_err(named(path))
}

fn named(path: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// A setting of the system that every Linux has.
fn setting(name: SysconfVar) -> u64 {
    sysconf(name)
        .ok()
        .flatten()
        .and_then(|value| u64::try_from(value).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_anything() {
        let stat = Stat::parse("7 (a) b) S 1 7 7");
        assert_eq!((stat.field(4), stat.field(5), stat.field(40)), (1.0, 7.0, 0.0));
    }

    #[test]
    fn labels_cannot_break_out() {
        assert_eq!(braced(&[("a", "x\"} 1\n\\")]), r#"{a="x\"} 1\n\\"}"#);
        assert_eq!(braced(&[]), "");
    }

    #[test]
    fn a_histogram_counts_each_duration_in_every_bucket_that_it_fits() {
        let mut histogram = Histogram::default();
        for milliseconds in [1, 3, 4, 2000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let mut out = Exposition::default();
        out.histogram("h", &[("action", "create")], &histogram);
        let text = out.into_text();
        for line in [
            "h_bucket{action=\"create\",le=\"1\"} 1",
            "h_bucket{action=\"create\",le=\"2\"} 1",
            "h_bucket{action=\"create\",le=\"4\"} 3",
            "h_bucket{action=\"create\",le=\"512\"} 3",
            "h_bucket{action=\"create\",le=\"+Inf\"} 4",
            "h_sum{action=\"create\"} 2008",
            "h_count{action=\"create\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn this_process_has_every_part() {
        let mut out = Exposition::default();
        out.process("p", "self", str::to_ascii_lowercase).unwrap();
        out.process_totals("p", "self").unwrap();
        let text = out.into_text();
        for name in [
            "p_threads ",
            "p_proc_stat{item=\"utime\"}",
            "p_proc_status{item=\"vmrss\"}",
            "p_process_open_fds ",
        ] {
            assert!(text.contains(name), "{name} in {text}");
        }
    }
}
