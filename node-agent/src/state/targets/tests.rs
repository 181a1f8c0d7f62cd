//! Destinations of probes, for views of all kinds.

use switchtower_proto::v1::{
    Endpoint, Family, Frontend, FrontendKey, NodeRecord, PoolKey, Role, Settings, Trial, UpdateEnd,
};

use super::*;
use crate::testing::{Fleet, frontend, node_record, pool_key, probe, settings};

/// Service 0 (port `http`, 80): a ClusterIP of each family, a NodePort of each family, endpoints in IPv4 only.
fn fleet(endpoints: bool) -> Fleet {
    let mut fleet = Fleet::new(0, 0);
    let key = frontend(0).key.unwrap();
    let v6 = FrontendKey { family: Family::Ipv6 as i32, address: [0xfd; 16].to_vec(), ..key };
    for cluster_ip in [key.clone(), v6.clone()] {
        fleet.add_frontend(Frontend { key: Some(cluster_ip), ..frontend(0) });
    }
    for node_port in [key, v6] {
        let key = Some(FrontendKey { address: Vec::new(), port: 30_080, ..node_port });
        fleet.add_frontend(Frontend { key, kind: FrontendKind::NodePort as i32, ..frontend(0) });
    }
    if endpoints {
        fleet.add_pool(pool_key(0), vec![Endpoint { address: vec![10, 1, 0, 1], port: 8080 }]);
        let key = PoolKey { family: Family::Ipv6 as i32, role: Role::Cluster as i32, ..pool_key(0) };
        fleet.add_pool(key, Vec::new());
    }
    fleet.generation = 1;
    fleet
}

/// The first round's targets: probe, address, whether a destination exists.
fn targets(mut fleet: Fleet, probes: Vec<Probe>) -> Vec<(String, String, bool)> {
    let mut state = State::new();
    let mut play = |(update, parts): (switchtower_proto::v1::Update, Vec<_>)| {
        state.begin(&update).unwrap();
        parts.iter().for_each(|part| state.part(part).unwrap());
        state.end(&UpdateEnd { to: update.to }, std::time::Instant::now()).unwrap();
    };
    play(fleet.snapshot());
    let trial = Trial { probes, window_milliseconds: 0, fallback: Some(Box::new(settings())) };
    let trial = Some(Box::new(trial));
    play(fleet.replace_settings(Settings { revision: 2, trial, ..settings() }));
    let round = state.next_round(Instant::now()).unwrap();
    let describe = |target: Target| {
        let address = target.address.map(|address| address.to_string()).unwrap_or_default();
        (target.probe.name, address, target.absent.is_none())
    };
    round.targets.into_iter().map(describe).collect()
}

#[test]
fn probe_port_is_a_name_a_number_or_all() {
    let v6 = "[fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd]:80";
    for port in ["", "http", "80"] {
        let found = targets(fleet(true), vec![probe(ProbeKind::ClusterIp, port)]);
        let name = format!("ClusterIp {port}");
        assert_eq!(
            found,
            [(name.clone(), "10.96.0.0:80".into(), true), (name, v6.into(), false)],
            "{port:?}"
        );
        // The number is the Service's, also for a NodePort. The Node has no IPv6 address.
        let found = targets(fleet(true), vec![probe(ProbeKind::NodePort, port)]);
        assert_eq!(found, [(format!("NodePort {port}"), "192.0.2.1:30080".into(), true)], "{port:?}");
    }
    for port in ["https", "30080", "8080"] {
        let found = targets(fleet(true), vec![probe(ProbeKind::NodePort, port)]);
        assert_eq!(found, [(format!("NodePort {port}"), String::new(), false)], "{port:?}");
    }
}

#[test]
fn missing_target_has_no_connection_command() {
    let missing = Probe { service: "service-00".into(), ..probe(ProbeKind::ClusterIp, "") };
    let found = targets(fleet(false), vec![missing, probe(ProbeKind::NodePort, "http")]);
    let expected = [("NodePort http", "192.0.2.1:30080"), ("ClusterIp ", "")];
    assert_eq!(found, expected.map(|(name, address)| (name.to_owned(), address.to_owned(), false)));
    let mut homeless = fleet(true);
    homeless.replace_node(NodeRecord { addresses: Vec::new(), ..node_record() });
    homeless.generation = 1;
    let found = targets(homeless, vec![probe(ProbeKind::NodePort, "http")]);
    assert_eq!(found, [("NodePort http".to_owned(), String::new(), false)]);
}
