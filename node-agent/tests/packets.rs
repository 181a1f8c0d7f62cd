//! Real packets through what the agent programs: a node, three pods and a client in network namespaces.

mod common;

use std::collections::BTreeSet;

use common::*;
use switchtower_node_agent::dataplane::Dataplane;
use switchtower_node_agent::kernel_change::KernelChange;
use switchtower_node_agent::nft::Nft;
use switchtower_proto::v1::{self as proto, Role};

/// Opens the dataplane in the laboratory's node and commits `view`.
fn program(lab: &Lab, view: &[KernelChange]) -> Nft {
    let mut nft = lab.node.run(|| Nft::open().unwrap());
    let mut changes = facts();
    changes.extend_from_slice(view);
    let committed = nft.commit(&changes, stamp(1)).unwrap();
    assert_eq!(committed.refused, vec![]);
    nft
}

fn backends(from: &Namespace, to: &str, tries: usize) -> BTreeSet<String> {
    (0..tries).map(|_| from.ask(to).unwrap().split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn cluster_ip_balances_and_masquerades_only_where_due() {
    let lab = Lab::new();
    let mut view = service("web", "10.96.0.10", &PODS);
    view.push(pool("web", Role::Cluster, &PODS6, &[]));
    view.push(KernelChange::Frontend(cluster_ip("web", "fd96::10")));
    let _nft = program(&lab, &view);
    for (vip, pod) in [("10.96.0.10:80", "10.244.0.1"), ("[fd96::10]:80", "fd44::1")] {
        assert_eq!(backends(&lab.pods[0], vip, 40).len(), 3, "spread over all pods");
        assert_eq!(backends(&lab.node, vip, 40).len(), 3, "from the host too");
        assert_eq!(backends(&lab.client, vip, 40).len(), 3, "and from outside");
        // A pod keeps its address, except towards itself.
        for _ in 0..20 {
            let answer = lab.pods[0].ask(vip).unwrap();
            let (name, source) = answer.split_once(' ').unwrap();
            assert_eq!(source == pod, name != "pod1", "{answer}");
        }
        let answer = lab.client.ask(vip).unwrap();
        assert!(answer.ends_with("10.244.0.254") || answer.ends_with("fd44::fe"), "{answer}");
    }
}
