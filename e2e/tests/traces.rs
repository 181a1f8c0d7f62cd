//! One change is one trace, as a real OpenTelemetry Collector receives it, and no collector slows down a change.
//! These tests restart the shared controller, so they run one after another.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]
#![allow(clippy::print_stdout, reason = "the received spans explain a failed test")]

#[cfg(test)]
use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use switchtower_crds::{ProxyProfile, ProxyStatus};
use switchtower_e2e::drain_gate;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::observe::collector::{Collector, Span};
use switchtower_e2e::observe::promtool;
use switchtower_e2e::switchtower::Fleet;
use switchtower_e2e::switchtower::plugin;

use switchtower_e2e::scene::{SOON, Scene, alone, fleet, node};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

/// The processes that export.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Who {
    Controller,
    AgentsToo,
}

/// Restarts the fleet with this environment, and returns when every agent is connected and settled.
fn restarted(who: Who, environment: &[(&str, &str)]) -> &'static Fleet {
    let fleet = fleet();
    fleet.stop_controller(libc::SIGTERM).unwrap();
    fleet.set_controller_environment(environment);
    fleet.set_agent_environment(if who == Who::AgentsToo { environment } else { &[] });
    fleet.start_controller().unwrap();
    for node in fleet.nodes() {
        fleet.stop_agent(node, libc::SIGTERM).unwrap();
        fleet.run_agent(node).unwrap();
    }
    wait::until("all agents are served again", Duration::from_secs(30), || {
        fleet.check_controller()?;
        // Query the new processes: the controller may still count the streams of the old ones.
        for node in fleet.nodes() {
            let connected = fleet.agent_metric(node, "switchtower_controller_connected", "")?;
            ensure!(connected == 1.0, "{} is not connected", node.net.name);
        }
        Ok(())
    })
    .unwrap();
    fleet.settled(Duration::from_secs(20)).unwrap();
    fleet
}

/// Changes an EndpointSlice with kubectl, with the trigger time that the endpoints controller sets.
fn change_with_kubectl(fleet: &Fleet, namespace: &str, pod: &str, triggered: u64) {
    let (found, node) = fleet.pod(pod).unwrap();
    let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
    let endpoint = objects::endpoint(found, &node.net, false);
    let mut slice = objects::slice(namespace, "web-4", "web", false, &ports, &[endpoint]);
    let at = Timestamp::from_nanosecond(i128::from(triggered)).unwrap();
    slice["metadata"]["annotations"] = json!({
        "endpoints.kubernetes.io/last-change-trigger-time": at.to_string(),
        "tracing.k8s.io/traceparent": PARENT,
    });
    let path = fleet.lab().directory().join("change.json");
    std::fs::write(&path, slice.to_string()).unwrap();
    fleet
        .control_plane()
        .kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &path.to_string_lossy()])
        .unwrap();
}

/// Starts a collector, and restarts the fleet to export to it.
fn collecting(who: Who, sampler: &str) -> Collector {
    let lab = fleet().lab();
    let collector = Collector::start(lab.root_address(), lab.directory()).unwrap();
    let endpoint = collector.endpoint();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ("OTEL_TRACES_SAMPLER", sampler),
    ];
    restarted(who, &environment);
    collector
}

/// Replaces one endpoint by another. Returns the trigger time and the trace, once it contains `from_agents` spans of
/// agents.
fn traced_change(
    scene: &Scene,
    namespace: &str,
    collector: &Collector,
    from_agents: usize,
) -> (u64, Vec<Span>) {
    scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    scene.fleet.settled(SOON).unwrap();
    let before = now();
    change_with_kubectl(scene.fleet, namespace, "b1", before);
    let object = format!("EndpointSlice {namespace}/web-4");
    let trace = wait::until("the change's trace arrives", Duration::from_secs(20), || {
        let trace = trace_of(collector, &object, before)?;
        let agents = trace.iter().filter(|span| is_agents(span)).count();
        ensure!(agents >= from_agents, "{agents} spans of agents:\n{}", outline(&trace));
        Ok(trace)
    });
    let trace = trace.map_err(|error| error.context(scene.fleet.controller_log())).unwrap();
    println!("{}", outline(&trace));
    (before, trace)
}

fn is_agents(span: &Span) -> bool {
    span.attribute("service.name") == "switchtower-node-agent"
}

/// The spans of the trace whose root names `object`, once it contains every node's acknowledgement.
fn trace_of(collector: &Collector, object: &str, after: u64) -> Result<Vec<Span>> {
    let spans = collector.spans()?;
    let is_root = |span: &&Span| {
        span.parent.is_empty() && span.start >= after && span.attribute("switchtower.object") == object
    };
    let root = spans.iter().find(is_root).with_context(|| format!("no trace among {} spans", spans.len()))?;
    let trace: Vec<_> = spans.iter().filter(|span| span.trace == root.trace).cloned().collect();
    let sends = trace.iter().filter(|span| span.name == "switchtower.send").count();
    ensure!(sends == 3, "{sends} nodes in the trace");
    Ok(trace)
}

#[test]
fn change_made_with_kubectl_is_one_trace() {
    let _alone = alone();
    let collector = collecting(Who::Controller, "always_on");
    let scene = Scene::new("traced");
    let (before, trace) = traced_change(&scene, "traced", &collector, 0);
    let after = now();

    let by_id: BTreeMap<_, _> = trace.iter().map(|span| (span.id.as_str(), span)).collect();
    let named = |name: &str| trace.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let one = |name: &str| named(name)[0];
    for name in ["switchtower.change", "switchtower.ingest", "switchtower.compile", "switchtower.distribute"]
    {
        assert_eq!(named(name).len(), 1, "{name}");
    }
    // Every span lies inside its parent, and inside the time that the test measured.
    for span in &trace {
        assert!(before <= span.start && span.start <= span.end && span.end <= after, "{span:?}");
        if let Some(parent) = by_id.get(span.parent.as_str()) {
            assert!(parent.start <= span.start && span.end <= parent.end, "{span:?} in {parent:?}");
        } else {
            assert_eq!(span.name, "switchtower.change", "a span without its parent");
        }
    }
    let root = one("switchtower.change");
    assert_eq!(root.attribute("service.name"), "switchtower-controller");
    assert_eq!((root.attribute("k8s.service.name").as_str(), root.links.len()), ("web", 1));
    assert_eq!(root.events[0].0, "switchtower.triggered");
    assert!(root.events[0].1.abs_diff(before) < 1_000, "{:?} and {before}", root.events);
    // watch, compile, then per node send, apply, commit, acknowledgement.
    let (ingest, compile) = (one("switchtower.ingest"), one("switchtower.compile"));
    assert!(ingest.end <= compile.start && compile.end <= one("switchtower.distribute").start);
    let nodes: BTreeSet<_> =
        named("switchtower.send").iter().map(|send| send.attribute("k8s.node.name")).collect();
    assert_eq!(nodes, ["alpha", "beta", "gamma"].map(str::to_owned).into());
    for apply in named("switchtower.apply") {
        let send = by_id[apply.parent.as_str()];
        assert_eq!(send.attribute("k8s.node.name"), apply.attribute("k8s.node.name"));
        let commit =
            trace.iter().find(|span| span.parent == apply.id && span.name == "switchtower.nft.commit");
        let commit = commit.expect("the kernel's transaction");
        assert!(compile.end <= send.start && send.start <= commit.start && commit.end <= send.end);
        assert!(commit.end > commit.start, "a transaction takes time");
        assert_ne!(commit.attribute("switchtower.nft.ops"), "0");
    }
    let whole = Duration::from_nanos(root.end - root.start);
    assert!(whole < Duration::from_secs(5), "{whole:?}");
    assert_eq!(one("switchtower.distribute").events.len(), 3, "50 %, 99 %, all");
    exemplars_lead_to_traces(scene.fleet, &collector);
}

/// Exemplars refer to traces that the collector has, in a text that Prometheus' own parser accepts.
fn exemplars_lead_to_traces(fleet: &Fleet, collector: &Collector) {
    let text = fleet.open_metrics().unwrap();
    promtool::parse_open_metrics(&text, fleet.lab().directory()).unwrap();
    let of = |family: &str| -> BTreeSet<String> {
        let buckets = text.lines().filter(|line| line.starts_with(&format!("{family}_bucket{{")));
        let named = buckets.filter_map(|line| line.split_once(" # {trace_id=\"")?.1.split_once('"'));
        named.map(|(trace, _)| trace.to_owned()).collect()
    };
    let (acknowledged, propagated) =
        (of("switchtower_change_ack_seconds"), of("switchtower_propagation_seconds"));
    assert!(!acknowledged.is_empty() && !propagated.is_empty(), "{text}");
    wait::until("the collector has the traces", Duration::from_secs(20), || {
        let known: BTreeSet<_> = collector.spans()?.into_iter().map(|span| span.trace).collect();
        let unknown: Vec<_> =
            acknowledged.union(&propagated).filter(|trace| !known.contains(*trace)).collect();
        ensure!(unknown.is_empty(), "{unknown:?} are missing");
        Ok(())
    })
    .unwrap();
}

#[test]
fn assignment_is_one_trace_named_by_rows() {
    let _alone = alone();
    // No sampler is active: assignments are exported nevertheless.
    let collector = collecting(Who::Controller, "always_off");
    let scene = Scene::new("settings");
    wait::until("drift of an earlier test is no longer reported", Duration::from_secs(45), || {
        scene.fleet.nodes().iter().try_for_each(|node| {
            let state = scene.fleet.row(&node.net.name)?.state;
            ensure!(state == "Synced", "{} is {state}", node.net.name);
            Ok(())
        })
    })
    .unwrap();
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "traced"},
        "spec": {"strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}}},
    });
    scene.fleet.kube().apply(&profile).unwrap();
    let assigned = wait::until("every row names the revision", Duration::from_secs(40), || {
        let rows = ["alpha", "beta", "gamma"].map(|node| {
            let row: Option<ProxyStatus> = scene.fleet.kube().get_cluster(node)?;
            let assigned = row.and_then(|row| row.spec.profile).context("no assignment")?;
            ensure!((assigned.name.as_str(), assigned.revision) == ("traced", 1), "{assigned:?}");
            assigned.trace_id.context("no trace")
        });
        rows.into_iter().collect::<Result<BTreeSet<String>>>()
    });
    let traces = assigned.unwrap();
    assert_eq!(traces.len(), 1, "what is assigned together is one trace: {traces:?}");
    wait::until("the collector has the trace with all nodes", Duration::from_secs(20), || {
        let spans: Vec<_> =
            collector.spans()?.into_iter().filter(|span| traces.contains(&span.trace)).collect();
        let roots: BTreeSet<_> = spans
            .iter()
            .filter(|span| span.parent.is_empty())
            .map(|span| span.attribute("switchtower.object"))
            .collect();
        ensure!(roots == BTreeSet::from(["ProxyRollout traced-1".to_owned()]), "{roots:?}");
        let sends = spans.iter().filter(|span| span.name == "switchtower.send");
        let nodes: BTreeSet<_> = sends.map(|send| send.attribute("k8s.node.name")).collect();
        ensure!(nodes == ["alpha", "beta", "gamma"].map(str::to_owned).into(), "{nodes:?}");
        println!("{}", outline(&spans));
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", scene.fleet.controller_log()));
    let names: BTreeSet<_> = collector.spans().unwrap().into_iter().map(|span| span.name).collect();
    assert!(!names.contains("switchtower.watch.list"), "of ordinary spans the sampler chooses: {names:?}");
}

#[test]
fn exporting_agent_sends_its_own_spans() {
    let _alone = alone();
    let collector = collecting(Who::AgentsToo, "always_on");
    let scene = Scene::new("agents-tell");
    // On each of three nodes: apply, receive, plan, the transaction, and flows, because an endpoint was removed.
    let (_, trace) = traced_change(&scene, "agents-tell", &collector, 15);
    let root = trace.iter().find(|span| span.parent.is_empty()).unwrap();
    let named = |name: &str| trace.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let applies = named("switchtower.apply");
    assert_eq!(applies.len(), 3, "the controller does not export it too");
    for apply in applies {
        let node = apply.attribute("k8s.node.name");
        assert!(is_agents(apply) && apply.parent == root.id, "{apply:?}");
        assert_eq!(apply.attribute("service.instance.id"), node);
        let send = named("switchtower.send");
        let send = send.iter().find(|send| send.attribute("k8s.node.name") == node).unwrap();
        // All processes share one clock: the update arrives after it was sent, and is acknowledged after it was
        // applied.
        assert!(send.start <= apply.start && apply.end <= send.end, "{apply:?} in {send:?}");
        let children: Vec<_> = trace.iter().filter(|span| span.parent == apply.id).collect();
        let child = |name: &str| {
            let found: Vec<_> = children.iter().filter(|span| span.name == name).collect();
            assert_eq!(found.len(), 1, "{name} of {node}");
            found[0]
        };
        let (receive, plan) = (child("switchtower.receive"), child("switchtower.plan"));
        let (commit, flows) = (child("switchtower.nft.commit"), child("switchtower.conntrack.clean"));
        for (first, then) in [(receive, plan), (plan, commit), (commit, flows)] {
            assert!(first.start <= first.end && first.end <= then.start, "{first:?} before {then:?}");
        }
        assert!(commit.end <= apply.end && apply.end <= flows.start, "flows are checked afterwards");
        assert_ne!(commit.attribute("switchtower.nft.ops"), "0");
    }

    // Drift has no change: its repair is a separate trace.
    let alpha = node(scene.fleet, "alpha");
    let before = now();
    alpha.net.namespace.output("nft", &["delete", "table", "ip", "switchtower"]).unwrap();
    let repair = wait::until("the repair's span arrives", Duration::from_secs(20), || {
        let spans = collector.spans()?;
        let found = spans.into_iter().find(|span| span.name == "switchtower.repair" && span.start >= before);
        found.context("no repair")
    });
    let repair = repair.unwrap();
    assert_eq!((repair.parent.as_str(), repair.attribute("k8s.node.name")), ("", "alpha".to_owned()));
    assert_eq!(repair.attribute("switchtower.drift.cause"), "table_deleted");
    restarted(Who::Controller, &[]);
}

#[test]
fn background_work_exported_as_ordinary_spans() {
    let _alone = alone();
    let collector = collecting(Who::AgentsToo, "always_on");
    let scene = Scene::new("ordinary");
    scene.service("web", &json!({}));
    // A profile without nodes: its ProxyRollout is created and completes.
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "ordinary"},
        "spec": {"nodeSelector": {"matchLabels": {"ordinary": "none"}}},
    });
    scene.fleet.kube().apply(&profile).unwrap();
    scene.fleet.settled(SOON).unwrap();
    assert_eq!(plugin::run(scene.fleet, &["diff", "alpha"]).unwrap().code, 0);
    // Span, service and attribute.
    let controller = "switchtower-controller";
    let agent = "switchtower-node-agent";
    let wanted = [
        ("switchtower.watch.list", controller, "switchtower.resource", "services"),
        ("switchtower.token.review", controller, "switchtower.audience", "switchtower"),
        ("switchtower.token.review", controller, "switchtower.audience", "switchtower-admin"),
        ("switchtower.admin.request", controller, "http.route", "/v1/nodes/{node}/diff"),
        ("switchtower.rollout.create", controller, "switchtower.profile", "ordinary"),
        ("switchtower.rollout.decide", controller, "switchtower.rollout", "ordinary-1"),
        ("switchtower.status.write", controller, "k8s.node.name", "beta"),
        ("switchtower.connect", agent, "service.instance.id", "gamma"),
        ("switchtower.snapshot.write", agent, "service.instance.id", "beta"),
        ("switchtower.question", agent, "service.instance.id", "alpha"),
    ];
    wait::until("the collector has them", Duration::from_secs(45), || {
        let spans = collector.spans()?;
        for (name, service, key, value) in wanted {
            let told = spans.iter().any(|span| {
                span.name == name
                    && span.attribute("service.name") == service
                    && span.attribute(key) == value
                    && span.events.is_empty()
            });
            ensure!(told, "no {name} of {service} with {key} {value} among {} spans", spans.len());
        }
        let by_id: BTreeMap<_, _> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
        let reviews = spans.iter().filter(|span| span.name == "switchtower.token.review");
        let parents = reviews.filter_map(|review| by_id.get(review.parent.as_str()));
        let parents: BTreeSet<_> = parents.map(|parent| parent.name.as_str()).collect();
        ensure!(parents == ["switchtower.admin.request"].into(), "reviews have parents {parents:?}");
        Ok(())
    })
    .unwrap();
    restarted(Who::Controller, &[]);
}

#[test]
fn drain_query_is_in_the_trace_of_the_removal() {
    let _alone = alone();
    let collector = collecting(Who::Controller, "always_on");
    let scene = Scene::new("drain-trace");
    drain_gate::open_gate(scene.fleet).unwrap();
    scene.service("web", &json!({}));
    // No Service of another test uses this pod: it would remain an endpoint.
    scene.endpoints("web", &["a2", "b1"]);
    scene.fleet.settled(SOON).unwrap();
    let (pod, node) = scene.fleet.pod("a2").unwrap();
    let waiting = std::thread::spawn(move || drain_gate::hook(node, pod.address(false), "/drained").unwrap());
    std::thread::sleep(Duration::from_millis(500));
    scene.endpoints("web", &["b1"]);
    assert_eq!(waiting.join().unwrap()["verdict"], "Drained");
    wait::until("the collector has the span", Duration::from_secs(20), || {
        let spans = collector.spans()?;
        let drain = spans.iter().find(|span| span.name == "switchtower.drain").context("no drain query")?;
        let root = spans.iter().find(|span| span.id == drain.parent).context("no change")?;
        ensure!(root.attribute("switchtower.object") == "EndpointSlice drain-trace/web-4", "{root:?}");
        ensure!(root.trace == drain.trace && root.name == "switchtower.change", "{root:?}");
        let attributes = ["k8s.node.name", "switchtower.drain.verdict", "switchtower.drain.address"];
        let values = attributes.map(|key| drain.attribute(key));
        ensure!(values == ["alpha", "Drained", &pod.address(false).to_string()], "{values:?}");
        Ok(())
    })
    .unwrap();
    scene.fleet.kube().delete_cluster::<ProxyProfile>("default").unwrap();
    restarted(Who::Controller, &[]);
}

/// The tree in readable form.
fn outline(trace: &[Span]) -> String {
    fn below(trace: &[Span], parent: &str, depth: usize, start: u64, text: &mut String) {
        let mut children: Vec<_> = trace.iter().filter(|span| span.parent == parent).collect();
        children.sort_by_key(|span| span.start);
        for span in children {
            let (at, took) = (span.start - start, span.end - span.start);
            let node = span.attribute("k8s.node.name");
            let indent = "  ".repeat(depth);
            text.push_str(&format!("{indent}{} {node} +{} us, {} us\n", span.name, at / 1_000, took / 1_000));
            below(trace, &span.id, depth + 1, start, text);
        }
    }
    let start = trace.iter().map(|span| span.start).min().unwrap_or_default();
    let mut text = String::new();
    below(trace, "", 0, start, &mut text);
    text
}

/// Mean time of a change from its receipt to a node's acknowledgement, over a series of changes.
fn mean_of_changes(scene: &Scene, changes: usize) -> Duration {
    let metric =
        |name: &str| scene.fleet.controller_metric(&format!("switchtower_change_ack_seconds_{name}"), "");
    let (sum, count) = (metric("sum").unwrap(), metric("count").unwrap());
    for round in 0..changes {
        scene.endpoints("web", if round % 2 == 0 { &["a1", "c1"] } else { &["a1"] });
    }
    scene.fleet.settled(SOON).unwrap();
    let (sum, count) = (metric("sum").unwrap() - sum, metric("count").unwrap() - count);
    assert!(count >= changes as f64, "{count} acknowledgements of {changes} changes");
    Duration::from_secs_f64(sum / count)
}

#[test]
fn dead_or_silent_collector_slows_no_change() {
    let _alone = alone();
    let scene = Scene::new("silent");
    scene.service("web", &json!({}));
    // Accepts connections and never answers.
    let root = fleet().lab().root_address();
    let silent = TcpListener::bind((root, 0)).unwrap();
    let held = silent.try_clone().unwrap();
    std::thread::spawn(move || held.incoming().flatten().collect::<Vec<_>>());
    let dead = TcpListener::bind((root, 0)).unwrap().local_addr().unwrap();
    let endpoints = [format!("http://{dead}"), format!("http://{}", silent.local_addr().unwrap())];
    let without = || {
        restarted(Who::Controller, &[]);
        scene.endpoints("web", &["a1"]);
        mean_of_changes(&scene, 60)
    };
    let before = without();
    let with = endpoints.map(|endpoint| {
        let environment = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            // Fill the export queue quickly.
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "64"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16"),
        ];
        restarted(Who::AgentsToo, &environment);
        // A systematic delay affects each run; a short load of the machine does not.
        let means = [(); 3].map(|()| mean_of_changes(&scene, 60));
        println!("a change takes {means:?} with {endpoint}");
        (means.into_iter().min().unwrap(), endpoint)
    });
    // The load of the machine may grow during the test: measure before and after.
    let without = before.max(without());
    for (with, endpoint) in with {
        println!("a change takes {without:?} without a collector, {with:?} with {endpoint}");
        // Neither a connection attempt nor an export's timeout (10 s) fits into this.
        let bound = without * 3 + Duration::from_millis(50);
        assert!(with < bound, "{with:?} with {endpoint}, {without:?} without");
    }
}
