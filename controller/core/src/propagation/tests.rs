//! The tracker by itself.

use std::sync::Arc;

use super::*;

fn trace(number: u64, sampled: bool) -> TraceContext {
    TraceContext { trace: u128::from(number), span: number, sampled }
}

fn change(id: u64, received: u64) -> Change {
    let object: Arc<str> = format!("Service default/s{id}").into();
    Change { id, object, service: None, received, triggered: None, trace: trace(id, true), origin: None }
}

/// One change, compiled at once.
fn publication(id: u64, received: u64) -> Publication {
    let changes = vec![change(id, received)];
    Publication { changes, total: 1, compiling: received + 1, published: received + 2 }
}

fn fleet(tracker: &mut Tracker, nodes: usize) -> Vec<Slot> {
    (0..nodes).map(|node| tracker.join(format!("n{node}").into(), 0)).collect()
}

fn delivery(started: u64, acknowledged: u64) -> Option<Delivery> {
    Some(Delivery { started, sent: started, acknowledged, ..Delivery::default() })
}

#[test]
fn milestones_record_when_shares_of_nodes_held_a_revision() {
    let mut tracker = Tracker::default();
    let slots = fleet(&mut tracker, 200);
    assert_eq!(tracker.publish(1, publication(1, 1_000), &slots), StepResult::default());
    let mut reached = Vec::new();
    for (at, slot) in (2_000..).zip(&slots) {
        let outcome = tracker.reached(*slot, 1, at, delivery(1_500, at));
        assert_eq!(outcome.acknowledged, [(at - 1_000, trace(1, true))]);
        reached.extend(outcome.milestones.iter().map(|(milestone, after, _)| (*milestone, *after)));
        assert_eq!(outcome.concluded.len(), usize::from(at == 2_199));
        assert_eq!(outcome.half, (at == 2_099).then_some(1));
    }
    assert_eq!(reached, [(Milestone::Half, 1_099), (Milestone::Most, 1_197), (Milestone::All, 1_199)]);
    let record = tracker.records().next().unwrap();
    assert_eq!((record.eligible, record.acknowledged, record.troubled), (200, 200, false));
    let slowest: Vec<_> = record.slowest.iter().map(|ack| ack.node.to_string()).collect();
    assert_eq!(slowest, ["n192", "n193", "n194", "n195", "n196", "n197", "n198", "n199"]);
    assert_eq!(&*record.kept[0].node, "n0", "the first is always kept");
    assert!(record.kept.len() < 15, "{} of 200 kept at a share of 1 %", record.kept.len());
}

#[test]
fn acknowledgement_covers_all_earlier_revisions() {
    let mut tracker = Tracker::default();
    let slots = fleet(&mut tracker, 1);
    for id in 1..=3 {
        let mut publication = publication(id, id * 100);
        publication.changes[0].trace.sampled = id > 1;
        tracker.publish(id, publication, &slots);
    }
    let outcome = tracker.reached(slots[0], 3, 1_000, delivery(500, 1_000));
    let expected = [(900, trace(1, false)), (800, trace(2, true)), (700, trace(3, true))];
    assert_eq!(outcome.acknowledged, expected);
    assert_eq!(outcome.concluded.len(), 3);
    for record in &outcome.concluded {
        assert_eq!(record.kept[0].carrier, trace(2, true));
    }
    assert_eq!(
        tracker.reached(slots[0], 3, 1_001, None),
        StepResult::default(),
        "the same again says nothing"
    );
}

#[test]
fn only_nodes_present_at_publication_are_awaited() {
    let mut tracker = Tracker::default();
    let slots = fleet(&mut tracker, 3);
    tracker.publish(1, publication(1, 0), &slots);
    let late = tracker.join("late".into(), 1);
    tracker.reached(slots[0], 1, 10, None);
    tracker.reached(slots[1], 1, 20, None);
    assert_eq!(
        tracker.waiting(tracker.records().next().unwrap()).map(|name| &**name).collect::<Vec<_>>(),
        ["n2"]
    );
    let outcome = tracker.leave(slots[2]);
    assert_eq!(outcome.excluded, 1);
    // The two that are left held it at 20, not when the third went.
    assert_eq!(
        outcome.milestones,
        [(Milestone::Most, 20, trace(1, true)), (Milestone::All, 20, trace(1, true))]
    );
    let record = &outcome.concluded[0];
    assert_eq!((record.eligible, record.acknowledged, record.excluded), (3, 2, 1));
    assert!(record.troubled);
    // The slot has a new owner; what it does concerns no old record.
    let next = tracker.join("next".into(), 1);
    assert_eq!(next, slots[2]);
    assert_eq!(tracker.reached(next, 2, 30, None), StepResult::default());
    assert_eq!(tracker.leave(late), StepResult::default());
}

#[test]
fn change_without_nodes_never_complete() {
    let mut tracker = Tracker::default();
    let outcome = tracker.publish(1, publication(1, 0), &[]);
    assert_eq!(outcome.milestones, []);
    let record = &outcome.concluded[0];
    assert_eq!((record.eligible, record.reached(Milestone::All), record.is_settled()), (0, None, true));
    // The same when the only node is lost.
    let slots = fleet(&mut tracker, 1);
    tracker.publish(2, publication(2, 0), &slots);
    let outcome = tracker.leave(slots[0]);
    assert_eq!((outcome.milestones.len(), outcome.concluded.len()), (0, 1));
}

#[test]
fn slow_and_refusing_nodes_are_kept_whatever_the_share() {
    let limits = Limits { share: 0.0, slow: 100, ..Limits::default() };
    let mut tracker = Tracker::new(limits);
    let slots = fleet(&mut tracker, 20);
    tracker.publish(1, publication(1, 0), &slots);
    tracker.refused(slots[7], 1, 5, "KernelRefused");
    for (index, slot) in slots.iter().enumerate() {
        let took = if index == 5 { 101 } else { 100 };
        tracker.reached(*slot, 1, 10 + took, delivery(10, 10 + took));
    }
    let record = tracker.records().next().unwrap();
    let kept: Vec<_> = record.kept.iter().map(|ack| ack.node.to_string()).collect();
    assert_eq!(kept, ["n0", "n5", "n7"]);
    assert!(record.troubled);
    assert_eq!((record.refusals.len(), record.refusals[0].reason), (1, "KernelRefused"));
}

#[test]
fn overdue_revision_reported_once_and_still_followed() {
    let mut tracker = Tracker::new(Limits { patience: 1_000, ..Limits::default() });
    let slots = fleet(&mut tracker, 2);
    tracker.publish(1, publication(1, 0), &slots);
    tracker.reached(slots[0], 1, 10, None);
    assert_eq!(tracker.next_overdue(), Some(1_002));
    assert_eq!(tracker.overdue(1_001), StepResult::default());
    let reported = tracker.overdue(1_002).concluded;
    assert_eq!((reported.len(), reported[0].outstanding()), (1, 1));
    assert_eq!((tracker.overdue(5_000), tracker.next_overdue()), (StepResult::default(), None));
    let outcome = tracker.reached(slots[1], 1, 9_000, None);
    assert_eq!((outcome.acknowledged[0].0, outcome.concluded.len()), (9_000, 0));
    assert_eq!(tracker.records().next().unwrap().reached(Milestone::All), Some(9_000));
}

#[test]
fn memory_bounded_and_evictions_counted() {
    let mut tracker = Tracker::new(Limits { open: 4, settled: 6, ..Limits::default() });
    let slots = fleet(&mut tracker, 1);
    let mut given_up = 0;
    for id in 1..=20 {
        given_up += tracker.publish(id, publication(id, id), &slots).given_up;
    }
    assert_eq!(given_up, 16);
    let records: Vec<_> = tracker.records().map(|record| (record.revision, record.given_up)).collect();
    let expected = [(20, 0), (19, 0), (18, 0), (17, 0), (16, 1), (15, 1), (14, 1), (13, 1), (12, 1), (11, 1)];
    assert_eq!(records, expected);
}

#[test]
fn traceparents_follow_the_w3c_standard() {
    let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let context: TraceContext = text.parse().unwrap();
    assert_eq!((context.span, context.sampled), (0xb7ad_6b71_6920_3331, true));
    assert_eq!(context.to_string(), text);
    let later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-what-comes";
    assert_eq!(later.parse::<TraceContext>().map(|context| context.sampled), Ok(false));
    for wrong in [
        "",
        "00",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ] {
        assert!(wrong.parse::<TraceContext>().is_err(), "{wrong:?}");
    }
}
