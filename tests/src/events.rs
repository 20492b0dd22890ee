//! containerd's event stream.

use std::{
    io::{BufRead, BufReader, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use serde_json::Value;

use crate::wait::Bell;

/// One event as `ctr events` prints it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// The event's fields.
    pub body: Value,
}

impl Event {
    /// Parses `2026-01-02 03:04:05.6 +0000 UTC k8s.io /tasks/exit {"id":…}`.
    fn parse(line: &str) -> Option<Event> {
        let (head, body) = line.split_at(line.find(" {")?);
        let topic = head.split_whitespace().next_back()?.to_owned();
        Some(Event {
            topic,
            body: serde_json::from_str(body.trim()).ok()?,
        })
    }

    /// The container it is about, empty if none.
    #[must_use]
    pub fn container(&self) -> &str {
        self.body["container_id"].as_str().unwrap_or_default()
    }
}

/// What containerd has told so far.
#[derive(Debug, Default)]
pub struct Events {
    heard: Mutex<Vec<Event>>,
    /// Rings at each event.
    pub bell: Bell,
}

impl Events {
    /// Reads events from `stream` in a thread until it ends.
    pub fn listen(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let events = Arc::clone(self);
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if let Some(event) = Event::parse(&line) {
                    events.heard().push(event);
                    events.bell.ring();
                }
            }
        });
    }

    /// The topics of the events about a container, in order.
    #[must_use]
    pub fn topics_of(&self, container: &str) -> Vec<String> {
        self.of(container).into_iter().map(|event| event.topic).collect()
    }

    /// The events about a container, in order.
    #[must_use]
    pub fn of(&self, container: &str) -> Vec<Event> {
        let about = |event: &&Event| event.container() == container;
        self.heard().iter().filter(about).cloned().collect()
    }

    /// The identifiers of every container so far, sandboxes included.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        let created = |event: &&Event| event.topic == "/containers/create";
        let identifier = |event: &Event| event.body["id"].as_str().map(str::to_owned);
        self.heard().iter().filter(created).filter_map(identifier).collect()
    }

    /// Whether an event with this topic was heard whose fields mention `text`.
    #[must_use]
    pub fn mentions(&self, topic: &str, text: &str) -> bool {
        self.heard()
            .iter()
            .any(|event| event.topic == topic && event.body.to_string().contains(text))
    }

    fn heard(&self) -> MutexGuard<'_, Vec<Event>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_line_is_taken_apart() {
        let line =
            r#"2026-01-02 03:04:05.678 +0000 UTC k8s.io /tasks/exit {"container_id":"c1","id":"c1","exit_status":7}"#;
        let event = Event::parse(line).unwrap();
        assert_eq!((event.topic.as_str(), event.container()), ("/tasks/exit", "c1"));
        assert_eq!(event.body["exit_status"], 7);
    }
}
