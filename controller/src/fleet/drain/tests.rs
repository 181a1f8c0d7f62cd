//! The drain gate of a fleet: queries, acknowledgements and lost nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use switchtower_core::compiled::{Compiled, Problem, ProblemObject, ProblemReason};
use switchtower_core::drain::Socket;
use switchtower_core::drain::host_pods::HostEndpoint;
use switchtower_core::layer::HealthCheckPlacement;
use switchtower_core::locality::PodChange;
use switchtower_core::model::{LayerId, ObjectKey};
use switchtower_core::propagation::Publication;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{
    Change, Endpoint, Family, PoolKey, PoolPatch, Role, ServicePort, Settings, Source,
};

use super::super::reports::MAX_PER_MINUTE;
use super::super::reports::tests::fleet;
use super::*;
use crate::status::Floor;

const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 7));
const SECOND: Duration = Duration::from_secs(1);

fn key() -> PoolKey {
    let service = ServicePort { namespace: "default".into(), name: "web".into(), ..ServicePort::default() };
    PoolKey { service_port: Some(service), family: Family::Ipv4 as i32, role: Role::Cluster as i32 }
}

fn publish(fleet: &Fleet, op: Op) -> u64 {
    let changes = BTreeMap::from([(LayerId::Cluster, vec![Change { change: Some(op) }])]);
    fleet.publish(Compiled { changes, ..Compiled::default() }, Publication::default(), Source::default())
}

fn add_pod(fleet: &Fleet) -> u64 {
    let added = vec![Endpoint { address: vec![10, 244, 1, 7], port: 8080 }];
    publish(fleet, Op::Pool(PoolPatch { key: Some(key()), added, removed: Vec::new() }))
}

fn remove_pod(fleet: &Fleet) -> u64 {
    publish(fleet, Op::PoolRemoved(key()))
}

/// A fleet whose settings have a drain gate, with one connected node that holds the pod's pool, long after the start.
async fn gated() -> (Arc<Fleet>, u64) {
    let (fleet, session, _) = reporting().await;
    (fleet, session)
}

/// The fleet with the problems that it reports.
async fn reporting() -> (Arc<Fleet>, u64, Arc<Mutex<Vec<Problem>>>) {
    let (fleet, problems) = fleet();
    let settings = Settings { drain_gate_port: 9910, ..Settings::default() };
    fleet.set_settings(&BTreeMap::from([(("p".into(), 1), settings)]));
    fleet.accept();
    let (session, _) = fleet.open(&"n1".into(), &mut Floor::default(), HealthCheckPlacement::Shared).unwrap();
    let revision = add_pod(&fleet);
    fleet.holds(&"n1".into(), session, revision);
    tokio::time::advance(100 * SECOND).await;
    (fleet, session, problems)
}

fn ask(fleet: &Arc<Fleet>) -> tokio::task::JoinHandle<Drained> {
    let fleet = fleet.clone();
    tokio::spawn(async move { fleet.drain(Some("n1"), &PodIdentity::Address(POD), 25 * SECOND).await })
}

#[tokio::test(start_paused = true)]
async fn query_answered_with_the_acknowledgement_of_the_removal() {
    let (fleet, session) = gated().await;
    let query = ask(&fleet);
    tokio::time::sleep(SECOND).await;
    let removed = remove_pod(&fleet);
    fleet.holds(&"n1".into(), session, removed - 1);
    tokio::time::sleep(SECOND).await;
    assert!(!query.is_finished());
    fleet.holds(&"n1".into(), session, removed);
    let drained = query.await.unwrap();
    assert_eq!((drained.verdict_name(), drained.took), ("Drained", 2 * SECOND));
    assert_eq!(drained.answer.waited_for.names, ["n1".into()]);
}

#[tokio::test(start_paused = true)]
async fn timeout_names_the_state() {
    let (fleet, _) = gated().await;
    assert_eq!(ask(&fleet).await.unwrap().verdict_name(), "LastEndpoint", "in a pool, but not ready");
    fleet.pods_changed(&[PodChange { node: "n1".into(), address: POD, present: true }]);
    let drained = ask(&fleet).await.unwrap();
    assert_eq!((drained.verdict_name(), drained.took), ("TimedOut", 25 * SECOND));
    remove_pod(&fleet);
    let drained = ask(&fleet).await.unwrap();
    assert_eq!(drained.verdict_name(), "TimedOut");
    assert_eq!(drained.answer.waited_for.names, ["n1".into()]);
    let other = PodIdentity::Address("10.244.9.9".parse().unwrap());
    let unknown = fleet.drain(Some("n1"), &other, SECOND).await;
    assert_eq!((unknown.verdict_name(), unknown.took), ("NotAnEndpoint", Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn lost_node_is_excluded_after_the_grace_period() {
    let (fleet, session) = gated().await;
    let query = ask(&fleet);
    tokio::time::sleep(SECOND).await;
    fleet.close(&"n1".into(), session, true);
    remove_pod(&fleet);
    let drained = query.await.unwrap();
    assert_eq!((drained.verdict_name(), drained.answer.missing.total), ("Drained", 1));
    assert_eq!(drained.took, SECOND + switchtower_core::drain::GRACE);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_recorded_without_a_drain_gate() {
    let (fleet, _) = gated().await;
    assert!(lock(&fleet.drains.open).is_some());
    fleet.set_settings(&BTreeMap::new());
    assert!(lock(&fleet.drains.open).is_none());
    remove_pod(&fleet);
    // The first query starts to record; every node must confirm what it holds.
    let query = ask(&fleet);
    tokio::time::sleep(SECOND).await;
    assert!(!query.is_finished());
    let drained = query.await.unwrap();
    assert_eq!((drained.verdict_name(), drained.answer.missing.total), ("Drained", 1));
}

#[tokio::test(start_paused = true)]
async fn abandoned_queries_leave_nothing_behind() {
    let (fleet, _) = gated().await;
    for _ in 0..100 {
        let query = ask(&fleet);
        tokio::task::yield_now().await;
        query.abort();
        let _ = query.await;
    }
    let open = lock(&fleet.drains.open);
    let open = open.as_ref().unwrap();
    assert_eq!((open.gate.waiting(), open.replies.len()), (0, 0));
}

fn host_pod(name: &str) -> PodIdentity {
    PodIdentity::HostNetwork(ObjectKey { namespace: "default".into(), name: name.into() })
}

/// An endpoint of a host-network pod on a node, with the address of the pool.
fn host_endpoint(name: &str, node: &str, port: u16, present: bool) -> HostPodChange {
    let socket = Socket { address: POD, protocol: 0, port };
    let pod = PodId::of("default", name);
    HostPodChange { endpoint: HostEndpoint { pod, node: node.into(), socket, ready: false }, present }
}

#[tokio::test(start_paused = true)]
async fn host_network_pod_is_identified_by_name_and_node() {
    let (fleet, session) = gated().await;
    // Of three pods with the address one is in the pool.
    fleet.host_pods_changed(&[
        host_endpoint("web", "n1", 8080, true),
        host_endpoint("idle", "n1", 9090, true),
        host_endpoint("foreign", "n2", 8080, true),
    ]);
    let drain = async |name: &str, timeout| fleet.drain(Some("n1"), &host_pod(name), timeout).await;
    for name in ["idle", "foreign", "unknown"] {
        let drained = drain(name, 25 * SECOND).await;
        assert_eq!((drained.verdict_name(), drained.took), ("NotAnEndpoint", Duration::ZERO), "{name}");
    }
    assert_eq!(drain("web", SECOND).await.verdict_name(), "LastEndpoint", "in a pool, but not ready");
    let ready = host_endpoint("web", "n1", 8080, true);
    let ready = HostPodChange { endpoint: HostEndpoint { ready: true, ..ready.endpoint }, ..ready };
    fleet.host_pods_changed(&[ready.clone(), host_endpoint("web", "n1", 8080, false)]);
    assert_eq!(drain("web", SECOND).await.verdict_name(), "TimedOut");
    // The EndpointSlice may be deleted before the hook asks.
    fleet.host_pods_changed(&[HostPodChange { present: false, ..ready }]);
    let removed = remove_pod(&fleet);
    assert_eq!(drain("web", SECOND).await.answer.waited_for.names, ["n1".into()]);
    fleet.holds(&"n1".into(), session, removed);
    assert_eq!(drain("web", SECOND).await.verdict_name(), "Drained");
}

#[tokio::test(start_paused = true)]
async fn event_reported_only_if_the_gate_gave_up() {
    let (fleet, session, problems) = reporting().await;
    let node: Arc<str> = "n1".into();
    let report = async |pod: PodIdentity| {
        let drained = fleet.drain(Some("n1"), &pod, 5 * SECOND).await;
        fleet.report_drain(&node, pod, &drained);
        std::mem::take(&mut *problems.lock().unwrap())
    };
    let pod = PodIdentity::Address(POD);
    let object = ProblemObject::Pod { node: node.clone(), pod: pod.clone() };
    let reported = report(pod.clone()).await;
    assert_eq!((&reported[0].object, reported[0].reason), (&object, ProblemReason::DrainGateLastEndpoint));
    assert!(reported[0].message.contains("waited 5.0 s"), "{reported:?}");
    let removed = remove_pod(&fleet);
    let reported = report(pod.clone()).await;
    assert_eq!(reported[0].reason, ProblemReason::DrainGateTimedOut);
    assert!(
        reported[0].message.contains("node n1 has not acknowledged the removal of the pod"),
        "{reported:?}"
    );
    fleet.holds(&node, session, removed);
    assert_eq!(report(pod).await, [], "drained");
    assert_eq!(report(host_pod("unknown")).await, []);
}

#[tokio::test(start_paused = true)]
async fn events_of_a_node_are_limited() {
    let (fleet, _, problems) = reporting().await;
    let node: Arc<str> = "n1".into();
    let flood = async || {
        for _ in 0..200 {
            let pod = PodIdentity::Address(POD);
            let drained = fleet.drain(Some("n1"), &pod, Duration::ZERO).await;
            fleet.report_drain(&node, pod, &drained);
        }
        std::mem::take(&mut *problems.lock().unwrap()).len()
    };
    assert_eq!(flood().await, MAX_PER_MINUTE as usize);
    tokio::time::advance(60 * SECOND).await;
    assert_eq!(flood().await, MAX_PER_MINUTE as usize);
}

#[tokio::test(start_paused = true)]
async fn two_thousand_pods_that_terminate_at_once_are_all_answered() {
    const PODS: u16 = 2_000;
    let (fleet, session) = gated().await;
    let pod = |index: u16| IpAddr::from([10, 245, (index >> 8) as u8, index as u8]);
    let endpoint = |index| Endpoint { address: switchtower_proto::address_bytes(pod(index)), port: 8080 };
    let added = (0..PODS).map(endpoint).collect();
    let held = publish(&fleet, Op::Pool(PoolPatch { key: Some(key()), added, removed: Vec::new() }));
    fleet.holds(&"n1".into(), session, held);
    let queries: Vec<_> = (0..PODS)
        .map(|index| {
            let (fleet, pod) = (fleet.clone(), PodIdentity::Address(pod(index)));
            tokio::spawn(async move { fleet.drain(Some("n1"), &pod, 25 * SECOND).await })
        })
        .collect();
    tokio::time::sleep(SECOND).await;
    // Each removal is a publication, as with slices of many Services.
    for index in 0..PODS {
        let removed = vec![endpoint(index)];
        publish(&fleet, Op::Pool(PoolPatch { key: Some(key()), added: Vec::new(), removed }));
    }
    fleet.holds(&"n1".into(), session, fleet.revision());
    for query in queries {
        let drained = query.await.unwrap();
        assert_eq!((drained.verdict_name(), drained.took), ("Drained", SECOND));
    }
}
