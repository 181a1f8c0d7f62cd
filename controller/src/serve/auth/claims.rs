//! What a ServiceAccount token says about itself, unverified.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// The claims that matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) audiences: Vec<String>,
    pub(super) expires: SystemTime,
    pub(super) pod_bound: bool,
}

impl Claims {
    /// `None` if it is not a JWT with an expiry.
    pub(super) fn of(token: &str) -> Option<Self> {
        let mut pieces = token.split('.');
        let (_, payload, _) = (pieces.next()?, pieces.next()?, pieces.next()?);
        if pieces.next().is_some() {
            return None;
        }
        let claims: Value = serde_json::from_slice(&base64url(payload)?).ok()?;
        let audiences = match claims.get("aud") {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(many)) => {
                many.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        };
        let seconds = claims.get("exp")?.as_u64()?;
        let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
        let pod_bound = claims.pointer("/kubernetes.io/pod/uid").is_some();
        Some(Self { audiences, expires, pod_bound })
    }
}

/// Base64 with the URL's alphabet and without padding (RFC 7515).
fn base64url(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_token_request_api_makes() {
        // {"aud":["switchtower"],"exp":1900000000,"kubernetes.io":{"pod":{"name":"a","uid":"u"}}}
        let token = "e30.eyJhdWQiOlsic3dpdGNodG93ZXIiXSwiZXhwIjoxOTAwMDAwMDAwLCJrdWJlcm5ldGVzLmlvIjp7InBvZCI6eyJuYW1lIjoiYSIsInVpZCI6InUifX19.c2ln";
        let claims = Claims::of(token).unwrap();
        assert_eq!(claims.audiences, ["switchtower"]);
        assert!(claims.pod_bound);
        assert_eq!(claims.expires, SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    }

    #[test]
    fn what_is_no_token_is_none() {
        for text in ["", "a", "a.b", "a.b.c", "a.e30.c", "..", "a.!!.c", "a.e30.c.d"] {
            assert_eq!(Claims::of(text), None, "{text}");
        }
    }
}
