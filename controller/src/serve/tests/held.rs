//! Held removals: their report, and their release by the row.

use switchtower_proto::v1::{Deviations, ReleaseHeld};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn held_removals_observed_until_acknowledged_again() {
    let lab = Lab::start(Limits::default()).await;
    let (agent, first) = Agent::settled(&lab, "n1").await;
    let ack = |held: u32| {
        let deviations = (held > 0).then(|| Deviations { held, ..Deviations::default() });
        let Update { to, digest, .. } = first.clone();
        FromAgent::Ack(Ack { session: agent.session, generation: to, digest, deviations, ..Ack::default() })
    };
    agent.send(ack(202)).await;
    lab.until("n1", |known| known.deviations.as_ref().is_some_and(|known| known.held == 202)).await;
    agent.send(ack(0)).await;
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
