//! Held removals: their report, and their release by the row.

use switchtower_core::compiled::PodIdentity;
use switchtower_proto::v1::{
    Deviations, DrainVerdict, Endpoint, Family, PoolKey, PoolPatch, ProxyMode, ReleaseHeld, Role, ServicePort,
};

use super::*;

impl Agent {
    /// Acknowledges an update with this number of held removals.
    async fn ack_held(&self, update: &Update, held: u32) {
        let deviations = (held > 0).then(|| Deviations { held, ..Deviations::default() });
        let Update { to, digest, .. } = update.clone();
        let ack = Ack { session: self.session, generation: to, digest, deviations, ..Ack::default() };
        self.send(FromAgent::Ack(ack)).await;
    }

    /// Acknowledges an update with tables in this mode.
    async fn ack_in(&self, update: &Update, mode: ProxyMode) {
        let Update { to, digest, .. } = update.clone();
        let ack = Ack { session: self.session, generation: to, digest, mode: mode.into(), ..Ack::default() };
        self.send(FromAgent::Ack(ack)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn node_in_shadow_is_not_drained() {
    let lab = Lab::start(Limits::default()).await;
    let key = publish_pool(&lab);
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    let (mut other, _) = Agent::settled(&lab, "n2").await;
    let asked = async { drained(&lab, Duration::from_millis(500)).await };
    let removed = async {
        lab.publish(LayerId::Cluster, Op::PoolRemoved(key));
        let (update, _) = agent.update().await;
        agent.ack_in(&update, ProxyMode::Shadow).await;
        let (of_other, _) = other.update().await;
        other.ack(&of_other).await;
        lab.until("n2", |known| known.applied == of_other.to).await;
        lab.until("n1", |known| known.mode == ProxyMode::Shadow && known.applied == update.to).await;
        update
    };
    let (verdict, update) = tokio::join!(asked, removed);
    assert_eq!(verdict, (DrainVerdict::TimedOut, vec!["n1".into()]), "another proxy sends connections");
    agent.ack_in(&update, ProxyMode::Active).await;
    assert_eq!(drained(&lab, Duration::from_secs(10)).await.0, DrainVerdict::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn held_removals_observed_until_acknowledged_again() {
    let lab = Lab::start(Limits::default()).await;
    let (agent, first) = Agent::settled(&lab, "n1").await;
    agent.ack_held(&first, 202).await;
    lab.until("n1", |known| known.deviations.as_ref().is_some_and(|known| known.held == 202)).await;
    agent.ack_held(&first, 0).await;
    lab.until("n1", |known| known.deviations.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn release_sent_once_per_change_and_after_welcome() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    let release = |before: u64| {
        lab.floors.set(&"n1".into(), before, None);
        crate::status::Registry::release_held(&*lab.fleet, "n1", before);
    };
    let sent = |before| ToAgent::ReleaseHeld(ReleaseHeld { before });
    release(first.to + 1);
    assert_eq!(agent.next().await, sent(first.to + 1));
    release(first.to + 1);
    release(first.to + 9);
    assert_eq!(agent.next().await, sent(first.to + 9), "not twice");
    drop(agent);
    let mut agent = lab.agent("n1").await;
    assert!(!agent.welcome(hello("n1")).await);
    agent.update().await;
    assert_eq!(agent.next().await, sent(first.to + 9), "a new session has seen none");
}

/// Publishes a pool with the pod of [`drained`]; returns its key.
fn publish_pool(lab: &Lab) -> PoolKey {
    let service = ServicePort { namespace: "default".into(), name: "web".into(), ..ServicePort::default() };
    let key =
        PoolKey { service_port: Some(service), family: Family::Ipv4 as i32, role: Role::Cluster as i32 };
    let added = vec![Endpoint { address: vec![10, 244, 1, 7], port: 8080 }];
    let pool = PoolPatch { key: Some(key.clone()), added, removed: Vec::new() };
    lab.publish(LayerId::Cluster, Op::Pool(pool));
    key
}

/// Waits for the pod's drain; returns the verdict and the nodes that were waited for.
async fn drained(lab: &Lab, timeout: Duration) -> (DrainVerdict, Vec<Arc<str>>) {
    let pod = PodIdentity::Address([10, 244, 1, 7].into());
    let drained = lab.fleet.drain(None, &pod, timeout).await;
    (drained.verdict(), drained.answer.waited_for.names)
}

#[tokio::test(flavor = "multi_thread")]
async fn node_with_held_removals_is_not_drained() {
    let lab = Lab::start(Limits::default()).await;
    let key = publish_pool(&lab);
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    let (mut other, _) = Agent::settled(&lab, "n2").await;
    let asked = async { drained(&lab, Duration::from_millis(500)).await };
    let removed = async {
        lab.publish(LayerId::Cluster, Op::PoolRemoved(key));
        let (update, _) = agent.update().await;
        assert_eq!(update.from, Some(first.to));
        agent.ack_held(&update, 1).await;
        let (of_other, _) = other.update().await;
        other.ack(&of_other).await;
        lab.until("n2", |known| known.applied == of_other.to).await;
        lab.until("n1", |known| known.deviations.is_some() && known.applied == update.to).await;
        update
    };
    let (verdict, update) = tokio::join!(asked, removed);
    assert_eq!(verdict, (DrainVerdict::TimedOut, vec!["n1".into()]));
    // A later update, and a resumed session, prove as little.
    drop(agent);
    lab.until("n1", |known| known.lost_since.is_some()).await;
    let mut agent = lab.agent("n1").await;
    let kernel = Some(Stamp { generation: update.to, digest: update.digest.clone() });
    let deviations = Some(Deviations { held: 1, ..Deviations::default() });
    let resumed = Hello { view: Some(view(&update)), kernel, deviations, ..hello("n1") };
    assert!(agent.welcome(resumed).await);
    lab.until("n1", |known| known.acknowledged).await;
    assert_eq!(drained(&lab, Duration::from_millis(100)).await.0, DrainVerdict::TimedOut);
    agent.ack_held(&update, 0).await;
    assert_eq!(drained(&lab, Duration::from_secs(10)).await.0, DrainVerdict::Drained);
}
