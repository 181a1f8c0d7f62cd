//! Check that no pod of a Service listens on the port of a drain gate.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use switchtower_admin_api::codes;
use switchtower_crds::ProxyProfile;

use super::Check;
use crate::cluster::{Cluster, SERVICE_NAME_LABEL};
use crate::output::names;

/// Lists EndpointSlices only if a profile has a drain gate.
pub(super) async fn after(cluster: &Cluster, profiles: &[ProxyProfile]) -> Vec<Check> {
    let gates = gates(profiles);
    if gates.is_empty() {
        return Vec::new();
    }
    match cluster.all_slices().await {
        Ok(slices) => about(&gates, &slices),
        Err(error) => vec![Check::not_seen(&error)],
    }
}

/// Returns the profiles with a drain gate by its port.
fn gates(profiles: &[ProxyProfile]) -> BTreeMap<i32, Vec<&str>> {
    let mut gates: BTreeMap<i32, Vec<&str>> = BTreeMap::new();
    for profile in profiles {
        if let Some(gate) = &profile.spec.settings.drain_gate {
            gates.entry(gate.port).or_default().push(profile.metadata.name.as_deref().unwrap_or_default());
        }
    }
    gates
}

fn about(gates: &BTreeMap<i32, Vec<&str>>, slices: &[EndpointSlice]) -> Vec<Check> {
    let mut checks = Vec::new();
    for (port, profiles) in gates {
        let services: BTreeSet<String> =
            slices.iter().filter(|slice| listens(slice, *port)).map(service_of).collect();
        if services.is_empty() {
            continue;
        }
        let services: Vec<String> = services.into_iter().collect();
        let what = format!(
            "the drain gate of {} uses port {port}, on which pods of {} listen",
            names(profiles, profiles.len(), 3),
            names(&services, services.len(), 5)
        );
        checks.push(Check::warning(codes::GATE_PORT_USED, what));
    }
    if checks.is_empty() {
        checks.push(Check::passed("no pod of a Service listens on the port of a drain gate"));
    }
    checks
}

fn listens(slice: &EndpointSlice, gate: i32) -> bool {
    let is_gate = |port: &k8s_openapi::api::discovery::v1::EndpointPort| {
        port.port == Some(gate) && port.protocol.as_deref().unwrap_or("TCP") == "TCP"
    };
    !slice.endpoints.is_empty() && slice.ports.iter().flatten().any(is_gate)
}

/// Returns the Service, or the slice itself if it names none.
fn service_of(slice: &EndpointSlice) -> String {
    let metadata = &slice.metadata;
    let label = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let name = label.or(metadata.name.as_ref()).map(String::as_str).unwrap_or_default();
    format!("{}/{name}", metadata.namespace.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Verdict, codes_of};
    use super::*;

    fn profile(name: &str, settings: &Value) -> ProxyProfile {
        serde_json::from_value(json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": name},
            "spec": {"settings": settings},
        }))
        .unwrap()
    }

    fn slice(service: &str, port: &Value, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": format!("{service}-x"),
                "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [port], "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn checked(profiles: &[ProxyProfile], slices: &[EndpointSlice]) -> Vec<Check> {
        about(&gates(profiles), slices)
    }

    #[test]
    fn pods_that_listen_on_the_gate_port_are_a_warning() {
        let gate = |port: i32| json!({"drainGate": {"port": port}});
        let profiles = [profile("a", &gate(9910)), profile("b", &gate(9910)), profile("c", &json!({}))];
        let slices = [
            slice("web", &json!({"name": "http", "port": 9910, "protocol": "TCP"}), &["10.244.1.7"]),
            slice("web", &json!({"name": "http", "port": 9910}), &["10.244.1.8"]),
            slice("api", &json!({"name": "http", "port": 9910}), &["10.244.1.9"]),
            slice("dns", &json!({"name": "dns", "port": 9910, "protocol": "UDP"}), &["10.244.1.7"]),
            slice("idle", &json!({"name": "http", "port": 9910}), &[]),
            slice("other", &json!({"name": "http", "port": 8080}), &["10.244.1.7"]),
        ];
        let checks = checked(&profiles, &slices);
        assert_eq!(codes_of(&checks), [Some("ST0309")]);
        assert!(checks[0].verdict == Verdict::Warning);
        let what = "the drain gate of a, b uses port 9910, on which pods of shop/api, shop/web listen";
        assert_eq!(checks[0].what, what);
        let checks = checked(&[profile("a", &gate(9911))], &slices);
        assert!(checks.len() == 1 && checks[0].has_passed());
        assert!(gates(&[profile("c", &json!({}))]).is_empty());
    }
}
