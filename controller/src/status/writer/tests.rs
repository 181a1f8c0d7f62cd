//! The writer against an API server in memory, in virtual time.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use switchtower_admin_api::NodeReason;
use switchtower_crds::{PreviousRevision, ProfileAssignment};

use crate::fake_api::{self, Call, Store, failure};
use crate::ingest::NodeIdentity;
use crate::lease::Fence;
use crate::replicas::Replicas;
use crate::server_clock::ServerClock;
use crate::status::absence::{Agents, Blocker};
use crate::status::{
    Assignments, Floors, News, NodeEvent, Observation, Registry, StatusMetrics, Writer, WriterClients,
    WriterSettings,
};
use crate::watch::Upstream;

mod replicas;

/// Stored rows, and the writes as method and name.
#[derive(Default)]
struct Server {
    store: Store,
    writes: Vec<String>,
    missing: bool,
    /// Every write of this row fails.
    broken: &'static str,
    latency: Duration,
}

/// Time after which a replica without a renewal is gone.
const PRESENCE: Duration = Duration::from_secs(10);
const ROWS: &str = "/apis/switchtower.dev/v1alpha1/proxystatuses";

fn path(name: &str) -> String {
    format!("{ROWS}/{name}")
}

impl Server {
    fn with(name: &str, row: Value) -> Self {
        let mut server = Self::default();
        server.store.put(&path(name), row);
        server
    }

    fn answer(&mut self, call: Call<'_>) -> (u16, Value) {
        if self.missing {
            return failure(404, "NotFound", "");
        }
        if *call.method != Method::GET {
            let of_path = call.path.trim_start_matches(ROWS).trim_matches('/').trim_end_matches("/status");
            let named = call.body["metadata"]["name"].as_str().unwrap_or(of_path);
            self.writes.push(format!("{} {named}", call.method));
            if named == self.broken {
                return failure(500, "InternalError", named);
            }
        }
        self.store.answer(call)
    }
}

#[derive(Default)]
struct Fleet {
    known: Mutex<HashMap<String, Observation>>,
    changed: Mutex<Vec<(Arc<str>, News)>>,
    /// Observations that were read.
    looks: AtomicUsize,
    settled: AtomicBool,
    notify: Notify,
    /// Nodes whose streams were ended because another replica has a later one.
    superseded: Mutex<Vec<String>>,
    /// The last `releaseHeldBefore` per node.
    released: Mutex<HashMap<String, u64>>,
}

impl Fleet {
    fn set(&self, node: &str, observation: Observation) {
        self.report(node, observation, News::Transition);
    }

    fn report(&self, node: &str, observation: Observation, news: News) {
        self.known.lock().unwrap().insert(node.to_owned(), observation);
        self.changed.lock().unwrap().push((node.into(), news));
        self.notify.notify_one();
    }
}

impl Registry for Fleet {
    fn observe(&self, node: &str) -> Option<Observation> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.known.lock().unwrap().get(node).cloned()
    }

    fn supersede(&self, node: &str) {
        self.superseded.lock().unwrap().push(node.to_owned());
        let observation = self.known.lock().unwrap().get(node).cloned();
        if let Some(mut observation) = observation {
            observation.note_end();
            self.set(node, observation);
        }
    }

    fn moved(&self, node: &str) {
        self.known.lock().unwrap().remove(node);
    }

    fn release_held(&self, node: &str, before: u64) {
        self.released.lock().unwrap().insert(node.to_owned(), before);
    }

    fn settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    async fn changed(&self) -> Vec<(Arc<str>, News)> {
        loop {
            let changed = std::mem::take(&mut *self.changed.lock().unwrap());
            if !changed.is_empty() {
                return changed;
            }
            self.notify.notified().await;
        }
    }
}

struct Lab {
    server: Arc<Mutex<Server>>,
    fleet: Arc<Fleet>,
    nodes: mpsc::UnboundedSender<NodeEvent>,
    floors: Floors,
    agents: Agents,
    assignments: Assignments,
    upstream: Upstream,
    replicas: Replicas,
    fence: Fence,
}

async fn lab(server: Server) -> Lab {
    replica(Arc::new(Mutex::new(server)), "tower-0").await
}

/// A replica that is the leader.
async fn replica(server: Arc<Mutex<Server>>, name: &str) -> Lab {
    replica_with(server, name, Fence::open()).await
}

async fn replica_with(server: Arc<Mutex<Server>>, name: &str, fence: Fence) -> Lab {
    let latency = server.lock().unwrap().latency;
    let client = fake_api::slow_client(server.clone(), latency, Server::answer);
    let (fleet, floors) = (Arc::new(Fleet::default()), Floors::default());
    let assignments = Assignments::default();
    let metrics = StatusMetrics::new(&prometheus::Registry::new()).unwrap();
    let agents = Agents::default();
    let replicas = Replicas::new(name, PRESENCE);
    let settings = WriterSettings {
        replicas: replicas.clone(),
        fence: fence.clone(),
        agents: agents.clone(),
        floors: floors.clone(),
        assignments: assignments.clone(),
        clock: ServerClock::new(&prometheus::Registry::new()).unwrap(),
    };
    let clients = WriterClients { any: client.clone(), leader: client };
    let mut writer = Writer::new(clients, fleet.clone(), settings, metrics);
    let loaded = writer.load().await.is_ok();
    let (nodes, events) = mpsc::unbounded_channel();
    let upstream = Upstream::default();
    tokio::spawn(writer.run(loaded, events, upstream.restores()));
    Lab { server, fleet, nodes, floors, assignments, agents, upstream, replicas, fence }
}

impl Lab {
    fn node(&self, name: &str, uid: &str) {
        let identity =
            NodeIdentity { name: name.into(), uid: uid.into(), kubelet_lost: None, labels: Arc::default() };
        self.nodes.send(NodeEvent::Applied(identity)).unwrap();
    }

    /// Advances the virtual time; all work that is due completes.
    async fn wait(&self, milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }

    fn row(&self, name: &str) -> Value {
        self.server.lock().unwrap().store.objects.get(&path(name)).cloned().unwrap_or_default()
    }

    /// Changes a row as another client.
    fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        self.server.lock().unwrap().store.change(&path(name), change);
    }

    fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.server.lock().unwrap().writes)
    }
}

fn observed(applied: u64, session: u64) -> Observation {
    Observation {
        session,
        desired: applied,
        sent: applied,
        applied,
        acknowledged: true,
        ..Observation::default()
    }
}

fn stored(replica: &str, session: i64) -> Value {
    json!({"metadata": {"name": "n1", "uid": "row", "resourceVersion": "1", "generation": 1,
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1"}]},
        "spec": {}, "status": {"state": "Synced", "generation": {"desired": 70, "sent": 70, "applied": 69},
            "connection": {"replica": replica, "session": session}}})
}

#[tokio::test(start_paused = true)]
async fn row_follows_its_node() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.wait(100).await;
    assert_eq!(lab.writes(), ["POST n1", "PUT n1"]);
    let row = lab.row("n1");
    assert_eq!(
        (&row["status"]["state"], &row["metadata"]["ownerReferences"][0]["uid"]),
        (&json!("Absent"), &json!("u1"))
    );
    lab.node("n1", "u2");
    lab.wait(100).await;
    assert_eq!(lab.writes(), ["PATCH n1"], "recreated under the same name");
    assert_eq!(lab.row("n1")["metadata"]["ownerReferences"][0]["uid"], "u2");
    lab.nodes.send(NodeEvent::Gone("n1".into())).unwrap();
    lab.wait(100).await;
    lab.node("n1", "u2");
    lab.nodes.send(NodeEvent::Synced).unwrap();
    lab.wait(100).await;
    assert!(lab.writes().is_empty(), "no row is removed before all nodes are known");
    lab.nodes.send(NodeEvent::Gone("n1".into())).unwrap();
    lab.wait(100).await;
    assert_eq!((lab.writes(), lab.row("n1")), (vec!["DELETE n1".to_owned()], Value::Null));
}

#[tokio::test(start_paused = true)]
async fn left_over_rows_are_deleted_once_all_nodes_are_known() {
    let lab = lab(Server::with("n1", stored("tower-0", 4))).await;
    lab.wait(2_000).await;
    assert!(lab.writes().is_empty());
    lab.nodes.send(NodeEvent::Synced).unwrap();
    lab.wait(100).await;
    assert_eq!(lab.writes(), ["DELETE n1"]);
}

#[tokio::test(start_paused = true)]
async fn writer_waits_for_a_missing_crd() {
    let lab = lab(Server { missing: true, ..Server::default() }).await;
    lab.node("n1", "u1");
    lab.wait(30_000).await;
    assert!(lab.writes().is_empty());
    lab.server.lock().unwrap().missing = false;
    lab.wait(6_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Absent");
}

#[tokio::test(start_paused = true)]
async fn transitions_are_written_at_once_others_once_per_second() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.wait(100).await;
    lab.writes();
    lab.fleet.set("n1", observed(1, 1));
    lab.wait(50).await;
    assert_eq!((lab.writes().len(), &lab.row("n1")["status"]["state"]), (1, &json!("Synced")));
    for generation in 2..=20 {
        lab.fleet.set("n1", observed(generation, 1));
        lab.wait(100).await;
    }
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["status"]["generation"]["applied"], 20);
    let writes = lab.writes().len();
    assert!((2..=3).contains(&writes), "{writes} writes in 1.9 s of changes");
    lab.wait(7_000).await;
    assert!(lab.writes().is_empty(), "nothing changed");
    lab.wait(60_000).await;
    let renewals = lab.writes().len();
    assert!((5..=7).contains(&renewals), "{renewals} renewals in a minute");
    let time = |field: &str| lab.row("n1")["status"][field].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(time("staleAfter").duration_since(time("reportedAt")).as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn progress_is_compared_when_rows_are_due() {
    let lab = lab(Server::default()).await;
    let nodes: Vec<_> = (0..20).map(|number| format!("n{number}")).collect();
    for node in &nodes {
        lab.node(node, "u1");
        lab.fleet.set(node, observed(1, 1));
    }
    lab.wait(2_000).await;
    lab.fleet.looks.store(0, Ordering::Relaxed);
    lab.writes();
    for generation in 2..=101 {
        for node in &nodes {
            lab.fleet.report(node, observed(generation, 1), News::Progress);
        }
        lab.wait(20).await;
    }
    lab.wait(1_500).await;
    let writes = lab.writes().len();
    let looks = lab.fleet.looks.load(Ordering::Relaxed);
    assert!((2..=4).contains(&(writes / nodes.len())), "{writes} writes of 20 rows in 2 s of changes");
    assert!(looks <= 4 * writes, "{looks} reads for {writes} writes and 2,000 changes");
    for node in &nodes {
        assert_eq!(lab.row(node)["status"]["generation"]["applied"], 101);
    }
}

#[tokio::test(start_paused = true)]
async fn release_of_held_removals_read_from_the_row() {
    let mut row = stored("tower-0", 4);
    row["spec"] = json!({"releaseHeldBefore": 70});
    let lab = lab(Server::with("n1", row)).await;
    let released = || lab.fleet.released.lock().unwrap().get("n1").copied();
    assert_eq!((released(), lab.floors.get("n1").release_held_before), (Some(70), 70));
    lab.node("n1", "u1");
    lab.fleet.set("n1", observed(71, 5));
    lab.change("n1", |row| row["spec"]["releaseHeldBefore"] = json!(71));
    lab.wait(60_000).await;
    assert_eq!(released(), Some(71));
}

#[tokio::test(start_paused = true)]
async fn row_shows_the_blocker_of_its_agent() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.wait(30_000).await;
    let reason = || {
        let row = lab.row("n1");
        let conditions = row["status"]["conditions"].as_array().unwrap().clone();
        let ready = conditions.into_iter().find(|known| known["type"] == "Ready").unwrap();
        ready["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason(), "NoAgent");
    lab.agents.closed(Some(Blocker::new(NodeReason::ControllerNotListening, "the port is taken")));
    lab.wait(2_000).await;
    assert_eq!(reason(), "ControllerNotListening");
    lab.agents.closed(None);
    lab.fleet.set("n1", observed(1, 1));
    lab.wait(2_000).await;
    assert_eq!(reason(), "UpToDate");
}

#[tokio::test(start_paused = true)]
async fn assignments_carry_the_version_of_their_decision() {
    let lab = lab(Server::default()).await;
    let name: Arc<str> = "n1".into();
    let want = |revision| {
        let assignment = ProfileAssignment {
            name: "default".into(),
            revision,
            assigned_at: None,
            trace_id: None,
            previous: None,
        };
        lab.assignments.request(BTreeMap::from([(name.clone(), assignment)]));
    };
    let named = || lab.row("n1")["spec"]["profile"]["revision"].clone();
    // Requested before the row exists: the row is created with the assignment.
    want(1);
    lab.node("n1", "u1");
    lab.wait(100).await;
    assert_eq!(named(), json!(1));
    assert_eq!(lab.assignments.of("n1").1.profile.map(|profile| profile.revision), Some(1));
    lab.writes();
    want(2);
    lab.wait(100).await;
    assert_eq!((named(), lab.writes()[0].as_str()), (json!(2), "PATCH n1"));
    // Another client wrote first: its assignment stays until the next decision.
    lab.change("n1", |row| row["spec"]["profile"] = json!({"name": "other", "revision": 9}));
    want(3);
    lab.wait(2_000).await;
    assert_eq!(named(), json!(9));
    let (wanted, stored) = lab.assignments.of("n1");
    assert_eq!(
        (wanted.map(|profile| profile.name), stored.profile.map(|profile| profile.revision)),
        (Some("other".into()), Some(9))
    );
    want(3);
    lab.wait(100).await;
    assert_eq!(named(), json!(3));
}

#[tokio::test(start_paused = true)]
async fn missing_agent_counts_after_the_time_to_reconnect() {
    let lab = lab(Server::with("n1", stored("tower-0", 4))).await;
    lab.node("n1", "u1");
    lab.wait(9_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Synced", "agents need a moment");
    assert!(lab.writes().is_empty(), "the row cannot be confirmed");
    lab.wait(3_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Unknown", "it must not claim to be ready");
    lab.wait(120_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Unknown", "streams are not accepted yet");
    lab.agents.closed(Some(Blocker::new(NodeReason::ControllerNotListening, "the port is taken")));
    lab.wait(12_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Stale", "no agent can connect");
    lab.agents.closed(None);
    lab.fleet.settled.store(true, Ordering::Relaxed);
    lab.wait(12_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Stale");
}

#[tokio::test(start_paused = true)]
async fn deleted_row_recreated_with_its_assignment() {
    let mut row = stored("tower-0", 4);
    row["spec"] = json!({"profile": {"name": "default", "revision": 7}});
    let lab = lab(Server::with("n1", row)).await;
    lab.node("n1", "u1");
    lab.server.lock().unwrap().store.objects.clear();
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["spec"]["profile"]["revision"], 7, "the nodes keep their settings");
    // A new Node of the same name does not inherit the assignment.
    lab.server.lock().unwrap().store.objects.clear();
    lab.node("n1", "u2");
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["metadata"]["ownerReferences"][0]["uid"], "u2");
    assert_eq!(lab.row("n1")["spec"]["profile"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn row_deleted_during_a_watch_failure_recreated() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.node("n2", "u2");
    lab.wait(100).await;
    lab.server.lock().unwrap().store.objects.remove(&path("n1"));
    lab.wait(60_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Absent");
    assert!(!lab.writes().iter().any(|write| write == "DELETE n2"));
}

#[tokio::test(start_paused = true)]
async fn flapping_row_is_written_at_most_once_per_second() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.wait(2_000).await;
    lab.writes();
    for round in 0..50 {
        let foreign_proxy = round % 2 == 0;
        lab.fleet.set("n1", Observation { foreign_proxy, ..observed(1, 1) });
        lab.wait(100).await;
    }
    lab.wait(2_000).await;
    let writes = lab.writes().len();
    assert!((4..=7).contains(&writes), "{writes} writes in 5 s of flapping");
}

#[tokio::test(start_paused = true)]
async fn assignment_removes_unset_fields() {
    let mut row = stored("tower-0", 4);
    row["spec"]["profile"] = json!({
        "name": "edge", "revision": 1, "assignedAt": "2026-01-01T00:00:00Z", "traceID": "0af7",
        "previous": {"name": "base", "revision": 1},
    });
    let lab = lab(Server::with("n1", row)).await;
    lab.node("n1", "u1");
    let mut wanted = ProfileAssignment { name: "edge".into(), revision: 2, ..ProfileAssignment::default() };
    lab.assignments.request(BTreeMap::from([("n1".into(), wanted.clone())]));
    lab.wait(100).await;
    assert_eq!(lab.row("n1")["spec"]["profile"], json!({"name": "edge", "revision": 2}));
    assert_eq!(lab.assignments.of("n1").1.profile, Some(wanted.clone()));
    // The same revision with another previous revision is another assignment.
    wanted.previous = Some(PreviousRevision { name: "base".into(), revision: 1 });
    wanted.trace_id = Some("0af8".into());
    lab.assignments.request(BTreeMap::from([("n1".into(), wanted.clone())]));
    lab.wait(2_000).await;
    assert_eq!(lab.assignments.of("n1").1.profile, Some(wanted));
    lab.writes();
    lab.wait(60_000).await;
    assert!(lab.writes().iter().all(|write| write != "PATCH n1"), "an equal row is not written");
}

/// A step of 1,250 nodes fails: each row has a change, and each node must be rolled back.
#[tokio::test(start_paused = true)]
async fn rollback_is_assigned_before_statuses_are_written() {
    const NODES: usize = 1_250;
    let mut server = Server { broken: "n7", latency: Duration::from_millis(20), ..Server::default() };
    server.store.silent = true;
    let names: Vec<Arc<str>> = (0..NODES).map(|at| format!("n{at}").into()).collect();
    for name in &names {
        let mut row = stored("tower-0", 4);
        row["metadata"]["name"] = json!(**name);
        row["metadata"]["ownerReferences"][0]["name"] = json!(**name);
        row["spec"]["profile"] = json!({"name": "default", "revision": 2});
        server.store.put(&path(name), row);
    }
    let lab = lab(server).await;
    for name in &names {
        lab.node(name, "u1");
        lab.fleet.set(name, Observation { foreign_proxy: true, ..observed(71, 5) });
    }
    lab.wait(2_000).await;
    let wanted = ProfileAssignment { name: "default".into(), revision: 1, ..ProfileAssignment::default() };
    lab.assignments.request(names.iter().map(|name| (name.clone(), wanted.clone())).collect());
    let assigned = || {
        let stored = lab.assignments.stored();
        stored.iter().filter(|(_, profile)| profile.revision == 1).count()
    };
    let begun = tokio::time::Instant::now();
    while assigned() < NODES - 1 {
        lab.wait(50).await;
        let elapsed = begun.elapsed();
        assert!(elapsed < Duration::from_secs(5), "{} of {NODES} after {elapsed:?}", assigned());
    }
    println!("{} rows assigned in {:?}", assigned(), begun.elapsed());
    // Only the failed row is retried.
    lab.server.lock().unwrap().broken = "";
    lab.wait(1_500).await;
    assert_eq!(assigned(), NODES);
    lab.wait(60_000).await;
    let exclusive = |row: Value| row["status"]["state"] == "NotExclusive";
    assert!(names.iter().all(|name| exclusive(lab.row(name))), "statuses follow");
}

#[tokio::test(start_paused = true)]
async fn failed_request_delays_no_other_row() {
    let lab = lab(Server { broken: "n1", ..Server::default() }).await;
    for name in ["n1", "n2", "n3"] {
        lab.node(name, name);
    }
    lab.wait(500).await;
    assert_eq!(lab.row("n2")["status"]["state"], "Absent");
    assert_eq!(lab.row("n3")["status"]["state"], "Absent");
    lab.server.lock().unwrap().broken = "";
    lab.wait(6_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Absent");
}

#[tokio::test(start_paused = true)]
async fn rows_relisted_after_an_etcd_restore() {
    let mut row = stored("tower-0", 4);
    row["metadata"]["generation"] = json!(9);
    row["spec"] = json!({"profile": {"name": "default", "revision": 7}});
    let mut server = Server::with("n1", row);
    server.store.silent = true;
    let lab = lab(server).await;
    lab.node("n1", "u1");
    lab.wait(2_000).await;
    let assigned = || lab.assignments.of("n1").0.map(|profile| profile.revision);
    assert_eq!(assigned(), Some(7));
    lab.change("n1", |row| {
        row["metadata"]["generation"] = json!(5);
        row["spec"] = json!({"profile": {"name": "default", "revision": 3}});
    });
    lab.upstream.went_back();
    lab.wait(2_000).await;
    assert_eq!(assigned(), Some(3));
    let wanted = ProfileAssignment { name: "default".into(), revision: 7, ..ProfileAssignment::default() };
    lab.assignments.request(BTreeMap::from([("n1".into(), wanted)]));
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["spec"]["profile"]["revision"], 7);
}
