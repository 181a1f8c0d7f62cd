//! Reads of objects for `migrate`.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, ListParams};
use switchtower_crds::ProxyProfile;

use super::{Cluster, explained};
use crate::error::CliError;

impl Cluster {
    /// Returns the Leases in the namespace of the installation.
    pub(crate) fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.system_namespace)
    }

    /// Returns a DaemonSet if it exists.
    pub(crate) async fn daemon_set(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<DaemonSet>, CliError> {
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("read DaemonSet {namespace}/{name}");
        api.get_opt(name).await.map_err(|error| explained(&what, &error))
    }

    /// Lists Jobs of a namespace by label.
    pub(crate) async fn jobs_labelled(&self, namespace: &str, label: &str) -> Result<Vec<Job>, CliError> {
        let api: Api<Job> = Api::namespaced(self.client.clone(), namespace);
        let jobs = api.list(&ListParams::default().labels(label)).await;
        Ok(jobs.map_err(|error| explained(&format!("list Jobs in {namespace}"), &error))?.items)
    }

    /// Returns a ProxyProfile if it exists.
    pub(crate) async fn profile(&self, name: &str) -> Result<Option<ProxyProfile>, CliError> {
        let api: Api<ProxyProfile> = Api::all(self.client.clone());
        api.get_opt(name).await.map_err(|error| explained(&format!("read ProxyProfile {name}"), &error))
    }
}
