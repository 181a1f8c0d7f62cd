//! The engine between watches and a fleet whose nodes acknowledge after a delay.

use std::time::Duration;

use switchtower_core::compiled::Compiled;
use switchtower_core::layer::HealthCheckPlacement;
use switchtower_core::model::{Input, LayerId, ObjectKey, Service, ServicePortSpec};
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change as LayerChange, NodeRecord, Protocol};

use super::super::*;
use crate::fleet::Parts;
use crate::ingest::{Fact, Ingested};
use crate::propagation::new_trace;
use crate::status::{Floor, News};
use crate::watch::WatchedResource;

const NODES: usize = 100;

fn name(node: usize) -> Arc<str> {
    format!("n{node}").into()
}

/// Nodes that hold everything, with an open stream each.
fn connected_fleet() -> (Arc<Fleet>, Vec<u64>) {
    let fleet = Fleet::new(Parts::for_tests());
    let record = |node| NodeRecord { name: name(node).to_string(), ..NodeRecord::default() };
    let layer =
        |node| (LayerId::Node(name(node)), vec![LayerChange { change: Some(Op::Node(record(node))) }]);
    let compiled = Compiled { changes: (0..NODES).map(layer).collect(), ..Compiled::default() };
    fleet.publish(compiled, Publication::default(), Source::default());
    let open = |node| fleet.open(&name(node), &mut Floor::default(), HealthCheckPlacement::Shared).unwrap().0;
    let sessions: Vec<_> = (0..NODES).map(open).collect();
    acknowledge(&fleet, &sessions);
    (fleet, sessions)
}

/// Every node acknowledges the current revision.
fn acknowledge(fleet: &Fleet, sessions: &[u64]) {
    for (node, session) in sessions.iter().enumerate() {
        let subscription = fleet.subscription(&name(node)).unwrap();
        let cursor = fleet.read(|layers| layers.head(&subscription));
        fleet.reached(&name(node), *session, &cursor, None, |_| News::Progress);
    }
}

fn engine(fleet: Arc<Fleet>) -> mpsc::Sender<Batch> {
    let (sink, batches) = mpsc::channel(64);
    let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    let client = kube::Client::try_from(config).unwrap();
    let registry = Registry::new();
    let (events, _) =
        crate::events::publisher(client, "tower-0", crate::lease::Fence::default(), &registry).unwrap();
    let outputs = Outputs { head: watch::channel(None).0, nodes: Vec::new(), events, busy: Busy::default() };
    let metrics = EngineMetrics::new(&registry).unwrap();
    let controllers = watch::channel(BTreeSet::new()).1;
    let parts =
        super::Parts { compiler: Compiler::new(), fleet, outputs, metrics, new_trace: Box::new(new_trace) };
    tokio::spawn(run(parts, batches, controllers));
    sink
}

fn batch(resource: WatchedResource, facts: Vec<Ingested>, version: u64, synced: bool) -> Batch {
    Batch { resource, facts, resource_version: version, synced, received: SystemTime::now() }
}

fn service(number: u32) -> Ingested {
    let [_, b, c, d] = number.to_be_bytes();
    Ingested::gone(Fact::Input(Input::Service(Service {
        key: ObjectKey { namespace: "default".into(), name: format!("s{number}").into() },
        uid: format!("u{number}").into(),
        cluster_ips: vec![[10, b, c, d].into()],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        ..Service::default()
    })))
}

/// Number of publications of 400 changes in four seconds, if every node takes `delay` for an update.
async fn publications(delay: Duration) -> u64 {
    let (fleet, sessions) = connected_fleet();
    let sink = engine(fleet.clone());
    for resource in WatchedResource::ALL {
        sink.send(batch(resource, Vec::new(), 1, true)).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
    acknowledge(&fleet, &sessions);
    let before = fleet.revision();
    let agents = fleet.clone();
    let agents = tokio::spawn(async move {
        let mut held = before;
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if agents.revision() > held {
                tokio::time::sleep(delay).await;
                held = agents.revision();
                acknowledge(&agents, &sessions);
            }
        }
    });
    for number in 0..400 {
        let batch = batch(WatchedResource::Services, vec![service(number)], u64::from(number) + 2, false);
        sink.send(batch).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    agents.abort();
    assert_eq!(fleet.read(|layers| layers.source()).services, 401, "everything is published");
    fleet.revision() - before
}

#[tokio::test(start_paused = true)]
async fn busy_fleet_gets_one_publication_for_many_changes() {
    let fast = publications(Duration::ZERO).await;
    assert!(fast > 350, "{fast}: each change is published at once");
    let busy = publications(Duration::from_millis(50)).await;
    assert!((14..=20).contains(&busy), "{busy} publications, one per 250 ms");
    let overloaded = publications(Duration::from_secs(3)).await;
    assert!((5..=9).contains(&overloaded), "{overloaded} publications, one per 750 ms");
}
