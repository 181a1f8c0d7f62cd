//! Fields of a kube-proxy configuration that have no counterpart in a ProxyProfile.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Backend, KubeProxyError, first_line, parse};

/// A field that is set and not converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unconverted {
    /// Path of the field.
    pub field: String,
    /// Value of the field, as JSON.
    pub value: String,
    /// Consequence, or the other place for the setting.
    pub reason: &'static str,
}

/// Fields that [`parse`] converts in every mode.
const CONVERTED: [&str; 9] = [
    "apiVersion",
    "kind",
    "mode",
    "clusterCIDR",
    "detectLocalMode",
    "detectLocal",
    "nodePortAddresses",
    "conntrack",
    // Reported by `KubeProxy::localhost_node_ports`, because it has a default.
    "iptables.localhostNodePorts",
];

/// Reasons, by the longest prefix of a path.
const REASONS: [(&str, &str); 19] = [
    ("bindAddress", "the primary address family is that of the Node's first InternalIP"),
    ("bindAddressHardFail", "the agent retries a port that is in use and reports it"),
    ("clientConnection", "agents do not connect to the API server; see the flags of switchtower-controller"),
    ("configSyncPeriod", "the controller watches objects and needs no periodic synchronisation"),
    ("enableProfiling", "there is no profiling endpoint"),
    ("featureGates", "there are no feature gates"),
    ("healthzBindAddress", "use the agent's flag --healthz-bind-address"),
    ("hostnameOverride", "use the agent's flag --hostname-override"),
    (
        "iptables.minSyncPeriod",
        "use settings.minimumIntervalMilliseconds; the default 0 suits transactions of changes only",
    ),
    (
        "iptables.syncPeriod",
        "the agent detects foreign changes and repairs them; it needs no periodic synchronisation",
    ),
    ("ipvs", "nftables has no schedulers, timeouts or exclusions of IPVS"),
    ("logging", "use settings.logLevel or the agent's flags --log-level and --log-format"),
    ("metricsBindAddress", "use the agent's flag --metrics-bind-address"),
    (
        "nftables.minSyncPeriod",
        "use settings.minimumIntervalMilliseconds; the default 0 suits transactions of changes only",
    ),
    (
        "nftables.syncPeriod",
        "the agent detects foreign changes and repairs them; it needs no periodic synchronisation",
    ),
    ("oomScoreAdj", "the kubelet derives it from the priority class of the agent's Pod"),
    ("portRange", "kube-proxy does not use it either"),
    ("showHiddenMetricsForVersion", "there are no hidden metrics"),
    ("windowsRunAsService", "Windows nodes are not served"),
];

/// Returns the fields with values other than their zero value that [`parse`] does not convert, sorted by path.
///
/// # Errors
/// Returns an error if [`parse`] does.
pub fn unconverted(text: &str) -> Result<Vec<Unconverted>, KubeProxyError> {
    let backend = parse(text)?.backend;
    let value: Option<Value> = serde_saphyr::from_str(text)
        .map_err(|error| KubeProxyError::Syntax(first_line(&error.to_string())))?;
    let mut leaves = BTreeMap::new();
    leaves_of(String::new(), value.unwrap_or_default(), &mut leaves);
    let fields = leaves.into_iter().filter(|(field, value)| !is_zero(value) && !is_converted(field, backend));
    Ok(fields
        .map(|(field, value)| Unconverted { reason: reason(&field), value: value.to_string(), field })
        .collect())
}

fn leaves_of(path: String, value: Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let path = if path.is_empty() { name } else { format!("{path}.{name}") };
                leaves_of(path, field, leaves);
            }
        }
        value => {
            leaves.insert(path, value);
        }
    }
}

/// kubeadm writes the zero value of all unset fields.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

fn is_converted(field: &str, backend: Backend) -> bool {
    let section = if backend == Backend::NfTables { "nftables" } else { "iptables" };
    let masquerading = ["masqueradeAll", "masqueradeBit"].map(|name| format!("{section}.{name}"));
    CONVERTED.iter().any(|known| is_within(field, known)) || masquerading.iter().any(|known| known == field)
}

fn is_within(field: &str, prefix: &str) -> bool {
    field.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn reason(field: &str) -> &'static str {
    let known = REASONS.iter().filter(|(prefix, _)| is_within(field, prefix));
    match known.max_by_key(|(prefix, _)| prefix.len()) {
        Some((_, reason)) => reason,
        None if is_within(field, "iptables") || is_within(field, "nftables") => {
            "kube-proxy does not use this section in its mode"
        }
        None if is_within(field, "winkernel") => "Windows nodes are not served",
        None => "kube-proxy 1.36 does not know this field",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_in_docs_lists_every_known_field() {
        let page = include_str!("../../../docs/kube-proxy-settings.md");
        for field in CONVERTED.iter().chain(REASONS.iter().map(|(field, _)| field)) {
            assert!(page.contains(&format!("`{field}`")), "docs/kube-proxy-settings.md lacks {field}");
        }
        let (_, without) = page.split_once("## Without a counterpart").unwrap();
        for line in without.lines().filter_map(|line| line.strip_prefix("| `")) {
            let (field, reason) = line.trim_end_matches(" |").split_once("` | ").unwrap();
            assert!(REASONS.contains(&(field, reason)), "{field}: {reason}");
        }
    }

    fn fields(text: &str) -> Vec<(String, &'static str)> {
        unconverted(text).unwrap().into_iter().map(|found| (found.field, found.reason)).collect()
    }

    #[test]
    fn zero_values_are_not_reported() {
        let text = "featureGates: null\nipvs: {scheduler: '', syncPeriod: 0s, strictARP: false, excludeCIDRs: []}\n\
                    logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}}}\nwinkernel: {}\n";
        assert_eq!(fields(text), []);
        assert_eq!(fields(""), []);
    }

    #[test]
    fn converted_fields_are_not_reported() {
        let text = "kind: KubeProxyConfiguration\nmode: nftables\nclusterCIDR: 10.0.0.0/8\n\
                    nftables: {masqueradeAll: true, masqueradeBit: 7}\nconntrack: {min: 5}\n\
                    nodePortAddresses: [primary]\ndetectLocal: {bridgeInterface: cni0}\n";
        assert_eq!(fields(text), []);
    }

    #[test]
    fn other_fields_are_reported_with_reasons() {
        let text = "mode: nftables\nbindAddress: 0.0.0.0\nbindAddressHardFail: true\niptables: {masqueradeAll: true}\n\
                    nftables: {minSyncPeriod: 1s}\nipvs: {scheduler: rr}\nclientConnection: {qps: 5}\nwinkernel: {sourceVip: a}\n\
                    colour: red\nfeatureGates: {A: true}\n";
        let found = unconverted(text).unwrap();
        let names: Vec<&str> = found.iter().map(|found| found.field.as_str()).collect();
        let wanted = [
            "bindAddress",
            "bindAddressHardFail",
            "clientConnection.qps",
            "colour",
            "featureGates.A",
            "iptables.masqueradeAll",
            "ipvs.scheduler",
            "nftables.minSyncPeriod",
            "winkernel.sourceVip",
        ];
        assert_eq!(names, wanted);
        assert_eq!((found[2].value.as_str(), found[6].value.as_str()), ("5", "\"rr\""));
        assert_eq!(found[5].reason, "kube-proxy does not use this section in its mode");
        assert!(found[1].reason.contains("retries"), "{:?}", found[1]);
        assert!(found[3].reason.contains("does not know"), "{:?}", found[3]);
    }
}
