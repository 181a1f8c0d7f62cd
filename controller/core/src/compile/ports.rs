//! The ports of a Service that can be served, and what is wrong with the others.

use std::collections::BTreeMap;

use switchtower_proto::v1::Protocol;

use crate::compiled::{Problem, ProblemReason};
use crate::model::{Service, ServicePortSpec};

/// Ports by name and protocol.
pub(super) type Ports<'a> = BTreeMap<(&'a str, i32), &'a ServicePortSpec>;

/// Ports by name and protocol: the last of two with the same wins, as in kube-proxy's map. A port 0, or one of no
/// protocol, is left out.
pub(super) fn distinct_ports<'a>(service: &'a Service, problems: &mut Vec<Problem>) -> Ports<'a> {
    let mut ports = BTreeMap::new();
    for port in &service.ports {
        if port.port == 0 || port.protocol == Protocol::Unspecified {
            let message = format!("port {} has no number or no protocol: it is left out", named(&port.name));
            problems.push(Problem::of_service(service, ProblemReason::InvalidPort, message));
            continue;
        }
        if ports.insert((&*port.name, i32::from(port.protocol)), port).is_some() {
            let protocol = port.protocol.as_str_name();
            let message = format!("two {protocol} ports {}: the last one is used", named(&port.name));
            problems.push(Problem::of_service(service, ProblemReason::DuplicatePort, message));
        }
    }
    problems.extend(shared_numbers(service, &ports, "port", |port| Some(port.port)));
    problems.extend(shared_numbers(service, &ports, "nodePort", |port| port.node_port));
    ports
}

/// Ports of different names with the same number and protocol: of these the last name's has the address.
fn shared_numbers(
    service: &Service,
    ports: &Ports<'_>,
    field: &str,
    number: fn(&ServicePortSpec) -> Option<u16>,
) -> Vec<Problem> {
    let mut first: BTreeMap<(u16, i32), &ServicePortSpec> = BTreeMap::new();
    let mut problems = Vec::new();
    for (&(_, protocol), &port) in ports {
        let Some(number) = number(port).filter(|number| *number != 0) else { continue };
        if let Some(other) = first.insert((number, protocol), port) {
            let (protocol, used) = (port.protocol.as_str_name(), named(&port.name));
            let message = format!(
                "ports {} and {used} have the same {protocol} {field} {number}: {used} is used",
                named(&other.name)
            );
            problems.push(Problem::of_service(service, ProblemReason::DuplicatePort, message));
        }
    }
    problems
}

fn named(name: &str) -> &str {
    if name.is_empty() { "without a name" } else { name }
}
