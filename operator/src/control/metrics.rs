//! What monitoring is told: `kata_operator_*` and `kata_config_installation_success`, in the OpenMetrics text format.

use std::{fmt, sync::atomic::AtomicU64};

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
struct Build {
    version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoLabels {}

/// All metrics.
pub(super) struct Metrics {
    registry: Registry,
    nodes: Family<State, Gauge>,
    success: Family<NoLabels, Gauge>,
    /// 1 while this controller leads.
    pub(super) leader: Gauge,
    install_seconds: Histogram,
    install_failures: Family<Reason, Counter>,
    /// Passes that ended with an error.
    pub(super) reconcile_errors: Counter<u64, AtomicU64>,
}

impl Metrics {
    pub(super) fn new(version: &str) -> Metrics {
        let mut registry = Registry::default();
        let nodes = Family::<State, Gauge>::default();
        let success = Family::<NoLabels, Gauge>::default();
        let leader = Gauge::default();
        let install_seconds = Histogram::new([1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0]);
        let install_failures = Family::<Reason, Counter>::default();
        let reconcile_errors = Counter::default();
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                version: version.to_owned(),
            })
            .set(1);
        registry.register(
            "kata_operator_nodes",
            "Nodes by state, as in status.kataNodes",
            nodes.clone(),
        );
        registry.register(
            "kata_config_installation_success",
            "1 when every wanted node has kata, else 0; absent without a KataConfig, and from a controller that does not lead",
            success.clone(),
        );
        registry.register("kata_operator_leader", "1 while this controller leads", leader.clone());
        registry.register(
            "kata_operator_node_install_seconds",
            "From the making of an installer pod to its success",
            install_seconds.clone(),
        );
        registry.register(
            "kata_operator_install_failures",
            "Runs of the installer that failed, by the installer's code",
            install_failures.clone(),
        );
        registry.register(
            "kata_operator_reconcile_errors",
            "Passes that ended with an error",
            reconcile_errors.clone(),
        );
        registry.register("kata_operator_build_info", "The version that is installed", build);
        Metrics {
            registry,
            nodes,
            success,
            leader,
            install_seconds,
            install_failures,
            reconcile_errors,
        }
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
        if !in_force {
            return self.success.clear();
        }
        let all = counts.node_count > 0 && counts.node_count == counts.ready_node_count;
        self.success.get_or_create(&NoLabels {}).set(i64::from(all));
    }

    /// Counts runs that have ended.
    pub(super) fn count(&self, ends: &[End]) {
        for end in ends {
            match &end.failure {
                Some(code) => {
                    let reason = format!("{code:?}");
                    self.install_failures.get_or_create(&Reason { reason }).inc();
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
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
