//! Every status that a KataConfig ever had, as a watch delivers them: nothing between two of them is missed.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use kube::{
    Api, Client, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{Config, Event, watcher},
    },
};
use operator::api::KataConfig;
use serde_json::{Value, json};
use tests::{failure::Result, wait::Bell};
use tokio::{runtime::Runtime, task::JoinHandle};

/// What a KataConfig said at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub name: String,
    /// The condition's status, reason and message.
    pub condition: [String; 3],
    pub nodes: Value,
    pub runtime_classes: Vec<String>,
}

#[derive(Debug, Default)]
struct Book {
    rows: Mutex<Vec<Row>>,
    gone: Mutex<Vec<String>>,
    bell: Bell,
}

/// A watch on all KataConfigs.
pub struct History {
    book: Arc<Book>,
    task: JoinHandle<()>,
}

impl History {
    pub fn begin(client: Client, runtime: &Runtime) -> History {
        let book = Arc::<Book>::default();
        let task = runtime.spawn(write(client, Arc::clone(&book)));
        History { book, task }
    }

    pub fn rows(&self) -> Vec<Row> {
        self.book.rows.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a row that is as claimed.
    pub fn until(&self, what: &str, deadline: Duration, claim: impl Fn(&Row) -> bool) -> Result<Row> {
        self.book.bell.until(what, deadline, || {
            let rows = self.rows();
            rows.iter()
                .find(|row| claim(row))
                .cloned()
                .ok_or_else(|| format!("{rows:#?}"))
        })
    }

    /// Waits until the newest row of this KataConfig is as claimed.
    pub fn until_last(&self, name: &str, what: &str, deadline: Duration, claim: impl Fn(&Row) -> bool) -> Result<Row> {
        self.book.bell.until(what, deadline, || {
            let rows = self.rows();
            let last = rows.iter().rev().find(|row| row.name == name);
            last.filter(|row| claim(row))
                .cloned()
                .ok_or_else(|| format!("{last:#?}"))
        })
    }

    /// Waits until these have been seen in this order, with others between them or not.
    pub fn until_in_order(&self, expected: &[(&str, Value)], deadline: Duration) -> Result {
        self.book
            .bell
            .until("all rows of the table in their order", deadline, || {
                let rows = self.rows();
                let mut left = expected.iter().peekable();
                for row in &rows {
                    left.next_if(|(reason, nodes)| row.condition[1] == *reason && row.nodes == *nodes);
                }
                match left.next() {
                    None => Ok(()),
                    Some(missing) => Err(format!("no {missing:?} after those before it in {rows:#?}")),
                }
            })
    }

    /// Waits until a KataConfig is no more.
    pub fn until_gone(&self, name: &str, deadline: Duration) -> Result {
        self.book.bell.until("the end of a KataConfig", deadline, || {
            let gone = self.book.gone.lock().unwrap_or_else(PoisonError::into_inner);
            gone.iter()
                .any(|gone| gone == name)
                .then_some(())
                .ok_or_else(|| format!("{:#?}", self.rows().last()))
        })
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn write(client: Client, book: Arc<Book>) {
    let configs = Api::<KataConfig>::all(client);
    let mut events = pin!(watcher(configs, Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(config) | Event::InitApply(config)) => {
                let Some(row) = row(&config) else { continue };
                let mut rows = book.rows.lock().unwrap_or_else(PoisonError::into_inner);
                if rows.iter().rev().find(|before| before.name == row.name) != Some(&row) {
                    rows.push(row);
                }
            }
            Ok(Event::Delete(config)) => {
                book.gone
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(config.name_any());
            }
            Ok(Event::Init | Event::InitDone) | Err(_) => {}
        }
        book.bell.ring();
    }
}

fn row(config: &KataConfig) -> Option<Row> {
    let status = config.status.as_ref()?;
    let condition = status.in_progress()?;
    Some(Row {
        name: config.name_any(),
        condition: [
            condition.status.clone(),
            condition.reason.clone(),
            condition.message.clone(),
        ],
        nodes: json!(status.kata_nodes),
        runtime_classes: status.runtime_classes.clone(),
    })
}
