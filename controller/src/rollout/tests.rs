//! Rounds against an in-memory API server that can refuse requests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use super::*;
use crate::fake_api::{self, Call, Store, failure};
use crate::fleet::Parts;

/// Stored objects, and the answers to the next creations.
#[derive(Default)]
struct Server {
    store: Store,
    refusals: Vec<u16>,
}

const PROFILES: &str = "/apis/switchtower.dev/v1alpha1/proxyprofiles";
const ROLLOUTS: &str = "/apis/switchtower.dev/v1alpha1/proxyrollouts";

impl Server {
    fn answer(&mut self, call: Call<'_>) -> (u16, Value) {
        if call.path.contains("/events") {
            return (201, call.body);
        }
        let refused = if *call.method == Method::POST { self.refusals.pop() } else { None };
        refused.map_or_else(|| self.store.answer(call), |code| failure(code, "Scripted", "default"))
    }
}

struct Lab {
    server: Arc<Mutex<Server>>,
    rollouts: Rollouts,
}

/// A profile with a completed first revision and a changed spec.
async fn lab() -> Lab {
    let server = Arc::new(Mutex::new(Server::default()));
    let mut lab = Lab { rollouts: rollouts(server.clone()), server };
    let metadata = json!({"name": "default", "uid": "profile", "generation": 1, "finalizers": [FINALIZER]});
    lab.put(PROFILES, &json!({"metadata": metadata, "spec": {"settings": {}}}));
    lab.rollouts.nodes_synced = true;
    lab.load().await;
    lab.rollouts.round().await;
    lab.finish("default-1").await;
    assert_eq!(lab.profile_status(), (Some(1), "default@1".to_owned(), "UpToDate".to_owned()));
    let mut profile = lab.object(PROFILES, "default");
    profile["metadata"]["generation"] = json!(2);
    profile["spec"]["settings"]["masqueradeAll"] = json!(true);
    lab.put(PROFILES, &profile);
    lab.load().await;
    lab
}

fn rollouts(server: Arc<Mutex<Server>>) -> Rollouts {
    let registry = prometheus::Registry::new();
    let fleet = Fleet::new(Parts { upstream: Arc::new(|| Some(Duration::ZERO)), ..Parts::for_tests() });
    let metrics = RolloutMetrics::new(&registry).unwrap();
    let assignments = Assignments::default();
    assignments.set_loaded();
    let leadership = (Fence::open(), replicas::Client::alone());
    Rollouts::new(
        fake_api::client(server, Server::answer),
        "tower-0",
        fleet,
        assignments,
        leadership,
        metrics,
    )
}

impl Lab {
    fn put(&self, kind: &str, object: &Value) {
        let path = format!("{kind}/{}", object["metadata"]["name"].as_str().unwrap());
        self.server.lock().unwrap().store.put(&path, object.clone());
    }

    fn object(&self, kind: &str, name: &str) -> Value {
        self.server.lock().unwrap().store.objects.get(&format!("{kind}/{name}")).cloned().unwrap_or_default()
    }

    /// Loads all objects into the controller.
    async fn load(&mut self) {
        self.rollouts.load().await.unwrap();
    }

    /// Marks a rollout as complete.
    async fn finish(&mut self, rollout: &str) {
        let mut object = self.object(ROLLOUTS, rollout);
        object["status"]["state"] = json!("Complete");
        self.put(ROLLOUTS, &object);
        self.load().await;
        self.rollouts.round().await;
    }

    /// Observed generation, target and reason.
    fn profile_status(&self) -> (Option<i64>, String, String) {
        let object: ProxyProfile = serde_json::from_value(self.object(PROFILES, "default")).unwrap();
        let status = object.status.unwrap_or_default();
        let reason = status.conditions.first().map(|ready| ready.reason.clone()).unwrap_or_default();
        (status.observed_generation, status.target_name, reason)
    }
}

#[tokio::test]
async fn generation_without_its_rollout_is_not_reported() {
    // A conflicting change, a busy API server, and a failure.
    for code in [409, 429, 500] {
        let mut lab = lab().await;
        lab.server.lock().unwrap().refusals.push(code);
        lab.rollouts.round().await;
        assert_eq!(
            lab.profile_status(),
            (Some(1), "default@1".to_owned(), "UpToDate".to_owned()),
            "after {code} the status is that of the generation before"
        );
        tokio::time::pause();
        tokio::time::advance(RETRY_OBJECT).await;
        tokio::time::resume();
        lab.rollouts.round().await;
        let standing = lab.profile_status();
        assert_eq!(standing, (Some(2), "default@2".to_owned(), "RollingOut".to_owned()), "after {code}");
    }
}

#[tokio::test]
async fn refused_rollout_is_reported_and_retried() {
    let mut lab = lab().await;
    lab.server.lock().unwrap().refusals = vec![422];
    lab.rollouts.round().await;
    let refused = (Some(2), "default@1".to_owned(), "RolloutRefused".to_owned());
    assert_eq!(lab.profile_status(), refused);
    lab.rollouts.round().await;
    assert_eq!(lab.profile_status(), refused, "not tried at each round");
    assert!(lab.rollouts.wake_up(false).is_some(), "it is retried without an event");
    tokio::time::pause();
    tokio::time::advance(RETRY * 2).await;
    lab.rollouts.round().await;
    assert_eq!(lab.profile_status(), (Some(2), "default@2".to_owned(), "RollingOut".to_owned()));
}

#[tokio::test]
async fn wall_clock_jump_does_not_affect_an_active_rollout() {
    let mut lab = lab().await;
    let jump = Arc::new(std::sync::atomic::AtomicI64::new(0));
    let ahead = jump.clone();
    lab.rollouts.clock = Clock::new(Box::new(move || {
        Timestamp::now()
            + Duration::from_secs(ahead.load(std::sync::atomic::Ordering::Relaxed).unsigned_abs())
    }));
    lab.rollouts.round().await;
    assert_eq!(lab.profile_status().2, "RollingOut");
    let before = lab.rollouts.facts().now;
    jump.store(86_400, std::sync::atomic::Ordering::Relaxed);
    lab.rollouts.round().await;
    assert!(lab.rollouts.facts().now.since(before) < Duration::from_secs(3_600), "no day has passed");
    // No rollout is active: the clock is set from the wall clock.
    lab.finish("default-2").await;
    lab.rollouts.round().await;
    assert!(lab.rollouts.facts().now.since(before) >= Duration::from_secs(80_000));
}

#[tokio::test]
async fn name_of_an_object_created_by_hand_is_skipped() {
    let mut lab = lab().await;
    let mut object = lab.object(ROLLOUTS, "default-1");
    object["metadata"] = json!({"name": "default-2", "uid": "by-hand", "generation": 1});
    object["status"] = Value::Null;
    lab.put(ROLLOUTS, &object);
    lab.load().await;
    lab.rollouts.round().await;
    assert_eq!(lab.profile_status(), (Some(2), "default@3".to_owned(), "RollingOut".to_owned()));
    assert_eq!(lab.object(ROLLOUTS, "default-2")["status"]["state"], "Ignored");
}

#[tokio::test]
async fn no_decision_before_the_rows_are_read() {
    let mut lab = lab().await;
    assert!(lab.rollouts.ready());
    lab.rollouts.assignments = Assignments::default();
    assert!(!lab.rollouts.ready(), "a node without an assignment may have one in its row");
    lab.rollouts.assignments.set_loaded();
    assert!(lab.rollouts.ready());
}

#[tokio::test]
async fn abort_after_a_restore_of_etcd_is_honored() {
    let mut lab = lab().await;
    lab.rollouts.round().await;
    let state = |lab: &Server| {
        let object = &lab.store.objects[&format!("{ROLLOUTS}/default-2")];
        object["status"]["state"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(state(&lab.server.lock().unwrap()), "Paused");
    let Lab { server, rollouts } = lab;
    server.lock().unwrap().store.silent = true;
    let upstream = crate::watch::Upstream::default();
    let (nodes, events) = mpsc::unbounded_channel();
    nodes.send(NodeEvent::Synced).unwrap();
    tokio::time::pause();
    tokio::spawn(rollouts.run(events, upstream.restores()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    server.lock().unwrap().store.change(&format!("{ROLLOUTS}/default-2"), |object| {
        object["spec"]["abort"] = json!(true);
        // An older version than the controller has seen: an ordinary watch would not deliver it either.
        object["metadata"]["resourceVersion"] = json!("1");
    });
    upstream.went_back();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(state(&server.lock().unwrap()), "Aborted");
}

/// A user removed the finalizer of a rollout whose revision a node has.
#[tokio::test]
async fn deleted_rollout_changes_nothing_on_its_nodes() {
    let mut lab = lab().await;
    let node: Arc<str> = "n1".into();
    let assigned = switchtower_crds::ProfileAssignment {
        name: "default".into(),
        revision: 1,
        ..switchtower_crds::ProfileAssignment::default()
    };
    let row = crate::status::StoredAssignment { profile: Some(assigned), had_agent: true };
    lab.rollouts.assignments.set(&node, &row);
    lab.rollouts.serve();
    let served = |lab: &Lab| {
        let (revision, _) = &lab.rollouts.served[&node];
        let settings =
            lab.rollouts.served_settings.get(&(revision.profile.clone(), revision.number)).cloned();
        (revision.to_string(), settings)
    };
    let before = served(&lab);
    assert_eq!(before.0, "default@1");
    lab.server.lock().unwrap().store.objects.remove(&format!("{ROLLOUTS}/default-1"));
    lab.load().await;
    assert_eq!(served(&lab), before);
    assert!(lab.rollouts.unknown.contains_key(&node));
    let with_row = lab.rollouts.fleet.assignments();
    // Removing the row also removes the record of its unknown revision.
    lab.rollouts.assignments = Assignments::default();
    lab.rollouts.serve();
    assert!(lab.rollouts.unknown.is_empty() && lab.rollouts.served.is_empty());
    assert_eq!(lab.rollouts.fleet.assignments(), with_row - 1, "of a name without a Node");
}
