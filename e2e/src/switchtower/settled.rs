//! Waits until the fleet has applied everything written to the API so far. Without this barrier, a test may read the
//! state from before its own write.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use http::Uri;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::{Api, Client, Config, ResourceExt as _};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use switchtower_admin_api::{AUDIENCE, Progress, SERVER_NAME, VIEWER};

use super::{Fleet, FleetNode, NAMESPACE, lock};
use crate::lab::wait;
use crate::observe::kernel;

/// Lifetime of a token for the admin API, in seconds.
const TOKEN_SECONDS: i64 = 3_600;

impl Fleet {
    /// Waits until all current Services and EndpointSlices are in force, and every node's row, agent and kernel
    /// agree: the row is Ready, desired equals applied, and the stamp that `nft` reads from the kernel has the same
    /// generation and digest. Returns the time that it took.
    ///
    /// # Errors
    /// They do not agree in time; the message names the node and the difference.
    pub fn settled(&self, deadline: Duration) -> Result<Duration> {
        let start = Instant::now();
        let mut barrier = None;
        let mut passed = false;
        wait::until("every node's row and kernel agree", deadline, || {
            self.check_controllers()?;
            if !passed {
                let barrier = match &mut barrier {
                    Some(barrier) => barrier,
                    none => none.insert(Barrier::now(self)?),
                };
                barrier.passed(self)?;
                passed = true;
            }
            self.nodes.iter().try_for_each(|node| self.agrees(node))
        })?;
        Ok(start.elapsed())
    }

    /// Checks that a node's row and its kernel agree.
    ///
    /// # Errors
    /// They differ; the message says in what.
    pub fn agrees(&self, node: &FleetNode) -> Result<()> {
        let name = &node.net.name;
        if let Some(agent) = lock(&node.agent).as_ref() {
            agent.check_running()?;
        }
        let row = self.row(name)?;
        let generation = row.generation;
        ensure!(
            generation.desired == generation.applied && generation.applied > 0,
            "{name}: desired {}, applied {} ({})",
            generation.desired,
            generation.applied,
            row.state
        );
        let stamp = kernel::stamp(&node.net.namespace)?;
        ensure!(
            i64::try_from(stamp.generation)? == generation.applied,
            "{name}: the kernel holds {}, the row reports {}",
            stamp.generation,
            generation.applied
        );
        // The row contains the digest in wire order, which is little-endian.
        let kernel: String = stamp.digest.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = row.digest.unwrap_or_default();
        ensure!(digest == kernel, "{name}: the kernel's digest is {kernel}, the row's {digest}");
        // A repaired foreign change is reported for half a minute, while everything agrees again.
        ensure!(["Synced", "Shadow", "Drifted"].contains(&row.state.as_str()), "{name}: state {}", row.state);
        Ok(())
    }
}

/// The objects in the API server at one moment, and the client that queries progress on them.
struct Barrier {
    admin: Option<Client>,
    path: String,
}

impl Barrier {
    /// Captures the newest resourceVersions.
    ///
    /// # Errors
    /// The API server refuses.
    fn now(fleet: &Fleet) -> Result<Self> {
        let services = newest::<Service>(fleet)?;
        let slices = newest::<EndpointSlice>(fleet)?;
        let path = format!("/v1/progress?services={services}&endpointSlices={slices}");
        Ok(Self { admin: None, path })
    }

    /// Checks that the controller has processed them and the kernel of every node holds them.
    ///
    /// # Errors
    /// Not yet, or the controller does not answer.
    fn passed(&mut self, fleet: &Fleet) -> Result<()> {
        // Taken: after an error, another controller with other certificates may have taken over.
        let admin = match self.admin.take() {
            Some(admin) => admin,
            None => admin_client(fleet)?,
        };
        let request = http::Request::get(&self.path).body(Vec::new())?;
        let progress: Progress =
            fleet.kube().block_on(admin.request(request)).context("querying the controller's progress")?;
        self.admin = Some(admin);
        ensure!(progress.revision.is_some(), "the controller has not processed the latest objects");
        for node in fleet.nodes() {
            let name = &node.net.name;
            ensure!(!progress.waiting.contains(name), "{name} does not hold the latest change");
            ensure!(!progress.excluded.contains(name), "the agent of {name} is not connected");
        }
        Ok(())
    }
}

/// The newest resourceVersion of a resource, 0 if there are no objects.
fn newest<K>(fleet: &Fleet) -> Result<u64>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::all(fleet.kube().client());
    let objects = fleet.kube().block_on(api.list(&ListParams::default())).context("listing objects")?;
    let versions = objects.iter().filter_map(|object| object.resource_version()?.parse().ok());
    Ok(versions.max().unwrap_or_default())
}

fn admin_client(fleet: &Fleet) -> Result<Client> {
    let map: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-bootstrap")?;
    let authority =
        map.and_then(|map| map.data?.remove("ca.crt")).context("the controller published no CA")?;
    let authority = CertificateDer::from_pem_slice(authority.as_bytes()).context("the controller's CA")?;
    let uri = Uri::builder().scheme("https").authority(fleet.admin_address().to_string());
    let mut config = Config::new(uri.path_and_query("/").build()?);
    config.root_cert = Some(vec![authority.to_vec()]);
    config.tls_server_name = Some(SERVER_NAME.to_owned());
    config.auth_info.token = Some(fleet.token(VIEWER, None, &[AUDIENCE], TOKEN_SECONDS)?.into());
    let _entered = fleet.kube().runtime().enter();
    Client::try_from(config).context("creating a client for the admin API")
}
