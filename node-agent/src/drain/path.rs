//! The request of a hook: `GET /drained[/NAMESPACE/NAME][?timeout=DURATION]`.

use std::net::IpAddr;
use std::time::Duration;

use axum::http::{Method, Uri};

use super::{DEFAULT_TIMEOUT, Pod, PodName, TIMEOUT_LIMIT};

/// Maximum length of a Namespace's name (DNS label).
const NAMESPACE_LENGTH: usize = 63;
/// Maximum length of a pod's name (DNS subdomain).
const NAME_LENGTH: usize = 253;

/// A well-formed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hook {
    /// The pod that the path names.
    pub(super) name: Option<PodName>,
    pub(super) timeout: Duration,
}

impl Hook {
    /// Parses a request.
    ///
    /// # Errors
    /// The message explains what is malformed.
    pub(super) fn parse(method: &Method, uri: &Uri) -> Result<Self, String> {
        if method != Method::GET {
            return Err(format!("method {method} is not supported; send GET /drained"));
        }
        let unknown = || {
            format!(
                "path {:?} is malformed; send GET /drained, or GET /drained/NAMESPACE/NAME for a host-network pod",
                clipped(uri.path())
            )
        };
        let name = match uri.path().strip_prefix("/drained").ok_or_else(unknown)? {
            "" => None,
            rest => Some(rest.strip_prefix('/').and_then(pod_name).ok_or_else(unknown)?),
        };
        Ok(Self { name, timeout: timeout(uri.query().unwrap_or_default())? })
    }

    /// Returns the pod. The address of a connection identifies it, unless the address is the node's own.
    ///
    /// # Errors
    /// The address is the node's own, and the path names no pod.
    pub(super) fn pod(self, address: IpAddr, node_addresses: &[IpAddr]) -> Result<Pod, String> {
        if !node_addresses.contains(&address) {
            return Ok(Pod::Address(address));
        }
        let missing = || {
            format!(
                "{address} is the address of the node; host-network pods send GET /drained/NAMESPACE/NAME with their \
                 namespace and name"
            )
        };
        Ok(Pod::Host { address, name: self.name.ok_or_else(missing)? })
    }
}

fn pod_name(text: &str) -> Option<PodName> {
    let (namespace, name) = text.split_once('/')?;
    let valid = |text: &str, limit: usize, extra: &[u8]| {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || extra.contains(&byte);
        (1..=limit).contains(&text.len()) && text.bytes().all(allowed)
    };
    let valid = valid(namespace, NAMESPACE_LENGTH, b"-") && valid(name, NAME_LENGTH, b"-.");
    valid.then(|| PodName { namespace: namespace.to_owned(), name: name.to_owned() })
}

fn timeout(query: &str) -> Result<Duration, String> {
    let mut timeout = DEFAULT_TIMEOUT;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let value = pair
            .strip_prefix("timeout=")
            .ok_or_else(|| format!("parameter {:?} is unknown; the only one is timeout", clipped(pair)))?;
        timeout = duration(value).ok_or_else(|| {
            format!("timeout {:?} is invalid; use a number of seconds such as 25 or a duration such as 90s, 500ms or 5m", clipped(value))
        })?;
    }
    Ok(timeout.min(TIMEOUT_LIMIT))
}

fn clipped(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Parses a number with the unit ms, s or m; without a unit it counts seconds.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number.into())),
        "" | "s" => Some(Duration::from_secs(number.into())),
        "m" => Some(Duration::from_secs(u64::from(number) * 60)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(target: &str) -> Result<Hook, String> {
        Hook::parse(&Method::GET, &target.parse().unwrap())
    }

    #[test]
    fn timeouts_are_parsed_and_bounded() {
        let seconds = Duration::from_secs;
        for (target, timeout) in [
            ("/drained", DEFAULT_TIMEOUT),
            ("/drained?", DEFAULT_TIMEOUT),
            ("/drained?timeout=0", Duration::ZERO),
            ("/drained?timeout=40", seconds(40)),
            ("/drained?timeout=40s", seconds(40)),
            ("/drained?timeout=2m", seconds(120)),
            ("/drained?timeout=250ms", Duration::from_millis(250)),
            ("/drained?timeout=11m", TIMEOUT_LIMIT),
            ("/drained?timeout=4294967295m", TIMEOUT_LIMIT),
            ("/drained/default/web?timeout=7", seconds(7)),
        ] {
            assert_eq!(parse(target).map(|hook| hook.timeout), Ok(timeout), "{target}");
        }
    }

    #[test]
    fn malformed_requests_are_explained() {
        let long = format!("/drained/default/{}", "x".repeat(NAME_LENGTH + 1));
        for (target, problem) in [
            ("/", "path"),
            ("/drained/", "path"),
            ("/drainedx", "path"),
            ("/drained/web", "path"),
            ("/drained//web", "path"),
            ("/drained/default/", "path"),
            ("/drained/default/web/", "path"),
            ("/drained/default/../web", "path"),
            ("/drained/Default/web", "path"),
            ("/drained/a.b/web", "path"),
            ("/drained/default/we%62", "path"),
            (&long, "path"),
            ("/drained?timeout=", "timeout"),
            ("/drained?timeout=soon", "timeout"),
            ("/drained?timeout=-1", "timeout"),
            ("/drained?timeout=1h", "timeout"),
            ("/drained?timeout=99999999999", "timeout"),
            ("/drained/default/web?timeout=soon", "timeout"),
            ("/drained?wait=1", "parameter"),
        ] {
            let error = parse(target).unwrap_err();
            assert!(error.starts_with(problem), "{target}: {error}");
        }
        assert!(Hook::parse(&Method::POST, &"/drained".parse().unwrap()).is_err());
        assert!(parse(&format!("/{}", "x".repeat(5_000))).unwrap_err().len() < 250);
    }

    #[test]
    fn path_names_a_pod_only_at_the_address_of_the_node() {
        let (node, pod): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "10.244.1.7".parse().unwrap());
        let of = |target: &str, address| parse(target).unwrap().pod(address, &[node]);
        let name = PodName { namespace: "default".into(), name: "web-0.a".into() };
        assert_eq!(of("/drained/default/web-0.a", node), Ok(Pod::Host { address: node, name }));
        assert_eq!(
            of("/drained/default/web-0.a", pod),
            Ok(Pod::Address(pod)),
            "the address is the pod's own"
        );
        assert_eq!(of("/drained", pod), Ok(Pod::Address(pod)));
        assert!(of("/drained", node).unwrap_err().contains("/drained/NAMESPACE/NAME"));
    }
}
