//! Stories of an API server that refuses, forgets and is silent: nothing is lost, nothing of others is overwritten, and
//! it is left alone when it wants to be.

use clap::Parser;
use serde_json::json;
use tokio::time::Instant;

use super::{
    fake::{Answer, Asked, DEADLINE, Fake, list, node},
    *,
};
use crate::{
    decide::{Decision, FINALIZER, Node, cluster::Cluster, fixtures},
    report::Code,
};

const CONFIGS: &str = "/apis/kataconfiguration.openshift.io/v1/kataconfigs";
const NODES: &str = "/api/v1/nodes";
const PODS: &str = "/api/v1/namespaces/ns/pods";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
const NAME_OF_CONFIG: &str = "cluster-kataconfig";

/// A controller of this API server, whose looks may take so many seconds, and its metrics.
fn controller(fake: &Fake, seconds: u32) -> (Controller, Arc<Metrics>) {
    let words = "sandpod-operator --installer-image i --version 0.1.0-1a2b3c4d --identity me --namespace ns";
    let mut options = Options::parse_from(words.split(' '));
    options.api_timeout = Duration::from_secs(seconds.into());
    let metrics = Arc::new(Metrics::new("1"));
    let (client, wish) = fake.client(&metrics);
    (Controller::new(client, wish, options, Arc::clone(&metrics)), metrics)
}

fn has(metrics: &Metrics, line: &str) {
    let text = metrics.text().unwrap();
    assert!(text.lines().any(|there| there == line), "no {line:?} in {text}");
}

fn code(error: &ActError) -> Option<u16> {
    match error {
        ActError::Api(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

/// The first decision that has such an action; the cluster is then as it was read for it.
fn decision_with(cluster: &mut Cluster, is_such: fn(&Action) -> bool) -> Decision {
    for _ in 0..20 {
        let decision = cluster.decide();
        if decision.actions.iter().any(is_such) {
            return decision;
        }
        cluster.pass(usize::MAX);
    }
    panic!("no such decision: {:?}", cluster.decide());
}

fn one_node() -> Cluster {
    let mut cluster = Cluster::new(&["worker-0"]);
    cluster.create(NAME_OF_CONFIG, json!({}));
    cluster
}

#[tokio::test]
async fn what_somebody_has_changed_meanwhile_is_read_again_and_not_overwritten() {
    let fake = Fake::default();
    let config = |version: &str, finalizers: &[&str]| {
        Answer::Is(json!({
            "apiVersion": "kataconfiguration.openshift.io/v1",
            "kind": "KataConfig",
            "metadata": {"name": NAME_OF_CONFIG, "uid": "u", "resourceVersion": version, "finalizers": finalizers},
            "spec": {},
        }))
    };
    let Answer::Is(first) = config("10", &[]) else {
        unreachable!()
    };
    fake.answers(&format!("GET {CONFIGS}"), [Answer::Is(list(&[first], "10", None))]);
    let path = format!("{CONFIGS}/{NAME_OF_CONFIG}");
    let statuses = [config("11", &[]), config("13", &["theirs"])];
    fake.answers(&format!("PATCH {path}/status"), statuses);
    let answers = [Answer::Refusal(409, "Conflict"), config("14", &["theirs", FINALIZER])];
    fake.answers(&format!("PATCH {path}"), answers);
    let (mut controller, metrics) = controller(&fake, 30);
    let failed = controller.pass().await.err().unwrap();
    assert_eq!(code(&failed), Some(409));
    assert!(matches!(controller.pass().await, Ok(Pass::Busy)));
    let patches: Vec<_> = fake
        .asked(&format!("PATCH {path}"))
        .into_iter()
        .map(|asked| asked.body)
        .collect();
    assert_eq!(
        patches,
        [
            json!({"metadata": {"resourceVersion": "11", "finalizers": [FINALIZER]}}),
            json!({"metadata": {"resourceVersion": "13", "finalizers": ["theirs", FINALIZER]}}),
        ]
    );
    has(&metrics, "kata_operator_api_failures_total{code=\"409\"} 1");
}

#[tokio::test]
async fn a_pod_that_is_there_is_made_and_one_that_is_refused_is_told_from_one_that_comes_later() {
    let mut cluster = one_node();
    let decision = decision_with(&mut cluster, |action| matches!(action, Action::StartRun { .. }));
    let start = decision.actions.len();
    for (answer, done, outcome) in [
        (Answer::Refusal(409, "AlreadyExists"), start, "done"),
        (Answer::Refusal(409, "Conflict"), start - 1, "409"),
        (Answer::Refusal(500, "InternalError"), start - 1, "500"),
        (Answer::Later(1), start - 1, "429"),
        (Answer::Refusal(403, "Forbidden"), start - 1, "refused"),
    ] {
        let fake = Fake::default();
        fake.answers(&format!("POST {PODS}"), [answer]);
        fake.answers(&format!("PATCH {NODES}/worker-0"), [Answer::Is(node("worker-0", "2"))]);
        let (controller, _) = controller(&fake, 30);
        let mut step = Step::Statuses(0);
        let carried_out = controller.hands.carry_out(&cluster.world, &decision, &mut step).await;
        let came_to = match carried_out {
            Ok(()) => "done".to_owned(),
            Err(ActError::Refused(_)) => "refused".to_owned(),
            Err(error) => code(&error).unwrap().to_string(),
        };
        assert_eq!((came_to.as_str(), step), (outcome, Step::Actions(done)));
        let told = decision.told(step).any(|note| note.reason == "InstallStarted");
        assert_eq!(told, outcome == "done");
    }
}

#[tokio::test]
async fn what_was_done_is_told_and_counted_though_the_rest_is_refused() {
    let mut cluster = one_node();
    cluster.rest();
    cluster.run_starts();
    cluster.run_fails(Some(Code::DiskFull), "the disk is full");
    let decision = decision_with(&mut cluster, |action| matches!(action, Action::DeleteRun { .. }));
    let run = cluster.world.runs[0].name.clone();
    for (answer, expected) in [
        (Answer::Refusal(500, "InternalError"), Some(500)),
        (Answer::Silence, None),
    ] {
        let fake = Fake::default();
        fake.answers(&format!("PATCH {NODES}/worker-0"), [Answer::Is(node("worker-0", "2"))]);
        let delete = format!("DELETE {PODS}/{run}");
        fake.answers(&delete, [answer]);
        let (controller, metrics) = controller(&fake, 30);
        let mut done = Step::Statuses(0);
        // As a pass is given up whose time is over.
        let refused = select! {
            carried_out = controller.hands.carry_out(&cluster.world, &decision, &mut done) => code(&carried_out.unwrap_err()),
            _ = fake.await_asked(&delete, 1), if expected.is_none() => None,
        };
        assert_eq!(refused, expected);
        assert!(
            decision.told(done).any(|note| note.reason == "InstallFailed"),
            "{decision:?}"
        );
        has(&metrics, "kata_operator_install_failures_total{reason=\"DiskFull\"} 1");
    }
}

#[tokio::test]
async fn an_event_for_which_the_api_server_has_no_time_is_told_later() {
    let fake = Fake::default();
    fake.answers(
        &format!("POST {EVENTS}"),
        [
            Answer::Later(1),
            Answer::Refusal(403, "Forbidden"),
            Answer::Is(json!({"metadata": {}, "eventTime": null})),
        ],
    );
    let (mut controller, _) = controller(&fake, 30);
    let cluster = one_node();
    let notes = ["first", "second"].map(|text| Note {
        about: About::Config(NAME_OF_CONFIG.into()),
        warning: true,
        reason: "Any",
        text: text.into(),
        after: Step::Statuses(0),
    });
    controller.tell(notes.to_vec(), &cluster.world).await;
    let told = |fake: &Fake| {
        let events = fake.asked(&format!("POST {EVENTS}")).into_iter();
        events
            .map(|event| event.body["note"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    // One that is not let in is left.
    assert_eq!(told(&fake), ["first"]);
    sleep(controller.wish.left()).await;
    controller.tell(Vec::new(), &cluster.world).await;
    assert_eq!(told(&fake), ["first", "first", "second"]);
    assert_eq!(controller.untold, []);
}

/// The nodes that are known when the watch of them is begun for the second time, or for the first.
async fn known(fake: &Fake, watches: usize) -> Vec<String> {
    let (controller, _) = controller(fake, 30);
    fake.await_asked(&format!("GET {NODES} watch"), watches).await;
    let nodes: Vec<Node> = controller.watches.nodes().all().await.unwrap();
    nodes.into_iter().map(|node| node.name).collect()
}

#[tokio::test]
async fn a_list_whose_next_page_was_forgotten_is_begun_again() {
    let fake = Fake::default();
    let first = |version: &str| Answer::Is(list(&[node("a", "1")], version, Some("more")));
    let answers = [
        first("5"),
        Answer::Refusal(410, "Expired"),
        first("6"),
        Answer::Is(list(&[node("b", "2")], "6", None)),
    ];
    fake.answers(&format!("GET {NODES} page"), answers);
    assert_eq!(known(&fake, 1).await, ["a", "b"]);
}

#[tokio::test]
async fn a_watch_that_has_lost_its_place_lists_again() {
    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {},
        "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410}});
    // By an event, or by the answer itself.
    for lost in [Answer::Watch(vec![gone]), Answer::Refusal(410, "Expired")] {
        let fake = Fake::default();
        let answers = [
            Answer::Is(list(&[node("a", "1"), node("b", "2")], "5", None)),
            Answer::Is(list(&[node("b", "2"), node("c", "7")], "9", None)),
        ];
        fake.answers(&format!("GET {NODES} page"), answers);
        fake.answers(&format!("GET {NODES} watch"), [lost, Answer::Watch(Vec::new())]);
        assert_eq!(known(&fake, 2).await, ["b", "c"]);
    }
}

/// Runs a controller until it has read the KataConfigs for the second time.
async fn second_look(fake: &Fake, seconds: u32) -> (Vec<Asked>, Arc<Metrics>) {
    let (controller, metrics) = controller(fake, seconds);
    let look = format!("GET {CONFIGS}");
    let looks = tokio::select! {
        looks = fake.await_asked(&look, 2) => looks,
        () = controller.go() => unreachable!(),
    };
    (looks, metrics)
}

#[tokio::test]
async fn an_api_server_with_too_many_requests_is_left_alone_for_as_long_as_it_says() {
    let fake = Fake::default();
    let answers = [Answer::Later(2), Answer::Is(list(&[], "1", None))];
    fake.answers(&format!("GET {CONFIGS}"), answers);
    let (looks, metrics) = second_look(&fake, 30).await;
    let pause = looks[1].at - looks[0].at;
    assert!(pause >= Duration::from_secs(2), "{pause:?}");
    assert_eq!(looks.len(), 2);
    has(&metrics, "kata_operator_api_failures_total{code=\"429\"} 1");
    has(&metrics, "kata_operator_reconcile_errors_total 1");
}

#[tokio::test]
async fn an_api_server_that_is_not_well_or_silent_is_asked_again_a_little_later() {
    for (answer, at_least, failures) in [
        (Answer::Refusal(500, "InternalError"), PATIENCE, Some("500")),
        (Answer::Silence, PATIENCE + Duration::from_secs(1), None),
    ] {
        let fake = Fake::default();
        let answers = [answer, Answer::Is(list(&[], "1", None))];
        fake.answers(&format!("GET {CONFIGS}"), answers);
        let began = Instant::now();
        let (looks, metrics) = second_look(&fake, 1).await;
        assert!(looks[1].at - began >= at_least, "{looks:?}");
        assert!(began.elapsed() < DEADLINE);
        has(&metrics, "kata_operator_reconcile_errors_total 1");
        if let Some(code) = failures {
            has(
                &metrics,
                &format!("kata_operator_api_failures_total{{code=\"{code}\"}} 1"),
            );
        }
    }
}

#[tokio::test]
async fn a_refused_write_is_tried_again_at_a_pace_that_grows() {
    let fake = Fake::default();
    let config = fixtures::config(NAME_OF_CONFIG, json!({}));
    let config = serde_json::to_value(config).unwrap();
    fake.answers(&format!("GET {CONFIGS}"), [Answer::Is(list(&[config], "1", None))]);
    let path = format!("PATCH {CONFIGS}/{NAME_OF_CONFIG}/status");
    fake.answers(&path, [Answer::Refusal(500, "InternalError")]);
    let (controller, _) = controller(&fake, 30);
    let tries = tokio::select! {
        tries = fake.await_asked(&path, 4) => tries,
        () = controller.go() => unreachable!(),
    };
    let pauses: Vec<_> = tries.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    for (pause, at_least) in pauses.iter().zip([1, 2, 4]) {
        assert!(*pause >= PATIENCE * at_least, "{pauses:?}");
    }
}
