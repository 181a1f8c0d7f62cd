//! Conversion of a kube-proxy configuration (`kubeproxy.config.k8s.io/v1alpha1`) to [`ProxySettings`].
//!
//! Used by the controller during installation and by `kubectl switchtower check`. Defaults and precedence are those of
//! kube-proxy 1.36 (`pkg/proxy/apis/config/v1alpha1`, `cmd/kube-proxy/app/server_linux.go`).

use std::net::IpAddr;

use serde::Deserialize;

mod unconverted;

pub use unconverted::{Unconverted, unconverted};

use crate::{Cidr, Conntrack, LocalDetection, LocalDetectionMode, NodePortAddress, ProxySettings};

/// Namespace of the ConfigMap that kubeadm writes.
pub const NAMESPACE: &str = "kube-system";
/// Name of that ConfigMap.
pub const CONFIG_MAP: &str = "kube-proxy";
/// Key of the ConfigMap that holds the configuration.
pub const CONFIG_KEY: &str = "config.conf";

const MAXIMUM_TIMEOUT_SECONDS: i64 = 2_147_483;
const MAXIMUM_PER_CORE: i32 = 1_048_576;

/// Backend that kube-proxy programs. Some defaults depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The default on Linux.
    IpTables,
    /// IPVS.
    Ipvs,
    /// nftables.
    NfTables,
}

/// A converted configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeProxy {
    /// Backend of kube-proxy.
    pub backend: Backend,
    /// All settings that have an equivalent, including kube-proxy's defaults.
    pub settings: ProxySettings,
    /// NodePorts also answer on 127.0.0.1 (iptables mode only), which Switchtower does not support.
    pub localhost_node_ports: bool,
    /// Values that could not be converted exactly, one sentence each.
    pub notes: Vec<String>,
}

/// Reason why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KubeProxyError {
    /// The text is not YAML, or a field has the wrong type.
    #[error("it is not a KubeProxyConfiguration: {0}")]
    Syntax(String),
    /// The object is of another kind.
    #[error("its kind is {0:?}, not KubeProxyConfiguration")]
    Kind(String),
    /// A field has a value that kube-proxy would also reject.
    #[error("{field}: {value:?} is {problem}")]
    Value {
        /// Path of the field.
        field: &'static str,
        /// Value of the field.
        value: String,
        /// Predicate that describes the error, such as `not a CIDR`.
        problem: &'static str,
    },
}

/// Treats explicit nulls as absent: kubeadm writes them for all unset fields.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    kind: Option<String>,
    mode: Option<String>,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: Option<String>,
    detect_local_mode: Option<String>,
    detect_local: Option<DetectLocal>,
    node_port_addresses: Option<Vec<String>>,
    iptables: Option<Masquerading>,
    nftables: Option<Masquerading>,
    conntrack: Option<Tracking>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DetectLocal {
    bridge_interface: Option<String>,
    interface_name_prefix: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Masquerading {
    masquerade_all: Option<bool>,
    masquerade_bit: Option<i32>,
    localhost_node_ports: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tracking {
    max_per_core: Option<i32>,
    min: Option<i32>,
    tcp_established_timeout: Option<String>,
    tcp_close_wait_timeout: Option<String>,
    tcp_be_liberal: Option<bool>,
    udp_timeout: Option<String>,
    udp_stream_timeout: Option<String>,
}

/// Parses a configuration file of kube-proxy. Unknown fields are ignored, as in older versions of kube-proxy.
///
/// # Errors
/// Returns an error if the text is not a KubeProxyConfiguration or has a value that kube-proxy rejects.
pub fn parse(text: &str) -> Result<KubeProxy, KubeProxyError> {
    // An empty file means all defaults.
    let parsed: Option<Configuration> = serde_saphyr::from_str(text)
        .map_err(|error| KubeProxyError::Syntax(first_line(&error.to_string())))?;
    let from = parsed.unwrap_or_default();
    if let Some(kind) = from.kind.as_ref().filter(|kind| *kind != "KubeProxyConfiguration") {
        return Err(KubeProxyError::Kind(kind.clone()));
    }
    let mut notes = Vec::new();
    let backend = backend(from.mode.as_deref().unwrap_or_default())?;
    // kube-proxy's IPVS mode reads the iptables section too.
    let iptables = from.iptables.unwrap_or_default();
    let nftables = from.nftables.unwrap_or_default();
    let masquerading = if backend == Backend::NfTables { &nftables } else { &iptables };
    let bit = masquerading.masquerade_bit.unwrap_or(14);
    if !(0..32).contains(&bit) {
        return Err(invalid("masqueradeBit", bit.to_string(), "not within 0 to 31"));
    }
    let cluster_cidrs = cluster_cidrs(from.cluster_cidr.as_deref().unwrap_or_default(), &mut notes)?;
    let detection = local_detection(
        from.detect_local_mode.as_deref().unwrap_or_default(),
        &from.detect_local.unwrap_or_default(),
        cluster_cidrs,
        &mut notes,
    )?;
    let settings = ProxySettings {
        local_detection: Some(detection),
        masquerade_all: Some(masquerading.masquerade_all.unwrap_or(false)),
        masquerade_bit: Some(bit),
        node_port_addresses: node_port_addresses(&from.node_port_addresses.unwrap_or_default(), backend)?,
        conntrack: Some(conntrack(&from.conntrack.unwrap_or_default(), &mut notes)?),
        minimum_interval_milliseconds: None,
        log_level: None,
        mode: None,
        drain_gate: None,
    };
    let localhost_node_ports = backend == Backend::IpTables && iptables.localhost_node_ports.unwrap_or(true);
    Ok(KubeProxy { backend, settings, localhost_node_ports, notes })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn invalid(field: &'static str, value: impl Into<String>, problem: &'static str) -> KubeProxyError {
    KubeProxyError::Value { field, value: value.into(), problem }
}

fn backend(mode: &str) -> Result<Backend, KubeProxyError> {
    match mode {
        "" | "iptables" => Ok(Backend::IpTables),
        "ipvs" => Ok(Backend::Ipvs),
        "nftables" => Ok(Backend::NfTables),
        other => Err(invalid("mode", other, "not iptables, ipvs or nftables")),
    }
}

fn is_ipv6(text: &str) -> Option<bool> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u8 = length.parse().ok()?;
    (length <= if address.is_ipv6() { 128 } else { 32 }).then_some(address.is_ipv6())
}

/// Returns the first CIDR of each family, which kube-proxy uses.
fn cluster_cidrs(text: &str, notes: &mut Vec<String>) -> Result<Vec<Cidr>, KubeProxyError> {
    let mut kept: Vec<(bool, Cidr)> = Vec::new();
    for cidr in text.split(',').map(str::trim).filter(|cidr| !cidr.is_empty()) {
        let ipv6 = is_ipv6(cidr).ok_or_else(|| invalid("clusterCIDR", cidr, "not a CIDR"))?;
        if kept.iter().any(|(family, _)| *family == ipv6) {
            notes.push(format!(
                "clusterCIDR {cidr} is ignored: kube-proxy uses only the first of each family."
            ));
        } else {
            kept.push((ipv6, Cidr(cidr.to_owned())));
        }
    }
    Ok(kept.into_iter().map(|(_, cidr)| cidr).collect())
}

fn local_detection(
    mode: &str,
    interfaces: &DetectLocal,
    cluster_cidrs: Vec<Cidr>,
    notes: &mut Vec<String>,
) -> Result<LocalDetection, KubeProxyError> {
    let by_interface = |mode, field, name: &Option<String>| {
        let name = name.clone().unwrap_or_default();
        let good = |letter: char| letter.is_ascii_alphanumeric() || "_.@-".contains(letter);
        if name.is_empty() || name.len() > 15 || !name.chars().all(good) {
            return Err(invalid(field, name, "not the name of a network interface"));
        }
        Ok(LocalDetection { mode, interface: Some(name), ..LocalDetection::default() })
    };
    match mode {
        "" | "ClusterCIDR" if cluster_cidrs.is_empty() => {
            notes.push(
                "clusterCIDR is empty: as with kube-proxy, no connection counts as local, and connections to \
                 ClusterIPs are not masqueraded."
                    .to_owned(),
            );
            Ok(LocalDetection { mode: LocalDetectionMode::None, ..LocalDetection::default() })
        }
        "" | "ClusterCIDR" => {
            Ok(LocalDetection { mode: LocalDetectionMode::ClusterCidr, cluster_cidrs, interface: None })
        }
        "NodeCIDR" => Ok(LocalDetection { mode: LocalDetectionMode::NodeCidr, ..LocalDetection::default() }),
        "BridgeInterface" => by_interface(
            LocalDetectionMode::BridgeInterface,
            "detectLocal.bridgeInterface",
            &interfaces.bridge_interface,
        ),
        "InterfaceNamePrefix" => by_interface(
            LocalDetectionMode::InterfaceNamePrefix,
            "detectLocal.interfaceNamePrefix",
            &interfaces.interface_name_prefix,
        ),
        other => Err(invalid("detectLocalMode", other, "not a mode of kube-proxy")),
    }
}

/// Converts `nodePortAddresses`. An empty list selects all addresses of the node with the iptables and IPVS backends, and
/// the primary addresses with the nftables backend.
fn node_port_addresses(from: &[String], backend: Backend) -> Result<Vec<NodePortAddress>, KubeProxyError> {
    let all = ["0.0.0.0/0", "::/0"];
    let texts: Vec<&str> = match (from, backend) {
        ([], Backend::NfTables) => vec![NodePortAddress::PRIMARY],
        ([], Backend::IpTables | Backend::Ipvs) => all.to_vec(),
        ([one], _) if one == NodePortAddress::PRIMARY => vec![NodePortAddress::PRIMARY],
        (several, _) => several.iter().map(|text| text.trim()).collect(),
    };
    let bad = |text: &&&str| **text != NodePortAddress::PRIMARY && is_ipv6(text).is_none();
    let mixed = texts.len() > 1 && texts.contains(&NodePortAddress::PRIMARY);
    if let Some(text) = texts.iter().find(bad).or(texts.first().filter(|_| mixed)) {
        return Err(invalid("nodePortAddresses", *text, "neither a list of CIDRs nor only \"primary\""));
    }
    if texts.len() > NodePortAddress::MAXIMUM {
        return Err(invalid("nodePortAddresses", texts.len().to_string(), "more entries than 64"));
    }
    Ok(texts.into_iter().map(|text| NodePortAddress(text.to_owned())).collect())
}

fn conntrack(from: &Tracking, notes: &mut Vec<String>) -> Result<Conntrack, KubeProxyError> {
    let count = |field, value: Option<i32>| match value {
        Some(value) if value < 0 => Err(invalid(field, value.to_string(), "negative")),
        value => Ok(value),
    };
    let mut seconds = |field: &'static str, text: &Option<String>| {
        let Some(text) = text.as_deref() else { return Ok(None) };
        let seconds = go_duration_seconds(text).ok_or_else(|| invalid(field, text, "not a duration"))?;
        if seconds > MAXIMUM_TIMEOUT_SECONDS {
            notes.push(format!("{field} {text} is limited to {MAXIMUM_TIMEOUT_SECONDS} seconds."));
        }
        Ok(Some(seconds.min(MAXIMUM_TIMEOUT_SECONDS)))
    };
    Ok(Conntrack {
        max_per_core: count("conntrack.maxPerCore", from.max_per_core)?
            .map(|value| value.min(MAXIMUM_PER_CORE)),
        min: count("conntrack.min", from.min)?,
        tcp_established_timeout_seconds: seconds(
            "conntrack.tcpEstablishedTimeout",
            &from.tcp_established_timeout,
        )?,
        tcp_close_wait_timeout_seconds: seconds(
            "conntrack.tcpCloseWaitTimeout",
            &from.tcp_close_wait_timeout,
        )?,
        tcp_be_liberal: from.tcp_be_liberal,
        udp_timeout_seconds: seconds("conntrack.udpTimeout", &from.udp_timeout)?,
        udp_stream_timeout_seconds: seconds("conntrack.udpStreamTimeout", &from.udp_stream_timeout)?,
    })
}

/// Parses a Go duration (`24h0m0s`, `1m30s`, `500ms`) to whole seconds. Returns `None` for negative durations.
fn go_duration_seconds(text: &str) -> Option<i64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut nanoseconds: f64 = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3_600e9,
            _ => return None,
        };
        nanoseconds += number * unit;
        rest = &rest[end..];
    }
    // The caller limits durations beyond the range.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the cast saturates, and fractions are discarded on purpose"
    )]
    Some((nanoseconds / 1e9) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `kubeadm init --pod-network-cidr=10.244.0.0/16,fd00:244::/56` 1.36 writes it.
    const KUBEADM: &str = r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
featureGates: null
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;

    fn detection(text: &str) -> LocalDetection {
        parse(text).unwrap().settings.local_detection.unwrap()
    }

    fn node_ports(text: &str) -> Vec<String> {
        let addresses = parse(text).unwrap().settings.node_port_addresses;
        addresses.into_iter().map(|NodePortAddress(text)| text).collect()
    }

    #[test]
    fn kubeadm_dual_stack_in_iptables_mode() {
        let read = parse(KUBEADM).unwrap();
        assert_eq!((read.backend, read.localhost_node_ports), (Backend::IpTables, true));
        assert_eq!(read.notes, Vec::<String>::new());
        let cidrs = ["10.244.0.0/16", "fd00:244::/56"].map(|cidr| Cidr(cidr.to_owned())).to_vec();
        let settings = read.settings;
        let expected =
            LocalDetection { mode: LocalDetectionMode::ClusterCidr, cluster_cidrs: cidrs, interface: None };
        assert_eq!(settings.local_detection, Some(expected));
        assert_eq!((settings.masquerade_all, settings.masquerade_bit), (Some(false), Some(14)));
        assert_eq!(node_ports(KUBEADM), ["0.0.0.0/0", "::/0"], "iptables mode serves all addresses");
        let conntrack = settings.conntrack.unwrap();
        assert_eq!((conntrack.max_per_core, conntrack.tcp_established_timeout_seconds), (None, None));
        assert_eq!((conntrack.udp_timeout_seconds, conntrack.tcp_be_liberal), (Some(0), Some(false)));
    }

    #[test]
    fn configurations_of_kind_and_with_own_values() {
        let read = parse(
            "kind: KubeProxyConfiguration\nmode: nftables\nclusterCIDR: 10.244.0.0/16\n\
             conntrack: {maxPerCore: 0, min: 7, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 1h30m0s, \
             udpTimeout: 1500ms}\nnftables: {masqueradeAll: true, masqueradeBit: 3}\n\
             iptables: {masqueradeAll: false, masqueradeBit: 5}\n",
        )
        .unwrap();
        let settings = read.settings;
        assert_eq!((settings.masquerade_all, settings.masquerade_bit), (Some(true), Some(3)));
        assert_eq!(settings.node_port_addresses, [NodePortAddress("primary".into())]);
        assert!(!read.localhost_node_ports);
        let conntrack = settings.conntrack.unwrap();
        assert_eq!((conntrack.max_per_core, conntrack.min), (Some(0), Some(7)));
        assert_eq!(conntrack.tcp_established_timeout_seconds, Some(0));
        assert_eq!(conntrack.tcp_close_wait_timeout_seconds, Some(5_400));
        assert_eq!(conntrack.udp_timeout_seconds, Some(1));
    }

    #[test]
    fn ipvs_reads_the_iptables_section() {
        let read =
            parse("mode: ipvs\niptables: {masqueradeAll: true}\nnftables: {masqueradeBit: 9}\n").unwrap();
        assert_eq!((read.settings.masquerade_all, read.settings.masquerade_bit), (Some(true), Some(14)));
        assert_eq!(node_ports("mode: ipvs"), ["0.0.0.0/0", "::/0"]);
        assert!(!read.localhost_node_ports);
    }

    #[test]
    fn nothing_is_local_without_cluster_cidr() {
        for text in ["", "---\n", "clusterCIDR: \"\"\n", "detectLocalMode: ClusterCIDR", "clusterCIDR: ' , '"]
        {
            assert_eq!(detection(text).mode, LocalDetectionMode::None, "{text:?}");
            assert_eq!(parse(text).unwrap().notes.len(), 1, "{text:?}");
        }
    }

    #[test]
    fn first_cluster_cidr_of_each_family_is_used() {
        let read = parse("clusterCIDR: 10.1.0.0/16, 10.2.0.0/16,fd00::/48").unwrap();
        let detection = read.settings.local_detection.unwrap();
        let cidrs: Vec<_> = detection.cluster_cidrs.iter().map(|Cidr(text)| text.as_str()).collect();
        assert_eq!(cidrs, ["10.1.0.0/16", "fd00::/48"]);
        assert!(read.notes[0].contains("10.2.0.0/16"), "{:?}", read.notes);
    }

    #[test]
    fn all_detection_modes_are_converted() {
        assert_eq!(
            detection("detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8").mode,
            LocalDetectionMode::NodeCidr
        );
        let bridge = detection(
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\nclusterCIDR: ''",
        );
        assert_eq!(
            (bridge.mode, bridge.interface.as_deref()),
            (LocalDetectionMode::BridgeInterface, Some("cni0"))
        );
        let prefix =
            detection("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}");
        assert_eq!(
            (prefix.mode, prefix.interface.as_deref()),
            (LocalDetectionMode::InterfaceNamePrefix, Some("cali"))
        );
    }

    #[test]
    fn node_port_addresses_are_kept() {
        assert_eq!(node_ports("nodePortAddresses: [192.0.2.0/24]"), ["192.0.2.0/24"]);
        assert_eq!(node_ports("nodePortAddresses: [primary]"), ["primary"]);
        assert_eq!(node_ports("mode: nftables\nnodePortAddresses: []"), ["primary"]);
    }

    #[test]
    fn values_rejected_by_kube_proxy_are_errors() {
        for (text, expected) in [
            ("kind: Kubelet", "kind"),
            ("clusterCIDR: [10.0.0.0/8]", "not a KubeProxyConfiguration"),
            ("clusterCIDR: 10.0.0.0/33", "clusterCIDR"),
            ("clusterCIDR: 10.0.0.0", "clusterCIDR"),
            ("mode: userspace", "mode"),
            ("detectLocalMode: Magic", "detectLocalMode"),
            ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"),
            (
                "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: a_name_of_17_bytes}",
                "prefix",
            ),
            ("nodePortAddresses: [here]", "nodePortAddresses"),
            ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses"),
            ("iptables: {masqueradeBit: 32}", "masqueradeBit"),
            ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore"),
            ("conntrack: {udpTimeout: soon}", "conntrack.udpTimeout"),
            ("{", "not a KubeProxyConfiguration"),
            ("just words", "not a KubeProxyConfiguration"),
            ("a: &a [*a, *a]", "not a KubeProxyConfiguration"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.to_lowercase().contains(&expected.to_lowercase()), "{text}: {error}");
            assert!(!error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn go_durations_parse() {
        for (text, expected) in [
            ("24h0m0s", Some(86_400)),
            ("1m30.5s", Some(90)),
            ("999ms", Some(0)),
            ("0", Some(0)),
            ("", None),
            ("5", None),
            ("-1s", None),
            ("1d", None),
            ("s", None),
        ] {
            assert_eq!(go_duration_seconds(text), expected, "{text:?}");
        }
        let read = parse("conntrack: {tcpEstablishedTimeout: 9000h0m0s}").unwrap();
        assert_eq!(read.settings.conntrack.unwrap().tcp_established_timeout_seconds, Some(2_147_483));
        assert_eq!(read.notes.len(), 2, "{:?}", read.notes);
    }
}
