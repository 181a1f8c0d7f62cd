//! Publishes Events about rollouts through a bounded queue. An Event that does not fit is in the log only.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource as _};
use switchtower_core::rollout::Transition;
use switchtower_crds::ProxyRollout;
use tokio::sync::mpsc;

/// Capacity of the queue.
const QUEUE: usize = 256;
/// Maximum length of an Event's note in the API, in bytes.
const NOTE_BYTES: usize = 1_024;

/// Sender of Events. Never blocks.
#[derive(Debug, Clone)]
pub(super) struct Announcer(mpsc::Sender<(ObjectReference, Event)>);

impl Announcer {
    /// Starts the task that publishes.
    pub(super) fn new(client: Client, replica: &str) -> Self {
        let reporter =
            Reporter { controller: "switchtower-controller".into(), instance: Some(replica.into()) };
        let recorder = Recorder::new(client, reporter);
        let (queue, mut events) = mpsc::channel::<(ObjectReference, Event)>(QUEUE);
        tokio::spawn(async move {
            while let Some((object, event)) = events.recv().await {
                if let Err(error) = recorder.publish(&event, &object).await {
                    tracing::debug!(%error, reason = event.reason, "failed to publish an Event; its text is in the log");
                }
            }
        });
        Self(queue)
    }

    /// Reports a transition in the log and as an Event.
    pub(super) fn announce(&self, rollout: &ProxyRollout, transition: &Transition) {
        let Transition { reason, warning, message } = transition;
        let name = rollout.metadata.name.as_deref().unwrap_or_default();
        if *warning {
            tracing::warn!(rollout = name, reason, message, "rollout changed");
        } else {
            tracing::info!(rollout = name, reason, message, "rollout changed");
        }
        let event = Event {
            type_: if *warning { EventType::Warning } else { EventType::Normal },
            reason: (*reason).to_owned(),
            note: Some(crate::events::shorten(message, NOTE_BYTES)),
            action: "RollOut".to_owned(),
            secondary: None,
        };
        // If the queue is full, the message is in the log only.
        let _ = self.0.try_send((rollout.object_ref(&()), event));
    }
}
