//! Synchronous access to the API server, so that tests read top to bottom and poll.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use kube::{Api, Client, Config, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::runtime::Runtime;

/// Client of the API server with administrator rights.
#[derive(Clone)]
pub struct Kube {
    client: Client,
    runtime: Arc<Runtime>,
}

impl Debug for Kube {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Kube").finish_non_exhaustive()
    }
}

impl Kube {
    /// Creates a client for a configuration.
    ///
    /// # Errors
    /// The configuration is unusable.
    pub fn new(config: Config, runtime: Arc<Runtime>) -> Result<Self> {
        let client = {
            let _entered = runtime.enter();
            Client::try_from(config).context("creating a client for the API server")?
        };
        Ok(Self { client, runtime })
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    pub fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Creates or changes an object by server-side apply. The object is JSON with apiVersion and kind; a `status` is
    /// written through the status subresource.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn apply(&self, object: &Value) -> Result<DynamicObject> {
        let parsed: DynamicObject =
            serde_json::from_value(object.clone()).context("the object has no kind")?;
        let name = parsed.metadata.name.clone().context("the object has no metadata.name")?;
        let types = parsed.types.clone().context("the object has no apiVersion or kind")?;
        let kind = kube::core::GroupVersionKind::try_from(&types).context("apiVersion")?;
        let resource = kube::core::ApiResource::from_gvk(&kind);
        let api: Api<DynamicObject> = match &parsed.metadata.namespace {
            Some(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
            None => Api::all_with(self.client(), &resource),
        };
        let params = PatchParams::apply("laboratory").force();
        let mut without_status = object.clone();
        let status = without_status.as_object_mut().and_then(|fields| fields.remove("status"));
        let describe = || format!("applying {} {name}", kind.kind);
        self.block_on(async {
            let applied = api.patch(&name, &params, &Patch::Apply(&without_status)).await?;
            let Some(status) = status else { return Ok(applied) };
            let body = serde_json::json!({"status": status});
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&body)).await
        })
        .with_context(describe)
    }

    /// Creates an object.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn create<K>(&self, namespace: &str, object: &K) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        self.block_on(api.create(&PostParams::default(), object)).context("creating an object")
    }

    /// Reads an object; `None` if it does not exist.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        self.block_on(api.get_opt(name)).with_context(|| format!("reading {namespace}/{name}"))
    }

    /// Reads a cluster-scoped object; `None` if it does not exist.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn get_cluster<K>(&self, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = ClusterResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::all(self.client());
        self.block_on(api.get_opt(name)).with_context(|| format!("reading {name}"))
    }

    /// Deletes an object immediately; a missing object is not an error.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete<K>(&self, namespace: &str, name: &str) -> Result<()>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        not_found_is_fine(self.block_on(api.delete(name, &now()))).with_context(|| format!("deleting {name}"))
    }

    /// Deletes a cluster-scoped object; a missing object is not an error.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete_cluster<K>(&self, name: &str) -> Result<()>
    where
        K: Resource<Scope = ClusterResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::all(self.client());
        not_found_is_fine(self.block_on(api.delete(name, &now()))).with_context(|| format!("deleting {name}"))
    }

    /// Checks that the API server is ready.
    ///
    /// # Errors
    /// It is not ready, or does not answer.
    pub fn ready(&self) -> Result<()> {
        let request = http::Request::get("/readyz").body(Vec::new())?;
        let answer = self.client.request_text(request);
        self.block_on(async { tokio::time::timeout(Duration::from_secs(2), answer).await })
            .context("/readyz does not answer")?
            .context("/readyz")?;
        Ok(())
    }
}

fn now() -> DeleteParams {
    DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }
}

fn not_found_is_fine<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}
