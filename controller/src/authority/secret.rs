//! The CAs in the Secret `switchtower-ca`, which all replicas share.
//!
//! The first CA is generated once: if several controllers start at the same time, one creates the Secret and the others
//! read it. Each replica watches the Secret, so that all of them use a new CA within moments. If the Secret is deleted, the
//! leader restores it from memory, and a replica that starts before that waits for it.

use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

use super::{Authority, AuthorityError, generate};
use crate::errors::Chain;
use crate::lease::Fence;
use crate::sync::publish;

/// The Secret that holds the CAs.
pub const CA_SECRET: &str = "switchtower-ca";
/// Annotation with which an operator requests a rotation. Removed when it begins.
pub const ROTATE: &str = "switchtower.dev/rotate-ca";
/// Interval between attempts to restore the Secret.
const RETRY: Duration = Duration::from_secs(5);

/// Reads the CAs; `None` if there is no Secret.
///
/// # Errors
/// The API server refuses, or the Secret is not usable.
pub async fn read(client: &Client, namespace: &str) -> Result<Option<Authority>, AuthorityError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = api.get_opt(CA_SECRET).await.map_err(|error| refused(namespace, error))?;
    secret.map(|secret| parse(&secret, namespace)).transpose()
}

/// Generates and stores the first CA, unless another replica does.
///
/// # Errors
/// The API server refuses, or the Secret of the other replica is not usable.
pub async fn create(client: &Client, namespace: &str) -> Result<Authority, AuthorityError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let made = Authority::new(generate()?);
    match api.create(&PostParams::default(), &new_secret(&made)).await {
        Ok(_) => Ok(made),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            parse(&api.get(CA_SECRET).await.map_err(|error| refused(namespace, error))?, namespace)
        }
        Err(error) => Err(refused(namespace, error)),
    }
}

/// The API server refused a request about the Secret.
pub fn refused(namespace: &str, source: kube::Error) -> AuthorityError {
    AuthorityError::Secret { namespace: namespace.to_owned(), source: Box::new(source) }
}

fn new_secret(authority: &Authority) -> Secret {
    let mut secret = Secret {
        metadata: ObjectMeta { name: Some(CA_SECRET.to_owned()), ..ObjectMeta::default() },
        ..Secret::default()
    };
    store(&mut secret, authority);
    secret
}

/// Reads the CAs of the Secret.
pub(super) fn parse(secret: &Secret, namespace: &str) -> Result<Authority, AuthorityError> {
    Authority::parse(&format!("the Secret {namespace}/{CA_SECRET}"), |name| {
        let bytes = secret.data.as_ref()?.get(name)?;
        Some(String::from_utf8(bytes.0.clone()).unwrap_or_default())
    })
}

/// Replaces the CAs of the Secret. Keeps all other fields.
pub(super) fn store(secret: &mut Secret, authority: &Authority) {
    let data = secret.data.get_or_insert_default();
    for (certificate, key) in [super::NEXT, super::PREVIOUS] {
        data.remove(certificate);
        data.remove(key);
    }
    for (name, text) in authority.fields() {
        data.insert(name.to_owned(), ByteString(text.as_bytes().to_vec()));
    }
}

/// Request of an operator, by the annotation [`ROTATE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// No rotation is requested.
    None,
    /// An operator requests a rotation.
    Rotate,
}

/// Publishes the content of the Secret, and in `requests` whether an operator requests a rotation.
pub(super) async fn follow(
    client: Client,
    namespace: String,
    sender: watch::Sender<Authority>,
    requests: watch::Sender<Request>,
    fence: Fence,
) {
    let api: Api<Secret> = Api::namespaced(client, &namespace);
    let seen = watcher::watch_object(api.clone(), CA_SECRET).default_backoff();
    futures::pin_mut!(seen);
    while let Some(event) = seen.next().await {
        match event {
            Ok(Some(secret)) => {
                let is_requested =
                    secret.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(ROTATE));
                requests.send_replace(if is_requested { Request::Rotate } else { Request::None });
                match parse(&secret, &namespace) {
                    Ok(authority) => publish(&sender, authority),
                    Err(error) => {
                        tracing::error!(error = %Chain(&error), "the CA was changed; the one that was read before stays in use");
                    }
                }
            }
            Ok(None) => {
                let secret = new_secret(&sender.borrow());
                restore(&api, &namespace, &secret, &fence).await;
            }
            Err(error) => {
                tracing::debug!(error = %Chain(&error), "failed to watch the Secret switchtower-ca; retrying");
            }
        }
    }
}

/// Creates the deleted Secret again, unless another replica does.
async fn restore(api: &Api<Secret>, namespace: &str, secret: &Secret, fence: &Fence) {
    loop {
        if fence.is_open() {
            match api.create(&PostParams::default(), secret).await {
                Ok(_) => {
                    tracing::warn!(%namespace, "the Secret switchtower-ca was deleted; restored it with the CA in use");
                    return;
                }
                Err(kube::Error::Api(status)) if status.code == 409 => return,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), %namespace, "failed to restore the deleted Secret switchtower-ca; retrying");
                }
            }
        } else if matches!(api.get_opt(CA_SECRET).await, Ok(Some(_))) {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}
