//! Compares the responses of health check node ports.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1;
use serde_json::Value;

use super::both::Both;
use super::case::{Families, Service, ServiceType};
use super::compare::{Answers, Difference};
use super::world::World;
use crate::lab::wait;

/// Timeout for the same response after the rules are in place.
const DEADLINE: Duration = Duration::from_secs(15);

/// Status line, the headers that load balancers read, and the body without timestamps; empty without a response.
pub fn essence(answer: &str) -> Vec<String> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or(("", ""));
    let mut lines = head.lines();
    let Some(status) = lines.next() else { return Vec::new() };
    let told = ["content-type", "x-content-type-options", "x-load-balancing-endpoint-weight"];
    let mut headers: Vec<_> = lines
        .map(|line| line.trim().to_lowercase())
        .filter(|line| told.iter().any(|name| line.starts_with(name)))
        .collect();
    headers.sort();
    let body = match serde_json::from_str::<Value>(body.trim()) {
        Ok(mut value) => {
            forget_times(&mut value);
            value.to_string()
        }
        Err(_) => body.trim().to_owned(),
    };
    [status.trim().to_owned()].into_iter().chain(headers).chain([body]).collect()
}

fn forget_times(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.retain(|name, _| !["lastUpdated", "currentTime"].contains(&name.as_str()));
        fields.values_mut().for_each(forget_times);
    }
}

/// Differences on all health check node ports, on the Node's addresses of the Service's families.
pub(super) fn differences(world: &World, services: &[Service]) -> Result<Vec<Difference>> {
    let mut differences = Vec::new();
    let checked =
        |service: &&Service| service.service_type == ServiceType::LoadBalancer && service.external_local;
    for service in services.iter().filter(checked) {
        let object: v1::Service = world.kube().get("default", &service.name)?.context("no Service")?;
        let number =
            object.spec.and_then(|spec| spec.health_check_node_port).context("no health check port")?;
        let families: &[bool] = match service.families {
            Families::Ipv4 => &[false],
            Families::Ipv6 => &[true],
            Families::Dual => &[false, true],
        };
        for ipv6 in families {
            let to = SocketAddr::new(world.node_address(*ipv6), u16::try_from(number)?);
            differences.extend(difference(world, &service.name, to)?);
        }
    }
    Ok(differences)
}

fn difference(world: &World, service: &str, to: SocketAddr) -> Result<Option<Difference>> {
    let mut last = None;
    let agreed = wait::until("the same answer", DEADLINE, || {
        let Both { kube_proxy, switchtower } = world.ask_node(to, "/")?;
        let (theirs, ours) = (essence(&kube_proxy), essence(&switchtower));
        let same = theirs == ours;
        last = Some((theirs, ours));
        ensure!(same, "they differ");
        Ok(())
    });
    let words = |lines: Vec<String>| -> Answers {
        [if lines.is_empty() { "no response".to_owned() } else { lines.join("; ") }].into()
    };
    Ok(match (agreed, last) {
        (Ok(()), _) => None,
        (Err(_), Some((theirs, ours))) => Some(Difference {
            what: format!("{service}: GET / of its health check node port {to}"),
            kube_proxy: words(theirs),
            switchtower: words(ours),
        }),
        (Err(error), None) => return Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_other_headers_are_left_out() {
        let answer = "HTTP/1.1 200 OK\r\nDate: now\r\nContent-Type: application/json\r\n\r\n\
                      {\"lastUpdated\": \"now\", \"localEndpoints\": 1}\n";
        let wanted = ["HTTP/1.1 200 OK", "content-type: application/json", "{\"localEndpoints\":1}"];
        assert_eq!(essence(answer), wanted);
        assert_eq!(essence("Failed to connect"), [""; 0]);
    }
}
