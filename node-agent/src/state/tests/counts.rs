//! Counts of the view, and memory of service ports.

use super::*;

#[test]
fn ports_without_a_local_endpoint_are_counted() {
    let (mut sender, mut state) = (Sender::default(), State::new());
    let local = |number: u8, kind: FrontendKind, when_empty: Verdict| {
        let cluster = Target { role: Role::Cluster as i32, when_empty: Verdict::Reject as i32 };
        let local = Some(Target { role: Role::Local as i32, when_empty: when_empty as i32 });
        let inside = if kind == FrontendKind::ClusterIp { local } else { Some(cluster) };
        Frontend { kind: kind as i32, outside: local, inside, ..frontend(number, 0) }
    };
    let frontends = [
        local(1, FrontendKind::ClusterIp, Verdict::Drop),
        local(2, FrontendKind::ClusterIp, Verdict::Drop),
        local(3, FrontendKind::LoadBalancer, Verdict::Drop),
        // Without an endpoint anywhere.
        local(4, FrontendKind::ClusterIp, Verdict::Reject),
        frontend(5, 0),
    ];
    for frontend in frontends {
        sender.frontends.insert(frontend.key.clone().unwrap(), frontend);
    }
    sender.play(&Step::Toggle(LayerKind::Node, 2, Role::Local, vec![1]));
    let parts = [sender.snapshot(LayerKind::Cluster), sender.snapshot(LayerKind::Node)];
    play(&mut state, &sender.update(None, 1), &parts).unwrap();
    let counted = state.without_local_endpoints();
    assert_eq!((counted.internal, counted.external), ((1, 0), (1, 0)));
}

#[test]
fn service_ports_are_forgotten_with_their_last_item() {
    let (mut sender, mut state) = (Sender::default(), State::new());
    let parts = [
        sender.play(&Step::Frontend(1, 0)),
        sender.play(&Step::Toggle(LayerKind::Cluster, 1, Role::Cluster, vec![1])),
    ];
    play(&mut state, &sender.update(None, 1), &parts).unwrap();
    assert_eq!(state.counts().services, 1);
    let parts = [
        sender.play(&Step::FrontendRemoved(1)),
        sender.play(&Step::PoolRemoved(LayerKind::Cluster, 1, Role::Cluster)),
    ];
    play(&mut state, &sender.update(Some(1), 2), &parts).unwrap();
    assert_eq!(state.counts(), Counts::default());
    // Refused updates leave no names behind either.
    let part = sender.clone().play(&Step::Frontend(2, 0));
    assert!(play(&mut state, &sender.update(Some(2), 3), &[part]).is_err());
    assert_eq!(state.counts().services, 0);
}
