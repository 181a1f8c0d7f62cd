//! Actions for every state, and a simulated migration that is interrupted and turned back at every step.

use super::*;

fn node(name: &str) -> NodeView {
    NodeView {
        name: name.to_owned(),
        place: Place::Untouched,
        state: Some(NodeState::Shadow),
        profile: "builtin".to_owned(),
        kube_proxy_rules: false,
        kube_proxy: Presence::Ready,
        cleanup: Cleanup::Absent,
    }
}

fn both(name: &str) -> NodeView {
    NodeView {
        place: Place::Both,
        state: Some(NodeState::NotExclusive),
        profile: ACTIVE_PROFILE.to_owned(),
        kube_proxy_rules: true,
        ..node(name)
    }
}

fn moved(name: &str) -> NodeView {
    NodeView {
        place: Place::Switchtower,
        state: Some(NodeState::Synced),
        kube_proxy: Presence::Absent,
        kube_proxy_rules: false,
        cleanup: Cleanup::Complete,
        ..both(name)
    }
}

#[test]
fn node_moves_through_every_step() {
    let next = |node: NodeView, rollout: Rollout| forward(&[node], &rollout, 1, true);
    assert_eq!(next(node("a"), Rollout::Over), Action::Activate(vec!["a".into()]));
    let shadow = NodeView { place: Place::Both, ..node("a") };
    assert!(matches!(next(shadow, Rollout::Running), Action::Wait(_)));
    assert!(matches!(next(both("a"), Rollout::Running), Action::Wait(_)), "the trial may still fail");
    assert_eq!(next(both("a"), Rollout::Over), Action::Detach("a".into()));
    let leaving = NodeView { kube_proxy: Presence::Ready, kube_proxy_rules: true, ..moved("a") };
    assert!(matches!(next(leaving.clone(), Rollout::Over), Action::Wait(_)));
    let left = NodeView { kube_proxy: Presence::Absent, cleanup: Cleanup::Absent, ..leaving };
    assert_eq!(next(left.clone(), Rollout::Over), Action::CleanUp("a".into()));
    let unseen = NodeView { kube_proxy_rules: false, ..left.clone() };
    assert_eq!(next(unseen, Rollout::Over), Action::CleanUp("a".into()), "the agent may not see every rule");
    for (cleanup, stuck) in [(Cleanup::Running, false), (Cleanup::Complete, false), (Cleanup::Failed, true)] {
        let action = next(NodeView { cleanup, ..left.clone() }, Rollout::Over);
        assert_eq!(matches!(action, Action::Stuck(_)), stuck, "{action:?}");
    }
    assert_eq!(next(moved("a"), Rollout::Over), Action::Finished(Vec::new()));
}

#[test]
fn failed_rollout_leaves_kube_proxy_on_the_node() {
    let waiting = NodeView { place: Place::Both, ..node("a") };
    let failed = Rollout::Failed("probe".into());
    assert!(matches!(forward(std::slice::from_ref(&waiting), &failed, 1, true), Action::Stuck(_)));
    assert_eq!(
        forward(&[waiting], &failed, 1, false),
        Action::Activate(vec!["a".into()]),
        "a new command retries"
    );
}

#[test]
fn unreachable_nodes_are_skipped_and_named() {
    let away = NodeView { state: Some(NodeState::Stale), ..node("b") };
    let missing = NodeView { state: None, ..node("c") };
    let nodes = [moved("a"), away, missing];
    assert_eq!(forward(&nodes, &Rollout::Over, 1, true), Action::Finished(vec!["b".into(), "c".into()]));
}

#[test]
fn batch_limits_nodes_under_way() {
    let nodes = [node("a"), node("b"), node("c")];
    assert_eq!(forward(&nodes, &Rollout::Over, 2, true), Action::Activate(vec!["a".into(), "b".into()]));
    let nodes = [both("a"), both("b"), node("c")];
    assert_eq!(forward(&nodes, &Rollout::Over, 2, true), Action::Detach("a".into()));
}

#[test]
fn rules_lose_effect_only_after_kube_proxy_is_back() {
    let next = |node: NodeView, rollout: Rollout| back(&[node], &rollout, 1, true);
    assert_eq!(next(moved("a"), Rollout::Over), Action::Attach(vec!["a".into()]));
    let cleaning = NodeView { cleanup: Cleanup::Running, ..moved("a") };
    assert!(matches!(next(cleaning, Rollout::Over), Action::Wait(_)), "it would remove the new rules");
    let attached = NodeView { place: Place::Both, ..moved("a") };
    assert!(matches!(next(attached.clone(), Rollout::Over), Action::Wait(_)), "no Pod");
    let starting = NodeView { kube_proxy: Presence::Ready, ..attached };
    assert!(matches!(next(starting, Rollout::Over), Action::Wait(_)), "no rules");
    assert_eq!(next(both("a"), Rollout::Over), Action::Deactivate(vec!["a".into()]));
    let late = NodeView { place: Place::KubeProxy, ..both("a") };
    assert!(matches!(next(late.clone(), Rollout::Running), Action::Wait(_)));
    assert!(matches!(next(late, Rollout::Failed("x".into())), Action::Stuck(_)));
    let returned = NodeView { place: Place::KubeProxy, ..node("a") };
    assert!(
        matches!(next(returned.clone(), Rollout::Running), Action::Wait(_)),
        "its end would be a reversal"
    );
    assert_eq!(next(returned, Rollout::Over), Action::Finished(Vec::new()));
    let later = NodeView { place: Place::Untouched, ..moved("a") };
    assert_eq!(next(later, Rollout::Over), Action::Attach(vec!["a".into()]), "joined after the migration");
}

/// A cluster that performs actions at once, and checks the invariant after each.
struct World(Vec<NodeView>);

impl World {
    fn perform(&mut self, action: &Action) {
        let with = |world: &mut Self, names: &[String], change: fn(&mut NodeView)| {
            world.0.iter_mut().filter(|node| names.contains(&node.name)).for_each(change);
        };
        match action {
            Action::Activate(names) => with(self, names, |node| *node = both(&node.name)),
            Action::Detach(name) => with(self, std::slice::from_ref(name), |node| {
                (node.place, node.kube_proxy, node.cleanup) =
                    (Place::Switchtower, Presence::Absent, Cleanup::Absent);
            }),
            Action::CleanUp(name) => with(self, std::slice::from_ref(name), |node| *node = moved(&node.name)),
            Action::Attach(names) => with(self, names, |node| *node = both(&node.name)),
            Action::Deactivate(names) => with(self, names, |node| {
                *node = NodeView {
                    place: Place::KubeProxy,
                    profile: SHADOW_PROFILE.into(),
                    ..super::tests::node(&node.name)
                };
            }),
            other => panic!("nothing to wait for: {other:?}"),
        }
        for node in &self.0 {
            let by_kube_proxy = node.kube_proxy == Presence::Ready || node.kube_proxy_rules;
            assert!(node.is_active() || by_kube_proxy, "no proxy after {action:?}: {node:?}");
        }
    }
}

#[test]
fn interrupted_and_turned_migration_always_has_a_proxy() {
    for turn in 0..12 {
        let mut world = World(["a", "b", "c"].map(node).to_vec());
        let mut steps = 0;
        while steps < turn {
            let action = forward(&world.0, &Rollout::Over, 2, steps % 2 == 0);
            if matches!(action, Action::Finished(_)) {
                break;
            }
            world.perform(&action);
            steps += 1;
        }
        for _ in 0..20 {
            let action = back(&world.0, &Rollout::Over, 2, true);
            if action == Action::Finished(Vec::new()) {
                break;
            }
            world.perform(&action);
        }
        assert!(world.0.iter().all(NodeView::has_returned), "turned at {turn}: {:?}", world.0);
    }
}
