//! Evidence against a revision: nodes that go dark because of it, and what proves nothing.

use super::*;

#[test]
fn canary_that_goes_dark_fails_after_a_deadline() {
    let canaries = [step(Quantity::Number(3)), canary(labelled("canary")), step(Quantity::Percent(10))];
    for first in canaries {
        let mut nodes = fleet(39);
        nodes.push(node("c", &["canary"]));
        let mut stage = Stage::new(
            vec![Step { soak: Duration::from_secs(10), ..first }, step(Quantity::Percent(100))],
            nodes,
        );
        stage.settle();
        let name = stage.touched()[0].to_owned();
        let touched = stage.touched().len();
        stage.lose(&name);
        stage.pass(60);
        let decision = stage.settle();
        let on = if touched == 1 { WaitingOn::CanaryNodes } else { WaitingOn::UnreachableNodes };
        stage.stands(State::Paused, Some(on), touched);
        assert_eq!(condition(&decision, ConditionType::Stalled).map(|(holds, _)| holds), Some(true));
        stage.pass(1);
        stage.decide();
        assert_eq!(stage.rollout.progress.failures[0].reason, "LostAfterUpdate");
        assert_eq!(stage.rollout.progress.failures[0].node, name);
        stage.settle();
        stage.stands(State::Failed, None, 0);
    }
}

#[test]
fn restarted_controller_gives_a_dark_canary_the_full_deadline() {
    let mut stage = Stage::new(vec![step(Quantity::Number(2)), step(Quantity::Percent(100))], fleet(20));
    stage.decide();
    stage.agents_follow();
    let name = stage.touched()[0].to_owned();
    stage.lose(&name);
    stage.pass(3_600);
    // The next controller has waited for agents until now.
    stage.node(&name).lost = Some(stage.now);
    stage.decide();
    assert_ne!(stage.rollout.progress.state, State::RollingBack);
    stage.pass(61);
    stage.decide();
    assert_eq!(stage.rollout.progress.state, State::RollingBack);
}

#[test]
fn unreachable_node_blocks_a_step_until_approved() {
    let mut stage = Stage::new(vec![step(Quantity::Number(1)), step(Quantity::Percent(100))], fleet(40));
    stage.rollout.strategy.max_unavailable = Quantity::Percent(10);
    while stage.touched().len() < 40 {
        stage.decide();
        stage.agents_follow();
    }
    let dark: Vec<String> = stage.touched()[7..10].iter().map(|&name| name.to_owned()).collect();
    dark.iter().for_each(|name| stage.lose(name));
    stage.pass(1_000_000);
    let decision = stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::UnreachableNodes), 40);
    assert_eq!(reasons(&decision), ["RolloutInconclusive"]);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "UnreachableNodes")));
    let message = &decision.status.message;
    assert!(message.contains(&format!("3 nodes ({})", dark.join(", "))), "{message}");
    assert!(
        message.contains("kubectl patch pxr default-2 ") && message.contains(r#""approvedStep":2"#),
        "{message}"
    );
    for back in [true, false] {
        let mut stage = Stage { rollout: stage.rollout.clone(), fleet: stage.fleet.clone(), now: stage.now };
        if back {
            dark.iter().for_each(|name| stage.returns(name));
        } else {
            stage.rollout.approved_steps = 2;
        }
        let status = stage.settle().status;
        stage.stands(State::Complete, None, 40);
        assert_eq!(status.updated, if back { 40 } else { 37 });
    }
}

#[test]
fn node_without_the_settings_is_no_evidence() {
    let mut stage = Stage::new(vec![step(Quantity::Number(2)), step(Quantity::Percent(100))], fleet(20));
    stage.decide();
    let names: Vec<String> = stage.touched().iter().map(|&name| name.to_owned()).collect();
    for name in &names {
        let node = stage.node(name);
        (node.still, node.pending) = (Some(stable()), true);
    }
    observed(stage.node(&names[0])).refused_items = 1;
    stage.pass(3_600);
    stage.decide();
    stage.stands(State::Progressing, Some(WaitingOn::Nodes), 2);
    // Its row is written now: from here on it has the whole deadline.
    observed(stage.node(&names[0])).refused_items = 0;
    let now = stage.now;
    for name in &names {
        let node = stage.node(name);
        (node.still, node.pending) = (None, false);
        node.assigned.as_mut().unwrap().at = now;
    }
    stage.pass(60);
    stage.decide();
    stage.stands(State::Progressing, Some(WaitingOn::Nodes), 2);
    stage.pass(1);
    stage.decide();
    assert_eq!(stage.rollout.progress.failures[0].reason, "ApplyDeadlineExceeded");
}

#[test]
fn rollout_waiting_too_long_is_stalled() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], fleet(4));
    let mut earlier = stable();
    earlier.number = 3;
    stage.rollout.target.number = 4;
    stage.fleet[1].assigned = Some(assignment(earlier, NOW));
    let decision = stage.decide();
    assert_eq!(stage.rollout.progress.state, State::Pending);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((false, "Pending")));
    stage.pass(601);
    let decision = stage.decide();
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "ProgressDeadlineExceeded")));
    assert!(decision.status.message.contains("1 node (n1)"), "{}", decision.status.message);
    // No rollout returns a revision that no object describes: the rollout takes the node as it is.
    stage.fleet[1].unknown = true;
    assert_eq!(stage.decide().moves.len(), 4);
}
