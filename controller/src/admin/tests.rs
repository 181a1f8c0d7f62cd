//! Requests to a fleet without streams, with an in-memory reviewer.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use serde_json::Value;
use switchtower_core::compile::Compiler;
use switchtower_core::model::{Input, Node, ObjectKey};
use switchtower_core::propagation::{Change, Publication};
use switchtower_proto::v1::Source;
use tower::ServiceExt as _;

use super::*;
use crate::fleet::Parts;
use crate::serve::review::{Review, Reviewer};

/// Accepts tokens of the form AUDIENCE@USER.
struct Fake;

impl Reviewer for Fake {
    fn review<'a>(&'a self, token: &'a str, _: &'a str) -> Review<'a> {
        Box::pin(async move {
            let (audience, user) = token.split_once('@').ok_or("the API server is away")?;
            let username = Some(format!("system:serviceaccount:switchtower-system:{user}"));
            Ok(TokenReviewStatus {
                authenticated: Some(true),
                audiences: Some(vec![audience.to_owned()]),
                user: Some(UserInfo { username, ..UserInfo::default() }),
                error: None,
            })
        })
    }
}

fn router() -> Router {
    let age = || Some(Duration::from_millis(70));
    let fleet = Fleet::new(Parts { upstream: Arc::new(age), ..Parts::for_tests() });
    let mut compiler = Compiler::new();
    compiler.apply(Input::Node(Node {
        name: "n1".into(),
        addresses: vec![[192, 0, 2, 1].into()],
        pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
        zone: None,
        eligible: true,
    }));
    let source = Source { services: 7, endpoint_slices: 9, ..Source::default() };
    let change = Change {
        id: 1,
        object: "Service shop/cart".into(),
        service: Some(ObjectKey { namespace: "shop".into(), name: "cart".into() }),
        received: 1_000_000,
        triggered: None,
        trace: crate::propagation::new_trace(),
        origin: None,
    };
    let publication =
        Publication { changes: vec![change], total: 1, compiling: 2_000_000, published: 5_000_000 };
    fleet.publish(compiler.compile(), publication, source);
    Admin::new(
        fleet,
        AdminAuthenticator::new(Fake, "switchtower-system"),
        "controller-0",
        crate::metrics::registry().unwrap(),
    )
    .router()
}

async fn get_as(token: &str, path: &str) -> (StatusCode, Value) {
    let mut request = Request::get(path);
    if !token.is_empty() {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let response = router().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    let status = response.status();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

const VIEWER: &str = "switchtower-admin@switchtower-viewer";
const OPERATOR: &str = "switchtower-admin@switchtower-operator";

#[tokio::test]
async fn requests_without_a_valid_token_are_refused() {
    let cases = [
        ("", StatusCode::UNAUTHORIZED),
        ("switchtower@switchtower-viewer", StatusCode::UNAUTHORIZED),
        ("switchtower-admin@switchtower-node-agent", StatusCode::FORBIDDEN),
        ("garbage", StatusCode::SERVICE_UNAVAILABLE),
        (VIEWER, StatusCode::OK),
    ];
    for (token, wanted) in cases {
        let (status, body) = get_as(token, "/v1/controller").await;
        assert_eq!(status, wanted, "{token}: {body}");
        // Unknown paths reveal nothing to unauthenticated callers.
        let (unknown, _) = get_as(token, "/nothing").await;
        assert_eq!(unknown, if wanted == StatusCode::OK { StatusCode::NOT_FOUND } else { wanted });
    }
}

#[tokio::test]
async fn whole_tables_require_an_operator() {
    for path in ["/v1/nodes/n1/diff", "/v1/nodes/n1/rules"] {
        let (status, body) = get_as(VIEWER, path).await;
        assert_eq!((status, &body["code"]), (StatusCode::FORBIDDEN, &"ST0404".into()), "{body}");
        let (status, body) = get_as(OPERATOR, path).await;
        assert_eq!((status, &body["code"]), (StatusCode::SERVICE_UNAVAILABLE, &"ST0109".into()), "{body}");
    }
    assert_eq!(get_as(OPERATOR, "/v1/nodes/n9/rules").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn controller_and_progress_are_reported() {
    let (_, body) = get_as(VIEWER, "/v1/controller").await;
    let known = (&body["replica"], &body["nodes"], &body["connected"], &body["upstreamAgeMilliseconds"]);
    assert_eq!(known, (&"controller-0".into(), &1.into(), &0.into(), &70.into()));
    let (_, body) = get_as(VIEWER, "/v1/progress?services=7&endpointSlices=9").await;
    assert_eq!((&body["revision"], &body["connected"]), (&2.into(), &0.into()), "{body}");
    assert_eq!(body["excluded"], serde_json::json!(["n1"]));
    let (_, body) = get_as(VIEWER, "/v1/progress?services=8").await;
    assert_eq!(body["revision"], Value::Null, "not seen yet");
    let (_, body) = get_as(VIEWER, "/v1/progress?services=8&revision=1&instance=other").await;
    assert_eq!(body["revision"], Value::Null, "a revision of another process");
}

#[tokio::test]
async fn metrics_are_returned_as_text() {
    let (status, body) = get_as(VIEWER, "/v1/metrics").await;
    assert_eq!(status, StatusCode::OK);
    assert!(body["text"].as_str().unwrap().contains("\nprocess_start_time_seconds "), "{body}");
    assert_eq!(get_as("", "/v1/metrics").await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn drain_state_of_an_address_is_reported() {
    let (status, body) = get_as(VIEWER, "/v1/drains/10.244.0.7").await;
    assert_eq!((status, &body["verdict"]), (StatusCode::OK, &"TimedOut".into()), "{body}");
    assert_eq!(body["waitedFor"], serde_json::json!(["n1"]), "it has not acknowledged anything yet");
    assert_eq!(body["endpoint"], false);
    assert_eq!(get_as(VIEWER, "/v1/drains/web").await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn unknown_services_and_nodes_are_errors() {
    let (status, body) = get_as(VIEWER, "/v1/services/default/none/explanation").await;
    assert_eq!((status, &body["code"]), (StatusCode::NOT_FOUND, &"ST0207".into()));
    let (status, body) = get_as(VIEWER, "/v1/services/default/none/explanation?from=here").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(body["message"].as_str().unwrap().contains("is not an IPv4 or IPv6 address"), "{body}");
    let (status, _) = get_as(VIEWER, "/v1/services/default/none/explanation?node=n9").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn last_changes_of_a_service_are_returned() {
    let (status, body) = get_as(VIEWER, "/v1/services/shop/cart/changes?limit=5").await;
    assert_eq!((status, body.as_array().map(Vec::len)), (StatusCode::OK, Some(1)), "{body}");
    let known = (&body[0]["object"], &body[0]["compiling"], &body[0]["eligible"]);
    assert_eq!(known, (&"Service shop/cart".into(), &1_000.into(), &0.into()));
    let (_, body) = get_as(VIEWER, "/v1/services/shop/other/changes").await;
    assert_eq!(body, serde_json::json!([]));
}
