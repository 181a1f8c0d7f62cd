//! Rotation of the CA: in its last year, or when an operator requests it with the annotation
//! [`ROTATE`].
//!
//! | Step | Signs | Agents trust | Begins |
//! |---|---|---|---|
//! | | the CA | the CA | |
//! | [`Step::Announce`] | the CA | the CA and the next one | in the last year, or on request |
//! | [`Step::Promote`] | the next CA | both | the ConfigMap has contained both for the delay |
//! | [`Step::Retire`] | the next CA | the next CA | the ConfigMap has contained both for the delay again |
//!
//! The delay is longer than kubelets need to deliver a ConfigMap. The leader counts it from what it has observed itself:
//! a wrong clock or a change of the leader prolongs a rotation and never shortens it. Each write carries the version of
//! the Secret on which it was decided.

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;

use super::secret::{CA_SECRET, ROTATE, Request, parse, store};
use super::{Authority, AuthorityError, CaPem, generate, secret};
use crate::errors::Chain;
use crate::lease::Fence;

/// Remaining validity of a CA at which its rotation begins.
const LAST_YEAR: time::Duration = time::Duration::days(365);
/// Interval between two checks of the validity.
const CHECK: Duration = Duration::from_secs(24 * 3_600);
/// Interval between attempts, and time for a write to be observed.
const RETRY: Duration = Duration::from_secs(5);

/// A step of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Generate the next CA.
    Announce,
    /// Sign with the next CA.
    Promote,
    /// Forget the previous CA.
    Retire,
}

/// Returns the next step. `remaining` is the remaining validity of the signer.
fn next_step(authority: &Authority, request: Request, remaining: time::Duration) -> Option<Step> {
    if authority.next.is_some() {
        return Some(Step::Promote);
    }
    if authority.previous.is_some() {
        return Some(Step::Retire);
    }
    let is_due = request == Request::Rotate || remaining < LAST_YEAR;
    is_due.then_some(Step::Announce)
}

impl Step {
    /// Time for which agents must have been able to read the present bundle.
    fn delay(self, delay: Duration) -> Duration {
        match self {
            Self::Announce => Duration::ZERO,
            Self::Promote | Self::Retire => delay,
        }
    }

    /// Returns the authority after the step. `made` is used by [`Step::Announce`] only.
    fn perform(
        self,
        authority: Authority,
        made: impl FnOnce() -> Result<CaPem, AuthorityError>,
    ) -> Result<Authority, AuthorityError> {
        let Authority { signer, next, previous } = authority;
        Ok(match (self, next) {
            (Self::Announce, None) => Authority { signer, next: Some(made()?), previous },
            (Self::Promote, Some(next)) => Authority { signer: next, next: None, previous: Some(signer) },
            (Self::Retire, next) => Authority { signer, next, previous: None },
            (Self::Announce | Self::Promote, next) => Authority { signer, next, previous },
        })
    }
}

/// The bundle that the ConfigMap contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The certificates.
    pub bundle: String,
    /// Contained in the ConfigMap since.
    pub since: Instant,
}

/// Channels between the parts that deal with CAs.
pub struct Rotation {
    /// Client of the leader.
    pub client: Client,
    /// Namespace of the Secret.
    pub namespace: String,
    /// Reports what the ConfigMap contains.
    pub published: watch::Receiver<Option<Published>>,
    /// Open while this replica is the leader.
    pub fence: Fence,
    /// Time for which a bundle is published before the next step.
    pub delay: Duration,
}

impl Rotation {
    /// Follows the Secret, publishes its content, and rotates the CA while this replica is the leader. `any` is a client
    /// of any replica.
    pub async fn run(self, any: Client, sender: watch::Sender<Authority>) {
        let (requests, requested) = watch::channel(Request::None);
        let authority = sender.subscribe();
        let following = secret::follow(any, self.namespace.clone(), sender, requests, self.fence.clone());
        tokio::select! {
            () = following => {}
            () = self.rotate(authority, requested) => {}
        }
    }

    async fn rotate(
        mut self,
        mut authority: watch::Receiver<Authority>,
        mut requested: watch::Receiver<Request>,
    ) {
        loop {
            self.fence.opened().await;
            let current = authority.borrow_and_update().clone();
            let request = *requested.borrow_and_update();
            let due = self.due(&current, request);
            tokio::select! {
                () = tokio::time::sleep(due.map_or(CHECK, |(_, wait)| wait)) => {}
                changed = authority.changed() => if changed.is_err() { return } else { continue },
                changed = requested.changed() => if changed.is_err() { return } else { continue },
                changed = self.published.changed() => if changed.is_err() { return } else { continue },
            }
            let Some((step, _)) = due else { continue };
            if let Err(error) = self.perform(step, &current).await {
                tracing::warn!(error = %Chain(&error), ?step, "failed to write the Secret switchtower-ca; retrying");
            }
            // The write arrives as a change of the Secret.
            let _ = tokio::time::timeout(RETRY, authority.changed()).await;
        }
    }

    /// Returns the next step, and the time until it is due.
    fn due(&self, authority: &Authority, request: Request) -> Option<(Step, Duration)> {
        let expiry = authority.signer.expiry().ok()?;
        let step = next_step(authority, request, expiry - OffsetDateTime::now_utc())?;
        let delay = step.delay(self.delay);
        if delay.is_zero() {
            return Some((step, delay));
        }
        let published = self.published.borrow();
        let since = published.as_ref().filter(|published| published.bundle == authority.bundle())?.since;
        Some((step, delay.saturating_sub(since.elapsed())))
    }

    async fn perform(&self, step: Step, decided_on: &Authority) -> Result<(), AuthorityError> {
        let refused = |source: kube::Error| AuthorityError::Secret {
            namespace: self.namespace.clone(),
            source: Box::new(source),
        };
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut secret = api.get(CA_SECRET).await.map_err(refused)?;
        if parse(&secret, &self.namespace)? != *decided_on {
            return Ok(());
        }
        let after = step.perform(decided_on.clone(), generate)?;
        store(&mut secret, &after);
        if let (Step::Announce, Some(annotations)) = (step, &mut secret.metadata.annotations) {
            annotations.remove(ROTATE);
        }
        api.replace(CA_SECRET, &PostParams::default(), &secret).await.map_err(refused)?;
        match step {
            Step::Announce => {
                tracing::info!(delay = ?self.delay, "generated the next CA; it signs after the delay");
            }
            Step::Promote => {
                tracing::info!(delay = ?self.delay, "the next CA signs; agents trust the previous one for the delay");
            }
            Step::Retire => tracing::info!("the rotation of the CA is complete"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
