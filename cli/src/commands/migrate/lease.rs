//! Exclusion of two operators that migrate at once, by a Lease.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, PostParams, Preconditions};

use crate::cluster::{Cluster, explained};
use crate::error::CliError;

const NAME: &str = "switchtower-migration";
/// Time after which a Lease that is not renewed is free.
const DURATION: Duration = Duration::from_secs(30);

/// The held Lease.
pub(super) struct Held {
    api: Api<Lease>,
    lease: Lease,
}

fn now() -> Option<MicroTime> {
    Some(MicroTime(Timestamp::now()))
}

fn is_free(lease: &Lease, now: Timestamp) -> bool {
    let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref());
    renewed.is_none_or(|renewed| {
        Duration::try_from(now.duration_since(renewed.0)).is_ok_and(|elapsed| elapsed >= DURATION)
    })
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or("unknown")
}

impl Held {
    /// Takes the Lease.
    ///
    /// # Errors
    /// Another command holds it, or the API server refuses.
    pub(super) async fn take(cluster: &Cluster) -> Result<Self, CliError> {
        let api = cluster.leases();
        let user = std::env::var("USER").unwrap_or_else(|_| "unknown".to_owned());
        let identity = format!("{user}, process {}, since {}", std::process::id(), Timestamp::now());
        let spec = LeaseSpec {
            holder_identity: Some(identity),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: now(),
            renew_time: now(),
            ..LeaseSpec::default()
        };
        let refused = |error: &kube::Error| explained(&format!("take the Lease {NAME}"), error);
        let busy = |lease: &Lease| {
            CliError::new(format!(
                "another migrate command is running ({}); wait until it ends, at most {} s after an interruption",
                holder(lease),
                DURATION.as_secs()
            ))
        };
        let result = match api.get_opt(NAME).await.map_err(|error| refused(&error))? {
            None => {
                let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
                api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
            }
            Some(lease) if !is_free(&lease, Timestamp::now()) => return Err(busy(&lease)),
            Some(lease) => {
                let taken = Lease { spec: Some(spec), ..lease };
                api.replace(NAME, &PostParams::default(), &taken).await
            }
        };
        match result {
            Ok(lease) => Ok(Self { api, lease }),
            Err(kube::Error::Api(status)) if status.code == 409 => Err(CliError::new(
                "another migrate command started at the same time; run kubectl switchtower migrate status",
            )),
            Err(error) => Err(refused(&error)),
        }
    }

    /// Renews the Lease.
    ///
    /// # Errors
    /// Another command has taken it, or the API server refuses.
    pub(super) async fn renew(&mut self) -> Result<(), CliError> {
        if let Some(spec) = &mut self.lease.spec {
            spec.renew_time = now();
        }
        self.lease = self.api.replace(NAME, &PostParams::default(), &self.lease).await.map_err(|error| {
            let what = "renew the Lease of the migration, which another migrate command may have taken";
            explained(what, &error)
        })?;
        Ok(())
    }

    /// Releases the Lease. Without it, another command waits until it expires.
    pub(super) async fn release(self) {
        let preconditions = Preconditions {
            resource_version: self.lease.metadata.resource_version.clone(),
            uid: self.lease.metadata.uid.clone(),
        };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let _ = self.api.delete(NAME, &parameters).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_is_free_after_its_duration() {
        let now = Timestamp::now();
        let ago = |seconds: i64| {
            let renewed = Timestamp::from_second(now.as_second() - seconds).unwrap();
            let spec = LeaseSpec { renew_time: Some(MicroTime(renewed)), ..LeaseSpec::default() };
            Lease { spec: Some(spec), ..Lease::default() }
        };
        assert!(!is_free(&ago(5), now) && is_free(&ago(60), now) && is_free(&Lease::default(), now));
        assert!(!is_free(&ago(-60), now), "a clock that is ahead");
    }
}
