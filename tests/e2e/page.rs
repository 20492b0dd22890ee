//! The page of `kata-ctl monitor`, as a browser and as a terminal shows it.

use std::fs;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::Value;
use tests::{
    browser::Browser,
    config::Runtime,
    cri::Pod,
    failure::{Failure, Result, Trying, claim, contains, same},
    node::Node,
    places,
    run::{self, succeed},
};

use crate::{
    Story,
    insight::{Monitor, PORT, kata_ctl},
};

pub const OF_A_VM: &[Story] = &[
    ("the_page_follows_the_pods", the_page_follows_the_pods),
    ("the_page_in_a_terminal", the_page_in_a_terminal),
    (A_PICTURE, a_picture_of_the_page),
];

/// Plays by `make screenshots` alone.
pub const A_PICTURE: &str = "a_picture_of_the_page";

const URL: &str = "http://127.0.0.1:8090/";

/// The cells of each row of the table, behind the sandbox's id.
const ROWS: &str = "[...document.querySelectorAll('#sandboxes tr')].map(row =>
    [row.id.replace('sandbox-', ''), ...[...row.cells].map(cell => cell.innerText)])";

/// Of each mark of a sandbox's waterfall its name, its two figures, and the length of its bar on the screen.
const WATERFALL: &str = "[...document.getElementById('start-ID').tBodies[0].rows].map(row =>
    [...[...row.cells].slice(0, 3).map(cell => cell.innerText),
        row.querySelector('rect').getBoundingClientRect().width])";

/// All marks of a sandbox whose first container has been started.
const MARKS: [&str; 8] = [
    "shim exec",
    "address printed",
    "QEMU spawned",
    "QMP ready",
    "kernel entered",
    "PID 1",
    "agent connected",
    "container exec'd",
];

/// Pods come and go on the page while somebody looks at it, and a monitor that has ended is told.
fn the_page_follows_the_pods(node: &Node, runtime: Runtime) -> Result {
    let first = node.pod(runtime, "shown")?.run()?;
    first.container("sleeper", &["sleep", "infinity"]).run()?;
    let second = node.pod(runtime, "shown")?.run()?;
    let monitor = Monitor::start(node)?;
    let browser = Browser::open(node, URL)?;
    let rows = browser.evaluate(ROWS)?;
    same("the rows", rows.as_array().map(Vec::len), Some(2))?;
    has_a_row(&rows, &first, "1")?;
    has_a_row(&rows, &second, "0")?;
    has_a_waterfall(&browser, node, &first)?;
    is_as_it_should_look(&browser)?;

    browser.evaluate("window.sinceTheBeginning = true")?;
    let row = |pod: &Pod<'_>| format!("document.getElementById('sandbox-{}')", pod.id());
    let gone = format!("!{}", row(&first));
    first.remove()?;
    browser.until("the end of the removed pod's row", &gone)?;
    let third = node.pod(runtime, "shown")?.run()?;
    let there = format!("{}?.innerText", row(&third));
    browser.until("the new pod's row", &there)?;
    let up = format!(
        "document.getElementById('start-{}')?.innerText.includes('agent connected')",
        third.id()
    );
    browser.until("the new pod's waterfall", &up)?;
    let rows = browser.evaluate(ROWS)?;
    same("the rows then", rows.as_array().map(Vec::len), Some(2))?;
    has_a_row(&rows, &second, "0")?;
    has_a_row(&rows, &third, "0")?;
    same("complaints", browser.complaints(), Vec::<String>::new())?;

    monitor.stop()?;
    let stale = "document.documentElement.classList.contains('stale') && document.getElementById('stale').innerText";
    let told = browser.until("the news that the monitor has ended", stale)?;
    let told = told.as_str().unwrap_or_default();
    contains("what is told", told, "Stale: these are the figures of 20")?;
    contains("what is told", told, "The monitor does not answer")?;
    let monitor = Monitor::start(node)?;
    let fresh = "!document.documentElement.classList.contains('stale') && !document.getElementById('stale').innerText";
    browser.until("the news that there is another monitor", fresh)?;
    same("the same page", browser.evaluate("window.sinceTheBeginning")?, true)?;
    browser.close()?;
    monitor.stop()?;
    second.remove()?;
    third.remove()
}

/// A pod's row: who it is, how it is, and what each of its parts holds.
fn has_a_row(rows: &Value, pod: &Pod<'_>, containers: &str) -> Result {
    let mut all = rows.as_array().into_iter().flatten();
    let row = all.find(|row| row[0] == pod.id());
    let row = row.ok_or_else(|| Failure::Claim(format!("{} has no row among {rows}", pod.id())))?;
    let cell = |index: usize| row[index].as_str().unwrap_or_default();
    contains("the pod", cell(1), "default/shown-")?;
    same("the sandbox", Some(cell(2)), pod.id().get(..13))?;
    same("the state", cell(3), "running")?;
    same("the containers", cell(4), containers)?;
    let figure = |index: usize| cell(index).parse::<f64>().unwrap_or(0.0);
    let parts = [5, 6, 7, 8].map(figure);
    claim(
        parts.iter().all(|part| *part > 0.0),
        format!("guest, QEMU, virtiofsd and shim hold {parts:?}"),
    )?;
    let (sum, total) = (parts.iter().sum::<f64>(), figure(9));
    claim(
        (sum - total).abs() < 0.3,
        format!("{parts:?} are {sum}, and told is {total}"),
    )?;
    claim(figure(11) > 0.1, format!("a boot takes time: {row}"))?;
    contains("the start", cell(12), "T")
}

/// The marks and figures are those that `kata-ctl trace` tells, and each mark has a bar that can be seen.
fn has_a_waterfall(browser: &Browser, node: &Node, pod: &Pod<'_>) -> Result {
    let shown = browser.evaluate(&WATERFALL.replace("ID", pod.id()))?;
    let shown = shown.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let names: Vec<_> = shown.iter().map(|mark| text(&mark[0])).collect();
    let mut sorted = names.clone();
    let mut known = MARKS.map(str::to_owned).to_vec();
    sorted.sort();
    known.sort();
    same("the marks", sorted, known)?;
    let told = kata_ctl(node, &["trace", pod.id()])?;
    let told: Vec<_> = told
        .lines()
        .map(|line| {
            line.replace(" ms ", " ")
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    let figures: Vec<_> = shown
        .iter()
        .map(|mark| format!("{} {} {}", text(&mark[0]), text(&mark[1]), text(&mark[2])))
        .collect();
    same("the waterfall", figures, told)?;
    let longest = shown.iter().filter_map(|mark| mark[3].as_f64()).fold(0.0, f64::max);
    claim(
        longest > 20.0 && shown.iter().all(|mark| mark[3].as_f64() > Some(0.5)),
        format!("bars are to be seen: {shown:?}"),
    )
}

/// The page's own style and script are in force, which its policy has to allow.
fn is_as_it_should_look(browser: &Browser) -> Result {
    let style = browser.evaluate("getComputedStyle(document.querySelector('.text')).display")?;
    same("bars of letters", style, "none")?;
    let live = browser.evaluate("document.getElementById('live').innerText")?;
    same("the script's word", live, ", and every 2 s anew")
}

/// A terminal's browser, which runs no scripts and draws nothing, shows the same.
fn the_page_in_a_terminal(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "read")?.run()?;
    pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let monitor = Monitor::start(node)?;
    let shown = in_a_terminal(node)?;
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let short = &pod.id()[..13];
    let row = shown.lines().find(|line| line.contains(short)).map(words);
    let row = row.ok_or_else(|| Failure::Claim(format!("{short} has no row in {shown}")))?;
    contains("the pod", &row[0], "default/read-")?;
    same("the state and the containers", &row[2..4], ["running", "1"])?;
    let figures: Vec<f64> = row[4..10].iter().filter_map(|word| word.parse().ok()).collect();
    claim(
        figures.len() == 6 && figures.iter().all(|figure| *figure > 0.0),
        format!("the figures are {row:?}"),
    )?;
    for mark in MARKS {
        let line = shown.lines().find(|line| line.trim_start().starts_with(mark));
        let line = line.ok_or_else(|| Failure::Claim(format!("{mark:?} is not in {shown}")))?;
        claim(line.trim_end().ends_with('#'), format!("a bar is to be in {line:?}"))?;
    }
    the_same_for_programs(node, &pod)?;
    monitor.stop()?;
    pod.remove()
}

fn in_a_terminal(node: &Node) -> Result<String> {
    let home = tempfile::tempdir().trying("making a home for w3m")?;
    let mut w3m = node.command("w3m");
    w3m.args(["-dump", "-cols", "120", URL]).env("HOME", home.path());
    succeed(w3m.env("LC_ALL", "C.UTF-8"), run::ORDINARY).map(|output| output.text())
}

/// The interface that docs/monitor.md describes.
fn the_same_for_programs(node: &Node, pod: &Pod<'_>) -> Result {
    let text = node.get("127.0.0.1", PORT, "/sandboxes.json")?;
    let report: Value = serde_json::from_str(&text).map_err(|source| Failure::Json {
        what: "/sandboxes.json".into(),
        source,
    })?;
    let sandbox = &report["sandboxes"][0];
    same("the sandbox", &sandbox["sandbox"], pod.id())?;
    same("the namespace", &sandbox["pod"]["namespace"], "default")?;
    same("the containers", &sandbox["containers"], 1)?;
    for part in ["guest", "qemu", "virtiofsd", "shim", "total"] {
        claim(
            sandbox["memory"][part].as_u64() > Some(1 << 20),
            format!("{part} of {sandbox}"),
        )?;
    }
    let marks = sandbox["start"].as_array().map_or(0, Vec::len);
    same("the marks", marks, MARKS.len())?;
    same("the first mark", &sandbox["start"][0]["mark"], "shim_exec")?;
    same("when it was", &sandbox["start"][0]["at"], 0.0)?;
    let documented =
        fs::read_to_string(places::workspace().join("docs/monitor.md")).trying("reading the page's page")?;
    for field in fields(&report) {
        contains("docs/monitor.md", &documented, &format!("`{field}`"))?;
    }
    Ok(())
}

/// The names of all fields, also those inside.
fn fields(value: &Value) -> Vec<String> {
    match value {
        Value::Object(fields_of) => fields_of
            .iter()
            .flat_map(|(name, value)| [vec![name.clone()], fields(value)].concat())
            .collect(),
        Value::Array(all) => all.iter().flat_map(fields).collect(),
        _ => Vec::new(),
    }
}

/// Pictures for the documentation, and a terminal's, in target/screenshots.
fn a_picture_of_the_page(node: &Node, runtime: Runtime) -> Result {
    let web = node.pod(runtime, "web")?.run()?;
    for name in ["server", "logs"] {
        web.container(name, &["sleep", "infinity"]).run()?;
    }
    let database = node.pod(runtime, "database")?.run()?;
    let fill = "dd if=/dev/zero of=/dev/shm/cache bs=1M count=60 2>/dev/null; echo filled; exec sleep infinity";
    let container = database.shell("server", fill).run()?;
    container.wait_for_log("filled")?;
    let idle = node.pod(runtime, "idle")?.run()?;
    let monitor = Monitor::start_with(node, "--node worker-0")?;
    let browser = Browser::open(node, URL)?;
    let folder = places::workspace().join("target/screenshots");
    fs::create_dir_all(&folder).trying("making a folder for pictures")?;
    for colours in ["light", "dark"] {
        let picture = browser.picture(1180, colours)?;
        let bytes = BASE64_STANDARD
            .decode(picture)
            .map_err(|error| Failure::Claim(format!("a picture: {error}")))?;
        fs::write(folder.join(format!("monitor-{colours}.png")), bytes).trying("writing a picture")?;
    }
    fs::write(folder.join("monitor.txt"), in_a_terminal(node)?).trying("writing a picture")?;
    browser.close()?;
    monitor.stop()?;
    for pod in [web, database, idle] {
        pod.remove()?;
    }
    Ok(())
}
