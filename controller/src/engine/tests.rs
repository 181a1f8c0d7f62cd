//! The task with a real compiler and fleet.

use switchtower_core::compiled::{Problem, ProblemReason};
use switchtower_core::layer::{HealthCheckPlacement, Planned, Subscription};
use switchtower_core::model::{Input, Node, ObjectKey, Service, ServicePortSpec};
use switchtower_proto::v1::Protocol;

use super::*;
use crate::fleet::fleet_with_one_node;
use crate::ingest::{Fact, Ingested, NodeIdentity};
use crate::watch::WatchedResource;

mod pacing;

struct Lab {
    fleet: Arc<Fleet>,
    batches: mpsc::Sender<Batch>,
    controllers: watch::Sender<BTreeSet<SocketAddr>>,
    problems: mpsc::Receiver<(crate::events::Publisher, Problem)>,
    head: watch::Receiver<Option<Head>>,
    metrics: EngineMetrics,
}

impl Lab {
    /// Starts an engine whose first lists are complete.
    async fn start() -> Self {
        let (fleet, _) = fleet_with_one_node();
        let (batches, receiver) = mpsc::channel(16);
        let (controllers, reserved) = watch::channel(BTreeSet::new());
        let (queue, problems) = mpsc::channel(16);
        let (head, mut seen) = watch::channel(None);
        let outputs =
            Outputs { head, nodes: Vec::new(), events: EventSink::to(queue), busy: Busy::default() };
        let metrics = EngineMetrics::new(&Registry::new()).unwrap();
        let new_trace = Box::new(|| TraceContext { trace: 1, span: 2, sampled: false });
        let (compiler, fleet_of_engine) = (Compiler::new(), fleet.clone());
        let parts = Parts { compiler, fleet: fleet_of_engine, outputs, metrics: metrics.clone(), new_trace };
        tokio::spawn(run(parts, receiver, reserved));
        for resource in WatchedResource::ALL {
            batches.send(batch(resource, Vec::new(), true)).await.unwrap();
        }
        assert!(first_head(&mut seen).await);
        Self { fleet, batches, controllers, problems, head: seen, metrics }
    }

    /// Waits until the engine has processed this version of the Services.
    async fn processed(&mut self, version: u64) {
        let processed = |head: &Option<Head>| head.is_some_and(|head| head.source.services >= version);
        self.head.wait_for(processed).await.unwrap();
    }
}

fn batch(resource: WatchedResource, facts: Vec<Fact>, synced: bool) -> Batch {
    let facts: Vec<_> = facts.into_iter().map(Ingested::gone).collect();
    let resource_version = if synced { 1 } else { 1 + facts.len() as u64 };
    Batch { resource, facts, resource_version, synced, received: SystemTime::UNIX_EPOCH }
}

fn node(name: &str) -> Fact {
    let node = Node {
        name: name.into(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
        zone: None,
        eligible: true,
    };
    Fact::Node(
        node,
        NodeIdentity { name: name.into(), uid: "u".into(), kubelet_lost: None, labels: Arc::default() },
    )
}

fn service(external: &str, port: u16) -> Fact {
    Fact::Input(Input::Service(Service {
        key: ObjectKey { namespace: "default".into(), name: "web".into() },
        uid: "u".into(),
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port, node_port: None }],
        external_ips: vec![external.parse().unwrap()],
        ..Service::default()
    }))
}

#[tokio::test]
async fn heartbeats_take_no_place_among_named_changes() {
    let mut lab = Lab::start().await;
    lab.batches.send(batch(WatchedResource::Nodes, vec![node("n1")], false)).await.unwrap();
    lab.batches.send(batch(WatchedResource::Services, vec![node("n1")], false)).await.unwrap();
    lab.processed(2).await;
    let subscription = Subscription {
        node: "n1".into(),
        zone: None,
        settings: ("builtin".into(), 0),
        health_checks: HealthCheckPlacement::Shared,
    };
    let (before, counted) = (lab.fleet.read(|layers| layers.head(&subscription)), lab.metrics.changes.get());
    let mut facts = vec![node("n1"); 2 * NAMED_CHANGES];
    facts.push(service("198.51.100.1", 80));
    lab.batches.send(batch(WatchedResource::Services, facts, false)).await.unwrap();
    lab.processed(2 + 2 * NAMED_CHANGES as u64).await;
    let Planned::Update(plan) = lab.fleet.read(|layers| layers.plan(&subscription, Some(&before))) else {
        panic!("nothing is to be sent")
    };
    let named: Vec<_> = plan.infos.iter().map(|info| &*info.object).collect();
    assert_eq!(named, ["Service default/web"]);
    assert_eq!(lab.metrics.changes.get() - counted, 1);
}

#[tokio::test]
async fn addresses_of_later_replicas_are_reserved() {
    let mut lab = Lab::start().await;
    let taken = service("198.51.100.7", 9_443);
    lab.batches.send(batch(WatchedResource::Services, vec![taken], false)).await.unwrap();
    lab.processed(2).await;
    let before = lab.fleet.revision();
    lab.controllers.send(["198.51.100.7:9443".parse().unwrap()].into()).unwrap();
    let (_, problem) = lab.problems.recv().await.unwrap();
    assert_eq!(problem.reason, ProblemReason::ControlPlaneAddress);
    let moved = |head: &Option<Head>| head.is_some_and(|head| head.revision > before);
    lab.head.wait_for(moved).await.unwrap();
}
