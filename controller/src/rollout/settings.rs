//! Converts settings and probes from the API to the protocol.

use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_core::rollout::Revision;
use switchtower_core::wire;
use switchtower_crds as api;
use switchtower_proto::v1::{Cidr, LocalDetection, Probe, ProbeKind, ProxyMode, Settings, Trial};

/// Default time for which a node repeats its probes after the switch.
const WINDOW_SECONDS: i32 = 10;
/// Maximum of the minimum interval between two commits.
const INTERVAL_MILLISECONDS: u32 = 1_000;

/// Returns the settings of a revision: those of the profile over the built-in ones.
#[must_use]
pub(super) fn settings(builtin: &Settings, revision: &Revision, from: &api::ProxySettings) -> Settings {
    let (profile, revision) = (revision.profile.to_string(), revision.number);
    Settings { profile, revision, ..laid_over(builtin, from) }
}

/// Returns `base` with the fields that are set in `from` replaced.
#[must_use]
pub(crate) fn laid_over(base: &Settings, from: &api::ProxySettings) -> Settings {
    let mut settings = base.clone();
    let api::ProxySettings {
        mode: proxy_mode,
        local_detection,
        masquerade_all,
        masquerade_bit,
        node_port_addresses,
        conntrack,
        minimum_interval_milliseconds,
        log_level,
        drain_gate,
    } = from;
    settings.mode = proxy_mode.map_or(settings.mode, |mode| node_mode(mode) as i32);
    if let Some(detection) = local_detection {
        settings.local_detection = mode(detection.mode) as i32;
        settings.cluster_cidrs = cidrs(detection.cluster_cidrs.iter().map(|cidr| cidr.0.as_str()));
        settings.interface = detection.interface.clone().unwrap_or_default();
    }
    settings.masquerade_all = masquerade_all.unwrap_or(settings.masquerade_all);
    if let Some(bit) = masquerade_bit.and_then(|bit| u32::try_from(bit).ok()).filter(|bit| *bit < 32) {
        settings.masquerade_mark = 1 << bit;
    }
    if !node_port_addresses.is_empty() {
        settings.node_port_addresses = node_port_networks(node_port_addresses);
    }
    if let (Some(from), Some(to)) = (conntrack, &mut settings.conntrack) {
        let api::Conntrack {
            max_per_core,
            min,
            tcp_established_timeout_seconds,
            tcp_close_wait_timeout_seconds,
            tcp_be_liberal,
            udp_timeout_seconds,
            udp_stream_timeout_seconds,
        } = from;
        let seconds =
            |value: &Option<i64>, or| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(or);
        to.max_per_core = max_per_core.and_then(|value| u32::try_from(value).ok()).unwrap_or(to.max_per_core);
        to.min = min.and_then(|value| u32::try_from(value).ok()).unwrap_or(to.min);
        to.tcp_established_timeout_seconds =
            seconds(tcp_established_timeout_seconds, to.tcp_established_timeout_seconds);
        to.tcp_close_wait_timeout_seconds =
            seconds(tcp_close_wait_timeout_seconds, to.tcp_close_wait_timeout_seconds);
        to.tcp_be_liberal = tcp_be_liberal.unwrap_or(to.tcp_be_liberal);
        to.udp_timeout_seconds = seconds(udp_timeout_seconds, to.udp_timeout_seconds);
        to.udp_stream_timeout_seconds = seconds(udp_stream_timeout_seconds, to.udp_stream_timeout_seconds);
    }
    if let Some(interval) = minimum_interval_milliseconds.and_then(|value| u32::try_from(value).ok()) {
        settings.minimum_interval_milliseconds = interval.min(INTERVAL_MILLISECONDS);
    }
    if let Some(level) = log_level {
        level.as_str().clone_into(&mut settings.log_level);
    }
    if let Some(gate) = drain_gate {
        settings.drain_gate_port = u16::try_from(gate.port).unwrap_or(0).into();
    }
    settings
}

/// Returns the settings of a rollout with their trial. Without probes there is no trial.
#[must_use]
pub(super) fn on_trial(builtin: &Settings, revision: &Revision, spec: &api::ProxyRolloutSpec) -> Settings {
    let mut tried = settings(builtin, revision, &spec.settings);
    let gates = spec.strategy.gates.clone().unwrap_or_default();
    let probes = gates.probes.unwrap_or_else(|| vec![default_probe()]);
    if !probes.is_empty() {
        let fallback = super::convert::fallback(spec);
        let window = gates.window_seconds.unwrap_or(WINDOW_SECONDS);
        tried.trial = Some(Box::new(Trial {
            probes: probes.iter().map(probe).collect(),
            window_milliseconds: u32::try_from(window).unwrap_or(0).saturating_mul(1_000),
            fallback: Some(Box::new(settings(builtin, &fallback, &spec.fallback.settings))),
        }));
    }
    tried
}

/// Returns the probe of the API server's Service, which every cluster has.
fn default_probe() -> api::ServiceProbe {
    let service = api::ServiceReference {
        namespace: "default".to_owned(),
        name: "kubernetes".to_owned(),
        port: Some("https".to_owned()),
    };
    api::ServiceProbe {
        name: "kubernetes".to_owned(),
        service,
        kind: None,
        compare_source: None,
        http_path: None,
        timeout_milliseconds: None,
    }
}

fn probe(from: &api::ServiceProbe) -> Probe {
    let kind = match from.kind.unwrap_or_default() {
        api::ProbeType::ClusterIp => ProbeKind::ClusterIp,
        api::ProbeType::NodePort => ProbeKind::NodePort,
    };
    Probe {
        name: from.name.clone(),
        namespace: from.service.namespace.clone(),
        service: from.service.name.clone(),
        port: from.service.port.clone().unwrap_or_default(),
        kind: kind as i32,
        timeout_milliseconds: from
            .timeout_milliseconds
            .and_then(|value| u32::try_from(value).ok())
            .unwrap_or(0),
        compare_source: from.compare_source.unwrap_or(false),
        http_path: from.http_path.clone().unwrap_or_default(),
    }
}

/// Returns the networks of NodePorts. As in kube-proxy, a family without a network is served on all its addresses if the
/// other family has one. Agents serve the primary addresses if there is no network at all.
fn node_port_networks(from: &[api::NodePortAddress]) -> Vec<Cidr> {
    let networks = from.iter().map(|address| address.0.as_str());
    let mut networks = cidrs(networks.filter(|address| *address != api::NodePortAddress::PRIMARY));
    if networks.is_empty() {
        return networks;
    }
    for length in [4, 16] {
        if !networks.iter().any(|network| network.address.len() == length) {
            networks.push(Cidr { address: vec![0; length], prefix_length: 0 });
        }
    }
    networks
}

fn node_mode(mode: api::ProxyMode) -> ProxyMode {
    match mode {
        api::ProxyMode::Active => ProxyMode::Active,
        api::ProxyMode::Shadow => ProxyMode::Shadow,
    }
}

fn mode(mode: api::LocalDetectionMode) -> LocalDetection {
    match mode {
        api::LocalDetectionMode::NodeCidr => LocalDetection::NodeCidr,
        api::LocalDetectionMode::ClusterCidr => LocalDetection::ClusterCidr,
        api::LocalDetectionMode::BridgeInterface => LocalDetection::BridgeInterface,
        api::LocalDetectionMode::InterfaceNamePrefix => LocalDetection::InterfaceNamePrefix,
        api::LocalDetectionMode::None => LocalDetection::None,
    }
}

/// Parses CIDRs, which the API server has validated. Host bits are cleared, invalid values are ignored, and a single
/// address counts as a network of one.
fn cidrs<'a>(from: impl IntoIterator<Item = &'a str>) -> Vec<Cidr> {
    let parsed = from.into_iter().filter_map(|text| {
        let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
        text.parse::<IpNet>().ok().or_else(address)
    });
    let mut networks: Vec<IpNet> = parsed.map(|network| network.trunc()).collect();
    networks.sort_unstable();
    networks.dedup();
    networks.into_iter().map(wire::cidr).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::builtin_settings;

    fn revision(number: u64) -> Revision {
        Revision { profile: "default".into(), number }
    }

    #[test]
    fn unset_settings_have_builtin_values() {
        let mut expected = builtin_settings();
        (expected.profile, expected.revision) = ("default".to_owned(), 3);
        assert_eq!(settings(&builtin_settings(), &revision(3), &api::ProxySettings::default()), expected);
    }

    #[test]
    fn every_setting_reaches_the_agent() {
        let from: api::ProxySettings = serde_json::from_value(serde_json::json!({
            "localDetection": {"mode": "ClusterCIDR", "clusterCIDRs": ["10.1.2.3/8", "fd00::/8", "10.0.0.0/8"]},
            "masqueradeAll": true, "masqueradeBit": 31, "nodePortAddresses": ["0.0.0.0/0"],
            "conntrack": {"maxPerCore": 0, "min": 7, "tcpEstablishedTimeoutSeconds": 1,
                "tcpCloseWaitTimeoutSeconds": 2, "tcpBeLiberal": true, "udpTimeoutSeconds": 3,
                "udpStreamTimeoutSeconds": 4},
            "minimumIntervalMilliseconds": 250, "logLevel": "debug", "drainGate": {"port": 9910},
            "mode": "Shadow",
        }))
        .unwrap();
        let settings = settings(&builtin_settings(), &revision(1), &from);
        assert_eq!(settings.local_detection(), LocalDetection::ClusterCidr);
        let lengths: Vec<_> = settings.cluster_cidrs.iter().map(|cidr| cidr.prefix_length).collect();
        assert_eq!(lengths, [8, 8], "host bits are cleared and duplicates removed");
        assert!(settings.masquerade_all);
        assert_eq!(settings.masquerade_mark, 1 << 31);
        let families: Vec<_> =
            settings.node_port_addresses.iter().map(|network| network.address.len()).collect();
        assert_eq!(families, [4, 16], "a family without a network is served on all its addresses");
        let conntrack = settings.conntrack.unwrap();
        assert_eq!((conntrack.max_per_core, conntrack.min, conntrack.tcp_be_liberal), (0, 7, true));
        assert_eq!(
            (conntrack.tcp_established_timeout_seconds, conntrack.tcp_close_wait_timeout_seconds),
            (1, 2)
        );
        assert_eq!((conntrack.udp_timeout_seconds, conntrack.udp_stream_timeout_seconds), (3, 4));
        assert_eq!((settings.minimum_interval_milliseconds, settings.log_level.as_str()), (250, "debug"));
        assert_eq!((settings.drain_gate_port, builtin_settings().drain_gate_port), (9910, 0));
        assert_eq!((settings.mode(), builtin_settings().mode()), (ProxyMode::Shadow, ProxyMode::Active));
    }

    #[test]
    fn adopted_settings_apply_where_a_profile_sets_none() {
        let from = |value| serde_json::from_value::<api::ProxySettings>(value).unwrap();
        let taken = from(serde_json::json!({
            "localDetection": {"mode": "ClusterCIDR", "clusterCIDRs": ["10.0.0.0/8"]},
            "nodePortAddresses": ["0.0.0.0/0", "::/0"], "conntrack": {"maxPerCore": 0},
        }));
        let builtin = laid_over(&builtin_settings(), &taken);
        let silent = settings(&builtin, &revision(1), &from(serde_json::json!({"masqueradeAll": true})));
        assert_eq!(silent.local_detection(), LocalDetection::ClusterCidr);
        assert_eq!((silent.node_port_addresses.len(), silent.masquerade_all), (2, true));
        assert_eq!(silent.conntrack.unwrap().max_per_core, 0);
        let own = from(
            serde_json::json!({"localDetection": {"mode": "NodeCIDR"}, "nodePortAddresses": ["primary"]}),
        );
        let own = settings(&builtin, &revision(2), &own);
        assert_eq!((own.local_detection(), own.cluster_cidrs.len()), (LocalDetection::NodeCidr, 0));
        assert_eq!(own.node_port_addresses, [], "primary addresses, although others were adopted");
    }

    #[test]
    fn trial_has_the_default_probe_and_a_fallback_without_a_trial() {
        let mut spec = api::ProxyRolloutSpec {
            fallback: api::RolloutFallback {
                profile: "builtin".into(),
                revision: 0,
                settings: api::ProxySettings::default(),
            },
            ..api::ProxyRolloutSpec::default()
        };
        let trial = on_trial(&builtin_settings(), &revision(1), &spec).trial.unwrap();
        assert_eq!((trial.probes[0].name.as_str(), trial.window_milliseconds), ("kubernetes", 10_000));
        assert_eq!(trial.fallback.map(|fallback| *fallback), Some(builtin_settings()));
        spec.strategy.gates = Some(api::RolloutGates { probes: Some(Vec::new()), ..Default::default() });
        assert_eq!(on_trial(&builtin_settings(), &revision(1), &spec).trial, None);
    }
}
