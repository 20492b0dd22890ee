//! `kata-ctl monitor`: the metrics of all sandboxes of a node on one address, as `kata-monitor` of Kata serves them,
//! and beside them a page for people. It holds nothing itself and asks nobody until it is asked.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use agent_protocol::exposition::{Exposition, Histogram};
use futures::{StreamExt, stream};
use tokio::net::TcpListener;

use super::{
    page,
    report::{Desk, Report},
    sandboxes,
};
use crate::{
    accept,
    error::{Context, Error, Result, decode},
    families::Families,
    http::{self, Answer, Request},
    metrics,
    undo::State,
};

/// Where `kata-monitor` listens.
const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8090);
/// How long a sandbox's shim may take; its guest has half of that.
const SHIM: Duration = Duration::from_secs(10);
/// How many are asked at once.
const AT_ONCE: usize = 8;

/// How it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    address: SocketAddr,
    /// What the page calls this node.
    node: String,
    /// Names that clients may ask for, beside addresses and `localhost`.
    hosts: Vec<String>,
}

impl Options {
    /// From the words of a command line.
    ///
    /// # Errors
    /// A sentence that names the word.
    pub fn parse(words: &[&str]) -> Result<Options> {
        let name = nix::unistd::gethostname().map_err(std::io::Error::from);
        let mut options = Options {
            address: ADDRESS,
            node: name.action("ask for this node's name")?.to_string_lossy().into_owned(),
            hosts: Vec::new(),
        };
        for pair in words.chunks(2) {
            match *pair {
                ["--listen", address] => {
                    let invalid = |_| Error::Invalid(format!("{address:?} is no address: 127.0.0.1:8090 is one"));
                    options.address = address.parse().map_err(invalid)?;
                }
                ["--node", name] => options.node = name.to_owned(),
                ["--host", name] => options.hosts.push(name.to_owned()),
                ["--listen" | "--node" | "--host"] => {
                    return Err(Error::Invalid(format!("{} needs a value", pair[0])));
                }
                _ => {
                    let known = "--listen ADDRESS, --node NAME and --host NAME are those of the monitor";
                    return Err(Error::Invalid(format!("there is no option {:?}: {known}", pair[0])));
                }
            }
        }
        Ok(options)
    }

    /// Whether a client that believes to ask this host is answered. A page of somebody else's in a browser on this
    /// machine may have its own name resolved to ours, and would then be one with what we serve; it cannot use an
    /// address for that.
    fn answers(&self, host: &str) -> bool {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host.parse::<SocketAddr>().is_ok()
            || address.parse::<IpAddr>().is_ok()
            || name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.hosts.iter().any(|known| name.eq_ignore_ascii_case(known))
    }
}

/// What the monitor has done so far.
#[derive(Default)]
struct Work {
    scrapes: u64,
    failed: u64,
    durations: Histogram,
}

struct Monitor {
    options: Options,
    work: Mutex<Work>,
    desk: Desk,
}

/// Serves until it is killed.
///
/// # Errors
/// The address cannot be had.
pub async fn serve(options: Options) -> Result<()> {
    let listener = TcpListener::bind(options.address).await.action("listen")?;
    let address = listener.local_addr().action("listen")?;
    println!("this node's sandboxes are at http://{address}/, their metrics at http://{address}/metrics");
    let monitor: &'static Monitor = Box::leak(Box::new(Monitor {
        options,
        work: Mutex::default(),
        desk: Desk::default(),
    }));
    loop {
        let (stream, _) = accept::next(|| listener.accept()).await;
        tokio::spawn(async move {
            // A client that hangs up is its own business.
            let _ended_early = http::serve(stream, |request| async move { respond(monitor, &request).await }).await;
        });
    }
}

async fn respond(monitor: &Monitor, request: &Request) -> Answer {
    if let Some(host) = &request.host
        && !monitor.options.answers(host)
    {
        return Answer::misdirected(format!(
            "only addresses and localhost are answered for: ask for one of them, or start the monitor with --host for \
             {host:?}"
        ));
    }
    match answer(monitor, &request.target).await {
        Ok(answer) => answer,
        Err(error) => Answer::unavailable(error.to_string()),
    }
}

async fn answer(monitor: &Monitor, target: &str) -> Result<Answer> {
    let live = || Ok::<_, Error>(live(sandboxes()?));
    Ok(match (http::path(target), http::query(target, "sandbox")) {
        ("/", _) => page::answer(&*monitor.report().await?)?,
        ("/sandboxes.json", _) => {
            let report = serde_json::to_string(&*monitor.report().await?);
            Answer::ok(http::JSON, report.map_err(decode("a report to write"))? + "\n")
        }
        ("/metrics", None) => Answer::ok(http::METRICS, all(&monitor.work, live()?).await?),
        ("/metrics", Some(id)) => match live()?.into_iter().find(|(name, _)| name == id) {
            Some((id, state)) => Answer::ok(http::METRICS, scrape(id, state).await?.render()),
            None => Answer::not_found(format!("no sandbox {id} runs on this node")),
        },
        ("/sandboxes", _) => Answer::ok(http::TEXT, live()?.into_iter().map(|(id, _)| id + "\n").collect()),
        _ => Answer::not_found("here are /, /sandboxes.json, /sandboxes, /metrics and /metrics?sandbox=ID"),
    })
}

impl Monitor {
    async fn report(&self) -> Result<Arc<Report>> {
        self.desk.report(&self.options.node).await
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

    fn options(words: &[&str]) -> std::result::Result<Options, String> {
        Options::parse(words).map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_read_and_a_wrong_one_is_named() {
        let given = options(&["--host", "node-1", "--listen", "[::]:1", "--node", "worker-0"]).unwrap();
        assert_eq!(given.address.to_string(), "[::]:1");
        assert_eq!(
            (given.node.as_str(), given.hosts),
            ("worker-0", vec!["node-1".to_owned()])
        );
        assert_eq!(options(&[]).unwrap().address.to_string(), "127.0.0.1:8090");
        for (words, sentence) in [
            (&["--listen"][..], "--listen needs a value"),
            (&["--listen", "8090"], "\"8090\" is no address: 127.0.0.1:8090 is one"),
            (
                &["--lisen", "x"],
                "there is no option \"--lisen\": --listen ADDRESS, --node NAME and --host NAME are those of the \
                 monitor",
            ),
        ] {
            assert_eq!(options(words), Err(sentence.into()));
        }
    }

    #[tokio::test]
    async fn a_name_that_somebody_has_led_here_is_not_answered() {
        let mut monitor = Monitor {
            options: options(&["--host", "node-1"]).unwrap(),
            work: Mutex::default(),
            desk: Desk::default(),
        };
        let ask = async |monitor: &Monitor, host: &str| {
            let request = Request {
                target: "/nothing".into(),
                host: Some(host.into()),
            };
            format!("{:?}", respond(monitor, &request).await)
        };
        for host in [
            "127.0.0.1:8090",
            "127.0.0.1",
            "[::1]:8090",
            "[::1]",
            "localhost:8090",
            "LOCALHOST",
            "node-1:8090",
            "10.0.0.7:1",
        ] {
            let answer = ask(&monitor, host).await;
            assert!(answer.contains("404 Not Found"), "{host}: {answer}");
        }
        for host in [
            "example.com",
            "example.com:8090",
            "127.0.0.1.example.com:8090",
            "localhost.example.com",
            "",
        ] {
            let answer = ask(&monitor, host).await;
            assert!(answer.contains("421 Misdirected Request"), "{host}: {answer}");
        }
        monitor.options.hosts.clear();
        let answer = ask(&monitor, "node-1:8090").await;
        assert!(answer.contains("start the monitor with --host for"), "{answer}");
    }

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
