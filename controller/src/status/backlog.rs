//! Buffers Node events between the engine and its readers, which start when rows and assignments were read. Keeps only the
//! latest state of each Node, so that the memory is bounded by the number of Nodes while the API server refuses them.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::NodeEvent;
use crate::ingest::NodeIdentity;

#[derive(Debug, Default)]
struct Backlog {
    nodes: HashMap<Arc<str>, NodeIdentity>,
    synced: bool,
}

impl Backlog {
    fn take(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::Applied(identity) => drop(self.nodes.insert(identity.name.clone(), identity)),
            NodeEvent::Gone(name) => drop(self.nodes.remove(&name)),
            NodeEvent::Synced => self.synced = true,
        }
    }

    fn drain(self) -> impl Iterator<Item = NodeEvent> {
        let Self { nodes, synced } = self;
        nodes.into_values().map(NodeEvent::Applied).chain(synced.then_some(NodeEvent::Synced))
    }
}

/// Forwards Node events once `active` completes. Returns when the engine or a reader ends.
pub async fn forward(
    mut from: UnboundedReceiver<NodeEvent>,
    readers: Vec<UnboundedSender<NodeEvent>>,
    active: impl Future<Output = ()>,
) {
    let mut backlog = Backlog::default();
    let mut active = std::pin::pin!(active);
    loop {
        tokio::select! {
            () = &mut active => break,
            event = from.recv() => match event {
                Some(event) => backlog.take(event),
                None => return,
            },
        }
    }
    let send = |event: NodeEvent| readers.iter().all(|reader| reader.send(event.clone()).is_ok());
    if !backlog.drain().all(&send) {
        return;
    }
    while let Some(event) = from.recv().await {
        if !send(event) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};

    use super::*;

    fn node(name: &str) -> NodeEvent {
        let uid = "uid".into();
        NodeEvent::Applied(NodeIdentity {
            name: name.into(),
            uid,
            kubelet_lost: None,
            labels: Arc::default(),
        })
    }

    #[tokio::test]
    async fn readers_get_the_latest_of_each_node_then_all() {
        let (engine, from) = mpsc::unbounded_channel();
        let (reader, mut seen) = mpsc::unbounded_channel();
        let (activate, active) = oneshot::channel::<()>();
        let task = tokio::spawn(forward(from, vec![reader], async move { drop(active.await) }));
        for event in [node("a"), node("a"), node("b"), NodeEvent::Gone("b".into()), NodeEvent::Synced] {
            engine.send(event).unwrap();
        }
        tokio::task::yield_now().await;
        assert!(seen.try_recv().is_err(), "nothing before it is active");
        activate.send(()).unwrap();
        assert_eq!(seen.recv().await, Some(node("a")));
        assert_eq!(seen.recv().await, Some(NodeEvent::Synced));
        engine.send(node("c")).unwrap();
        assert_eq!(seen.recv().await, Some(node("c")));
        drop(engine);
        task.await.unwrap();
    }
}
