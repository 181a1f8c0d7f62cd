//! The watch loop against a scripted API server.

use std::sync::Arc;

use http::{Request, Response};
use k8s_openapi::api::core::v1::Service;
use kube::client::Body;
use kube::{Api, Client};
use prometheus::Registry;
use serde_json::{Value, json};
use switchtower_core::model::Input;
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};
use tower_test::mock::{self, Handle, SendResponse};

use super::{Batch, Selectors, Upstream, WatchMetrics, run};
use crate::ingest::Fact;

struct Lab {
    server: Handle<Request<Body>, Response<Body>>,
    batches: mpsc::Receiver<Batch>,
    registry: Registry,
    upstream: Arc<Upstream>,
}

fn lab() -> Lab {
    let (service, server) = mock::pair::<Request<Body>, Response<Body>>();
    let api = Api::all(Client::new(service, "default"));
    let (sink, batches) = mpsc::channel(64);
    let (registry, upstream) = (Registry::new(), Arc::new(Upstream::default()));
    let metrics = WatchMetrics::new(&registry).unwrap();
    let selectors = Selectors { labels: Some("!example".to_owned()) };
    tokio::spawn(run::<Service>(api, selectors, upstream.clone(), metrics, sink));
    Lab { server, batches, registry, upstream }
}

impl Lab {
    async fn next(&mut self) -> (String, SendResponse<Response<Body>>) {
        let next = timeout(Duration::from_secs(60), self.server.next_request());
        let (request, send) = next.await.expect("no request within a minute").expect("the client is gone");
        (request.uri().to_string(), send)
    }

    /// The question which version the API server has reached, answered.
    async fn reached(&mut self, version: u64) {
        let (uri, send) = self.next().await;
        assert!(uri.contains("limit=1") && !uri.contains("limit=500"), "{uri}");
        send.send_response(list(version, "more", &[object("a", 3)]));
    }

    /// The next request; its path and query are checked to contain all of `parts`.
    async fn request(&mut self, parts: &[&str]) -> SendResponse<Response<Body>> {
        let (uri, send) = self.next().await;
        for part in parts {
            assert!(uri.contains(part), "{uri} lacks {part}");
        }
        assert!(uri.contains("labelSelector=%21example"), "{uri}");
        send
    }

    async fn batch(&mut self) -> (String, u64, bool) {
        let next = timeout(Duration::from_secs(20), self.batches.recv());
        let batch = next.await.expect("no batch within 20 s").expect("the watch is gone");
        let facts: Vec<String> = batch.facts.iter().map(|ingested| show(&ingested.fact)).collect();
        (facts.join(" "), batch.resource_version, batch.synced)
    }

    fn count(&self, name: &str) -> u64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        family.map_or(0, |family| {
            family.get_metric().iter().map(|metric| metric.get_counter().get_value() as u64).sum()
        })
    }
}

fn show(fact: &Fact) -> String {
    match fact {
        Fact::Input(Input::Service(service)) => format!("+{}", service.key.name),
        Fact::Input(Input::ServiceDeleted(key)) => format!("-{}", key.name),
        other => format!("{other:?}"),
    }
}

fn object(name: &str, version: u64) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "resourceVersion": version.to_string()},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}})
}

fn broken(name: &str, version: u64) -> Value {
    let mut object = object(name, version);
    object["spec"]["ports"] = json!("not a list");
    object
}

fn list(version: u64, token: &str, items: &[Value]) -> Response<Body> {
    let body = json!({"apiVersion": "v1", "kind": "ServiceList",
        "metadata": {"resourceVersion": version.to_string(), "continue": token}, "items": items});
    Response::new(Body::from(serde_json::to_vec(&body).unwrap()))
}

fn events(events: &[(&str, Value)]) -> Response<Body> {
    let lines: String = events
        .iter()
        // As the API server writes it: the type first.
        .map(|(kind, object)| format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n"))
        .collect();
    Response::new(Body::from(lines.into_bytes()))
}

fn bookmark(version: u64) -> (&'static str, Value) {
    (
        "BOOKMARK",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"resourceVersion": version.to_string()}}),
    )
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "metadata": {},
        "code": code, "reason": reason, "message": "scripted"})
}

fn refused(code: u16, reason: &str) -> Response<Body> {
    let body = serde_json::to_vec(&failure(code, reason)).unwrap();
    Response::builder().status(code).body(Body::from(body)).unwrap()
}

#[tokio::test]
async fn pages_then_events_then_bookmarks_carry_the_version_on() {
    let mut lab = lab();
    assert_eq!(lab.upstream.age(), None, "not all watches were heard");
    lab.request(&["limit=500"]).await.send_response(list(7, "next", &[object("a", 3)]));
    assert_eq!(lab.batch().await, ("+a".into(), 0, false));
    lab.request(&["continue=next"]).await.send_response(list(7, "", &[object("b", 5)]));
    assert_eq!(lab.batch().await, ("+b".into(), 7, true));
    let watch = lab
        .request(&["watch=true", "resourceVersion=7", "timeoutSeconds=10", "allowWatchBookmarks=true"])
        .await;
    watch.send_response(events(&[("MODIFIED", object("a", 8)), ("DELETED", object("b", 9)), bookmark(20)]));
    assert_eq!(lab.batch().await, ("+a".into(), 8, false));
    assert_eq!(lab.batch().await, ("-b".into(), 9, false));
    assert_eq!(lab.batch().await, (String::new(), 20, false));
    lab.request(&["watch=true", "resourceVersion=20"]).await;
}

#[tokio::test]
async fn missed_deletions_follow_the_next_complete_list() {
    for expired in [refused(410, "Expired"), events(&[("ERROR", failure(410, "Expired"))])] {
        let mut lab = lab();
        lab.request(&[]).await.send_response(list(7, "", &[object("a", 3), object("b", 5), object("c", 6)]));
        assert_eq!(lab.batch().await, ("+a +b +c".into(), 7, true));
        lab.request(&["watch=true"]).await.send_response(expired);
        lab.request(&["limit=500"]).await.send_response(list(90, "next", &[object("a", 3)]));
        assert_eq!(
            lab.batch().await,
            (String::new(), 0, false),
            "an unchanged object is not handed on again"
        );
        lab.request(&["continue=next"]).await.send_response(list(90, "", &[object("c", 80)]));
        assert_eq!(lab.batch().await, ("+c -b".into(), 90, true));
        assert_eq!(lab.count("switchtower_watch_lists_total"), 2);
    }
}

#[tokio::test]
async fn undecodable_object_does_not_block_others() {
    let mut lab = lab();
    lab.request(&[]).await.send_response(list(7, "", &[broken("a", 3), object("b", 5)]));
    assert_eq!(lab.batch().await, ("+b".into(), 7, true));
    let watch = lab.request(&["watch=true"]).await;
    watch.send_response(events(&[
        ("MODIFIED", broken("b", 8)),
        ("ADDED", object("c", 9)),
        ("DELETED", broken("a", 10)),
    ]));
    assert_eq!(lab.batch().await, (String::new(), 8, false), "the previous state of b stays in force");
    assert_eq!(lab.batch().await, ("+c".into(), 9, false));
    assert_eq!(lab.batch().await, ("-a".into(), 10, false));
    assert_eq!(lab.count("switchtower_watch_undecodable_total"), 2);
    assert_eq!(lab.count("switchtower_watch_errors_total"), 0);
}

#[tokio::test]
async fn failed_watch_resumes_from_its_version() {
    let mut lab = lab();
    lab.request(&[]).await.send_response(list(7, "", &[object("a", 3)]));
    assert_eq!(lab.batch().await, ("+a".into(), 7, true));
    lab.request(&["watch=true"]).await.send_response(refused(403, "Forbidden"));
    lab.reached(7).await;
    lab.request(&["watch=true", "resourceVersion=7"])
        .await
        .send_response(events(&[("ADDED", object("b", 8))]));
    assert_eq!(lab.batch().await, ("+b".into(), 8, false));
    lab.request(&["watch=true", "resourceVersion=8"]).await;
    assert_eq!(lab.count("switchtower_watch_errors_total"), 1);
    assert_eq!(lab.count("switchtower_watch_lists_total"), 1);
}

#[tokio::test]
async fn expired_page_restarts_the_list() {
    let mut lab = lab();
    lab.request(&[]).await.send_response(list(7, "next", &[object("a", 3)]));
    assert_eq!(lab.batch().await, ("+a".into(), 0, false));
    lab.request(&["continue=next"]).await.send_response(refused(410, "Expired"));
    lab.request(&["limit=500"]).await.send_response(list(9, "", &[object("b", 8)]));
    assert_eq!(lab.batch().await, ("+b -a".into(), 9, true));
}

#[tokio::test]
async fn silent_watch_of_idle_cluster_continues() {
    let mut lab = lab();
    lab.request(&[]).await.send_response(list(7, "", &[object("a", 3)]));
    assert_eq!(lab.batch().await, ("+a".into(), 7, true));
    lab.request(&["watch=true"]).await.send_response(events(&[]));
    lab.reached(7).await;
    lab.request(&["watch=true", "resourceVersion=7"]).await.send_response(events(&[bookmark(9)]));
    assert_eq!(lab.batch().await, (String::new(), 9, false));
    lab.request(&["watch=true", "resourceVersion=9"]).await;
    assert_eq!(lab.count("switchtower_watch_lists_total"), 1);
}

#[tokio::test]
async fn restored_api_server_relisted() {
    for end in [events(&[]), refused(500, "InternalError")] {
        let mut lab = lab();
        lab.request(&[]).await.send_response(list(90, "", &[object("a", 80), object("b", 85)]));
        assert_eq!(lab.batch().await, ("+a +b".into(), 90, true));
        lab.request(&["watch=true"]).await.send_response(end);
        lab.reached(82).await;
        // The same version may be another content now.
        lab.request(&["limit=500"]).await.send_response(list(82, "", &[object("a", 80)]));
        assert_eq!(lab.batch().await, ("+a -b".into(), 82, true));
        lab.request(&["watch=true", "resourceVersion=82"]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn list_without_response_times_out() {
    let mut lab = lab();
    let _unanswered = lab.request(&["limit=500"]).await;
    lab.request(&["limit=500"]).await.send_response(list(7, "", &[]));
    assert_eq!(lab.batch().await, (String::new(), 7, true));
    assert_eq!(lab.count("switchtower_watch_errors_total"), 1);
}

/// A lab whose first list has this many objects, and its expired watch.
async fn expired(objects: u64) -> Lab {
    let mut lab = lab();
    let all: Vec<Value> = (0..objects).map(|number| object(&format!("s{number}"), number + 1)).collect();
    lab.request(&[]).await.send_response(list(900, "", &all));
    assert_eq!(lab.batch().await.1, 900);
    lab.request(&["watch=true"]).await.send_response(refused(410, "Expired"));
    lab
}

#[tokio::test(start_paused = true)]
async fn empty_list_confirmed_before_anything_is_deleted() {
    let mut lab = expired(150).await;
    lab.request(&["limit=500"]).await.send_response(list(910, "", &[]));
    assert_eq!(lab.batch().await, (String::new(), 0, false), "not a complete list yet");
    let all: Vec<Value> = (0..150).map(|number| object(&format!("s{number}"), number + 1)).collect();
    lab.request(&["limit=500"]).await.send_response(list(911, "", &all));
    assert_eq!(lab.batch().await, (String::new(), 911, true), "nothing was deleted");
    lab.request(&["watch=true", "resourceVersion=911"]).await;
}

#[tokio::test(start_paused = true)]
async fn confirmed_mass_deletion_forwarded() {
    let mut lab = expired(150).await;
    lab.request(&["limit=500"]).await.send_response(list(910, "", &[]));
    assert_eq!(lab.batch().await, (String::new(), 0, false));
    lab.request(&["limit=500"]).await.send_response(list(911, "", &[]));
    let (facts, version, synced) = lab.batch().await;
    assert_eq!((facts.split(' ').count(), version, synced), (150, 911, true));
}

#[tokio::test(start_paused = true)]
async fn deletions_in_a_small_cluster_not_delayed() {
    let mut lab = expired(99).await;
    lab.request(&["limit=500"]).await.send_response(list(910, "", &[]));
    let (facts, _, synced) = lab.batch().await;
    assert_eq!((facts.split(' ').count(), synced), (99, true));
}
