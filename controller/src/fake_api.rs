//! An API server in memory for tests. Writes behave as they do there: a merge patch follows RFC 7386, the main
//! resource ignores `status` and the status subresource ignores everything else, a stale `resourceVersion` is a
//! conflict, `generation` counts changes of `spec`, and finalizers defer deletion.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// Applies a JSON merge patch (RFC 7386).
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, change) in changes {
        if change.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut target[key], change);
        }
    }
}

/// The objects by path, as the API server stores them.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) objects: BTreeMap<String, Value>,
    pub(crate) version: u64,
    /// Watches stay open without events, like those of a server that is behind their start version; otherwise each
    /// ends at once, so that the caller lists again.
    pub(crate) silent: bool,
}

/// Status code of a request that is never answered.
const NEVER: u16 = 0;

/// A request.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) query: &'a str,
    pub(crate) body: Value,
}

impl Store {
    /// Stores an object with a new `resourceVersion`, without checks.
    pub(crate) fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    /// Changes an object as another client would, bypassing all checks.
    pub(crate) fn change(&mut self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut object = self.objects[path].clone();
        change(&mut object);
        self.put(path, object);
    }

    /// Answers a request about a collection or an object.
    pub(crate) fn answer(&mut self, call: Call<'_>) -> (u16, Value) {
        let Call { method, path, query, body } = call;
        if query.contains("watch=true") && self.silent {
            return (NEVER, Value::Null);
        }
        if query.contains("watch=true") {
            return (200, json!({"type": "ERROR", "object": failure(410, "Expired", "").1}));
        }
        let object = path.trim_end_matches("/status");
        match *method {
            // The group's paths have four segments before the name.
            Method::GET if path.trim_start_matches('/').split('/').count() == 4 => self.list(path),
            Method::POST => self.create(path, body),
            _ if !self.objects.contains_key(object) => failure(404, "NotFound", name_of(object)),
            Method::GET => (200, self.objects[object].clone()),
            Method::DELETE => self.delete(object),
            Method::PATCH => self.patch(object, &body),
            _ => self.put_status(object, &body),
        }
    }

    fn list(&self, path: &str) -> (u16, Value) {
        let prefix = format!("{path}/");
        let items: Vec<_> = self.objects.iter().filter(|(known, _)| known.starts_with(&prefix)).collect();
        let items: Vec<_> = items.into_iter().map(|(_, object)| object.clone()).collect();
        (200, json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items}))
    }

    fn create(&mut self, collection: &str, mut object: Value) -> (u16, Value) {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let path = format!("{collection}/{name}");
        if self.objects.contains_key(&path) {
            return failure(409, "AlreadyExists", &name);
        }
        object["metadata"]["uid"] = json!(format!("uid-{}", self.version + 1));
        object["metadata"]["generation"] = json!(1);
        object.as_object_mut().unwrap().remove("status");
        (201, self.put(&path, object))
    }

    fn patch(&mut self, path: &str, patch: &Value) -> (u16, Value) {
        let before = &self.objects[path];
        if is_stale(before, patch) {
            return failure(409, "Conflict", name_of(path));
        }
        let mut after = before.clone();
        merge(&mut after, patch);
        match before.get("status") {
            Some(status) => after["status"] = status.clone(),
            None => drop(after.as_object_mut().unwrap().remove("status")),
        }
        if before.get("spec") != after.get("spec") {
            after["metadata"]["generation"] = json!(before["metadata"]["generation"].as_i64().unwrap() + 1);
        }
        self.store(path, after)
    }

    fn put_status(&mut self, path: &str, body: &Value) -> (u16, Value) {
        let mut after = self.objects[path].clone();
        if is_stale(&after, body) {
            return failure(409, "Conflict", name_of(path));
        }
        after["status"] = body["status"].clone();
        self.store(path, after)
    }

    fn delete(&mut self, path: &str) -> (u16, Value) {
        let mut object = self.objects[path].clone();
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        self.store(path, object)
    }

    /// Stores an object, or removes it if it is being deleted and has no finalizer.
    fn store(&mut self, path: &str, object: Value) -> (u16, Value) {
        let metadata = &object["metadata"];
        let kept = metadata["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty());
        if metadata.get("deletionTimestamp").is_some() && !kept {
            self.objects.remove(path);
            return (200, object);
        }
        (200, self.put(path, object))
    }
}

fn is_stale(stored: &Value, body: &Value) -> bool {
    let version = &body["metadata"]["resourceVersion"];
    !version.is_null() && *version != stored["metadata"]["resourceVersion"]
}

fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// A `Status` that reports a failure. Without a name it is about the kind.
pub(crate) fn failure(code: u16, reason: &str, name: &str) -> (u16, Value) {
    let details = if name.is_empty() { json!({}) } else { json!({"name": name}) };
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
            "reason": reason, "message": "scripted", "details": details}),
    )
}

/// A client whose requests `answer` answers at once.
pub(crate) fn client<S: Send + 'static>(
    server: Arc<Mutex<S>>,
    answer: fn(&mut S, Call<'_>) -> (u16, Value),
) -> Client {
    slow_client(server, Duration::ZERO, answer)
}

/// A client whose requests are answered after some time.
pub(crate) fn slow_client<S: Send + 'static>(
    server: Arc<Mutex<S>>,
    latency: Duration,
    answer: fn(&mut S, Call<'_>) -> (u16, Value),
) -> Client {
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = server.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap_or_default();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let query = head.uri.query().unwrap_or_default();
            tokio::time::sleep(latency).await;
            let call = Call { method: &head.method, path: head.uri.path(), query, body };
            let (code, answer) = answer(&mut server.lock().unwrap(), call);
            if code == NEVER {
                std::future::pending::<()>().await;
            }
            let body = Body::from(serde_json::to_vec(&answer).unwrap());
            Ok::<_, Infallible>(Response::builder().status(code).body(body).unwrap())
        }
    });
    Client::new(service, "default")
}

#[test]
fn merge_patches_follow_rfc_7386() {
    // The examples of the RFC's appendix A.
    let cases = [
        (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
        (json!({"a": "b"}), json!({"a": null}), json!({})),
        (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
        (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
        (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
        (json!({"a": "foo"}), json!(null), json!(null)),
        (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
    ];
    for (mut target, patch, expected) in cases {
        merge(&mut target, &patch);
        assert_eq!(target, expected, "{patch}");
    }
}
