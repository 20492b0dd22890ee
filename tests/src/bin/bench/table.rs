//! The results as Markdown.

use std::fmt::Write;

use tests::{
    cold_read::{ColdRead, FILE_MIB, View},
    config,
    footprint::mib,
};

use crate::{Series, samples::Samples};

/// A bound that the guest with our own kernel is held to.
enum Target {
    None,
    AtMost(f64),
    AtLeast(f64),
    /// That many times the median of the bare boot.
    BareBoots(f64),
}

/// A row's name, digits, target, and where its numbers are.
type Row = (&'static str, usize, Target, fn(&Series) -> &Samples);

const ROWS: [Row; 10] = [
    ("bare boot: QEMU exec → PID 1, s", 2, Target::None, |series| {
        &series.bare_boot
    }),
    ("`ctr run` → first output, s", 2, Target::BareBoots(1.6), |series| {
        &series.first_output
    }),
    ("`ctr tasks exec … true`, s", 3, Target::AtMost(0.12), |series| {
        &series.exec
    }),
    ("SIGKILL → task removed, s", 3, Target::AtMost(0.10), |series| {
        &series.removal
    }),
    (
        "5 pods at once → all have said something, s",
        2,
        Target::None,
        |series| &series.at_once,
    ),
    ("shim, PSS, MiB", 1, Target::AtMost(8.0), |series| &series.shim),
    ("virtiofsd, PSS without guest RAM, MiB", 1, Target::None, |series| {
        &series.virtiofsd
    }),
    ("QEMU, PSS without guest RAM, MiB", 1, Target::None, |series| {
        &series.qemu
    }),
    (
        "guest RAM held by the host, idle, MiB",
        1,
        Target::AtMost(90.0),
        |series| &series.guest_ram,
    ),
    (
        "MemAvailable in the guest, of 2,048 MiB",
        0,
        Target::AtLeast(1950.0),
        |series| &series.available,
    ),
];

/// The table of times and memory: our kernel with its targets, Debian's kernel, runc.
pub fn starts(rounds: usize, [own, debian, runc]: &[Series; 3]) -> String {
    let accelerator = match config::accelerator() {
        "kvm" => "KVM",
        _ => "emulation (TCG)",
    };
    let mut text = format!(
        "Median (least–most) of {rounds} rounds under {accelerator}, each runtime in turn.\n\n\
         | | target | own kernel | | Debian's kernel | runc |\n|---|---|---|---|---|---|\n"
    );
    for (name, digits, target, samples) in &ROWS {
        let bound = match *target {
            Target::None => None,
            Target::AtMost(most) => Some(("≤", most)),
            Target::AtLeast(least) => Some(("≥", least)),
            Target::BareBoots(times) => own.bare_boot.median().map(|boot| ("≤", times * boot)),
        };
        let median = samples(own).median();
        let (wanted, verdict) = match bound.zip(median) {
            None => (String::new(), ""),
            Some(((sign, bound), median)) => {
                let met = if sign == "≤" {
                    median <= bound
                } else {
                    median >= bound
                };
                let times = match target {
                    Target::BareBoots(times) => format!("{times} × bare boot: "),
                    _ => String::new(),
                };
                let verdict = if met { "met" } else { "**not met**" };
                (format!("{times}{sign} {bound:.digits$}"), verdict)
            }
        };
        let [own, debian, runc] = [own, debian, runc].map(|series| samples(series).text(*digits));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {name} | {wanted} | {own} | {verdict} | {debian} | {runc} |");
    }
    text
}

/// The table of a cold read.
pub fn cold_read(read: &ColdRead) -> String {
    type Place = (&'static str, fn(&View) -> u64);
    let places: [Place; 8] = [
        ("guest: `Cached`", |view| view.guest_cached),
        ("QEMU, resident as ps shows it", |view| view.qemu_resident),
        ("virtiofsd, resident as ps shows it", |view| view.virtiofsd_resident),
        ("guest RAM held by the host: one object, mapped by both", |view| {
            view.footprint.guest_kib
        }),
        ("host page cache: the file", |view| view.host_cache),
        ("the pod's cgroup on the host", |view| view.charge.usage_kib),
        ("… of it, pages of files, given back on demand", |view| {
            view.charge.files_kib
        }),
        ("the pod, mapped guest memory counted once", |view| {
            view.footprint.total_kib()
        }),
    ];
    let mut text = format!(
        "A container reads a cold file of {FILE_MIB} MiB in {:.1} s; MiB.\n\n\
         | | before | after | difference |\n|---|---|---|---|\n",
        read.took.as_secs_f64()
    );
    for (name, kib) in places {
        let (before, after) = (kib(&read.before), kib(&read.after));
        let sign = if after < before { "−" } else { "+" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {sign}{} |",
            mib(before),
            mib(after),
            mib(after.abs_diff(before))
        );
    }
    text
}
