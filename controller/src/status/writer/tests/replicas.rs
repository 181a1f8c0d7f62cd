//! Several replicas that write rows.

use super::*;
use crate::replicas::presence::Seen;

/// Two replicas write rows, each for the agents that it serves. Both act as the leader.
#[tokio::test(start_paused = true)]
async fn two_writers_do_not_overwrite_each_other() {
    let one = lab(Server::default()).await;
    let other = replica(one.server.clone(), "tower-1").await;
    for lab in [&one, &other] {
        lab.fleet.settled.store(true, Ordering::Relaxed);
        lab.node("n1", "u1");
        lab.node("n2", "u2");
    }
    one.fleet.set("n1", observed(5, 1));
    other.fleet.set("n2", observed(6, 1));
    one.wait(120_000).await;
    for (name, replica) in [("n1", "tower-0"), ("n2", "tower-1")] {
        let row = one.row(name);
        assert_eq!(
            (&row["status"]["connection"]["replica"], &row["status"]["state"]),
            (&json!(replica), &json!("Synced"))
        );
    }
    one.writes();
    one.wait(600_000).await;
    // The replica that serves a node renews its row every ten seconds.
    let writes = one.writes().len();
    assert!((100..=140).contains(&writes), "{writes} writes in ten minutes without news");
    // The agent moves: its row follows the new session.
    other.fleet.set("n1", observed(7, 2));
    one.wait(60_000).await;
    assert_eq!(one.row("n1")["status"]["connection"], json!({"replica": "tower-1", "session": 2}));
}

fn lease(replica: &str, version: u32) -> Seen {
    Seen { name: replica.to_owned(), addresses: Vec::new(), version: version.to_string() }
}

#[tokio::test(start_paused = true)]
async fn follower_writes_the_statuses_of_its_nodes_only() {
    let leader = lab(Server::default()).await;
    let follower = replica_with(leader.server.clone(), "tower-1", Fence::default()).await;
    for name in ["n1", "n2"] {
        follower.node(name, "u1");
    }
    follower.fleet.set("n1", observed(5, 1));
    follower.nodes.send(NodeEvent::Synced).unwrap();
    follower.wait(60_000).await;
    assert!(follower.writes().is_empty(), "it creates no rows");
    for name in ["n1", "n2"] {
        leader.node(name, "u1");
    }
    leader.wait(60_000).await;
    let shown = |name: &str| {
        let row = leader.row(name);
        (row["status"]["connection"]["replica"].clone(), row["status"]["state"].clone())
    };
    assert_eq!(shown("n1"), (json!("tower-1"), json!("Synced")));
    assert_eq!(shown("n2"), (Value::Null, json!("Absent")));
    follower.nodes.send(NodeEvent::Gone("n1".into())).unwrap();
    follower.wait(60_000).await;
    assert!(!leader.writes().iter().any(|write| write.starts_with("DELETE")), "nor does it delete any");
}

#[tokio::test(start_paused = true)]
async fn leader_writes_the_rows_of_a_replica_that_is_gone() {
    let lab = lab(Server::with("n1", stored("tower-1", 4))).await;
    lab.fleet.settled.store(true, Ordering::Relaxed);
    lab.node("n1", "u1");
    let state = || lab.row("n1")["status"]["state"].clone();
    for second in 0..60 {
        lab.replicas.observe(&[lease("tower-1", second)], tokio::time::Instant::now());
        lab.wait(1_000).await;
    }
    assert_eq!(state(), "Synced", "tower-1 writes it");
    for _ in 0..9 {
        lab.replicas.observe(&[lease("tower-1", 59)], tokio::time::Instant::now());
        lab.wait(1_000).await;
    }
    assert_eq!(state(), "Synced");
    for _ in 0..3 {
        lab.replicas.observe(&[lease("tower-1", 59)], tokio::time::Instant::now());
        lab.wait(1_000).await;
    }
    assert_eq!(state(), "Stale", "its agent has not connected to another replica");
    assert_eq!(lab.row("n1")["status"]["connection"]["replica"], "tower-1");
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(2_000).await;
    assert_eq!(state(), "Synced");
}

#[tokio::test(start_paused = true)]
async fn requests_end_with_the_leadership() {
    let lab = lab(Server::with("n1", stored("tower-0", 4))).await;
    lab.fence.close();
    lab.wait(100).await;
    lab.node("n1", "u1");
    let wanted = ProfileAssignment { name: "default".into(), revision: 2, ..ProfileAssignment::default() };
    lab.assignments.request(BTreeMap::from([("n1".into(), wanted)]));
    lab.wait(5_000).await;
    assert!(!lab.writes().iter().any(|write| write == "PATCH n1"));
    lab.fence.open_until(tokio::time::Instant::now() + Duration::from_secs(60));
    lab.wait(5_000).await;
    assert_eq!(lab.row("n1")["spec"]["profile"]["revision"], 2);
    let wanted = ProfileAssignment { name: "default".into(), revision: 3, ..ProfileAssignment::default() };
    lab.fence.close();
    lab.assignments.request(BTreeMap::from([("n1".into(), wanted)]));
    lab.fence.close();
    lab.wait(5_000).await;
    assert_eq!(lab.row("n1")["spec"]["profile"]["revision"], 2);
}

/// A row edited by hand does not keep its node's state from being reported.
#[tokio::test(start_paused = true)]
async fn row_edited_by_hand_is_claimed_again() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(2_000).await;
    for (replica, session) in [("unknown", 3_i64), ("unknown", i64::MAX), ("", -1)] {
        lab.change("n1", |row| {
            row["status"] =
                json!({"state": "Edited", "connection": {"replica": replica, "session": session}});
        });
        lab.wait(60_000).await;
        let status = &lab.row("n1")["status"];
        assert_eq!(status["connection"], json!({"replica": "tower-0", "session": 5}), "{replica} {session}");
        assert_eq!(status["state"], "Synced");
    }
}

#[tokio::test(start_paused = true)]
async fn row_of_another_replica_is_not_written() {
    let lab = lab(Server::with("n1", stored("tower-0", 4))).await;
    assert_eq!((lab.floors.get("n1").generation, lab.floors.get("n1").session), (70, 4));
    lab.node("n1", "u1");
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(100).await;
    assert_eq!(lab.row("n1")["status"]["connection"]["session"], 5);
    lab.change("n1", |row| row["status"]["connection"] = json!({"replica": "tower-1", "session": 6}));
    lab.fleet.set("n1", observed(72, 5));
    lab.wait(5_000).await;
    let row = lab.row("n1");
    assert_eq!(
        (&row["status"]["connection"]["replica"], &row["status"]["generation"]["applied"]),
        (&json!("tower-1"), &json!(71))
    );
    lab.writes();
    lab.fleet.set("n1", observed(73, 5));
    lab.wait(5_000).await;
    assert!(lab.writes().is_empty());
    let superseded = || lab.fleet.superseded.lock().unwrap().clone();
    assert!(superseded().iter().all(|node| node == "n1") && !superseded().is_empty(), "its stream is ended");
    assert!(lab.fleet.observe("n1").is_none(), "and forgotten");
    lab.fleet.set("n1", observed(74, 7));
    lab.wait(5_000).await;
    assert_eq!(lab.row("n1")["status"]["connection"], json!({"replica": "tower-0", "session": 7}));
}
