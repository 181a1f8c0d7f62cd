//! Verdicts of the drain gate, and a random model of nodes and revisions.

use super::*;

const WEB: &str = "10.244.1.7";

fn address(text: &str) -> Target {
    Target::Address(text.parse().unwrap())
}

fn socket(text: &str, port: u16) -> Socket {
    Socket { address: text.parse().unwrap(), protocol: 6, port }
}

fn service() -> Arc<ObjectKey> {
    Arc::new(ObjectKey { namespace: "default".into(), name: "web".into() })
}

fn moved(change: i64) -> Move {
    Move { change, left: (change < 0).then(service) }
}

fn moves(list: &[(&str, i64)]) -> Moves {
    list.iter().map(|(text, change)| (socket(text, 8080), moved(*change))).collect()
}

fn at(seconds: u64) -> Instant {
    Duration::from_secs(seconds)
}

fn names(list: &[&str]) -> Vec<Arc<str>> {
    list.iter().map(|name| Arc::from(*name)).collect()
}

/// A gate in which the address is in two pools and three nodes hold revision 1, long after the start.
fn gate() -> Gate {
    let mut gate = Gate::new(moves(&[(WEB, 2)]), 1, at(0));
    for node in names(&["a", "b", "c"]) {
        gate.opened(&node, 1, at(0));
        gate.held(&node, 1, 1);
    }
    gate
}

fn publish(gate: &mut Gate, revision: u64, change: i64) -> Answers {
    gate.published(revision, &moves(&[(WEB, change)]), &names(&["a", "b", "c"]))
}

fn verdicts(answers: &Answers) -> Vec<Verdict> {
    answers.iter().map(|(_, answer)| answer.verdict).collect()
}

#[test]
fn drained_once_last_node_acknowledged() {
    let mut gate = gate();
    let query = gate.ask(address(WEB), at(100)).unwrap_err();
    assert!(publish(&mut gate, 2, -1).is_empty(), "it is in another pool");
    for node in ["a", "b", "c"] {
        assert!(gate.held(&node.into(), 1, 2).is_empty());
    }
    assert!(publish(&mut gate, 3, -1).is_empty());
    assert!(gate.held(&"a".into(), 1, 3).is_empty());
    assert!(gate.held(&"c".into(), 1, 3).is_empty());
    let answers = gate.held(&"b".into(), 1, 3);
    assert_eq!((answers[0].0, answers[0].1.verdict), (query, Verdict::Drained));
    assert_eq!(answers[0].1.waited_for.names, names(&["b"]));
    assert_eq!(gate.waiting(), 0);
    let again = gate.ask(address(WEB), at(101)).unwrap();
    assert_eq!(again.verdict, Verdict::Drained, "remembered");
}

#[test]
fn acknowledgement_of_earlier_revision_does_not_count() {
    let mut gate = gate();
    publish(&mut gate, 2, 1);
    publish(&mut gate, 3, -3);
    assert!(gate.ask(address(WEB), at(100)).is_err());
    for node in ["a", "b", "c"] {
        assert!(gate.held(&node.into(), 1, 2).is_empty());
    }
    gate.held(&"a".into(), 1, 3);
    gate.held(&"b".into(), 1, 3);
    assert_eq!(verdicts(&gate.held(&"c".into(), 1, 4)), [Verdict::Drained]);
}

#[test]
fn only_woken_nodes_are_waited_for() {
    let mut gate = gate();
    assert!(gate.ask(address(WEB), at(100)).is_err());
    assert!(gate.published(2, &moves(&[(WEB, -2)]), &names(&["b"])).is_empty());
    assert_eq!(verdicts(&gate.held(&"b".into(), 1, 2)), [Verdict::Drained]);
}

#[test]
fn acknowledgement_before_the_publication_is_recorded_counts() {
    let mut gate = gate();
    assert!(gate.ask(address(WEB), at(100)).is_err());
    for node in ["a", "b", "c"] {
        gate.held(&node.into(), 1, 2);
    }
    assert_eq!(verdicts(&publish(&mut gate, 2, -2)), [Verdict::Drained]);
}

#[test]
fn address_that_returns_is_waited_for_again() {
    let mut gate = gate();
    let query = gate.ask(address(WEB), at(100)).unwrap_err();
    publish(&mut gate, 2, -2);
    publish(&mut gate, 3, 1);
    for node in ["a", "b", "c"] {
        assert!(gate.held(&node.into(), 1, 3).is_empty());
    }
    assert_eq!(gate.give_up(query).unwrap().verdict, Verdict::StillMember);
    assert_eq!(gate.give_up(query), None);
    assert!(publish(&mut gate, 4, -1).is_empty());
}

#[test]
fn lost_node_is_waited_for_during_grace_and_named() {
    let mut gate = gate();
    gate.closed(&"b".into(), 1, at(100));
    assert!(gate.ask(address(WEB), at(101)).is_err());
    gate.published(2, &moves(&[(WEB, -2)]), &names(&["a", "c"]));
    gate.held(&"a".into(), 1, 2);
    assert!(gate.held(&"c".into(), 1, 2).is_empty());
    assert_eq!(gate.next_expiry(), Some(at(110)));
    assert!(gate.expire(at(109)).is_empty());
    let answers = gate.expire(at(110));
    assert_eq!(verdicts(&answers), [Verdict::Drained]);
    assert_eq!(answers[0].1.missing.names, names(&["b"]));
    gate.opened(&"b".into(), 2, at(120));
    gate.held(&"b".into(), 2, 2);
    assert_eq!(gate.ask(address(WEB), at(121)).unwrap().missing.total, 0);
}

#[test]
fn returning_node_must_acknowledge_in_its_new_stream() {
    let mut gate = gate();
    gate.opened(&"b".into(), 2, at(100));
    assert!(gate.ask(address(WEB), at(101)).is_err());
    publish(&mut gate, 2, -2);
    for node in ["a", "c"] {
        gate.held(&node.into(), 1, 2);
    }
    gate.closed(&"b".into(), 1, at(102));
    assert!(gate.held(&"b".into(), 1, 2).is_empty(), "of the replaced stream");
    assert!(gate.held(&"b".into(), 2, 1).is_empty(), "an update that was planned before");
    assert!(gate.expire(at(200)).is_empty(), "it is connected");
    assert_eq!(verdicts(&gate.held(&"b".into(), 2, 2)), [Verdict::Drained]);
}

#[test]
fn deleted_node_is_not_waited_for() {
    let mut gate = gate();
    assert!(gate.ask(address(WEB), at(100)).is_err());
    publish(&mut gate, 2, -2);
    gate.held(&"a".into(), 1, 2);
    gate.held(&"b".into(), 1, 2);
    assert_eq!(verdicts(&gate.removed(&"c".into())), [Verdict::Drained]);
}

#[test]
fn node_that_never_acknowledges_is_named() {
    let mut gate = gate();
    let query = gate.ask(address(WEB), at(100)).unwrap_err();
    publish(&mut gate, 2, -2);
    gate.held(&"a".into(), 1, 2);
    gate.held(&"b".into(), 1, 2);
    let answer = gate.give_up(query).unwrap();
    assert_eq!(answer.verdict, Verdict::NotAcknowledged);
    assert_eq!((answer.waited_for.names, answer.waited_for.total), (names(&["c"]), 1));
}

#[test]
fn unknown_address_after_restart_waits_for_all_nodes() {
    let mut gate = Gate::new(Moves::new(), 1, at(0));
    for node in names(&["a", "b"]) {
        gate.expect(&node, at(0));
    }
    gate.restart(at(50));
    gate.opened(&"a".into(), 7, at(51));
    gate.held(&"a".into(), 7, 1);
    assert!(gate.ask(address(WEB), at(52)).is_err(), "b may still have it");
    gate.opened(&"b".into(), 9, at(53));
    assert_eq!(verdicts(&gate.held(&"b".into(), 9, 1)), [Verdict::Drained]);
    let late = gate.ask(address(WEB), at(50) + YOUNG).unwrap();
    assert_eq!(late.verdict, Verdict::NotAnEndpoint);
}

#[test]
fn queries_and_memory_are_bounded() {
    let mut gate = gate();
    for _ in 0..QUERIES {
        assert!(gate.ask(address(WEB), at(100)).is_err());
    }
    assert_eq!(gate.ask(address(WEB), at(100)).unwrap().verdict, Verdict::Overloaded);
    publish(&mut gate, 2, -2);
    gate.held(&"a".into(), 1, 2);
    gate.held(&"b".into(), 1, 2);
    assert_eq!(gate.held(&"c".into(), 1, 2).len(), QUERIES, "no query starves");
    for revision in 3..(REMEMBERED as u64 + 10) {
        publish(&mut gate, revision * 2, 1);
        publish(&mut gate, revision * 2 + 1, -1);
    }
    assert!(gate.gone_order.len() <= REMEMBERED && gate.gone.len() == 1);
}

fn sockets(list: &[(&str, u16)]) -> Target {
    Target::Sockets(list.iter().map(|(text, port)| socket(text, *port)).collect())
}

#[test]
fn host_network_pod_does_not_wait_for_others_with_its_address() {
    const HOST: &str = "192.0.2.1";
    let both = Moves::from([(socket(HOST, 80), moved(1)), (socket(HOST, 443), moved(2))]);
    let mut gate = Gate::new(both, 1, at(0));
    gate.opened(&"a".into(), 1, at(0));
    gate.held(&"a".into(), 1, 1);
    let pod = gate.ask(sockets(&[(HOST, 80)]), at(100)).unwrap_err();
    let other = gate.ask(sockets(&[(HOST, 443), ("fd00::1", 443)]), at(100)).unwrap_err();
    let all = gate.ask(address(HOST), at(100)).unwrap_err();
    let udp = Socket { protocol: 17, ..socket(HOST, 80) };
    assert_eq!(gate.ask(Target::Sockets(vec![udp]), at(100)).unwrap().verdict, Verdict::NotAnEndpoint);
    assert_eq!(gate.ask(sockets(&[]), at(100)).unwrap().verdict, Verdict::NotAnEndpoint);
    assert!(gate.published(2, &Moves::from([(socket(HOST, 80), moved(-1))]), &names(&["a"])).is_empty());
    let answers = gate.held(&"a".into(), 1, 2);
    assert_eq!((answers.len(), answers[0].0, answers[0].1.verdict), (1, pod, Verdict::Drained));
    assert_eq!(answers[0].1.removal, Some(Removal { revision: 2, service: Some(service()) }));
    gate.published(3, &Moves::from([(socket(HOST, 443), moved(-2))]), &names(&["a"]));
    let answers = gate.held(&"a".into(), 1, 3);
    assert_eq!(BTreeSet::from_iter(answers.iter().map(|(id, _)| *id)), BTreeSet::from([other, all]));
    assert!(gate.by_address.is_empty() && gate.queries.is_empty());
}

#[test]
fn answer_names_the_last_removal() {
    let mut gate = gate();
    assert_eq!(
        gate.ask(address(WEB), at(100)).map(|_| ()).map_err(|id| gate.give_up(id).unwrap().removal),
        Err(None)
    );
    publish(&mut gate, 2, -2);
    let query = gate.ask(address(WEB), at(100)).unwrap_err();
    let removal = Some(Removal { revision: 2, service: Some(service()) });
    assert_eq!(gate.give_up(query).unwrap().removal, removal);
    for node in ["a", "b", "c"] {
        gate.held(&node.into(), 1, 2);
    }
    assert_eq!(gate.ask(address(WEB), at(101)).unwrap().removal, removal, "also without a wait");
}

/// Random histories against the definition: drained only if every node that is not missing holds the removal.
#[test]
fn answers_match_a_model_of_all_nodes() {
    use rand::{Rng as _, SeedableRng as _};
    let mut random = rand::rngs::StdRng::seed_from_u64(18);
    for _ in 0..300 {
        let mut gate = gate();
        let all = ["a", "b", "c"];
        let mut held = HashMap::from([("a", 1), ("b", 1), ("c", 1)]);
        let (mut pools, mut gone, mut revision) = (2_i64, None, 1);
        let mut waiting = BTreeSet::new();
        for _ in 0..60 {
            let node = all[random.random_range(0..3)];
            let answers = match random.random_range(0..4) {
                0 => {
                    revision += 1;
                    let change = if pools > 0 { -pools } else { random.random_range(1..3) };
                    pools += change;
                    gone = (pools == 0).then_some(revision);
                    publish(&mut gate, revision, change)
                }
                1 => {
                    if let Err(id) = gate.ask(address(WEB), at(1_000)) {
                        waiting.insert(id);
                    }
                    Answers::new()
                }
                _ => {
                    let reached = random.random_range(held[node]..=revision);
                    held.insert(node, reached);
                    gate.held(&node.into(), 1, reached)
                }
            };
            let drained = gone.is_some_and(|gone| held.values().all(|held| *held >= gone));
            for (id, _) in answers {
                assert!(drained && waiting.remove(&id));
            }
            assert!(!drained || waiting.is_empty(), "{held:?} {gone:?}");
        }
    }
}
