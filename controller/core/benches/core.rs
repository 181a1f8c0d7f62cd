//! Micro-benchmarks of the controller's pure core, with allocations: `make bench PART=micro`.
//!
//! Each Service has three endpoints. The costs of one endpoint change must not grow with the number of Services.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark ends at the first error")]
#![allow(missing_docs, reason = "names of benchmarks")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::slice;
use divan::Bencher;
use prost::Message as _;
use switchtower_core::compile::Compiler;
use switchtower_core::layer::{HealthCheckPlacement, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::Input;
use switchtower_proto::v1::{Source, Update};

#[global_allocator]
static ALLOCATOR: divan::AllocProfiler = divan::AllocProfiler::system();

const NODES: u32 = 100;
const SERVICES: [u32; 3] = [1_000, 10_000, 50_000];

fn main() {
    divan::main();
}

/// A compiled cluster.
struct Cluster {
    compiler: Compiler,
    layers: Layers,
    services: u32,
    round: u32,
}

impl Cluster {
    fn new(services: u32) -> Self {
        let compiler = common::cluster(NODES, services);
        let mut cluster = Self { compiler, layers: Layers::new(LogLimits::default()), services, round: 0 };
        cluster.publish();
        cluster
    }

    fn publish(&mut self) {
        let compiled = self.compiler.compile();
        self.layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default());
    }

    fn change(&mut self) {
        self.round += 1;
        self.compiler.apply(Input::Slice(slice(self.services / 2, self.round)));
    }
}

fn node() -> Subscription {
    Subscription {
        node: "n5".into(),
        zone: None,
        settings: ("builtin".into(), 0),
        health_checks: HealthCheckPlacement::Shared,
    }
}

#[divan::bench(args = SERVICES, sample_count = 5)]
fn compile_everything(bencher: Bencher<'_, '_>, services: u32) {
    let cluster = || common::cluster(NODES, services);
    bencher.with_inputs(cluster).bench_local_values(|mut compiler| compiler.compile());
}

#[divan::bench(args = SERVICES)]
fn compile_one_endpoint(bencher: Bencher<'_, '_>, services: u32) {
    let mut cluster = Cluster::new(services);
    bencher.bench_local(|| {
        cluster.change();
        cluster.compiler.compile()
    });
}

/// Compilation, the digest and the log.
#[divan::bench(args = SERVICES)]
fn publish_one_endpoint(bencher: Bencher<'_, '_>, services: u32) {
    let mut cluster = Cluster::new(services);
    bencher.bench_local(|| {
        cluster.change();
        cluster.publish();
    });
}

/// For the second and each further node: the first one joins the changes for all.
#[divan::bench(args = SERVICES)]
fn plan_one_endpoint_for_a_node(bencher: Bencher<'_, '_>, services: u32) {
    let mut cluster = Cluster::new(services);
    let before = cluster.layers.head(&node());
    cluster.change();
    cluster.publish();
    bencher.bench_local(|| cluster.layers.plan(&node(), Some(&before)));
}

#[divan::bench(args = SERVICES)]
fn encode_one_endpoint_for_a_node(bencher: Bencher<'_, '_>, services: u32) {
    let mut cluster = Cluster::new(services);
    let before = cluster.layers.head(&node());
    cluster.change();
    cluster.publish();
    let Planned::Update(plan) = cluster.layers.plan(&node(), Some(&before)) else {
        panic!("nothing to send")
    };
    bencher.bench_local(|| {
        let digest = plan.after.digest().to_bytes().to_vec();
        let update = Update { from: Some(1), to: 2, digest, source: Some(plan.source), ..Update::default() };
        let parts: usize = plan.parts.iter().map(|part| part.encode_to_vec().len()).sum();
        update.encode_to_vec().len() + parts
    });
}

#[divan::bench(args = SERVICES, sample_count = 5)]
fn compress_snapshot(bencher: Bencher<'_, '_>, services: u32) {
    let cluster = Cluster::new(services);
    let raw = || match cluster.layers.plan(&node(), None) {
        Planned::Compress(raw) => raw,
        other => panic!("{other:?}"),
    };
    bencher.with_inputs(raw).bench_local_values(|raw| raw.compress());
}
