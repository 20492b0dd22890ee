//! What monitoring is told: `kata_operator_*` and `kata_config_installation_success`, in the OpenMetrics text format.

use std::{
    fmt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{api::KataNodes, decide::End, report::Verb};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: String,
}

/// All metrics.
pub(super) struct Metrics {
    nodes: Family<State, Gauge>,
    success: Gauge,
    /// There is a KataConfig that this controller has looked at.
    in_force: AtomicBool,
    /// 1 while this controller leads.
    pub(super) leader: Gauge,
    install_seconds: Histogram,
    install_failures: Family<Reason, Counter>,
    verification_failures: Family<Reason, Counter>,
    /// Passes that ended with an error.
    pub(super) reconcile_errors: Counter<u64, AtomicU64>,
    /// Looks at the cluster.
    pub(super) passes: Counter<u64, AtomicU64>,
    /// Requests to the API server.
    pub(super) api_requests: Counter<u64, AtomicU64>,
    /// Those that were refused or not answered.
    api_failures: Family<Answer, Counter>,
    /// Bytes of its answers.
    pub(super) api_received_bytes: Counter<u64, AtomicU64>,
    build: Family<Build, Gauge>,
}

impl Metrics {
    pub(super) fn new(version: &str) -> Metrics {
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                version: version.to_owned(),
            })
            .set(1);
        Metrics {
            nodes: Family::default(),
            success: Gauge::default(),
            in_force: AtomicBool::default(),
            leader: Gauge::default(),
            install_seconds: Histogram::new([1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0]),
            install_failures: Family::default(),
            verification_failures: Family::default(),
            reconcile_errors: Counter::default(),
            passes: Counter::default(),
            api_requests: Counter::default(),
            api_failures: Family::default(),
            api_received_bytes: Counter::default(),
            build,
        }
    }

    /// Names all of them, and leaves out what is not known.
    fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        registry.register(
            "kata_operator_nodes",
            "Nodes by state, as in status.kataNodes",
            self.nodes.clone(),
        );
        if self.in_force.load(Ordering::Relaxed) {
            registry.register(
                "kata_config_installation_success",
                "1 when every wanted node has kata, else 0; absent without a KataConfig and from who does not lead",
                self.success.clone(),
            );
        }
        registry.register(
            "kata_operator_leader",
            "1 while this controller leads",
            self.leader.clone(),
        );
        registry.register(
            "kata_operator_node_install_seconds",
            "From the making of an installer pod to its success",
            self.install_seconds.clone(),
        );
        registry.register(
            "kata_operator_install_failures",
            "Installations and removals that failed, by the installer's code",
            self.install_failures.clone(),
        );
        registry.register(
            "kata_operator_verification_failures",
            "Looks at nodes with kata that failed, by the installer's code",
            self.verification_failures.clone(),
        );
        registry.register(
            "kata_operator_reconcile_errors",
            "Passes that ended with an error",
            self.reconcile_errors.clone(),
        );
        registry.register(
            "kata_operator_passes",
            "Looks at the cluster, after each of which the controller acts or rests",
            self.passes.clone(),
        );
        registry.register(
            "kata_operator_api_requests",
            "Requests to the API server",
            self.api_requests.clone(),
        );
        registry.register(
            "kata_operator_api_failures",
            "Requests that the API server refused, by the code of its answer, 404 and 409 among them, or did not answer (none)",
            self.api_failures.clone(),
        );
        registry.register(
            "kata_operator_api_received_bytes",
            "Bytes of the API server's answers",
            self.api_received_bytes.clone(),
        );
        registry.register(
            "kata_operator_build_info",
            "The version that is installed",
            self.build.clone(),
        );
        registry
    }

    /// Shows the lists of the KataConfig that is in force, if there is one.
    pub(super) fn show(&self, counts: &KataNodes, in_force: bool) {
        let states = [
            ("installed", &counts.installed),
            ("installing", &counts.installing),
            ("waitingToInstall", &counts.waiting_to_install),
            ("failedToInstall", &counts.failed_to_install),
            ("uninstalling", &counts.uninstalling),
            ("waitingToUninstall", &counts.waiting_to_uninstall),
            ("failedToUninstall", &counts.failed_to_uninstall),
        ];
        for (state, names) in states {
            let label = State {
                state: state.to_owned(),
            };
            self.nodes
                .get_or_create(&label)
                .set(i64::try_from(names.len()).unwrap_or(i64::MAX));
        }
        self.in_force.store(in_force, Ordering::Relaxed);
        let all = counts.node_count > 0 && counts.node_count == counts.ready_node_count;
        self.success.set(i64::from(all));
    }

    /// Counts a request that the API server has refused with a code, or not answered.
    pub(super) fn failed(&self, code: Option<u16>) {
        let code = code.map_or_else(|| "none".to_owned(), |code| code.to_string());
        self.api_failures.get_or_create(&Answer { code }).inc();
    }

    /// Counts runs that have ended.
    pub(super) fn count<'e>(&self, ends: impl IntoIterator<Item = &'e End>) {
        for end in ends {
            match &end.failure {
                Some(code) => {
                    let failures = match end.verb {
                        Verb::Verify => &self.verification_failures,
                        Verb::Install | Verb::Uninstall => &self.install_failures,
                    };
                    let reason = format!("{code:?}");
                    failures.get_or_create(&Reason { reason }).inc();
                }
                None if end.verb == Verb::Install => self.install_seconds.observe(end.took.as_secs_f64()),
                None => {}
            }
        }
    }

    /// All of them as text.
    ///
    /// # Errors
    /// None in practice: a string takes everything.
    pub(super) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry())?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::SignedDuration;

    use super::*;
    use crate::{decide::Step, report::Code};

    /// The names in a text that begin as ours do.
    fn names(text: &str) -> BTreeSet<&str> {
        let words = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
        words.filter(|word| word.starts_with("kata_")).collect()
    }

    /// Everything that there is to show.
    fn shown() -> String {
        let metrics = Metrics::new("0.1.0");
        metrics.show(&KataNodes::default(), true);
        metrics.count(&[Verb::Install, Verb::Verify].map(|verb| End {
            verb,
            took: SignedDuration::from_secs(1),
            failure: Some(Code::Io),
            after: Step::Actions(1),
        }));
        metrics.text().unwrap()
    }

    #[test]
    fn alerts_and_panels_ask_for_metrics_that_there_are() {
        let text = shown();
        let there = names(&text);
        for asked in [
            include_str!("../../../deploy/monitoring/prometheusrule.yaml"),
            include_str!("../../../deploy/monitoring/dashboard.json"),
        ] {
            let asked = names(asked);
            assert!(!asked.is_empty());
            let missing: Vec<_> = asked.difference(&there).collect();
            assert!(missing.is_empty(), "{missing:?} in none of {there:?}");
        }
        for state in [
            "failedToInstall",
            "failedToUninstall",
            "waitingToInstall",
            "uninstalling",
        ] {
            assert!(text.contains(&format!("{{state=\"{state}\"}}")), "{state}");
        }
    }

    #[test]
    fn a_controller_without_a_kataconfig_does_not_tell_of_its_success() {
        let metrics = Metrics::new("0.1.0");
        assert!(!metrics.text().unwrap().contains("installation_success"));
        metrics.show(&KataNodes::default(), true);
        assert!(metrics.text().unwrap().contains("kata_config_installation_success 0"));
        metrics.show(&KataNodes::default(), false);
        assert!(!metrics.text().unwrap().contains("installation_success"));
    }
}
