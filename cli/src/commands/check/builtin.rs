//! Checks of the built-in settings: values taken over from kube-proxy, and features without an equivalent.

use k8s_openapi::api::core::v1::ConfigMap;
use serde::Deserialize;
use switchtower_admin_api::codes;
use switchtower_crds::builtin::{self, Origin, Record};
use switchtower_crds::kube_proxy::{self, Backend, KubeProxy};
use switchtower_crds::{LocalDetectionMode, NodePortAddress, ProxySettings};

use super::Check;
use crate::cluster::Cluster;

/// Relevant part of kubeadm's ClusterConfiguration.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ClusterConfiguration {
    networking: Networking,
    proxy: Proxy,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Networking {
    pod_subnet: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Proxy {
    disabled: bool,
}

fn value<'a>(map: &'a ConfigMap, key: &str) -> Option<&'a str> {
    map.data.as_ref()?.get(key).map(String::as_str)
}

fn read(map: &ConfigMap) -> Result<KubeProxy, String> {
    let text = value(map, kube_proxy::CONFIG_KEY).ok_or("it has no key config.conf")?;
    kube_proxy::parse(text).map_err(|error| error.to_string())
}

/// Returns true if nodes without a ProxyProfile will use local detection by pod CIDRs.
pub(super) fn by_pod_cidrs(kube_proxy: Option<&ConfigMap>) -> bool {
    let detection =
        kube_proxy.and_then(|map| read(map).ok()).and_then(|found| found.settings.local_detection);
    detection.is_none_or(|detection| detection.mode == LocalDetectionMode::NodeCidr)
}

/// Reports the settings that will be taken over, and features of kube-proxy without an equivalent.
pub(super) fn before(kube_proxy: Option<&ConfigMap>, kubeadm: Option<&ConfigMap>) -> Vec<Check> {
    let mut checks = Vec::new();
    match kube_proxy.map(read) {
        None => checks.push(Check::passed(
            "ConfigMap kube-system/kube-proxy not found: local detection will use the pod CIDRs of the Nodes, or will be \
             disabled if a pod is outside of them; change this with a ProxyProfile",
        )),
        Some(Ok(found)) => checks.extend(about(&found)),
        Some(Err(problem)) => checks.push(Check::warning(
            codes::SETTINGS_NOT_TAKEN_OVER,
            format!("cannot take over settings from ConfigMap kube-system/kube-proxy: {problem}"),
        )),
    }
    if let Some(map) = kubeadm {
        checks.extend(about_kubeadm(map, kube_proxy.and_then(|map| read(map).ok()).as_ref()));
    }
    checks
}

fn about(found: &KubeProxy) -> Vec<Check> {
    let mut checks = vec![Check::passed(format!(
        "settings to be taken over from kube-proxy: {}",
        summary(&found.settings)
    ))];
    for note in &found.notes {
        checks.push(Check::passed(note.trim_end_matches('.')));
    }
    if found.backend != Backend::NfTables {
        let what = "kube-proxy's iptables rules also accept Service traffic and healthCheckNodePorts in the hosts' \
                    firewalls; Switchtower's rules do not";
        checks.push(Check::warning(codes::FIREWALLS, what));
    }
    if found.localhost_node_ports {
        let what = "kube-proxy also serves NodePorts on 127.0.0.1; Switchtower does not";
        checks.push(Check::warning(codes::LOCALHOST_NODE_PORTS, what));
    }
    checks
}

fn about_kubeadm(map: &ConfigMap, found: Option<&KubeProxy>) -> Vec<Check> {
    let text = value(map, "ClusterConfiguration").unwrap_or_default();
    let Ok(Some(configuration)) = serde_saphyr::from_str::<Option<ClusterConfiguration>>(text) else {
        let what = "ConfigMap kube-system/kubeadm-config has no valid ClusterConfiguration";
        return vec![Check::warning(codes::KUBEADM_BRINGS_BACK, what)];
    };
    let mut checks = Vec::new();
    checks.push(if configuration.proxy.disabled {
        Check::passed("kubeadm will not reinstall kube-proxy: proxy.disabled is set in kubeadm-config")
    } else {
        let what = "kubeadm-config has no proxy.disabled: the next kubeadm upgrade reinstalls kube-proxy";
        Check::warning(codes::KUBEADM_BRINGS_BACK, what)
    });
    let detection = found.and_then(|found| found.settings.local_detection.as_ref());
    if let Some(detection) = detection.filter(|detection| detection.mode == LocalDetectionMode::ClusterCidr) {
        let subnet = configuration.networking.pod_subnet;
        let cidrs: Vec<&str> = detection.cluster_cidrs.iter().map(|cidr| cidr.0.as_str()).collect();
        let same = subnet.split(',').map(str::trim).filter(|part| !part.is_empty()).eq(cidrs.iter().copied());
        if !same && !subnet.is_empty() {
            let cidrs = cidrs.join(",");
            let what = format!("kube-proxy's clusterCIDR {cidrs} differs from kubeadm's podSubnet {subnet}");
            checks.push(Check::warning(codes::SETTINGS_NOT_TAKEN_OVER, what));
        }
    }
    checks
}

/// Returns a short description of settings.
fn summary(settings: &ProxySettings) -> String {
    let mut parts = Vec::new();
    if let Some(detection) = &settings.local_detection {
        let cidrs: Vec<&str> = detection.cluster_cidrs.iter().map(|cidr| cidr.0.as_str()).collect();
        let interface = detection.interface.as_deref().unwrap_or_default();
        parts.push(match detection.mode {
            LocalDetectionMode::NodeCidr => "local pods by their Nodes' pod CIDRs".to_owned(),
            LocalDetectionMode::ClusterCidr => {
                format!("local pods by the cluster CIDRs {}", cidrs.join(", "))
            }
            LocalDetectionMode::BridgeInterface => format!("local pods by the interface {interface}"),
            LocalDetectionMode::InterfaceNamePrefix => format!("local pods by interfaces {interface}*"),
            LocalDetectionMode::None => "no connection counts as local".to_owned(),
        });
    }
    let addresses: Vec<&str> =
        settings.node_port_addresses.iter().map(|address| address.0.as_str()).collect();
    parts.push(match addresses.as_slice() {
        [] | [NodePortAddress::PRIMARY] => "NodePorts on primary addresses".to_owned(),
        ["0.0.0.0/0", "::/0"] => "NodePorts on all addresses".to_owned(),
        other => format!("NodePorts on addresses inside {}", other.join(", ")),
    });
    if settings.masquerade_all == Some(true) {
        parts.push("all connections to ClusterIPs are masqueraded".to_owned());
    }
    parts.join("; ")
}

/// Checks the recorded built-in settings and compares them with kube-proxy's configuration if it still exists.
pub(super) async fn after(cluster: &Cluster) -> Vec<Check> {
    let record: Option<ConfigMap> = match cluster.find(cluster.system_namespace(), builtin::CONFIG_MAP).await
    {
        Ok(record) => record,
        Err(error) => return vec![Check::not_seen(&error)],
    };
    // Without permission to read it, skip the comparison.
    let kube_proxy = cluster.find(kube_proxy::NAMESPACE, kube_proxy::CONFIG_MAP).await.ok().flatten();
    vec![about_record(record.as_ref(), kube_proxy.as_ref())]
}

fn about_record(record: Option<&ConfigMap>, kube_proxy: Option<&ConfigMap>) -> Check {
    let Some(map) = record else {
        let what =
            format!("ConfigMap {} not found; the controller writes it when it starts", builtin::CONFIG_MAP);
        return Check::warning(codes::SETTINGS_NOT_TAKEN_OVER, what);
    };
    let record = match Record::read(map) {
        Ok(record) => record,
        Err(error) => {
            let what = format!("ConfigMap {} is unusable: {error}", builtin::CONFIG_MAP);
            return Check::failed(codes::SETTINGS_NOT_TAKEN_OVER, what);
        }
    };
    if let Some(problem) = &record.problem {
        return Check::warning(codes::SETTINGS_NOT_TAKEN_OVER, problem.trim_end_matches('.'));
    }
    let summary = summary(&record.settings);
    if let Some(Ok(found)) = kube_proxy.map(read)
        && found.settings != record.settings
    {
        let what = format!(
            "the built-in settings ({summary}) differ from ConfigMap kube-system/kube-proxy ({})",
            self::summary(&found.settings)
        );
        return Check::warning(codes::SETTINGS_NOT_TAKEN_OVER, what);
    }
    match record.origin {
        Origin::Pods => {
            Check::warning(codes::SETTINGS_NOT_TAKEN_OVER, record.explanation.trim_end_matches('.'))
        }
        Origin::KubeProxy => {
            Check::passed(format!("built-in settings, taken over from kube-proxy: {summary}"))
        }
        Origin::Defaults | Origin::EarlierVersion | Origin::Other => {
            Check::passed(format!("built-in settings: {summary}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::codes_of;
    use super::*;

    const CONFIG: &str = "clusterCIDR: 10.244.0.0/16";

    fn map(key: &str, value: &str) -> ConfigMap {
        serde_json::from_value(json!({"data": {key: value}})).unwrap()
    }

    #[test]
    fn settings_before_installation_are_checked() {
        let of = |config: &str| codes_of(&before(Some(&map("config.conf", config)), None));
        assert_eq!(codes_of(&before(None, None)), [None]);
        assert_eq!(of(CONFIG), [None, Some("ST0414"), Some("ST0416")]);
        assert_eq!(of("mode: nftables\nclusterCIDR: 10.0.0.0/8"), [None]);
        assert_eq!(of("mode: ipvs\nclusterCIDR: 10.0.0.0/8"), [None, Some("ST0414")]);
        assert_eq!(of("{"), [Some("ST0413")]);
        assert_eq!(codes_of(&before(Some(&map("kubeconfig", "")), None)), [Some("ST0413")]);
        let checks = before(Some(&map("config.conf", CONFIG)), None);
        assert!(checks[0].what.ends_with("10.244.0.0/16; NodePorts on all addresses"), "{checks:?}");
    }

    #[test]
    fn kubeadm_reinstalling_kube_proxy_reported() {
        let of = |text: &str| {
            let kube_proxy = KubeProxy { notes: Vec::new(), ..kube_proxy::parse(CONFIG).unwrap() };
            codes_of(&about_kubeadm(&map("ClusterConfiguration", text), Some(&kube_proxy)))
        };
        assert_eq!(of("networking: {podSubnet: 10.244.0.0/16}\nproxy: {}"), [Some("ST0411")]);
        assert_eq!(of("networking: {podSubnet: 10.244.0.0/16}\nproxy: {disabled: true}"), [None]);
        assert_eq!(
            of("networking: {podSubnet: 10.9.0.0/16}\nproxy: {disabled: true}"),
            [None, Some("ST0413")]
        );
        assert_eq!(of("{"), [Some("ST0411")]);
        assert_eq!(of(""), [Some("ST0411")]);
    }

    #[test]
    fn record_compared_with_kube_proxy() {
        let settings = kube_proxy::parse(CONFIG).unwrap().settings;
        let record = |origin, problem: Option<&str>| {
            let problem = problem.map(str::to_owned);
            Record { settings: settings.clone(), origin, explanation: "Why.".to_owned(), problem }
                .config_map()
        };
        let of = |record: &ConfigMap, config: Option<&str>| {
            let kube_proxy = config.map(|config| map("config.conf", config));
            about_record(Some(record), kube_proxy.as_ref()).code
        };
        assert_eq!(of(&record(Origin::KubeProxy, None), Some(CONFIG)), None);
        assert_eq!(of(&record(Origin::KubeProxy, None), None), None);
        assert_eq!(of(&record(Origin::KubeProxy, None), Some("mode: nftables")), Some("ST0413"));
        assert_eq!(of(&record(Origin::Defaults, Some("Bad.")), None), Some("ST0413"));
        assert_eq!(of(&record(Origin::Pods, None), None), Some("ST0413"));
        assert_eq!(of(&map("settings", "{"), None), Some("ST0413"));
        assert_eq!(about_record(None, None).code, Some("ST0413"));
    }
}
