//! Claims of a ServiceAccount token, unverified.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

/// The claims that authentication uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) audiences: Vec<String>,
    pub(super) expires: SystemTime,
    /// Bound to a Pod or a Node, whose deletion revokes the token.
    pub(super) bound: bool,
    /// User name.
    pub(super) subject: Option<String>,
    /// Node of the token's pod.
    pub(super) node: Option<String>,
}

impl Claims {
    /// Parses a token. Returns `None` if it is not a JWT with an expiry.
    pub(super) fn of(token: &str) -> Option<Self> {
        let mut pieces = token.split('.');
        let (_, payload, _) = (pieces.next()?, pieces.next()?, pieces.next()?);
        if pieces.next().is_some() {
            return None;
        }
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
        let audiences = match claims.get("aud") {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(many)) => {
                many.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        };
        let seconds = claims.get("exp")?.as_u64()?;
        let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
        let bound = ["/kubernetes.io/pod/uid", "/kubernetes.io/node/uid"];
        let bound = bound.iter().any(|pointer| claims.pointer(pointer).is_some());
        let text = |pointer: &str| claims.pointer(pointer)?.as_str().map(str::to_owned);
        let (subject, node) = (text("/sub"), text("/kubernetes.io/node/name"));
        Some(Self { audiences, expires, bound, subject, node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_of_a_token_request_are_parsed() {
        // {"aud":["switchtower"],"exp":1900000000,"kubernetes.io":{"pod":{"name":"a","uid":"u"}}}
        let token = "e30.eyJhdWQiOlsic3dpdGNodG93ZXIiXSwiZXhwIjoxOTAwMDAwMDAwLCJrdWJlcm5ldGVzLmlvIjp7InBvZCI6eyJuYW1lIjoiYSIsInVpZCI6InUifX19.c2ln";
        let claims = Claims::of(token).unwrap();
        assert_eq!(claims.audiences, ["switchtower"]);
        assert!(claims.bound);
        assert_eq!(claims.expires, SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    }

    #[test]
    fn invalid_tokens_have_no_claims() {
        for text in ["", "a", "a.b", "a.b.c", "a.e30.c", "..", "a.!!.c", "a.e30.c.d"] {
            assert_eq!(Claims::of(text), None, "{text}");
        }
    }
}
