//! The keys that the API server signs ServiceAccount tokens with, and whether a token bears such a signature.
//!
//! The check grants nothing: a genuine token is still reviewed by the API server, which alone knows whether its pod
//! still exists. It keeps forged tokens from costing a review, or anything else that agents wait for.

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::Client;
use prometheus::{IntGauge, Registry};
use ring::signature::{
    self, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;

/// Between two reads of the keys, however many tokens name unknown ones.
const PAUSE: Duration = Duration::from_secs(10);
/// Longest read.
const READ: Duration = Duration::from_secs(5);
/// Most keys.
const KEYS: usize = 64;

/// The answer of the API server: its keys, or why there are none.
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

/// A public key; of kinds that are not understood only the id.
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

/// What a token's signature is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signature {
    /// The API server's.
    Genuine,
    /// Not made with the key that it names.
    Forged,
    /// Names a key that the API server does not publish; a new one is found within [`PAUSE`].
    UnknownKey,
    /// The keys cannot be read, or are of a kind that is not understood.
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
    /// One read at a time; who comes later finds it done.
    reading: tokio::sync::Mutex<()>,
    count: IntGauge,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

/// What a token says of its signature.
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
    /// Reads the keys when the first token comes.
    ///
    /// # Errors
    /// The metric's name is already registered.
    pub fn new(source: impl KeySource, registry: &Registry) -> Result<Self, prometheus::Error> {
        let count = IntGauge::new(
            "switchtower_token_keys",
            "Keys of the API server that tokens are verified with; 0: every token needs a review, forged ones too.",
        )?;
        registry.register(Box::new(count.clone()))?;
        let (state, reading) = Default::default();
        Ok(Self { source: Box::new(source), state, reading, count })
    }

    /// Whether the API server signed the token. May read the keys first.
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

    /// `None`: its key is not among those that are known.
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
        let told = self.with(|state| {
            // From the end of the read: a slow API server must not be asked without a pause.
            state.read = Some(Instant::now());
            state.take(answer)
        });
        self.count.set(self.with(|state| state.keys.as_ref().map_or(0, Vec::len) as i64));
        match told {
            Told::Nothing => {}
            Told::Read(count) => tracing::info!(keys = count, "read the API server's keys for tokens"),
            Told::Failed { error, kept } => tracing::warn!(
                error,
                kept,
                "the API server's keys for tokens (/openid/v1/jwks) cannot be read; without any (kept=0) every \
                 token is reviewed, few of unknown callers at a time; check the ClusterRole switchtower-controller \
                 and that --service-account-issuer of the API server is an https URL"
            ),
        }
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What is worth a log line.
enum Told {
    Nothing,
    Read(usize),
    Failed { error: String, kept: usize },
}

impl State {
    fn take(&mut self, answer: Result<KeySet, String>) -> Told {
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
                if same { Told::Nothing } else { Told::Read(count) }
            }
            Err(error) => {
                let kept = self.keys.as_ref().map_or(0, Vec::len);
                let before = self.failure.replace(error.clone());
                if before.as_ref() == Some(&error) { Told::Nothing } else { Told::Failed { error, kept } }
            }
        }
    }
}

impl Key {
    /// The algorithm follows from the key, never from what the token says alone.
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
