//! Events to containerd: `Forward` on its ttrpc socket, in order, again after a reconnect. Under CRI-O there is no
//! such socket and events go to the log only.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::{MessageDyn, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::{self, context},
};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use crate::service::timestamp;

/// Events kept while containerd is away; beyond it the oldest are dropped.
const BACKLOG: usize = 1024;
/// How long to wait before containerd is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// An event that containerd does not take in this time is tried again on a new connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// Hands events to a task that never blocks its callers.
#[derive(Clone)]
pub struct Events {
    namespace: String,
    queue: Option<mpsc::UnboundedSender<Envelope>>,
}

impl Events {
    /// Starts the publisher; `address` is containerd's ttrpc socket, `None` under CRI-O.
    pub fn new(namespace: &str, address: Option<String>) -> Events {
        let queue = address.map(|address| {
            let (sender, receiver) = mpsc::unbounded_channel();
            tokio::spawn(publish(address, receiver));
            sender
        });
        Events {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Publishes one event. `topic` is one of containerd's `/tasks/...`.
    pub fn send(&self, topic: &str, event: &dyn MessageDyn) {
        tracing::debug!(topic, %event, "event");
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes_dyn() {
            Ok(value) => value,
            Err(error) => return tracing::error!(%error, topic, "cannot encode an event"),
        };
        // containerd wants the bare message name, without a host part.
        let any = Any {
            type_url: event.descriptor_dyn().full_name().into(),
            value,
            ..Any::default()
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(any).into(),
            ..Envelope::default()
        };
        if queue.send(envelope).is_err() {
            tracing::error!(topic, "the event publisher has ended");
        }
    }
}

async fn publish(address: String, mut queue: mpsc::UnboundedReceiver<Envelope>) {
    let mut waiting = VecDeque::new();
    let mut client: Option<EventsClient> = None;
    let mut retry = tokio::time::interval(RETRY);
    // Else the ticks of all the time without events would come at once.
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // While something waits, the tick tries it again; otherwise only a new event wakes this task.
        tokio::select! {
            event = queue.recv() => match event {
                Some(event) => waiting.push_back(event),
                None => return,
            },
            _ = retry.tick(), if !waiting.is_empty() => {}
        }
        while let Ok(event) = queue.try_recv() {
            waiting.push_back(event);
        }
        waiting.drain(..waiting.len().saturating_sub(BACKLOG));
        while let Some(event) = waiting.front() {
            if !forward(&address, &mut client, event).await {
                client = None;
                break;
            }
            waiting.pop_front();
        }
    }
}

async fn forward(address: &str, client: &mut Option<EventsClient>, event: &Envelope) -> bool {
    if client.is_none() {
        let url = if address.contains("://") {
            address.to_owned()
        } else {
            format!("unix://{address}")
        };
        match Client::connect(&url).await {
            Ok(connected) => *client = Some(EventsClient::new(connected)),
            Err(error) => {
                tracing::debug!(%error, "containerd's event socket does not answer");
                return false;
            }
        }
    }
    let Some(client) = client else { return false };
    let request = ForwardRequest {
        envelope: Some(event.clone()).into(),
        ..ForwardRequest::default()
    };
    match client.forward(context::with_duration(PATIENCE), &request).await {
        Ok(_) => true,
        // containerd understood the event and does not want it: sending it again would not help.
        Err(ttrpc::Error::RpcStatus(status)) => {
            tracing::warn!(
                message = status.message,
                topic = event.topic,
                "containerd refused an event"
            );
            true
        }
        Err(error) => {
            tracing::debug!(%error, "an event did not get through");
            false
        }
    }
}
