//! Verification of token signatures with the keys that the API server publishes.
//!
//! Verification grants nothing: a genuine token is still reviewed by the API server, because only that knows whether
//! its pod still exists. It prevents forged tokens from using reviews, or anything else that agents wait for.

use std::pin::Pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::Client;
use prometheus::{IntGauge, Registry, register_int_gauge_with_registry};
use ring::signature::{
    self, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;

use crate::sync::lock;

/// Minimum interval between reads of the keys, however many tokens name unknown keys.
const PAUSE: Duration = Duration::from_secs(10);
/// Timeout of a read.
const READ: Duration = Duration::from_secs(5);
/// Maximum number of keys.
const KEYS: usize = 64;

/// The API server's keys, or the error.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<KeySet, String>> + Send + 'a>>;

/// Reads the API server's keys.
pub trait KeySource: Send + Sync + 'static {
    /// Reads them.
    fn read(&self) -> Answer<'_>;
}

impl KeySource for Client {
    fn read(&self) -> Answer<'_> {
        Box::pin(async move {
            let request = http::Request::get("/openid/v1/jwks").body(Vec::new());
            let request = request.map_err(|error| error.to_string())?;
            self.request(request).await.map_err(|error| error.to_string())
        })
    }
}

/// A JSON Web Key Set (RFC 7517).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct KeySet {
    keys: Vec<Key>,
}

/// A public key; only the ID of unsupported kinds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Key {
    kid: String,
    kty: String,
    crv: String,
    n: String,
    e: String,
    x: String,
    y: String,
}

/// Result of the verification of a token's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signature {
    /// Made by the API server.
    Genuine,
    /// Not made with the key that it names.
    Forged,
    /// Names a key that the API server does not publish; a new one is found within [`PAUSE`].
    UnknownKey,
    /// The keys cannot be read, or are of an unsupported kind.
    Unverifiable,
}

#[derive(Debug, Default)]
struct State {
    /// The last set that could be read.
    keys: Option<Vec<Key>>,
    /// Why the last read failed.
    failure: Option<String>,
    read: Option<Instant>,
}

/// Verifies signatures of tokens.
pub struct Keys {
    source: Box<dyn KeySource>,
    state: Mutex<State>,
    /// Serializes reads; a waiting caller finds the keys ready.
    reading: tokio::sync::Mutex<()>,
    count: IntGauge,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

/// Header and signature of a token.
struct Signed<'a> {
    header: Header,
    message: &'a str,
    signature: Vec<u8>,
}

impl<'a> Signed<'a> {
    fn of(token: &'a str) -> Option<Self> {
        let (message, signature) = token.rsplit_once('.')?;
        let (header, _) = message.split_once('.')?;
        let header = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        Some(Self { header, message, signature: URL_SAFE_NO_PAD.decode(signature).ok()? })
    }
}

impl Keys {
    /// Creates a verifier, which reads the keys with the first token.
    ///
    /// # Errors
    /// The metric's name is already registered.
    pub fn new(source: impl KeySource, registry: &Registry) -> Result<Self, prometheus::Error> {
        let count = register_int_gauge_with_registry!(
            "switchtower_token_keys",
            "Keys of the API server that tokens are verified with; 0: every token needs a review, forged ones too.",
            registry
        )?;
        let (state, reading) = Default::default();
        Ok(Self { source: Box::new(source), state, reading, count })
    }

    /// Verifies the signature of a token. May read the keys first.
    pub(crate) async fn verify(&self, token: &str) -> Signature {
        let Some(signed) = Signed::of(token) else { return Signature::Forged };
        if let Some(verdict) = self.verdict(&signed) {
            return verdict;
        }
        self.refresh().await;
        self.verdict(&signed).unwrap_or_else(|| {
            let known = self.with(|state| state.keys.is_some());
            if known { Signature::UnknownKey } else { Signature::Unverifiable }
        })
    }

    /// Returns `None` if the token's key is not known.
    fn verdict(&self, signed: &Signed<'_>) -> Option<Signature> {
        let kid = &signed.header.kid;
        let candidates: Vec<Key> = self.with(|state| {
            let keys = state.keys.iter().flatten();
            keys.filter(|key| kid.is_empty() || key.kid == *kid).cloned().collect()
        });
        // A token need not name its key.
        let verdicts = candidates.iter().map(|key| key.check(signed));
        verdicts.reduce(|best, next| if best == Signature::Genuine { best } else { next })
    }

    async fn refresh(&self) {
        let _one = self.reading.lock().await;
        let now = Instant::now();
        let recent = |at: Instant| now.saturating_duration_since(at) < PAUSE;
        if self.with(|state| state.read.is_some_and(recent)) {
            return;
        }
        let answer = tokio::time::timeout(READ, self.source.read()).await;
        let answer = answer.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        let outcome = self.with(|state| {
            // From the end of the read, so that a slow API server gets a pause between requests.
            state.read = Some(Instant::now());
            state.take(answer)
        });
        self.count.set(self.with(|state| state.keys.as_ref().map_or(0, Vec::len) as i64));
        match outcome {
            ReadOutcome::Unchanged => {}
            ReadOutcome::Read(count) => tracing::info!(keys = count, "read the API server's keys for tokens"),
            ReadOutcome::Failed { error, kept } => tracing::warn!(
                error,
                kept,
                "the API server's keys for tokens (/openid/v1/jwks) cannot be read; without any (kept=0) every \
                 token is reviewed, few of unknown callers at a time; check the ClusterRole switchtower-controller \
                 and that --service-account-issuer of the API server is an https URL"
            ),
        }
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut lock(&self.state))
    }
}

/// Result of a read, for the log.
enum ReadOutcome {
    Unchanged,
    Read(usize),
    Failed { error: String, kept: usize },
}

impl State {
    fn take(&mut self, answer: Result<KeySet, String>) -> ReadOutcome {
        let answer = answer.and_then(|set| match set.keys.len() {
            0 => Err("the set is empty".to_owned()),
            count if count > KEYS => Err(format!("the set has {count} keys, more than {KEYS}")),
            _ => Ok(set.keys),
        });
        match answer {
            Ok(keys) => {
                let same = self.failure.take().is_none() && self.keys.as_ref() == Some(&keys);
                let count = keys.len();
                self.keys = Some(keys);
                if same { ReadOutcome::Unchanged } else { ReadOutcome::Read(count) }
            }
            Err(error) => {
                let kept = self.keys.as_ref().map_or(0, Vec::len);
                let before = self.failure.replace(error.clone());
                if before.as_ref() == Some(&error) {
                    ReadOutcome::Unchanged
                } else {
                    ReadOutcome::Failed { error, kept }
                }
            }
        }
    }
}

impl Key {
    /// The key determines the algorithm; the token's header alone is never trusted.
    fn check(&self, Signed { header, message, signature }: &Signed<'_>) -> Signature {
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap_or_default();
        let point = || [vec![4], bytes(&self.x), bytes(&self.y)].concat();
        let message = message.as_bytes();
        let verified = match (self.kty.as_str(), self.crv.as_str(), header.alg.as_str()) {
            ("RSA", _, alg) => {
                let parameters = match alg {
                    "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
                    "RS512" => &signature::RSA_PKCS1_2048_8192_SHA512,
                    _ => return Signature::Forged,
                };
                let key = RsaPublicKeyComponents { n: bytes(&self.n), e: bytes(&self.e) };
                key.verify(parameters, message, signature)
            }
            ("EC", "P-256", "ES256") => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point()).verify(message, signature)
            }
            ("EC", "P-384", "ES384") => {
                UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point()).verify(message, signature)
            }
            ("EC", "P-256" | "P-384", _) => return Signature::Forged,
            _ => return Signature::Unverifiable,
        };
        if verified.is_ok() { Signature::Genuine } else { Signature::Forged }
    }
}

#[cfg(test)]
pub(crate) mod tests;
