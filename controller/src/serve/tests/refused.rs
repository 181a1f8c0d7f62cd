//! Recovery after an agent refuses an update.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn refused_update_followed_by_its_remedy() {
    let limits = Limits { pause: Duration::from_millis(20), ..Limits::default() };
    let lab = Lab::start(limits).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    lab.change(1);
    let (second, _) = agent.update().await;
    agent.nack(&second, NackReason::DigestMismatch).await;
    let (third, _) = agent.update().await;
    assert_eq!((third.from, third.to > second.to), (None, true), "a snapshot under a new number");
    agent.ack(&third).await;
    lab.until("n1", |known| known.applied == third.to && known.failure.is_none()).await;
    lab.change(2);
    let (fourth, _) = agent.update().await;
    agent.nack(&fourth, NackReason::Kernel).await;
    lab.until("n1", |known| known.failure.is_some() && known.applied == third.to).await;
    // The agent retries on its own; changes in this time wait for its late acknowledgement.
    lab.change(3);
    agent.ack(&fourth).await;
    let (fifth, _) = agent.update().await;
    assert_eq!((fifth.from, fifth.to > fourth.to), (Some(fourth.to), true));
    agent.ack(&fifth).await;
    lab.until("n1", |known| known.applied == fifth.to && known.failure.is_none()).await;
    assert!(first.to < fifth.to);
    // The switch to settings on trial is a commit without a generation: it may be refused, and taken later.
    agent.nack(&fifth, NackReason::Kernel).await;
    lab.until("n1", |known| known.applied == fifth.to && known.failure.is_some()).await;
    lab.change(4);
    let (sixth, _) = agent.update().await;
    agent.ack(&fifth).await;
    lab.until("n1", |known| known.failure.is_none()).await;
    agent.ack(&sixth).await;
    lab.until("n1", |known| known.applied == sixth.to).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_over_the_limit_waits_for_a_change() {
    let limits = Limits { pause: Duration::from_millis(20), ..Limits::default() };
    let lab = Lab::start(limits).await;
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    for (number, reason) in [(1, NackReason::OverLimit), (3, NackReason::Malformed)] {
        lab.change(number);
        let (delta, _) = agent.update().await;
        agent.nack(&delta, reason).await;
        let (snapshot, _) = agent.update().await;
        assert_eq!(snapshot.from, None);
        agent.nack(&snapshot, reason).await;
        // Far longer than any pause after a refusal here.
        let again = tokio::time::timeout(Duration::from_millis(500), agent.update()).await;
        assert!(again.is_err(), "the same snapshot again");
        lab.change(number + 1);
        let (other, _) = agent.update().await;
        agent.ack(&other).await;
        lab.until("n1", |known| known.applied == other.to && known.failure.is_none()).await;
    }
}
