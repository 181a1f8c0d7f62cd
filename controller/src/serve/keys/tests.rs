//! Keys made here, and one RSA token made by OpenSSL.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};

use super::*;

const RSA: &str = "9pI3vNMwxjZ2Dj6TUn5CAZ8NmGD94wBW9O3eYGPfFAmJBrwyREEvDNq0EYJFjouirGCDTBhviOBPyREukxqwHhKe72C3ZqsD6aqSSszQiu2wJcov0aqX2WE4wqCvmJm5TQLbzCZPVhyFgD7f88vO2V32iqWKxyHgrvExwZGd6satDi4rRPkvuJLZ2DjnYSvtOFHo7wKcAEK8dUlinJqxtdxeM-08gdT9CA6W7QBuLcenMzgC4I-iFLUW1tYbm7z_8JnHnNQA-i9GuI3rU14TYnZdTIQqwXXWUX6oBmxajt_unk7lzmyg4zYsmXYwBKvn8DFr5cS9yhOBcwvcbJ1gsw";
const RSA_TOKEN: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSJ9.eyJhdWQiOlsic3dpdGNodG93ZXIiXX0.xLu3IKiXVMDx26t0fEN4OolmToA-w0E3Zn_YApOXrqp1woUyKE3-leoCzM3M1M4plgC6AFEmTgBJgRMcgJnEC3cgPJ7_H67tKQAwwrnWjziW1y_4iPEPbidGqWoARetS0mVZ-gWd_0fQMELfs2NLJoURqfihhIzthA5ZWe2RmqFIgbcKxQKC5xwyxrxz0h-SaMNN-OC72yVDUOiym49gPtTYxEPSL9UOgHwWaAr5m-aS4rhmIME9FMTEXNWF1_SZoijkCTbUhxG8pkYH_OhcMHUCZCnPTBSExotKCqrO7TODBjEHakB2yZxaJQzxgr7UviwvFQJFwYkPKpsFKABAoA";

/// Signs tokens as an API server does.
pub(crate) struct Signer {
    pair: EcdsaKeyPair,
    kid: String,
}

impl Signer {
    pub(crate) fn new(kid: &str) -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random).unwrap();
        Self { pair, kid: kid.to_owned() }
    }

    fn key(&self) -> Key {
        let point = self.pair.public_key().as_ref();
        let [x, y] = [&point[1..33], &point[33..]].map(|half| URL_SAFE_NO_PAD.encode(half));
        Key { kid: self.kid.clone(), kty: "EC".into(), crv: "P-256".into(), x, y, ..Key::default() }
    }

    pub(crate) fn set(&self) -> KeySet {
        KeySet { keys: vec![self.key()] }
    }

    pub(crate) fn sign(&self, claims: &str) -> String {
        let header = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, self.kid);
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// An API server with configurable keys that counts requests.
#[derive(Clone)]
pub(crate) struct Published {
    answer: Arc<Mutex<Result<KeySet, String>>>,
    asked: Arc<AtomicUsize>,
}

impl Published {
    pub(crate) fn new(answer: Result<KeySet, &str>) -> Self {
        let answer = Arc::new(Mutex::new(answer.map_err(str::to_owned)));
        Self { answer, asked: Arc::default() }
    }

    fn set(&self, answer: Result<KeySet, &str>) {
        *self.answer.lock().unwrap() = answer.map_err(str::to_owned);
    }
}

impl KeySource for Published {
    fn read(&self) -> Answer<'_> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answer = self.answer.lock().unwrap().clone();
        Box::pin(async move { answer })
    }
}

fn keys(source: &Published) -> Keys {
    Keys::new(source.clone(), &Registry::new()).unwrap()
}

#[tokio::test]
async fn signatures_of_every_kind_of_key_are_verified() {
    let signer = Signer::new("ec");
    let rsa = Key { kid: "rsa".into(), kty: "RSA".into(), n: RSA.into(), e: "AQAB".into(), ..Key::default() };
    let odd = Key { kid: "odd".into(), kty: "EC".into(), crv: "P-521".into(), ..Key::default() };
    let source = Published::new(Ok(KeySet { keys: vec![rsa, signer.key(), odd] }));
    let keys = keys(&source);
    let token = signer.sign("{}");
    assert_eq!(keys.verify(&token).await, Signature::Genuine);
    let unnamed = Signer { kid: String::new(), ..signer };
    assert_eq!(keys.verify(&unnamed.sign("{}")).await, Signature::Genuine, "without the key's name");
    assert_eq!(keys.verify(RSA_TOKEN).await, Signature::Genuine);
    assert_eq!(keys.verify(&RSA_TOKEN.replace("c3dpd", "c3dpe")).await, Signature::Forged);
    assert_eq!(keys.verify(&Signer::new("ec").sign("{}")).await, Signature::Forged);
    assert_eq!(keys.verify(&Signer::new("odd").sign("{}")).await, Signature::Unverifiable);
    let encode = |header: &str| format!("{}.e30.", URL_SAFE_NO_PAD.encode(header));
    for token in [
        encode(r#"{"alg":"none","kid":"ec"}"#),
        encode(r#"{"alg":"HS256","kid":"rsa"}"#),
        encode(r#"{"alg":"ES256","kid":"rsa"}"#),
        token[..token.len() - 4].to_owned(),
        "a.b.c".to_owned(),
        String::new(),
    ] {
        assert_eq!(keys.verify(&token).await, Signature::Forged, "{token}");
    }
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn unknown_keys_are_looked_for_but_not_for_every_token() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let source = Published::new(Ok(old.set()));
    let keys = keys(&source);
    assert_eq!(keys.verify(&new.sign("{}")).await, Signature::UnknownKey);
    source.set(Ok(new.set()));
    for _ in 0..1_000 {
        assert_eq!(keys.verify(&new.sign("{}")).await, Signature::UnknownKey);
    }
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
    keys.with(|state| state.read = state.read.map(|at| at - PAUSE));
    assert_eq!(keys.verify(&new.sign("{}")).await, Signature::Genuine);
    assert_eq!((source.asked.load(Ordering::Relaxed), keys.count.get()), (2, 1));
}

#[tokio::test]
async fn unreadable_keys_keep_the_known_ones() {
    let signer = Signer::new("ec");
    let source = Published::new(Err("403 forbidden"));
    let keys = keys(&source);
    assert_eq!(keys.verify(&signer.sign("{}")).await, Signature::Unverifiable);
    assert_eq!(keys.count.get(), 0);
    for (answer, expected) in [(Ok(signer.set()), 1), (Err("503"), 1), (Ok(KeySet::default()), 1)] {
        source.set(answer);
        keys.with(|state| state.read = state.read.map(|at| at - PAUSE));
        keys.verify(&Signer::new("another").sign("{}")).await;
        assert_eq!(keys.verify(&signer.sign("{}")).await, Signature::Genuine);
        assert_eq!(keys.count.get(), expected);
    }
    assert_eq!(source.asked.load(Ordering::Relaxed), 4);
}
