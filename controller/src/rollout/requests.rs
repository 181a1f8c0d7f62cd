//! Requests about profiles and rollouts.

use std::fmt::Debug;
use std::time::Duration;

use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::FINALIZER;
use crate::errors::is_missing_kind;

/// A request that takes longer is given up and tried again.
const PATIENCE: Duration = Duration::from_secs(10);

async fn in_time<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    tokio::time::timeout(PATIENCE, request).await.unwrap_or_else(|_| {
        let message = format!("no answer within {} seconds", PATIENCE.as_secs());
        Err(kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
    })
}

/// What the watch will tell soon: somebody else was faster, or the object is there already, or gone.
pub(super) fn is_race(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409) || is_missing_object(error)
}

fn is_missing_object(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404) && !is_missing_kind(error)
}

/// What the API server says about an object that it will not take however often it is tried.
pub(super) fn refusal(error: &kube::Error) -> Option<String> {
    match error {
        kube::Error::Api(status) if matches!(status.code, 400 | 403 | 413 | 422) => {
            Some(status.message.clone())
        }
        _ => None,
    }
}

/// All objects of a kind.
pub(super) async fn list<K>(api: &Api<K>) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    in_time(api.list(&ListParams::default())).await.map(|list| list.items)
}

/// Creates an object.
pub(super) async fn create<K>(api: &Api<K>, object: &K) -> Result<K, kube::Error>
where
    K: Serialize + Clone + DeserializeOwned + Debug,
{
    in_time(api.create(&PostParams::default(), object)).await
}

/// Replaces the status over the version that is in `object`.
pub(super) async fn write_status<K>(api: &Api<K>, object: &K) -> Result<K, kube::Error>
where
    K: Resource + Serialize + Clone + DeserializeOwned + Debug,
{
    in_time(api.replace_status(&object.name_any(), &PostParams::default(), object)).await
}

/// Adds or removes the finalizer, over the version that is in `object`.
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

/// Deletes exactly this object; one that is gone is fine.
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
