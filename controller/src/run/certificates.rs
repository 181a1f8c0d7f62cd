//! Everything of a replica that depends on the CAs: its server certificates, its trust in other replicas, and the secrets
//! with which they identify themselves. Replaced for new connections; open ones stay.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use prometheus::{IntGaugeVec, Opts, Registry};
use tokio::sync::watch;

use crate::authority::Authority;
use crate::authority::nodes::NodeCertificates;
use crate::replicas::Client;
use crate::replicas::service::ReplicaKeys;
use crate::serve::tls::{self, ServerTls, VALIDITY};

/// Interval between two renewals of the server certificates.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3_600);

/// The certificates, and those who depend on the CAs.
pub(super) struct Certificates {
    /// For agents and other replicas.
    pub(super) agents: Arc<ServerTls>,
    /// For the admin API.
    pub(super) admin: Arc<ServerTls>,
    others: Client,
    replicas: ReplicaKeys,
    nodes: NodeCertificates,
    expiry: IntGaugeVec,
}

impl Certificates {
    /// Creates the first certificates.
    ///
    /// # Errors
    /// The CA cannot sign.
    pub(super) fn new(
        authority: &Authority,
        others: Client,
        replicas: ReplicaKeys,
        nodes: NodeCertificates,
        registry: &Registry,
    ) -> anyhow::Result<Self> {
        let help = "Time at which a certificate expires, in seconds since 1970: that of the signing CA, and of this server.";
        let expiry = Opts::new("switchtower_certificate_expiry_timestamp_seconds", help);
        let expiry = IntGaugeVec::new(expiry, &["certificate"])?;
        registry.register(Box::new(expiry.clone()))?;
        let agents = Arc::new(ServerTls::from_pointee(tls::server_config(authority)?));
        let admin = Arc::new(ServerTls::from_pointee(tls::admin_config(authority)?));
        let made = Self { agents, admin, others, replicas, nodes, expiry };
        made.record(authority);
        Ok(made)
    }

    /// Renews the certificates at intervals, and when the CAs change.
    pub(super) async fn follow(self, mut authority: watch::Receiver<Authority>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(RENEWAL) => {}
                changed = authority.changed() => if changed.is_err() {
                    // The process ends.
                    return std::future::pending().await;
                },
            }
            let current = authority.borrow_and_update().clone();
            match self.renew(&current) {
                Ok(()) => tracing::info!("renewed the server certificates"),
                Err(error) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "failed to use the CA; the previous certificates stay in use"
                    );
                }
            }
        }
    }

    fn renew(&self, authority: &Authority) -> anyhow::Result<()> {
        let (agents, admin) = (tls::server_config(authority)?, tls::admin_config(authority)?);
        self.others.trust(authority).context("trust the CA for queries to other replicas")?;
        self.nodes.trust(authority)?;
        self.replicas.trust(authority);
        self.agents.store(Arc::new(agents));
        self.admin.store(Arc::new(admin));
        self.record(authority);
        Ok(())
    }

    fn record(&self, authority: &Authority) {
        // Validated when it was read.
        if let Ok(expiry) = authority.signer.expiry() {
            self.expiry.with_label_values(&["ca"]).set(expiry.unix_timestamp());
        }
        let server = time::OffsetDateTime::now_utc() + VALIDITY;
        self.expiry.with_label_values(&["server"]).set(server.unix_timestamp());
    }
}
