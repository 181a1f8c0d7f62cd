//! The order and the timing of a rotation, against an API server in memory.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;
use crate::fake_api::{self, Call};

const DELAY: Duration = Duration::from_secs(600);
const LONG: time::Duration = time::Duration::days(3_000);

fn made() -> Result<CaPem, AuthorityError> {
    generate()
}

#[test]
fn every_certificate_is_trusted_before_it_is_used() {
    let mut authority = Authority::new(generate().unwrap());
    assert_eq!(next_step(&authority, Request::None, LONG), None);
    assert_eq!(next_step(&authority, Request::None, LAST_YEAR - CHECK), Some(Step::Announce));
    let mut trusted = authority.bundle();
    let mut steps = Vec::new();
    let mut request = Request::Rotate;
    while let Some(step) = next_step(&authority, request, LONG) {
        authority = step.perform(authority, made).unwrap();
        assert!(trusted.contains(authority.signer.certificate.trim_end()), "{step:?}: the bundle before it");
        assert!(authority.bundle().contains(authority.signer.certificate.trim_end()));
        trusted = authority.bundle();
        request = Request::None;
        steps.push(step);
    }
    assert_eq!(steps, [Step::Announce, Step::Promote, Step::Retire]);
    assert_eq!(authority, Authority::new(authority.signer.clone()));
}

/// A Secret, the number of writes, and the version of each.
struct Server {
    secret: Value,
    writes: usize,
}

fn answer(server: &mut Server, call: Call<'_>) -> (u16, Value) {
    match *call.method {
        http::Method::GET => (200, server.secret.clone()),
        http::Method::PUT
            if call.body["metadata"]["resourceVersion"] == server.secret["metadata"]["resourceVersion"] =>
        {
            server.writes += 1;
            server.secret = call.body;
            server.secret["metadata"]["resourceVersion"] = json!((server.writes + 1).to_string());
            (200, server.secret.clone())
        }
        _ => fake_api::failure(409, "Conflict", CA_SECRET),
    }
}

struct Setup {
    server: Arc<Mutex<Server>>,
    authority: watch::Sender<Authority>,
    requests: watch::Sender<Request>,
    published: watch::Sender<Option<Published>>,
}

impl Setup {
    /// Starts the leader's task.
    fn start() -> Self {
        let authority = Authority::new(generate().unwrap());
        let mut secret = k8s_openapi::api::core::v1::Secret::default();
        secret.metadata.name = Some(CA_SECRET.to_owned());
        secret.metadata.resource_version = Some("1".to_owned());
        secret.metadata.annotations = Some([(ROTATE.to_owned(), "now".to_owned())].into());
        store(&mut secret, &authority);
        let server =
            Arc::new(Mutex::new(Server { secret: serde_json::to_value(secret).unwrap(), writes: 0 }));
        let (published, seen) = watch::channel(None);
        let rotation = Rotation {
            client: fake_api::client(server.clone(), answer),
            namespace: "switchtower-system".to_owned(),
            published: seen,
            fence: Fence::open(),
            delay: DELAY,
        };
        let (authority, current) = watch::channel(authority);
        let (requests, requested) = watch::channel(Request::None);
        tokio::spawn(rotation.rotate(current, requested));
        Self { server, authority, requests, published }
    }

    /// The Secret's CAs, as the watch of every replica reports them.
    fn observe(&self) -> Authority {
        let stored = self.stored();
        self.authority.send_replace(stored.clone());
        stored
    }

    fn stored(&self) -> Authority {
        let secret = self.server.lock().unwrap().secret.clone();
        parse(&serde_json::from_value(secret).unwrap(), "switchtower-system").unwrap()
    }

    fn publish(&self, authority: &Authority) {
        self.published.send_replace(Some(Published { bundle: authority.bundle(), since: Instant::now() }));
    }

    fn writes(&self) -> usize {
        self.server.lock().unwrap().writes
    }
}

#[tokio::test(start_paused = true)]
async fn steps_wait_until_the_bundle_was_published_for_the_delay() {
    let setup = Setup::start();
    tokio::time::sleep(2 * DELAY).await;
    assert_eq!(setup.writes(), 0, "nothing is due");
    setup.requests.send_replace(Request::Rotate);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let announced = setup.observe();
    setup.requests.send_replace(Request::None);
    assert!(announced.next.is_some() && announced.previous.is_none());
    assert!(setup.server.lock().unwrap().secret["metadata"]["annotations"].get(ROTATE).is_none());
    tokio::time::sleep(2 * DELAY).await;
    assert_eq!(setup.writes(), 1, "an unpublished CA never signs");
    setup.publish(&announced);
    tokio::time::sleep(DELAY - Duration::from_secs(1)).await;
    // Another client changed the ConfigMap: the delay starts again.
    setup.published.send_replace(None);
    setup.publish(&announced);
    tokio::time::sleep(DELAY - Duration::from_secs(1)).await;
    assert_eq!(setup.writes(), 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let promoted = setup.observe();
    assert_eq!(Some(&promoted.signer), announced.next.as_ref());
    assert_eq!(promoted.previous, Some(announced.signer));
    setup.publish(&promoted);
    tokio::time::sleep(DELAY + Duration::from_secs(1)).await;
    let retired = setup.observe();
    assert_eq!(retired, Authority::new(promoted.signer));
    setup.publish(&retired);
    tokio::time::sleep(Duration::from_secs(24 * 3_600)).await;
    assert_eq!(setup.writes(), 3, "a request rotates once");
}

#[tokio::test(start_paused = true)]
async fn decision_on_an_older_secret_is_not_written() {
    let setup = Setup::start();
    // Another leader has rotated, and this replica has not observed it yet.
    let other = Authority::new(generate().unwrap());
    {
        let mut server = setup.server.lock().unwrap();
        let mut secret = serde_json::from_value(server.secret.clone()).unwrap();
        store(&mut secret, &other);
        server.secret = serde_json::to_value(secret).unwrap();
    }
    setup.requests.send_replace(Request::Rotate);
    tokio::time::sleep(4 * RETRY).await;
    assert_eq!(setup.writes(), 0);
    setup.observe();
    tokio::time::sleep(2 * RETRY).await;
    assert_eq!(setup.stored().signer, other.signer);
    assert!(setup.stored().next.is_some());
}
