//! Decides which requests are served. Pure.
//!
//! The page acts with the rights of the user's kubeconfig, so other programs and other websites must not reach it:
//! - The path starts with a random token. Another user of the machine, or a website that scans ports, does not know it.
//! - The Host header must be the loopback address: a website whose name is rebound to 127.0.0.1 has its own name there.
//! - Requests that change something need the page's own Origin and a header that forms cannot send.

use http::request::Parts;
use http::{HeaderMap, Method, StatusCode, header};

use crate::args::RolloutAction;

/// Header of requests that change something. A browser sends it across origins only after a preflight request, which
/// is refused.
pub(super) const ACTION_HEADER: &str = "x-switchtower-action";

/// A permitted request.
#[derive(Debug)]
pub(super) enum Route {
    /// The page.
    Page,
    /// Changes since a version.
    State { since: u64 },
    /// Path and latest changes of a Service, `NAMESPACE/NAME`, on all nodes or one.
    Service { name: String, node: Option<String> },
    /// A command of `kubectl switchtower rollout`.
    Rollout(RolloutAction),
}

/// Checks a request against the token and the address (`127.0.0.1:PORT`) of the server.
///
/// # Errors
/// Returns the status of the response.
pub(super) fn route(request: &Parts, token: &str, address: &str) -> Result<Route, StatusCode> {
    let port = address.rsplit_once(':').map_or("", |(_, port)| port);
    let host = single(&request.headers, header::HOST.as_str());
    let hosts = [address.to_owned(), format!("localhost:{port}")];
    let host = host.filter(|host| hosts.iter().any(|known| known == host)).ok_or(StatusCode::FORBIDDEN)?;
    let path = request.uri.path().strip_prefix('/').ok_or(StatusCode::NOT_FOUND)?;
    let (given, rest) = path.split_once('/').ok_or(StatusCode::NOT_FOUND)?;
    if !equal(given.as_bytes(), token.as_bytes()) {
        return Err(StatusCode::NOT_FOUND);
    }
    let query = |name: &str| query(request.uri.query().unwrap_or_default(), name);
    match (&request.method, rest.split('/').collect::<Vec<_>>().as_slice()) {
        (&Method::GET, [""]) => Ok(Route::Page),
        (&Method::GET, ["state"]) => {
            let since = query("since").unwrap_or_else(|| "0".to_owned());
            Ok(Route::State { since: since.parse().map_err(|_| StatusCode::BAD_REQUEST)? })
        }
        (&Method::GET, ["service"]) => {
            let name = query("name").ok_or(StatusCode::BAD_REQUEST)?;
            Ok(Route::Service { name, node: query("node").filter(|node| !node.is_empty()) })
        }
        (&Method::POST, ["rollouts", name, action]) => {
            let own = format!("http://{host}");
            let same_origin = single(&request.headers, header::ORIGIN.as_str()) == Some(&own);
            if !same_origin || single(&request.headers, ACTION_HEADER).is_none() {
                return Err(StatusCode::FORBIDDEN);
            }
            rollout(&decoded(name), action).map(Route::Rollout)
        }
        (&Method::GET | &Method::POST, _) => Err(StatusCode::NOT_FOUND),
        _ => Err(StatusCode::METHOD_NOT_ALLOWED),
    }
}

fn rollout(name: &str, action: &str) -> Result<RolloutAction, StatusCode> {
    let name = name.to_owned();
    match action {
        "pause" => Ok(RolloutAction::Pause { name }),
        "resume" => Ok(RolloutAction::Resume { name }),
        "approve" => Ok(RolloutAction::Approve { name }),
        "abort" => Ok(RolloutAction::Abort { name }),
        _ => Err(StatusCode::NOT_FOUND),
    }
}

/// Value of a header that occurs once.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// Compares in a time that does not depend on the first difference.
fn equal(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

fn query(text: &str, name: &str) -> Option<String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(known, _)| *known == name).map(|(_, value)| decoded(&value.replace('+', " ")))
}

/// Decodes percent-encoding. Invalid sequences are kept.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.filter(|_| byte == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.push(value.unwrap_or(byte));
        at += if value.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    const ADDRESS: &str = "127.0.0.1:4000";

    fn asked(method: &str, path: &str, headers: &[(&str, &str)]) -> Result<Route, StatusCode> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        route(&request.body(()).unwrap().into_parts().0, "secret", ADDRESS)
    }

    #[test]
    fn token_and_host_are_required() {
        let host = [("host", ADDRESS)];
        assert!(matches!(asked("GET", "/secret/", &host), Ok(Route::Page)));
        assert!(matches!(asked("GET", "/secret/", &[("host", "localhost:4000")]), Ok(Route::Page)));
        for path in ["/", "/secret", "/Secret/", "/secre/", "/secrets/", "//secret/", "/secret/../etc"] {
            assert_eq!(asked("GET", path, &host).unwrap_err(), StatusCode::NOT_FOUND, "{path}");
        }
        for host in ["evil.example:4000", "127.0.0.1", "127.0.0.1:4001", "localhost.evil.example:4000"] {
            assert_eq!(
                asked("GET", "/secret/", &[("host", host)]).unwrap_err(),
                StatusCode::FORBIDDEN,
                "{host}"
            );
        }
        assert_eq!(asked("GET", "/secret/", &[]).unwrap_err(), StatusCode::FORBIDDEN);
        let two = [("host", ADDRESS), ("host", "evil.example")];
        assert_eq!(asked("GET", "/secret/", &two).unwrap_err(), StatusCode::FORBIDDEN);
        assert_eq!(asked("OPTIONS", "/secret/state", &host).unwrap_err(), StatusCode::METHOD_NOT_ALLOWED);
    }

    #[test]
    fn actions_need_own_origin_and_header() {
        let path = "/secret/rollouts/limits-2/pause";
        let origin = ("origin", "http://127.0.0.1:4000");
        let action = (ACTION_HEADER, "1");
        let host = ("host", ADDRESS);
        let route = asked("POST", path, &[host, origin, action]).unwrap();
        assert!(matches!(route, Route::Rollout(RolloutAction::Pause { name }) if name == "limits-2"));
        let refused: [&[(&str, &str)]; 4] = [
            &[host, origin],
            &[host, action],
            &[host, action, ("origin", "http://evil.example")],
            &[host, action, ("origin", "null")],
        ];
        for headers in refused {
            assert_eq!(asked("POST", path, headers).unwrap_err(), StatusCode::FORBIDDEN, "{headers:?}");
        }
        let wrong = asked("POST", "/secret/rollouts/limits-2/delete", &[host, origin, action]);
        assert_eq!(wrong.unwrap_err(), StatusCode::NOT_FOUND);
        assert_eq!(asked("GET", path, &[host, origin, action]).unwrap_err(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn queries_are_decoded() {
        let host = [("host", ADDRESS)];
        let route = asked("GET", "/secret/service?name=shop%2Fcart%3Ahttp&node=", &host).unwrap();
        assert!(matches!(route, Route::Service { name, node: None } if name == "shop/cart:http"));
        assert!(matches!(asked("GET", "/secret/state?since=7", &host), Ok(Route::State { since: 7 })));
        assert_eq!(asked("GET", "/secret/state?since=x", &host).unwrap_err(), StatusCode::BAD_REQUEST);
        assert_eq!(asked("GET", "/secret/service", &host).unwrap_err(), StatusCode::BAD_REQUEST);
        assert_eq!(decoded("%zz%4"), "%zz%4");
        assert_eq!(decoded("%€"), "%€");
    }
}
