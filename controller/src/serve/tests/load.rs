//! Updates under load.

use super::*;

/// Publishes `changes`, one every 20 ms, to an agent that takes `commit` for each update. Returns the number of updates.
async fn updates(changes: u8, commit: Duration) -> usize {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    let publish = async {
        for number in 0..changes {
            lab.change(number);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let receive = async {
        let (mut updates, mut carried) = (0, 0);
        while carried < u32::from(changes) {
            let (update, _) = agent.update().await;
            tokio::time::sleep(commit).await;
            agent.ack(&update).await;
            updates += 1;
            carried += update.changes_total;
        }
        updates
    };
    tokio::join!(publish, receive).1
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_agents_get_fewer_and_larger_updates() {
    let updates = updates(60, Duration::from_millis(100)).await;
    assert!((2..=7).contains(&updates), "{updates} updates in 1.2 s, each acknowledged after 100 ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_under_way_take_changes_without_a_wake() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    lab.change(0);
    let (first, _) = agent.update().await;
    for number in 1..=100 {
        lab.change(number);
    }
    agent.ack(&first).await;
    let (second, _) = agent.update().await;
    assert_eq!((second.from, second.changes_total), (Some(first.to), 100), "one update carries all");
    agent.ack(&second).await;
    lab.until("n1", |known| known.applied == second.to && known.desired == second.to).await;
}
