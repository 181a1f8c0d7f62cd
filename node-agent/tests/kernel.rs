//! Content of the kernel after commits, restarts and disturbances, read back by `nft`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::{CommitError, Dataplane};
use switchtower_node_agent::kernel::nft::{self, Monitor, Nft, Notice};
use switchtower_proto::address_bytes;
use switchtower_proto::v1::{self as proto, Role};

fn open(namespace: &Namespace) -> Nft {
    namespace.run(|| Nft::open().unwrap())
}

/// One Service of each kind, both families.
fn sample() -> Vec<KernelChange> {
    let ranges = vec![cidr("192.0.2.0/24"), cidr("2001:db8::/32")];
    let mut view = facts();
    view.extend([
        pool("web", Role::Cluster, &PODS, &[]),
        pool("web", Role::Local, &PODS[..1], &[]),
        pool("sticky", Role::Cluster, &PODS[..2], &[]),
        pool("sticky", Role::Local, &PODS[..1], &[]),
        pool("web", Role::Cluster, &PODS6, &[]),
        pool("web", Role::Local, &PODS6[..1], &[]),
        udp_pool("dns", Role::Cluster, &PODS[..2], &[]),
        KernelChange::Frontend(cluster_ip("web", "10.96.0.10")),
        KernelChange::Frontend(cluster_ip("web", "fd96::10")),
        KernelChange::Frontend(udp(cluster_ip("dns", "10.96.0.53"))),
        KernelChange::Frontend(cluster_ip("empty", "10.96.0.30")),
        KernelChange::Frontend(load_balancer("web", "198.51.100.1")),
        KernelChange::Frontend(load_balancer_local("web", "198.51.100.2")),
        KernelChange::Frontend(load_balancer_local("web", "2001:db8:5::2")),
        KernelChange::Frontend(proto::Frontend {
            source_ranges: ranges.clone(),
            ..load_balancer("web", "198.51.100.3")
        }),
        KernelChange::Frontend(proto::Frontend {
            source_ranges: ranges,
            ..load_balancer("web", "2001:db8:5::3")
        }),
        KernelChange::Frontend(proto::Frontend {
            affinity_seconds: 10800,
            ..cluster_ip("sticky", "10.96.0.20")
        }),
        KernelChange::Frontend(proto::Frontend {
            affinity_seconds: 10800,
            ..load_balancer_local("sticky", "198.51.100.4")
        }),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv4, 30080)),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv6, 30080)),
    ]);
    view
}

#[test]
fn programmed_tables_equal_golden_text_and_reload() {
    let node = Namespace::new("golden");
    let committed = open(&node).commit(&sample(), stamp(42)).unwrap();
    assert_eq!(committed.refused, vec![]);
    for family in ["ip", "ip6"] {
        let text = node.table(family);
        node.nft(&["-c", "-f", "-"], &text);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{family}.nft"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, golden, "run with UPDATE_GOLDEN=1 and review the difference of {}", path.display());
    }
    // A table loaded from its own text prints the same text.
    let other = Namespace::new("golden-copy");
    for family in ["ip", "ip6"] {
        let text = node.table(family);
        other.nft(&["-f", "-"], &text);
        assert_eq!(other.table(family), text);
    }
}

#[test]
fn restart_adopts_without_writing() {
    let node = Namespace::new("adopt");
    let mut first = open(&node);
    first.commit(&sample(), stamp(1)).unwrap();
    // History: slots are no longer in the order of the view, numbers have gaps, a size is unused.
    first.commit(&[pool("web", Role::Cluster, &[], &PODS[..1])], stamp(2)).unwrap();
    first.commit(&[pool("web", Role::Cluster, &PODS[..1], &[])], stamp(3)).unwrap();
    drop(first);
    let mut nft = open(&node);
    assert_eq!(nft.stamp().unwrap(), Some(stamp(3)));
    let before = (nft.ruleset_generation().unwrap(), node.table("ip"));
    let adopted = nft.adopt(&sample(), stamp(3)).unwrap();
    assert!(adopted.committed.is_none(), "{adopted:?}");
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert_eq!((nft.ruleset_generation().unwrap(), node.table("ip")), before);
    // Then exactly the next change: two slots, a backend, and the values of the frontends with the size.
    let committed = nft.commit(&[pool("web", Role::Local, &PODS[1..2], &[])], stamp(4)).unwrap();
    assert!((1..30).contains(&committed.operations), "{committed:?}");
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert_eq!(nft.stamp().unwrap(), Some(stamp(4)));
}

#[test]
fn table_of_another_layout_replaced_in_one_transaction() {
    let node = Namespace::new("layout");
    let old = "table ip switchtower {
        map frontends {
            type ipv4_addr . inet_proto . inet_service : classid
            elements = { 10.96.0.10 . tcp . 80 : 0:2005 }
        }
        map picks { type classid : verdict; elements = { 0:5 : goto pick-plain-1 }; }
        map stamp {
            type mark : ipv6_addr
            elements = { 0x00000000 : ::2a:0:0:0:7, 0x00000001 : ::2a:2:0:0:0, 0x00000002 : ::1 }
        }
        set allowed_sources {
            type ipv4_addr . inet_proto . inet_service . ipv4_addr
            flags interval
        }
        chain pick-plain-1 { drop; }
        chain services { meta priority & 0:fff vmap @picks; }
        chain nat_output { type nat hook output priority -100; policy accept; jump services; }
    }";
    node.nft(&["-f", "-"], old);
    let mut nft = open(&node);
    assert_eq!(nft.stamp().unwrap(), None);
    let before = nft.ruleset_generation().unwrap();
    nft.adopt(&sample(), stamp(1)).unwrap();
    assert_eq!(nft.ruleset_generation().unwrap(), before + 1, "one transaction: no gap");
    assert_eq!(nft.repair().unwrap().differences, 0);
    let text = node.table("ip");
    assert!(!text.contains("picks") && !text.contains("allowed_sources"), "{text}");
}

#[test]
fn adoption_repairs_only_what_differs() {
    let node = Namespace::new("adopt-differs");
    open(&node).commit(&sample(), stamp(1)).unwrap();
    node.nft(&["delete", "element", "ip", "switchtower", "frontends", "{ 10.96.0.10 . tcp . 80 }"], "");
    node.nft(&["add", "element", "ip", "switchtower", "vips", "{ 10.96.0.99 }"], "");
    let mut nft = open(&node);
    let adopted = nft.adopt(&sample(), stamp(1)).unwrap().committed.unwrap();
    assert_eq!(adopted.operations, 2);
    assert_eq!(nft.repair().unwrap().differences, 0);
    // A view without a Service: its elements are removed.
    let smaller: Vec<KernelChange> = facts();
    nft.adopt(&smaller, stamp(2)).unwrap();
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert!(!node.table("ip").contains("10.96.0.10"));
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn disturbances_noticed_and_repaired() {
    let node = Namespace::new("disturb");
    let mut nft = open(&node);
    let port = nft.port().unwrap();
    let mut monitor = node.run(|| Monitor::open(port).unwrap());
    nft.commit(&sample(), stamp(1)).unwrap();
    nft.commit(&[pool("web", Role::Cluster, &[], &PODS[..1])], stamp(2)).unwrap();
    let text = (node.table("ip"), node.table("ip6"));
    node.nft(&["add", "table", "ip", "foreign"], "");
    assert_eq!(
        monitor.wait(Duration::from_millis(200)).unwrap(),
        None,
        "own changes and foreign tables cause no notice"
    );
    let changed = Notice::Changed;
    for (disturbance, notice) in [
        ("delete element ip switchtower frontends { 10.96.0.10 . tcp . 80 }", changed),
        ("add element ip switchtower frontends { 10.96.0.77 . tcp . 80 : 0:7 }", changed),
        ("add element ip6 switchtower service_cidrs { fd99::/64 }", changed),
        ("flush map ip switchtower backends", changed),
        ("flush map ip switchtower stamp", changed),
        ("flush map ip switchtower source_lists", changed),
        ("flush map ip switchtower sticky_pools", changed),
        ("flush set ip6 switchtower sources-1", changed),
        ("add element ip switchtower sources-1 { 203.0.113.0/24 }", changed),
        (
            "add set ip switchtower sources-9 { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }",
            changed,
        ),
        ("flush chain ip switchtower sources-1", changed),
        ("flush chain ip switchtower size-3", changed),
        ("flush chain ip switchtower services", changed),
        ("insert rule ip switchtower services accept", changed),
        ("add rule ip6 switchtower nat_output counter", changed),
        ("add chain ip switchtower more", changed),
        (
            "add chain ip switchtower hooked { type filter hook input priority 0; }; add rule ip switchtower hooked drop",
            changed,
        ),
        ("add set ip switchtower more { type ipv4_addr; }", changed),
        (
            "add chain ip switchtower more; add map ip switchtower verdicts { type ipv4_addr : verdict; }; \
             add element ip switchtower verdicts { 10.0.0.1 : goto more, 10.0.0.2 : goto services }",
            changed,
        ),
        ("add element ip switchtower local_pods { 10.0.0.0-10.0.0.7, 11.0.0.1-11.0.0.9 }", changed),
        ("add table ip switchtower { flags dormant; }", changed),
        ("delete table ip6 switchtower", Notice::TableDeleted),
        ("flush ruleset", Notice::TableDeleted),
    ] {
        node.nft(&[disturbance], "");
        assert_eq!(monitor.wait(Duration::from_secs(2)).unwrap(), Some(notice), "{disturbance}");
        assert!(nft.repair().unwrap().differences > 0, "{disturbance}");
        assert_eq!(nft.repair().unwrap().differences, 0, "{disturbance}");
        assert_eq!(normal(&node.table("ip")), normal(&text.0), "{disturbance}");
        assert_eq!(normal(&node.table("ip6")), normal(&text.1), "{disturbance}");
        assert_eq!(monitor.wait(Duration::from_millis(50)).unwrap(), None, "{disturbance}: our own repair");
    }
    // A commit without tables rebuilds them with the change.
    node.nft(&["flush", "ruleset"], "");
    nft.commit(&[pool("web", Role::Cluster, &PODS[..1], &[])], stamp(3)).unwrap();
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert_eq!(nft.stamp().unwrap(), Some(stamp(3)));
    // A commit repairs the changed elements that it touches.
    node.nft(&["delete element ip switchtower frontends { 10.96.0.10 . tcp . 80 }"], "");
    nft.commit(&[KernelChange::FrontendRemoved(cluster_ip("web", "10.96.0.10").key.unwrap())], stamp(4))
        .unwrap();
    node.nft(&["add element ip switchtower frontends { 10.96.0.10 . tcp . 80 : 0:7 }"], "");
    nft.commit(&[KernelChange::Frontend(cluster_ip("web", "10.96.0.10"))], stamp(5)).unwrap();
    assert_eq!(nft.repair().unwrap().differences, 0);
}

/// The sorted lines of a table: the order of slots and chains depends on history.
fn normal(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .split(['\n', ','])
        .map(|line| line.replace("elements = {", "").replace('}', "").trim().to_owned())
        .collect();
    lines.sort();
    lines.retain(|line| !line.is_empty());
    lines
}

#[test]
fn foreign_reference_does_not_keep_a_chain() {
    let node = Namespace::new("reference");
    let mut nft = open(&node);
    let mut view = service("one", "10.96.0.1", &PODS);
    let restricted = load_balancer("one", "198.51.100.1");
    let key = restricted.key.clone().unwrap();
    let source_ranges = vec![cidr("192.0.2.0/24")];
    view.push(KernelChange::Frontend(proto::Frontend { source_ranges, ..restricted }));
    nft.commit(&view, stamp(1)).unwrap();
    let chain = "sources-1";
    assert!(node.table("ip").contains(chain));
    let map = "add map ip switchtower verdicts { type ipv4_addr : verdict; }";
    node.nft(&[map], "");
    node.nft(
        &["add", "element", "ip", "switchtower", "verdicts", &format!("{{ 10.0.0.1 : goto {chain} }}")],
        "",
    );
    // The list of sources is gone and so is its chain; the map is not known yet.
    nft.commit(&[KernelChange::FrontendRemoved(key)], stamp(2)).unwrap();
    assert!(!node.table("ip").contains(chain));
    assert_eq!(nft.repair().unwrap().differences, 0);
}

#[test]
fn deleted_table_rebuilt_by_the_next_commit() {
    let node = Namespace::new("flushed");
    let mut nft = open(&node);
    nft.commit(&sample(), stamp(1)).unwrap();
    // A commit before the notice that the tables are gone, with one element of each set.
    node.nft(&["flush", "ruleset"], "");
    let committed = nft.commit(&service("one", "10.96.0.88", &PODS[..1]), stamp(2)).unwrap();
    assert_eq!(committed.refused, vec![]);
    assert!(node.table("ip").contains("10.96.0.88 . tcp . 80"));
    // The same for an endpoint of an existing Service.
    node.nft(&["delete", "table", "ip", "switchtower"], "");
    let committed = nft.commit(&[pool("one", Role::Cluster, &PODS[1..2], &[])], stamp(3)).unwrap();
    assert_eq!(committed.refused, vec![]);
    assert_eq!(nft.repair().unwrap().differences, 0);
    let mut view = sample();
    view.extend(service("one", "10.96.0.88", &PODS[..2]));
    assert!(open(&node).adopt(&view, stamp(3)).unwrap().committed.is_none(), "nothing is missing");
}

#[test]
fn nothing_committed_without_the_capability() {
    let node = Namespace::new("eperm");
    let mut nft = open(&node);
    nft.commit(&sample(), stamp(1)).unwrap();
    let text = node.table("ip");
    let error = node.run(|| {
        // SAFETY: only this thread gives up its user id, and with it the capability.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        nft.commit(&[pool("web", Role::Cluster, &[], &PODS)], stamp(2)).unwrap_err()
    });
    assert!(matches!(error, CommitError::Refused { errno: libc::EPERM, .. }), "{error:?}");
    assert_eq!(node.table("ip"), text);
    // The mirror was undone: later commits are correct.
    assert_eq!(nft.commit(&[], stamp(2)).unwrap().refused, vec![]);
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert!(node.table("ip").contains("10.96.0.10 . tcp . 80"));
    let adopted = open(&node).adopt(&sample(), stamp(2)).unwrap();
    assert!(adopted.committed.is_none(), "{adopted:?}");
}

#[test]
fn frontends_swap_addresses_in_one_batch() {
    let node = Namespace::new("swap");
    let mut nft = open(&node);
    let mut view = facts();
    view.extend(service("a", "10.96.0.1", &PODS[..1]));
    view.extend(service("b", "10.96.0.2", &PODS[1..]));
    nft.commit(&view, stamp(1)).unwrap();
    let value = |address: &str| {
        let elements = node.run(|| nft::inspect().unwrap()).remove(0).elements;
        let prefix = format!("frontends {address}:80/TCP");
        elements
            .into_iter()
            .find(|line| line.starts_with(&prefix))
            .unwrap()
            .split(" : ")
            .nth(1)
            .unwrap()
            .to_owned()
    };
    let before = (value("10.96.0.1"), value("10.96.0.2"));
    let swap = [
        KernelChange::Frontend(cluster_ip("a", "10.96.0.2")),
        KernelChange::Frontend(cluster_ip("b", "10.96.0.1")),
    ];
    let committed = nft.commit(&swap, stamp(2)).unwrap();
    assert_eq!(committed.operations, 4);
    assert_eq!((value("10.96.0.2"), value("10.96.0.1")), before);
    assert_eq!(nft.repair().unwrap().differences, 0);
}

/// `count` Services of `count` different sizes.
fn sizes(count: u32) -> Vec<KernelChange> {
    let mut view = facts();
    for size in 1..=count {
        let endpoints: Vec<String> = (0..size)
            .map(|number| format!("10.{}.{}.{}:80", size >> 8, size & 255, number % 250 + 1))
            .collect();
        let endpoints: Vec<String> = endpoints
            .into_iter()
            .enumerate()
            .map(|(number, text)| text.replace(":80", &format!(":{}", 80 + number / 250)))
            .collect();
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        let address = format!("10.96.{}.{}", size >> 8, size & 255);
        view.extend(service(&format!("s{size}"), &address, &endpoints));
    }
    view
}

#[test]
fn four_hundred_sizes_programmed_exactly() {
    let node = Namespace::new("sizes");
    let mut nft = open(&node);
    let committed = nft.commit(&sizes(400), stamp(1)).unwrap();
    assert_eq!(committed.refused, vec![]);
    let summary = node.run(|| nft::inspect().unwrap()).remove(0);
    let slots = summary.elements.iter().filter(|line| line.starts_with("slots")).count();
    assert_eq!(slots, 400 * 401 / 2);
    let empty = Namespace::new("sizes-none");
    open(&empty).commit(&facts(), stamp(1)).unwrap();
    assert_eq!(summary.chains, empty.run(|| nft::inspect().unwrap()).remove(0).chains, "chains are constant");
    let adopted = open(&node).adopt(&sizes(400), stamp(1)).unwrap();
    assert!(adopted.committed.is_none());
}

#[test]
fn pool_grows_and_shrinks_by_a_few_elements() {
    let node = Namespace::new("growth");
    let mut nft = open(&node);
    let mut view = sizes(20);
    let sticky = cluster_ip("grows", "10.97.0.1");
    view.push(KernelChange::Frontend(proto::Frontend { affinity_seconds: 60, ..sticky }));
    view.push(KernelChange::Frontend(cluster_ip("grows", "10.97.0.2")));
    nft.commit(&view, stamp(1)).unwrap();
    let endpoints: Vec<String> = (0..70).map(|number| format!("10.9.0.{number}:80")).collect();
    let changes = endpoints.iter().map(|endpoint| (endpoint, true));
    let changes = changes.chain(endpoints.iter().map(|endpoint| (endpoint, false)));
    for (number, (endpoint, added)) in (2..).zip(changes) {
        let one = [endpoint.as_str()];
        let (added, removed): (&[&str], &[&str]) = if added { (&one, &[]) } else { (&[], &one) };
        let change = [pool("grows", Role::Cluster, added, removed)];
        let committed = nft.commit(&change, stamp(number)).unwrap();
        // Two slots, a backend, and where the size class changes its value and two frontends; each at most replaced.
        assert!(committed.operations <= 16, "{endpoint}: {committed:?}");
    }
    assert_eq!(nft.repair().unwrap().differences, 0);
}

#[test]
fn cleanup_removes_only_own_tables() {
    let node = Namespace::new("cleanup");
    assert!(!node.run(|| nft::cleanup().unwrap()));
    node.nft(&["add", "table", "ip", "foreign"], "");
    open(&node).commit(&sample(), stamp(1)).unwrap();
    assert_eq!(node.run(|| nft::inspect().unwrap()).len(), 2);
    node.nft(&["delete", "table", "ip6", "switchtower"], "");
    assert!(node.run(|| nft::cleanup().unwrap()));
    assert_eq!(node.nft(&["list", "tables"], "").trim(), "table ip foreign");
    assert_eq!(open(&node).stamp().unwrap(), None);
}

/// One line for one side of a frontend: verdict and endpoints.
fn side(target: Option<&proto::KernelTarget>) -> String {
    let target = target.unwrap();
    let endpoints = target.endpoints.iter().map(|endpoint| {
        let address = <[u8; 4]>::try_from(endpoint.address.as_slice()).unwrap();
        format!(" {}:{}", std::net::Ipv4Addr::from(address), endpoint.port)
    });
    format!("{:?}{}", target.verdict(), endpoints.collect::<String>())
}

#[test]
fn reader_follows_the_maps_to_the_endpoints() {
    let node = Namespace::new("reader");
    let mut nft = open(&node);
    let mut view = facts();
    view.extend(service("a", "10.96.0.1", &PODS[..2]));
    view.push(KernelChange::Frontend(cluster_ip("none", "10.96.0.2")));
    nft.commit(&view, stamp(5)).unwrap();
    let mut reader = node.run(|| nft::KernelReader::open().unwrap());
    let ask = |address: Option<&str>, port| proto::FrontendKey {
        family: proto::Family::Ipv4.into(),
        address: address.map(|address| address_bytes(address.parse().unwrap())).unwrap_or_default(),
        protocol: proto::Protocol::Tcp.into(),
        port,
    };
    let queries =
        [ask(Some("10.96.0.1"), 80), ask(Some("10.96.0.2"), 80), ask(Some("10.96.0.3"), 80), ask(None, 81)];
    let found = reader.lookup(&queries).unwrap();
    assert_eq!(found.stamp.as_ref().unwrap().generation, 5);
    let sides: Vec<String> = found.frontends.iter().map(|found| side(found.inside.as_ref())).collect();
    assert_eq!(sides, [format!("Forward {} {}", PODS[0], PODS[1]), "Reject".to_owned()]);
    // The same by port only, and in the dump of everything.
    let all = reader.frontends(100).unwrap();
    assert_eq!(all.frontends, found.frontends);
    assert_eq!(reader.lookup(&[ask(None, 80)]).unwrap().frontends, found.frontends);
    let limited = reader.frontends(1).unwrap();
    assert_eq!((limited.frontends.len(), limited.total), (1, 2));

    let elements = reader.elements("10.96.0.2", 100).unwrap().elements;
    assert!(elements.iter().any(|line| line == "ip refused 10.96.0.2:80/TCP"), "{elements:?}");
    let chains = reader.chains().unwrap().chains;
    let hooked = chains.iter().find(|chain| chain.family == "ip" && chain.name == "nat_prerouting").unwrap();
    assert_eq!(
        (hooked.hook.as_str(), hooked.rules, hooked.foreign),
        ("nat hook prerouting priority -101", 1, 0)
    );
    assert!(chains.iter().any(|chain| chain.family == "ip6"));
}

#[test]
fn reader_sees_foreign_changes_and_a_missing_table() {
    let node = Namespace::new("reader-foreign");
    let mut nft = open(&node);
    let mut reader = node.run(|| nft::KernelReader::open().unwrap());
    let empty = reader.frontends(10).unwrap();
    assert_eq!((empty.stamp, empty.frontends.len()), (None, 0));
    let mut view = facts();
    view.extend(service("a", "10.96.0.1", &PODS[..2]));
    nft.commit(&view, stamp(1)).unwrap();
    node.nft(&["flush", "map", "ip", "switchtower", "backends"], "");
    node.nft(&["add", "rule", "ip", "switchtower", "services", "accept"], "");
    let found = reader.frontends(10).unwrap().frontends.remove(0);
    assert_eq!(side(found.inside.as_ref()), "Broken");
    let chains = reader.chains().unwrap().chains;
    let foreign: Vec<_> = chains.iter().filter(|chain| chain.foreign > 0).map(|chain| &chain.name).collect();
    assert_eq!(foreign, ["services"]);
}
