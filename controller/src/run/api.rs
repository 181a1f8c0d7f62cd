//! Clients of the API server, and the certificate authority that is stored there.

use std::time::Duration;

use anyhow::Context as _;
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use prometheus::Registry;
use tokio::time::Instant;

use super::RETRY;
use crate::authority::{Authority, AuthorityError, directory, secret};
use crate::cli::ServeArgs;
use crate::errors::Chain;
use crate::lease::Fence;
use crate::replicas::announce;
use crate::server_clock::ServerClock;

/// Timeout of a request for the certificate authority.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Time after two durations of the Lease in which a leader restores a deleted Secret.
const RESTORE: Duration = Duration::from_secs(20);

/// Clients of the API server.
pub(super) struct Clients {
    /// For reads, reviews of tokens, and what any replica may write: Leases, the statuses of rows, Events about what agents
    /// report, and what is created once: the CA's Secret and the record of the built-in settings.
    pub(super) unfenced: Client,
    /// For what only the leader may write.
    pub(super) fenced: Client,
    /// Clock of the API server.
    pub(super) clock: ServerClock,
}

impl Clients {
    pub(super) fn new(config: &Config, fence: &Fence, registry: &Registry) -> anyhow::Result<Self> {
        let context = "setting up the client of the API server";
        let clock = ServerClock::new(registry)?;
        let builder = || ClientBuilder::try_from(config.clone()).context(context);
        let unfenced = builder()?.with_layer(&clock.layer()).build();
        let fenced = builder()?.with_layer(&clock.layer()).with_layer(&fence.layer()).build();
        Ok(Self { unfenced, fenced, clock })
    }
}

/// Finds the API server and credentials: --kubeconfig, the Pod's ServiceAccount, or the default kubeconfig.
///
/// # Errors
/// There are none, or the file is invalid.
pub async fn config(args: &ServeArgs) -> anyhow::Result<Config> {
    let Some(path) = &args.kubeconfig else {
        return Config::infer().await.context(
            "finding the API server: this process does not run in a Pod with a ServiceAccount, and there is no \
             kubeconfig; name one with --kubeconfig",
        );
    };
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("using the current context of {}", path.display()))
}

/// Reads or creates the CAs where the flags say. Retries while the API server is unreachable or permissions are missing.
pub(super) async fn authority(client: &Client, args: &ServeArgs) -> anyhow::Result<Authority> {
    if let Some(directory) = &args.tls_dir {
        return Ok(directory::read_or_create(directory)?);
    }
    let restored = Instant::now() + args.lease_duration() * 2 + RESTORE;
    loop {
        let read = read_or_create(client, &args.namespace, Instant::now() < restored);
        match tokio::time::timeout(TIMEOUT, read).await {
            Ok(Ok(Some(authority))) => return Ok(authority),
            Ok(Ok(None)) => {
                tracing::warn!(
                    "the Secret switchtower-ca was deleted; waiting for another replica to restore it"
                );
            }
            Ok(Err(error @ AuthorityError::Secret { .. })) => {
                tracing::error!(error = %Chain(&error), "failed to load the CA; retrying");
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => tracing::error!("failed to load the CA: the API server does not answer; retrying"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Reads the CAs, or creates the first one. `None` if others may restore the Secret: agents trust the CA of a running
/// replica, not a new one.
async fn read_or_create(
    client: &Client,
    namespace: &str,
    wait_for_others: bool,
) -> Result<Option<Authority>, AuthorityError> {
    if let Some(authority) = secret::read(client, namespace).await? {
        return Ok(Some(authority));
    }
    let others = announce::any(client, namespace).await.map_err(|error| secret::refused(namespace, error))?;
    if wait_for_others && others {
        return Ok(None);
    }
    secret::create(client, namespace).await.map(Some)
}
