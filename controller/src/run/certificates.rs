//! Everything of a replica that depends on the CAs: its server certificates, its trust in other replicas, and the secrets
//! with which they identify themselves. Replaced for new connections; open ones stay.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use prometheus::{IntGaugeVec, Opts, Registry};
use tokio::sync::watch;

use crate::authority::Authority;
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
        registry: &Registry,
    ) -> anyhow::Result<Self> {
        let help = "Time at which a certificate expires, in seconds since 1970: that of the signing CA, and of this server.";
        let expiry = Opts::new("switchtower_certificate_expiry_timestamp_seconds", help);
        let expiry = IntGaugeVec::new(expiry, &["certificate"])?;
        registry.register(Box::new(expiry.clone()))?;
        let agents = Arc::new(ServerTls::from_pointee(tls::server_config(&authority.signer)?));
        let admin = Arc::new(ServerTls::from_pointee(tls::admin_config(&authority.signer)?));
        let made = Self { agents, admin, others, replicas, expiry };
        made.record(authority);
        Ok(made)
    }

    /// Renews the certificates at intervals, and when the CAs change.
    pub(super) async fn follow(self, mut authority: watch::Receiver<Authority>) {
        let mut signer = authority.borrow().signer.clone();
        loop {
            let is_due = tokio::select! {
                () = tokio::time::sleep(RENEWAL) => true,
                // Ends only with the process.
                changed = authority.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return std::future::pending().await,
                },
            };
            let current = authority.borrow_and_update().clone();
            if let Err(error) = self.renew(&current, is_due || current.signer != signer) {
                tracing::error!(
                    error = format!("{error:#}"),
                    "failed to use the CA; the previous certificates stay in use"
                );
                continue;
            }
            signer = current.signer;
        }
    }

    fn renew(&self, authority: &Authority, is_due: bool) -> anyhow::Result<()> {
        self.others.trust(authority).context("trust the CA for queries to other replicas")?;
        self.replicas.trust(authority);
        if is_due {
            let (agents, admin) =
                (tls::server_config(&authority.signer)?, tls::admin_config(&authority.signer)?);
            self.agents.store(Arc::new(agents));
            self.admin.store(Arc::new(admin));
            self.record(authority);
            tracing::info!("renewed the server certificates");
        }
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
