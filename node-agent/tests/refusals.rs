//! Transactions that the kernel refuses: elements, one address family, the base rules.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::{CommitError, Dataplane};
use switchtower_node_agent::kernel::nft::Nft;
use switchtower_proto::v1::{self as proto, Role};

fn open(namespace: &Namespace) -> Nft {
    namespace.run(|| Nft::open().unwrap())
}

/// A Service with endpoints of both families.
fn sample() -> Vec<KernelChange> {
    let mut view = facts();
    view.extend(service("web", "10.96.0.10", &PODS));
    view.extend([
        pool("web", Role::Cluster, &PODS6, &[]),
        KernelChange::Frontend(cluster_ip("web", "fd96::10")),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv4, 30080)),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv6, 30080)),
    ]);
    view
}

#[test]
fn refused_element_does_not_stop_other_changes() {
    let node = Namespace::new("refused");
    let mut nft = open(&node);
    nft.commit(&sample(), stamp(1)).unwrap();
    // A foreign range: the kernel refuses another that overlaps it in part.
    let range = "{ 10.97.0.128-10.98.3.50 }";
    node.nft(&["add", "element", "ip", "switchtower", "service_cidrs", range], "");
    let view = [
        KernelChange::ServiceCidr(cidr("10.97.0.0/16")),
        pool("other", Role::Cluster, &PODS, &[]),
        KernelChange::Frontend(cluster_ip("other", "10.96.0.88")),
    ];
    let committed = nft.commit(&view, stamp(2)).unwrap();
    assert_eq!(committed.refused.len(), 1, "{:?}", committed.refused);
    assert_eq!(committed.refused[0].item, "ServiceCIDR 10.97.0.0/16");
    assert_ne!(committed.refused[0].errno, 0);
    assert!(node.table("ip").contains("10.96.0.88 . tcp . 80"));
    assert_eq!(nft.stamp().unwrap(), Some(stamp(2)));
    // It is listed until it is repaired or replaced.
    assert_eq!(nft.commit(&[], stamp(3)).unwrap().refused.len(), 1);
    let repaired = nft.repair().unwrap();
    assert!(repaired.differences > 0, "the foreign range");
    assert_eq!(repaired.refused, vec![]);
    assert_eq!(nft.commit(&[], stamp(4)).unwrap().refused, vec![]);
    assert_eq!(nft.repair().unwrap().differences, 0);
}

#[test]
fn support_check_writes_nothing() {
    let node = Namespace::new("support");
    let mut nft = open(&node);
    nft.check_support().unwrap();
    assert_eq!(node.nft(&["list", "ruleset"], ""), "");
    nft.commit(&sample(), stamp(1)).unwrap();
    let before = node.table("ip");
    nft.check_support().unwrap();
    assert_eq!(node.table("ip"), before);
}

#[test]
fn refused_object_named_in_the_error() {
    let node = Namespace::new("unsupported");
    let owner = ForeignOwner::take(&node, "ip6 ");
    let error = open(&node).commit(&sample(), stamp(1)).unwrap_err().to_string();
    assert!(error.contains("table switchtower in family ip6") && error.contains("IPv6"), "{error}");
    drop(owner);
}

#[test]
fn refused_element_retried_once_the_cause_is_gone() {
    let node = Namespace::new("retry");
    let mut nft = open(&node);
    nft.commit(&sample(), stamp(1)).unwrap();
    let range = "{ 10.97.0.128-10.98.3.50 }";
    node.nft(&["add", "element", "ip", "switchtower", "service_cidrs", range], "");
    let committed = nft.commit(&[KernelChange::ServiceCidr(cidr("10.97.0.0/16"))], stamp(2)).unwrap();
    assert_eq!(committed.refused.len(), 1, "{:?}", committed.refused);
    assert_eq!(nft.retry_refused().unwrap(), committed.refused, "the foreign range is still there");
    node.nft(&["delete", "element", "ip", "switchtower", "service_cidrs", range], "");
    assert_eq!(nft.retry_refused().unwrap(), vec![]);
    assert!(node.table("ip").contains("10.97.0.0/16"));
    assert_eq!(nft.stamp().unwrap(), Some(stamp(2)));
    assert_eq!(nft.repair().unwrap().differences, 0);
}

/// A table with an owner refuses every change by other sockets (EPERM) as long as its owner exists.
struct ForeignOwner(std::process::Child);

impl ForeignOwner {
    fn take(node: &Namespace, family: &str) -> Self {
        use std::io::Write as _;
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &node.0, "nft", "-i"]);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let line = format!("add table {family} switchtower {{ flags owner; }}\n");
        child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        eventually("the table has an owner", || node.nft(&["list", "tables"], "").contains(family));
        ForeignOwner(child)
    }
}

impl Drop for ForeignOwner {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn other_family_committed_while_the_kernel_refuses_one() {
    for (refused, family, other) in [("ip6", "IPv6", "ip"), ("ip", "IPv4", "ip6")] {
        let node = Namespace::new(refused);
        let owner = ForeignOwner::take(&node, &format!("{refused} "));
        let mut nft = open(&node);
        let (first, second) =
            if other == "ip" { ("10.96.0.77", "10.96.0.78") } else { ("fd96::77", "fd96::78") };
        let mut view = sample();
        view.push(KernelChange::Frontend(cluster_ip("empty", first)));
        let error = nft.commit(&view, stamp(1)).unwrap_err();
        assert!(
            matches!(error, CommitError::Family { family: named, errno: libc::EPERM, .. } if named == family),
            "{error:?}"
        );
        assert!(error.to_string().contains(family), "{error}");
        assert!(node.table(other).contains(first), "the other family's changes are in force");
        assert_eq!(nft.stamp().unwrap(), None, "no generation is committed");
        // The engine repeats the changes that were not acknowledged, with the next ones.
        view.push(KernelChange::Frontend(cluster_ip("empty", second)));
        assert!(matches!(nft.commit(&view, stamp(2)), Err(CommitError::Family { .. })));
        assert!(node.table(other).contains(second));
        assert_eq!(nft.stamp().unwrap(), None);
        drop(owner);
        eventually("the foreign table is gone", || {
            !node.nft(&["list", "tables"], "").contains(&format!("{refused} "))
        });
        assert_eq!(nft.commit(&view, stamp(2)).unwrap().refused, vec![]);
        assert_eq!(nft.stamp().unwrap(), Some(stamp(2)));
        assert!(node.table(refused).contains("nat_prerouting"));
        let adopted = open(&node).adopt(&view, stamp(2)).unwrap();
        assert!(adopted.committed.is_none(), "both tables hold the view: {adopted:?}");
    }
}

/// SCTP has the verdicts of TCP and UDP: `reject` with ICMP port unreachable, in input only for node ports.
#[test]
fn sctp_without_endpoints_rejected_by_rule() {
    let node = Namespace::new("sctp");
    let sctp = |mut frontend: proto::Frontend| {
        for protocol in [
            frontend.key.as_mut().map(|key| &mut key.protocol),
            frontend.service_port.as_mut().map(|port| &mut port.protocol),
        ] {
            *protocol.unwrap() = proto::Protocol::Sctp as i32;
        }
        KernelChange::Frontend(frontend)
    };
    let mut view = facts();
    view.extend([
        sctp(cluster_ip("empty", "10.96.0.30")),
        sctp(load_balancer("empty", "198.51.100.9")),
        sctp(load_balancer_local("empty", "198.51.100.10")),
        sctp(node_port("empty", proto::Family::Ipv4, 30009)),
        sctp(cluster_ip("empty", "fd96::30")),
    ]);
    let committed = open(&node).commit(&view, stamp(1)).unwrap();
    assert_eq!(committed.refused, vec![]);
    let set = |family: &str, set: &str| node.nft(&["list", "set", family, "switchtower", set], "");
    let refused = set("ip", "refused");
    assert!(
        refused.contains("10.96.0.30 . sctp . 80") && refused.contains("198.51.100.9 . sctp . 80"),
        "{refused}"
    );
    assert!(set("ip6", "refused").contains("fd96::30 . sctp . 80"));
    let node_ports = set("ip", "refused_node_ports");
    assert!(node_ports.contains("192.0.2.1 . sctp . 30009") && !refused.contains("30009"), "{node_ports}");
    for (family, chain, set) in [
        ("ip", "no_endpoint_input", "@refused "),
        ("ip", "no_endpoint_input", "@refused_node_ports "),
        ("ip", "routed", "@refused "),
        ("ip6", "routed", "@refused "),
    ] {
        let rules = node.nft(&["list", "chain", family, "switchtower", chain], "");
        let rule = rules.lines().find(|line| line.contains(set)).unwrap_or_else(|| panic!("{rules}"));
        assert!(rule.contains("meta l4proto") && rule.contains("reject"), "any protocol: {rule}");
    }
}
