//! The page of `kata-ctl monitor`: a [`Report`] for people, in any browser. One without scripts shows everything, and a
//! terminal's shows bars as text. The script fetches the page anew and exchanges what has changed, so there is one
//! renderer, and every value passes its escaping.

use std::sync::LazyLock;

use askama::Template;
use base64::{Engine, prelude::BASE64_STANDARD};
use sha2::{Digest, Sha256};

use super::{
    report::{Report, Sandbox},
    top::{Memory, mib},
};
use crate::{
    error::{Context, Result},
    http::Answer,
    trace::{Mark, Step},
};

/// The template, for the sums of its style and script, in which nothing is filled in.
const TEMPLATE: &str = include_str!("../../templates/monitor.html");
/// A bar's whole length, in the units of its drawing.
const WHOLE: u64 = 1000;
/// And in letters.
const LETTERS: u64 = 32;

/// What the page may do: run its own style and script (CSP 3, hash sources), and ask where it came from.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let sum = |tag: &str| {
        let inside = TEMPLATE.split_once(&format!("<{tag}>")).map_or("", |(_, rest)| rest);
        let inside = inside.split_once(&format!("</{tag}>")).map_or("", |(inside, _)| inside);
        BASE64_STANDARD.encode(Sha256::digest(inside))
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        sum("style"),
        sum("script")
    )
});

/// The page of a report.
///
/// # Errors
/// None that is known: the template's own.
pub fn answer(report: &Report) -> Result<Answer> {
    let text = render(report)?;
    Ok(Answer::page(&POLICY, text))
}

fn render(report: &Report) -> Result<String> {
    let largest = report.sandboxes.iter().map(|sandbox| sandbox.usage.memory.total).max();
    let row = |sandbox| Row::of(sandbox, largest.unwrap_or(0));
    let page = Page {
        report,
        rows: report.sandboxes.iter().map(row).collect(),
        sums: Figures::of(&report.memory()),
    };
    page.render().map_err(std::io::Error::other).action("render the page")
}

#[derive(Template)]
#[template(path = "monitor.html")]
struct Page<'a> {
    report: &'a Report,
    rows: Vec<Row<'a>>,
    sums: Figures,
}

/// Memory as the table has it.
struct Figures {
    guest: String,
    qemu: String,
    virtiofsd: String,
    shim: String,
    total: String,
}

struct Row<'a> {
    id: &'a str,
    short: String,
    pod: String,
    state: &'static str,
    running: bool,
    containers: String,
    figures: Figures,
    parts: Vec<Part>,
    cpu: String,
    started: &'a str,
    took: String,
    marks: Vec<Line>,
}

/// One part of a sandbox's memory.
struct Part {
    name: &'static str,
    bar: Bar,
}

/// One mark of a waterfall.
struct Line {
    label: &'static str,
    /// Whose time it is: the class of its bar.
    side: &'static str,
    at: String,
    step: String,
    bar: Bar,
    text: String,
}

struct Bar {
    from: u64,
    width: u64,
}

impl Figures {
    fn of(memory: &Memory) -> Figures {
        let part = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), mib);
        Figures {
            guest: part(memory.guest),
            qemu: part(memory.qemu),
            virtiofsd: part(memory.virtiofsd),
            shim: mib(memory.shim),
            total: mib(memory.total),
        }
    }
}

impl<'a> Row<'a> {
    fn of(sandbox: &'a Sandbox, largest: u64) -> Row<'a> {
        let usage = &sandbox.usage;
        let whole = sandbox.start.last().map_or(0.0, |last| last.at);
        Row {
            id: &usage.sandbox,
            short: usage.short(),
            pod: super::pod_name(usage.pod.as_ref()),
            state: usage.state,
            running: usage.state == super::RUNNING,
            containers: usage.counted(),
            figures: Figures::of(&usage.memory),
            parts: parts(&usage.memory, largest),
            cpu: format!("{:.1}", usage.cpu_seconds),
            started: sandbox.started.as_deref().unwrap_or("-"),
            took: format!("{whole:.1}"),
            marks: sandbox.start.iter().map(|step| Line::of(step, whole)).collect(),
        }
    }
}

/// The parts of a sandbox's memory one after another, on the scale of the largest sandbox.
fn parts(memory: &Memory, largest: u64) -> Vec<Part> {
    let scaled = |bytes: u64| (u128::from(bytes) * u128::from(WHOLE) / u128::from(largest.max(1))) as u64;
    let mut before = 0;
    let part = |(name, bytes): (&'static str, Option<u64>)| {
        let (from, to) = (scaled(before), scaled(before + bytes?));
        before += bytes?;
        let bar = Bar { from, width: to - from };
        Some(Part { name, bar })
    };
    [
        ("guest", memory.guest),
        ("qemu", memory.qemu),
        ("virtiofsd", memory.virtiofsd),
        ("shim", Some(memory.shim)),
    ]
    .into_iter()
    .filter_map(part)
    .collect()
}

impl Line {
    fn of(step: &Step, whole: f64) -> Line {
        let scaled = |at: f64, length: u64| (at * length as f64 / whole.max(f64::MIN_POSITIVE)).round() as u64;
        let bar = |length: u64| {
            let (from, to) = (scaled(step.at - step.step, length), scaled(step.at, length));
            // What took no time that can be seen has a place all the same.
            let from = from.min(length - 1);
            let width = to.saturating_sub(from).max(1);
            Bar { from, width }
        };
        let letters = bar(LETTERS);
        Line {
            label: step.mark.label(),
            side: side(step.mark),
            at: format!("{:.1}", step.at),
            step: format!("+{:.1}", step.step),
            bar: Bar {
                width: bar(WHOLE).width.max(WHOLE / 200),
                ..bar(WHOLE)
            },
            // Spaces that a browser keeps.
            text: "\u{a0}".repeat(letters.from as usize) + &"#".repeat(letters.width as usize),
        }
    }
}

/// Who was at work until a mark was reached.
fn side(mark: Mark) -> &'static str {
    match mark {
        Mark::ShimExec | Mark::AddressPrinted | Mark::QemuSpawned => "shim",
        Mark::QmpReady | Mark::KernelEntered => "qemu",
        Mark::Pid1 | Mark::AgentConnected | Mark::ContainerExec => "guest",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ctl::top::Usage, undo::PodName};

    fn sandbox(id: &str, pod: Option<(&str, &str)>) -> Sandbox {
        let step = |mark, at, step| Step { mark, at, step };
        Sandbox {
            usage: Usage {
                sandbox: id.into(),
                pod: pod.map(|(namespace, name)| PodName {
                    namespace: namespace.into(),
                    name: name.into(),
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
            },
            started: Some("2026-11-28T12:00:00Z".into()),
            start: vec![
                step(Mark::ShimExec, 0.0, 0.0),
                step(Mark::QemuSpawned, 10.0, 10.0),
                step(Mark::AgentConnected, 1000.0, 990.0),
            ],
        }
    }

    fn report(sandboxes: Vec<Sandbox>) -> Report {
        Report {
            node: "worker-0".into(),
            version: "0.1.0",
            measured: "2026-11-28T12:00:05Z".into(),
            sandboxes,
        }
    }

    #[test]
    fn a_row_has_every_figure_and_a_waterfall_its_bars() {
        let page = render(&report(vec![sandbox("0123456789abcdef", Some(("shop", "web-0")))])).unwrap();
        for text in [
            "<tr id=\"sandbox-0123456789abcdef\" align=\"right\"><th scope=\"row\" align=\"left\"><a",
            "<a href=\"#start-0123456789abcdef\">shop/web-0</a></th>",
            "<td>76.0</td><td>116.0</td><td>3.0</td>\n<td>6.0</td>\n<td class=\"total\">201.0</td>",
            "<rect class=\"qemu\" x=\"378\" width=\"577\"\n height=\"1\"/>",
            "<caption><b>shop/web-0</b>, 1000.0 ms</caption>",
            "<th scope=\"row\" align=\"left\">agent connected</th><td>1000.0</td>\n<td>+990.0</td>",
            "x=\"10\" width=\"990\" height=\"1\"/></svg><span\n class=\"text\">################################</span>",
            "datetime=\"2026-11-28T12:00:05Z\"",
        ] {
            assert!(page.contains(text), "{text} in {page}");
        }
    }

    #[test]
    fn names_are_text_wherever_they_stand() {
        let hostile = "\"><script>alert('x')</script>&amp;";
        let mut all = report(vec![sandbox(hostile, Some((hostile, hostile)))]);
        all.node = hostile.into();
        let page = render(&all).unwrap();
        assert_eq!(page.matches("<script>").count(), 1, "{page}");
        assert!(!page.contains("alert('x')"), "{page}");
        assert!(
            page.contains("&#60;script&#62;alert(&#39;x&#39;)&#60;/script&#62;&#38;amp;"),
            "{page}"
        );
    }

    #[test]
    fn a_sandbox_without_guest_pod_and_waterfall_has_a_row() {
        let mut bare = sandbox("ab", None);
        bare.usage.state = "no guest";
        bare.usage.containers = None;
        bare.usage.memory = Memory {
            shim: 6 << 20,
            total: 6 << 20,
            ..Memory::default()
        };
        bare.start.clear();
        bare.started = None;
        let page = render(&report(vec![bare])).unwrap();
        assert!(page.contains("<th scope=\"row\" align=\"left\">-</th>"), "{page}");
        assert!(
            page.contains("<td class=\"left odd\" align=\"left\">no guest</td><td>-</td>"),
            "{page}"
        );
        assert!(!page.contains("id=\"start-ab\""), "{page}");
        assert!(render(&report(Vec::new())).unwrap().contains("No pod of this node"));
    }

    #[test]
    fn the_policy_names_what_the_page_has_and_nothing_else_runs() {
        let page = render(&report(Vec::new())).unwrap();
        for tag in ["style", "script"] {
            let (_, rest) = page.split_once(&format!("<{tag}>")).unwrap();
            let (inside, _) = rest.split_once(&format!("</{tag}>")).unwrap();
            assert!(inside.len() > 500);
            let sum = BASE64_STANDARD.encode(Sha256::digest(inside));
            assert!(
                POLICY.contains(&format!("{tag}-src 'sha256-{sum}'")),
                "{tag}: {}",
                *POLICY
            );
        }
        assert!(
            POLICY.starts_with("default-src 'none';") && !POLICY.contains("unsafe"),
            "{}",
            *POLICY
        );
        for part in [" style=", " onclick=", " onload=", "http://", "https://"] {
            assert!(!page.contains(part), "{part}");
        }
    }
}
