//! `kata-ctl monitor`: the metrics of all sandboxes of a node on one address, as `kata-monitor` of Kata serves them. It
//! holds no metrics itself and asks nobody until it is asked.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use agent::exposition::{Exposition, Histogram};
use futures::{StreamExt, stream};
use tokio::net::TcpListener;

use super::sandboxes;
use crate::{
    accept,
    error::{Context, Result},
    families::Families,
    http::{self, Answer},
    metrics,
    undo::State,
};

/// Where `kata-monitor` listens.
pub const ADDRESS: &str = "127.0.0.1:8090";
/// How long a sandbox's shim may take; its guest has half of that.
const SHIM: Duration = Duration::from_secs(10);
/// How many are asked at once.
const AT_ONCE: usize = 8;

/// What the monitor has done so far.
#[derive(Default)]
struct Work {
    scrapes: u64,
    failed: u64,
    durations: Histogram,
}

/// Serves until it is killed.
///
/// # Errors
/// The address cannot be had.
pub async fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).await.action("listen")?;
    println!("metrics of this node's sandboxes are at http://{address}/metrics");
    let work: &'static Mutex<Work> = Box::leak(Box::default());
    loop {
        let (stream, _) = accept::next(|| listener.accept()).await;
        tokio::spawn(async move {
            // A client that hangs up is its own business.
            let _ended_early = http::serve(stream, |target| async move { respond(work, &target).await }).await;
        });
    }
}

async fn respond(work: &Mutex<Work>, target: &str) -> Answer {
    let path = http::path(target);
    let one = http::query(target, "sandbox");
    let sandboxes = match sandboxes() {
        Ok(all) => live(all),
        Err(error) => return Answer::unavailable(error.to_string()),
    };
    match (path, one) {
        ("/metrics", None) => match all(work, sandboxes).await {
            Ok(text) => Answer::ok(http::METRICS, text),
            Err(error) => Answer::unavailable(error.to_string()),
        },
        ("/metrics", Some(id)) => match sandboxes.into_iter().find(|(name, _)| name == id) {
            Some((id, state)) => match scrape(id, state).await {
                Ok(families) => Answer::ok(http::METRICS, families.render()),
                Err(error) => Answer::unavailable(error.to_string()),
            },
            None => Answer::not_found(format!("no sandbox {id} runs on this node")),
        },
        ("/sandboxes", _) => {
            let ids = sandboxes.into_iter().map(|(id, _)| id + "\n");
            Answer::ok(http::TEXT, ids.collect())
        }
        _ => Answer::not_found("here are /metrics, /metrics?sandbox=ID and /sandboxes"),
    }
}

fn live(sandboxes: Vec<(String, State)>) -> Vec<(String, State)> {
    let live = sandboxes.into_iter().filter(|(_, state)| state.shim.alive());
    live.collect()
}

/// Everything of the node.
async fn all(work: &Mutex<Work>, sandboxes: Vec<(String, State)>) -> Result<String> {
    let (count, began) = (sandboxes.len(), Instant::now());
    let asked = sandboxes.into_iter().map(|(id, state)| scrape(id, state));
    let answers: Vec<_> = stream::iter(asked).buffered(AT_ONCE).collect().await;
    let mut families = Families::default();
    let mut failed = 0;
    for answer in answers {
        match answer {
            Ok(answer) => families.merge(answer),
            Err(error) => {
                eprintln!("kata-ctl: {error}");
                failed += 1;
            }
        }
    }
    let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
    work.scrapes += 1;
    work.failed += failed;
    work.durations.observe(began.elapsed());
    families.merge(own(&work, count)?);
    Ok(families.render())
}

/// One sandbox's metrics, labelled as its own.
async fn scrape(id: String, state: State) -> Result<Families> {
    let socket = metrics::socket(&id);
    let text = http::get(&socket, "/metrics", SHIM).await.at("ask", &socket)?;
    let mut labels = vec![("sandbox_id", id.as_str())];
    if let Some(pod) = &state.pod {
        labels.extend([("cri_namespace", pod.namespace.as_str()), ("cri_name", &pod.name)]);
    }
    Ok(Families::parse(&text).labelled(&labels))
}

fn own(work: &Work, shims: usize) -> Result<Families> {
    let mut out = Exposition::default();
    let shims_help = "Running shims, each of one sandbox";
    out.single("kata_monitor_running_shim_count", "gauge", shims_help, shims as f64);
    out.single("kata_monitor_scrape_count", "counter", "Scrapes", work.scrapes as f64);
    out.single(
        "kata_monitor_scrape_failed_count",
        "counter",
        "Sandboxes that did not answer a scrape",
        work.failed as f64,
    );
    let name = "kata_monitor_scrape_durations_histogram_milliseconds";
    out.family(name, "histogram", "Durations of scrapes");
    out.histogram(name, &[], &work.durations);
    out.process_totals("kata_monitor", "self")
        .action("measure the monitor")?;
    Ok(Families::parse(&out.into_text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_sandboxes_the_monitor_tells_of_itself() {
        let work = Mutex::default();
        all(&work, Vec::new()).await.unwrap();
        let text = all(&work, Vec::new()).await.unwrap();
        for line in [
            "kata_monitor_running_shim_count 0",
            "# TYPE kata_monitor_scrape_count counter",
            "kata_monitor_scrape_count 2",
            "kata_monitor_scrape_durations_histogram_milliseconds_count 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
