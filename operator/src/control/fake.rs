//! An API server for tests, which answers as it is told.

use std::{
    collections::{BTreeMap, VecDeque},
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use kube::{
    Client,
    client::{Body, ClientBuilder, DynBody},
};
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tower::{BoxError, util::BoxService};

use super::{
    client::{self, Wish},
    metrics::Metrics,
};

/// What is waited for in a test comes much sooner.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// What is answered to a request.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// An object or a list.
    Is(Value),
    /// A refusal with this code and reason.
    Refusal(u16, &'static str),
    /// The same that names the seconds after which the client may come again, in text as the API server's own filter.
    Later(u64),
    /// Nothing, ever.
    Silence,
    /// A watch that tells these events, and no end.
    Watch(Vec<Value>),
}

/// A request that was made.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Method and path, with ` watch` behind that of a watch and ` page` behind that of a list by pages.
    pub(super) what: String,
    /// The body; null where there is none.
    pub(super) body: Value,
    pub(super) at: Instant,
}

#[derive(Debug, Default)]
struct Script {
    /// By method and path; the last one stays.
    answers: BTreeMap<String, VecDeque<Answer>>,
    asked: Vec<Asked>,
}

/// The API server. What it was not told of is not there, and lists are empty.
#[derive(Debug, Clone, Default)]
pub(super) struct Fake {
    script: Arc<Mutex<Script>>,
    news: Arc<Notify>,
}

impl Fake {
    /// Answers to a request, such as `GET /api/v1/nodes` or `GET /api/v1/nodes watch`, with these one after the other,
    /// and with the last of them from then on.
    pub(super) fn answers(&self, what: &str, answers: impl IntoIterator<Item = Answer>) {
        let answers = answers.into_iter().collect();
        self.script.lock().unwrap().answers.insert(what.to_owned(), answers);
    }

    /// The requests of this kind so far.
    pub(super) fn asked(&self, what: &str) -> Vec<Asked> {
        let script = self.script.lock().unwrap();
        script
            .asked
            .iter()
            .filter(|asked| asked.what == what)
            .cloned()
            .collect()
    }

    /// Waits until there were so many requests of a kind.
    pub(super) async fn await_asked(&self, what: &str, times: usize) -> Vec<Asked> {
        let there = async {
            loop {
                let news = self.news.notified();
                let asked = self.asked(what);
                if asked.len() >= times {
                    return asked;
                }
                news.await;
            }
        };
        timeout(DEADLINE, there)
            .await
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.script.lock().unwrap().asked))
    }

    /// A client of it, counted as the controller's is.
    pub(super) fn client(&self, metrics: &Arc<Metrics>) -> (Client, Arc<Wish>) {
        let fake = self.clone();
        let transport = BoxService::new(tower::service_fn(move |request| fake.clone().answer(request)));
        client::counted(ClientBuilder::new(transport, "default"), metrics)
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Box<DynBody>>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let has = |word: &str| query.split('&').any(|part| part.starts_with(word));
        let (watch, page) = (has("watch=true"), has("limit="));
        let manner = if watch {
            " watch"
        } else if page {
            " page"
        } else {
            ""
        };
        let what = format!("{} {}{manner}", head.method, head.uri.path());
        let answer = {
            let mut script = self.script.lock().unwrap();
            script.asked.push(Asked {
                what: what.clone(),
                body: serde_json::from_slice(&body).unwrap_or_default(),
                at: Instant::now(),
            });
            let answers = script.answers.get_mut(&what);
            answers.and_then(|answers| match answers.len() {
                0 | 1 => answers.front().cloned(),
                _ => answers.pop_front(),
            })
        };
        self.news.notify_waiters();
        let is_list = head.method == "GET" && !watch && !head.uri.path().contains("/leases/");
        match answer {
            Some(Answer::Is(object)) => Ok(json(200, &object)),
            Some(Answer::Refusal(code, reason)) => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": format!("the server says {reason}"), "reason": reason, "code": code});
                Ok(json(code, &status))
            }
            Some(Answer::Later(seconds)) => {
                let mut answer = whole(429, Bytes::from_static(b"Too many requests, please try again later.\n"));
                answer.headers_mut().insert(http::header::RETRY_AFTER, seconds.into());
                Ok(answer)
            }
            Some(Answer::Silence) => pending().await,
            Some(Answer::Watch(events)) => Ok(watched(&events)),
            None if watch => Ok(watched(&[])),
            None if is_list => Ok(json(200, &list(&[], "1", None))),
            None if head.method == "POST" => Ok(whole(201, body)),
            None => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "not found", "reason": "NotFound", "code": 404});
                Ok(json(404, &status))
            }
        }
    }
}

/// A list of these at a version, with a token for the next page.
pub(super) fn list(items: &[Value], version: &str, next: Option<&str>) -> Value {
    json!({"kind": "List", "apiVersion": "v1", "items": items,
        "metadata": {"resourceVersion": version, "continue": next.unwrap_or_default()}})
}

/// A node that is Ready.
pub(super) fn node(name: &str, version: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": format!("uid-of-{name}"),
            "resourceVersion": version,
            "labels": {"node-role.kubernetes.io/worker": "", "kubernetes.io/hostname": name},
        },
        "status": {
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-02T03:04:05Z"}],
            "nodeInfo": {
                "architecture": "amd64", "bootID": "b", "containerRuntimeVersion": "containerd://2.4.2",
                "kernelVersion": "6.12", "kubeProxyVersion": "", "kubeletVersion": "v1.36.3", "machineID": "m",
                "operatingSystem": "linux", "osImage": "Debian", "systemUUID": "s",
            },
        },
    })
}

fn json(code: u16, object: &Value) -> Response<Box<DynBody>> {
    whole(code, object.to_string().into())
}

fn whole(code: u16, bytes: Bytes) -> Response<Box<DynBody>> {
    let body = http_body_util::Full::new(bytes).map_err(BoxError::from);
    let mut answer = Response::new(Box::new(body) as Box<DynBody>);
    *answer.status_mut() = code.try_into().unwrap();
    answer
}

/// A body with these events, which stays open.
fn watched(events: &[Value]) -> Response<Box<DynBody>> {
    use futures::StreamExt;

    let lines: Vec<_> = events.iter().map(|event| format!("{event}\n")).collect();
    let told = futures::stream::iter(
        lines
            .into_iter()
            .map(|line| Ok::<_, BoxError>(Frame::data(Bytes::from(line)))),
    );
    let body = StreamBody::new(told.chain(futures::stream::pending()));
    Response::new(Box::new(body) as Box<DynBody>)
}
