//! Observations of the agents, and their reports to the writer of rows.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use switchtower_proto::v1::GoAwayReason;

use super::{Fleet, Node, Nodes};
use crate::status::{News, Observation};
use crate::sync::lock;

impl Fleet {
    /// Changes the observation of a node if `session` is still its current stream. `change` returns the significance
    /// for the row.
    pub(crate) fn observe_with(
        &self,
        node: &Arc<str>,
        session: u64,
        change: impl FnOnce(&mut Observation) -> News,
    ) {
        let mut nodes = lock(&self.nodes);
        if let Some(entry) = nodes.nodes.get_mut(node)
            && let Some(news) = observe(entry, session, change)
        {
            self.mark(&mut nodes, node, news);
        }
    }

    /// Reports a change to the writer of rows, unless an equal or more significant one is pending.
    pub(super) fn mark(&self, nodes: &mut Nodes, name: &Arc<str>, news: News) {
        if let Some(node) = nodes.nodes.get_mut(name) {
            if node.news >= Some(news) {
                return;
            }
            node.news = Some(news);
        }
        nodes.news.push((name.clone(), news));
        self.changed.notify_one();
    }

    pub(super) fn mark_all(&self, nodes: &mut Nodes, names: &[Arc<str>], news: News) {
        names.iter().for_each(|name| self.mark(nodes, name, news));
    }

    /// Returns the observation of a node's agent; `desired` includes changes that are not sent yet.
    pub(super) fn observed(&self, nodes: &Nodes, node: &str) -> Option<Observation> {
        let entry = nodes.nodes.get(node)?;
        let mut observation = entry.observation.clone()?;
        observation.locality = nodes.localities.of(node).unwrap_or_default();
        if let (Some(subscription), Some(cursor)) = (&entry.subscription, &entry.cursor) {
            let pending = self.read(|layers| layers.pending(subscription, cursor));
            observation.desired = observation.sent.max(observation.applied + pending);
            if observation.applied < observation.desired {
                observation.behind_since = observation.behind_since.or(observation.lost_since);
            }
        }
        Some(observation)
    }
}

/// Changes the observation of a node if `session` is still its current stream.
pub(super) fn observe(
    entry: &mut Node,
    session: u64,
    change: impl FnOnce(&mut Observation) -> News,
) -> Option<News> {
    let known = entry.observation.as_mut().filter(|known| known.session == session)?;
    let was_current = known.applied >= known.desired;
    let news = change(known);
    if known.applied >= known.desired {
        known.behind_since = None;
    } else if was_current || known.behind_since.is_none() {
        known.behind_since = Some(Timestamp::now());
    }
    Some(news)
}

impl crate::status::Registry for Fleet {
    fn observe(&self, node: &str) -> Option<Observation> {
        let mut nodes = lock(&self.nodes);
        nodes.nodes.get_mut(node)?.news = None;
        self.observed(&nodes, node)
    }

    fn supersede(&self, node: &str) {
        if let Some(signal) = self.signal(node) {
            signal.end(GoAwayReason::Superseded);
        }
    }

    fn moved(&self, node: &str) {
        let mut nodes = lock(&self.nodes);
        if let Some(entry) = nodes.nodes.get_mut(node).filter(|entry| entry.signal.is_none()) {
            entry.observation = None;
        }
    }

    fn release_held(&self, node: &str, before: u64) {
        if let Some(signal) = self.signal(node) {
            signal.release_held(before);
        }
    }

    fn settled(&self) -> bool {
        Fleet::settled(self)
    }

    async fn changed(&self) -> Vec<(Arc<str>, News)> {
        loop {
            let news = std::mem::take(&mut lock(&self.nodes).news);
            if !news.is_empty() {
                return news;
            }
            self.changed.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use switchtower_core::layer::HealthCheckPlacement;

    use super::super::reports::tests::fleet;
    use super::*;
    use crate::status::{Floor, Registry as _};

    fn progress(fleet: &Fleet, session: u64) {
        fleet.observe_with(&"n1".into(), session, |known| {
            known.applied += 1;
            News::Progress
        });
    }

    #[tokio::test]
    async fn progress_is_news_once_until_it_is_observed() {
        let (fleet, _) = fleet();
        let (session, _) =
            fleet.open(&"n1".into(), &mut Floor::default(), HealthCheckPlacement::default()).unwrap();
        fleet.changed().await;
        fleet.observe("n1");
        for _ in 0..1_000 {
            progress(&fleet, session);
        }
        let news = |news| vec![(Arc::<str>::from("n1"), news)];
        assert_eq!(fleet.changed().await, news(News::Progress));
        progress(&fleet, session);
        fleet.observe_with(&"n1".into(), session, |_| News::Transition);
        assert_eq!(
            fleet.changed().await,
            news(News::Transition),
            "a transition does not wait behind progress"
        );
        assert_eq!(fleet.observe("n1").unwrap().applied, 1_001);
        progress(&fleet, session);
        assert_eq!(fleet.changed().await, news(News::Progress));
    }

    #[tokio::test]
    async fn news_of_an_earlier_session_changes_nothing() {
        let (fleet, _) = fleet();
        let (session, _) =
            fleet.open(&"n1".into(), &mut Floor::default(), HealthCheckPlacement::default()).unwrap();
        fleet.changed().await;
        progress(&fleet, session - 1);
        assert_eq!(fleet.observe("n1").unwrap().applied, 0);
    }
}
