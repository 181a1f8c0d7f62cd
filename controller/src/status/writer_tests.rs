//! The writer against an API server in memory, in virtual time.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use switchtower_crds::ProfileAssignment;

use super::{Assignments, Floors, NodeEvent, Observation, Registry, StatusMetrics, Writer, WriterSettings};
use crate::agents::{Agents, Obstacle};
use crate::ingest::NodeIdentity;

/// Rows, and what was asked: method and name.
#[derive(Default)]
struct Server {
    rows: BTreeMap<String, Value>,
    version: u64,
    writes: Vec<String>,
    missing: bool,
}

impl Server {
    fn answer(&mut self, method: &Method, path: &str, query: &str, body: &[u8]) -> (u16, Value) {
        let name =
            path.trim_start_matches("/apis/switchtower.dev/v1alpha1/proxystatuses").trim_start_matches('/');
        let name = name.trim_end_matches("/status").to_owned();
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        if self.missing {
            return failure(404, "NotFound", "");
        }
        if query.contains("watch=true") {
            // The metadata watch only lists in these tests.
            return (200, json!({"type": "ERROR", "object": failure(410, "Expired", "").1}));
        }
        if *method == Method::GET && name.is_empty() {
            let items: Vec<_> = self.rows.values().cloned().collect();
            return (200, json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items}));
        }
        if *method != Method::GET {
            let named = body["metadata"]["name"].as_str().unwrap_or(&name);
            self.writes.push(format!("{method} {named}"));
        }
        match *method {
            Method::POST => self.create(body),
            _ if !self.rows.contains_key(&name) => failure(404, "NotFound", &name),
            Method::GET => (200, self.rows[&name].clone()),
            Method::DELETE => (200, self.rows.remove(&name).unwrap()),
            _ => self.change(&name, &body),
        }
    }

    fn create(&mut self, mut body: Value) -> (u16, Value) {
        self.version += 1;
        let name = body["metadata"]["name"].as_str().unwrap().to_owned();
        body["metadata"]["uid"] = json!(format!("row-{}", self.version));
        body["metadata"]["generation"] = json!(1);
        body["metadata"]["resourceVersion"] = json!(self.version.to_string());
        body.as_object_mut().unwrap().remove("status");
        self.rows.insert(name, body.clone());
        (201, body)
    }

    /// PUT of the status, or a merge patch of the metadata.
    fn change(&mut self, name: &str, body: &Value) -> (u16, Value) {
        let row = self.rows.get_mut(name).unwrap();
        if body["metadata"]["resourceVersion"] != row["metadata"]["resourceVersion"] {
            return failure(409, "Conflict", name);
        }
        self.version += 1;
        if let Some(status) = body.get("status") {
            row["status"] = status.clone();
        } else if let Some(spec) = body.get("spec") {
            row["spec"] = spec.clone();
            row["metadata"]["generation"] = json!(row["metadata"]["generation"].as_i64().unwrap() + 1);
        } else {
            row["metadata"]["ownerReferences"] = body["metadata"]["ownerReferences"].clone();
        }
        row["metadata"]["resourceVersion"] = json!(self.version.to_string());
        (200, row.clone())
    }
}

fn failure(code: u16, reason: &str, name: &str) -> (u16, Value) {
    let details = if name.is_empty() { json!({}) } else { json!({"name": name}) };
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "reason": reason, "message": "scripted", "details": details}),
    )
}

#[derive(Default)]
struct Fleet {
    known: Mutex<HashMap<String, Observation>>,
    changed: Mutex<Vec<Arc<str>>>,
    settled: AtomicBool,
    notify: Notify,
}

impl Fleet {
    fn set(&self, node: &str, observation: Observation) {
        self.known.lock().unwrap().insert(node.to_owned(), observation);
        self.changed.lock().unwrap().push(node.into());
        self.notify.notify_one();
    }
}

impl Registry for Fleet {
    fn observe(&self, node: &str) -> Option<Observation> {
        self.known.lock().unwrap().get(node).cloned()
    }

    fn settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    async fn changed(&self) -> Vec<Arc<str>> {
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
}

async fn lab(server: Server) -> Lab {
    let server = Arc::new(Mutex::new(server));
    let shared = server.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let shared = shared.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap_or_default();
            let query = head.uri.query().unwrap_or_default();
            let (code, answer) = shared.lock().unwrap().answer(&head.method, head.uri.path(), query, &body);
            let body = Body::from(serde_json::to_vec(&answer).unwrap());
            Ok::<_, Infallible>(Response::builder().status(code).body(body).unwrap())
        }
    });
    let (fleet, floors) = (Arc::new(Fleet::default()), Floors::default());
    let assignments = Assignments::default();
    let metrics = StatusMetrics::new(&prometheus::Registry::new()).unwrap();
    let agents = Agents::default();
    let settings = WriterSettings { replica: "tower-0".into(), agents: agents.clone() };
    let client = Client::new(service, "default");
    let mut writer =
        Writer::new(client, fleet.clone(), settings, floors.clone(), assignments.clone(), metrics);
    let loaded = writer.load().await.is_ok();
    let (nodes, events) = mpsc::unbounded_channel();
    tokio::spawn(writer.run(loaded, events));
    Lab { server, fleet, nodes, floors, assignments, agents }
}

impl Lab {
    fn node(&self, name: &str, uid: &str) {
        let identity =
            NodeIdentity { name: name.into(), uid: uid.into(), kubelet_lost: None, labels: Arc::default() };
        self.nodes.send(NodeEvent::Applied(identity)).unwrap();
    }

    /// Virtual time: everything that can happen without waiting longer happens before this returns.
    async fn wait(&self, milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }

    fn row(&self, name: &str) -> Value {
        self.server.lock().unwrap().rows.get(name).cloned().unwrap_or_default()
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
async fn a_row_follows_its_node() {
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
async fn left_over_rows_go_once_all_nodes_are_known() {
    let rows = [("n1".to_owned(), stored("tower-0", 4))].into();
    let lab = lab(Server { rows, version: 1, ..Server::default() }).await;
    lab.wait(2_000).await;
    assert!(lab.writes().is_empty());
    lab.nodes.send(NodeEvent::Synced).unwrap();
    lab.wait(100).await;
    assert_eq!(lab.writes(), ["DELETE n1"]);
}

#[tokio::test(start_paused = true)]
async fn a_missing_crd_is_waited_for() {
    let lab = lab(Server { missing: true, ..Server::default() }).await;
    lab.node("n1", "u1");
    lab.wait(30_000).await;
    assert!(lab.writes().is_empty());
    lab.server.lock().unwrap().missing = false;
    lab.wait(6_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Absent");
}

#[tokio::test(start_paused = true)]
async fn transitions_are_written_at_once_and_the_rest_once_a_second() {
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
    lab.wait(60_000).await;
    assert!(lab.writes().is_empty(), "nothing changed");
    lab.wait(300_000).await;
    assert_eq!(lab.writes().len(), 1, "the refresh");
}

#[tokio::test(start_paused = true)]
async fn a_row_that_another_replica_took_is_left_to_it() {
    let rows = [("n1".to_owned(), stored("tower-0", 4))].into();
    let lab = lab(Server { rows, version: 1, ..Server::default() }).await;
    assert_eq!((lab.floors.get("n1").generation, lab.floors.get("n1").session), (70, 4));
    lab.node("n1", "u1");
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(100).await;
    assert_eq!(lab.row("n1")["status"]["connection"]["session"], 5);
    {
        let mut server = lab.server.lock().unwrap();
        server.version += 1;
        let version = json!(server.version.to_string());
        let row = server.rows.get_mut("n1").unwrap();
        row["status"]["connection"] = json!({"replica": "tower-1", "session": 6});
        row["metadata"]["resourceVersion"] = version;
    }
    lab.fleet.set("n1", observed(72, 5));
    lab.wait(5_000).await;
    let row = lab.row("n1");
    assert_eq!(
        (&row["status"]["connection"]["replica"], &row["status"]["generation"]["applied"]),
        (&json!("tower-1"), &json!(71))
    );
    lab.writes();
    lab.fleet.set("n1", observed(73, 5));
    lab.wait(5_000).await;
    assert!(lab.writes().is_empty());
    lab.fleet.set("n1", observed(74, 7));
    lab.wait(5_000).await;
    assert_eq!(lab.row("n1")["status"]["connection"], json!({"replica": "tower-0", "session": 7}));
}

#[tokio::test(start_paused = true)]
async fn a_row_says_why_its_agent_is_missing() {
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
    lab.agents.closed(Some(Obstacle::new("ControllerNotListening", "the port is taken")));
    lab.wait(2_000).await;
    assert_eq!(reason(), "ControllerNotListening");
    lab.agents.closed(None);
    lab.fleet.set("n1", observed(1, 1));
    lab.wait(2_000).await;
    assert_eq!(reason(), "UpToDate");
}

#[tokio::test(start_paused = true)]
async fn assignments_are_written_over_the_version_that_they_were_decided_on() {
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
        lab.assignments.want(BTreeMap::from([(name.clone(), assignment)]));
    };
    let named = || lab.row("n1")["spec"]["profile"]["revision"].clone();
    // Before there is a row: it is born with the assignment.
    want(1);
    lab.node("n1", "u1");
    lab.wait(100).await;
    assert_eq!(named(), json!(1));
    assert_eq!(lab.assignments.of("n1").1.profile.map(|profile| profile.revision), Some(1));
    lab.writes();
    want(2);
    lab.wait(100).await;
    assert_eq!((named(), lab.writes()[0].as_str()), (json!(2), "PATCH n1"));
    // Somebody else was faster: what they wrote stays until the next decision.
    {
        let mut server = lab.server.lock().unwrap();
        server.version += 1;
        let version = json!(server.version.to_string());
        let row = server.rows.get_mut("n1").unwrap();
        row["metadata"]["resourceVersion"] = version;
        row["spec"]["profile"] = json!({"name": "other", "revision": 9});
    }
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
async fn a_missing_agent_is_news_once_agents_had_the_time_to_come_back() {
    let rows = [("n1".to_owned(), stored("tower-0", 4))].into();
    let lab = lab(Server { rows, version: 1, ..Server::default() }).await;
    lab.node("n1", "u1");
    lab.wait(120_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Synced", "streams are not accepted yet");
    lab.agents.closed(Some(Obstacle::new("ControllerNotListening", "the port is taken")));
    lab.wait(12_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Stale", "nobody can come");
    lab.agents.closed(None);
    lab.fleet.settled.store(true, Ordering::Relaxed);
    lab.wait(12_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Stale");
}

#[tokio::test(start_paused = true)]
async fn a_row_that_was_deleted_is_made_again_with_its_assignment() {
    let mut row = stored("tower-0", 4);
    row["spec"] = json!({"profile": {"name": "default", "revision": 7}});
    let lab = lab(Server { rows: [("n1".to_owned(), row)].into(), version: 1, ..Server::default() }).await;
    lab.node("n1", "u1");
    lab.server.lock().unwrap().rows.clear();
    lab.fleet.set("n1", observed(71, 5));
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["spec"]["profile"]["revision"], 7, "the nodes keep their settings");
    // Another Node of that name is not the one that was moved there.
    lab.server.lock().unwrap().rows.clear();
    lab.node("n1", "u2");
    lab.wait(2_000).await;
    assert_eq!(lab.row("n1")["metadata"]["ownerReferences"][0]["uid"], "u2");
    assert_eq!(lab.row("n1")["spec"]["profile"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_row_that_went_while_the_watch_was_down_is_made_again() {
    let lab = lab(Server::default()).await;
    lab.node("n1", "u1");
    lab.node("n2", "u2");
    lab.wait(100).await;
    lab.server.lock().unwrap().rows.remove("n1");
    lab.wait(60_000).await;
    assert_eq!(lab.row("n1")["status"]["state"], "Absent");
    assert!(!lab.writes().iter().any(|write| write == "DELETE n2"));
}

#[tokio::test(start_paused = true)]
async fn a_row_that_flaps_is_written_at_most_once_a_second() {
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
