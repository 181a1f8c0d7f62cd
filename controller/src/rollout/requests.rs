//! Requests to the API server about profiles and rollouts.

use std::fmt::Debug;
use std::time::Duration;

use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::FINALIZER;
use crate::errors::is_missing_kind;

/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);

async fn in_time<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    tokio::time::timeout(TIMEOUT, request).await.unwrap_or_else(|_| {
        let message = format!("no answer within {} seconds", TIMEOUT.as_secs());
        Err(kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
    })
}

/// Returns true if another client changed, created or deleted the object first. The watch delivers that change.
pub(super) fn is_race(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409) || is_missing_object(error)
}

fn is_missing_object(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404) && !is_missing_kind(error)
}

/// Returns the message of a refusal that no retry can change.
pub(super) fn refusal(error: &kube::Error) -> Option<String> {
    match error {
        kube::Error::Api(status) if matches!(status.code, 400 | 403 | 413 | 422) => {
            Some(status.message.clone())
        }
        _ => None,
    }
}

/// Lists all objects of a kind.
pub(super) async fn list<K>(api: &Api<K>) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    in_time(api.list(&ListParams::default())).await.map(|list| list.items)
}

pub(super) async fn create<K>(api: &Api<K>, object: &K) -> Result<K, kube::Error>
where
    K: Serialize + Clone + DeserializeOwned + Debug,
{
    in_time(api.create(&PostParams::default(), object)).await
}

/// Replaces the status. The request fails if the version in `object` is not the stored one.
pub(super) async fn write_status<K>(api: &Api<K>, object: &K) -> Result<K, kube::Error>
where
    K: Resource + Serialize + Clone + DeserializeOwned + Debug,
{
    in_time(api.replace_status(&object.name_any(), &PostParams::default(), object)).await
}

/// Adds or removes the finalizer. The request fails if the version in `object` is not the stored one.
pub(super) async fn set_finalizer<K>(api: &Api<K>, object: &K, present: bool) -> Result<K, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut finalizers = object.finalizers().to_vec();
    finalizers.retain(|known| known != FINALIZER);
    if present {
        finalizers.push(FINALIZER.to_owned());
    }
    let metadata = json!({"resourceVersion": object.resource_version(), "finalizers": finalizers});
    let patch = Patch::Merge(json!({"metadata": metadata}));
    in_time(api.patch(&object.name_any(), &PatchParams::default(), &patch)).await
}

/// Deletes the object with this UID. An object that does not exist is no error.
pub(super) async fn delete<K>(api: &Api<K>, object: &K) -> Result<(), kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let preconditions = Some(Preconditions { uid: object.uid(), resource_version: None });
    let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
    match in_time(api.delete(&object.name_any(), &parameters)).await {
        Err(error) if !is_race(&error) => Err(error),
        _ => Ok(()),
    }
}
