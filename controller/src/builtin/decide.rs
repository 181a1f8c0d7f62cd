//! Derivation of the built-in settings from the facts at the installation. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use switchtower_core::locality::Detection;
use switchtower_core::model::Input;
use switchtower_crds::builtin::{Origin, Record};
use switchtower_crds::kube_proxy::{self, Backend, KubeProxy};
use switchtower_crds::{LocalDetection, LocalDetectionMode, ProxyMode, ProxySettings};

use crate::cli::BuiltinMode;
use crate::ingest::{self, Fact};

/// Facts for the decision.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// A node had an agent of an earlier version, which kept no record.
    pub(super) served_before: bool,
    /// kube-proxy's configuration, or the error in it.
    pub(super) kube_proxy: Option<Result<KubeProxy, String>>,
    pub(super) pods: PodsSeen,
}

/// Nodes, and the first pod that is outside of its Node's pod CIDRs.
#[derive(Debug, Default)]
pub(super) struct PodsSeen {
    nodes: HashMap<String, (Vec<IpAddr>, Detection)>,
    inside: usize,
    outside: Option<(String, IpAddr)>,
}

impl PodsSeen {
    pub(super) fn add_node(&mut self, object: &Node) {
        if let Fact::Node(node, _) = ingest::node(object).fact {
            self.nodes.insert(node.name.to_string(), (node.addresses, Detection::PodCidrs(node.pod_cidrs)));
        }
    }

    pub(super) fn add_slice(&mut self, object: &EndpointSlice) {
        let Fact::Input(Input::Slice(slice)) = ingest::slice(object).fact else { return };
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready) {
            let Some(node) = &endpoint.node else { continue };
            let Some((own, detection)) = self.nodes.get(&**node) else { continue };
            if own.contains(&endpoint.address) {
                continue;
            }
            if detection.misses(endpoint.address) {
                self.outside.get_or_insert_with(|| (node.to_string(), endpoint.address));
            } else {
                self.inside += 1;
            }
        }
    }

    /// One pod outside is enough.
    pub(super) fn is_decided(&self) -> bool {
        self.outside.is_some()
    }
}

/// kube-proxy's configuration in its ConfigMap.
pub(super) fn read(map: &ConfigMap) -> Result<KubeProxy, String> {
    let text = map.data.as_ref().and_then(|data| data.get(kube_proxy::CONFIG_KEY));
    let text = text.ok_or_else(|| format!("it has no key {}", kube_proxy::CONFIG_KEY))?;
    kube_proxy::parse(text).map_err(|error| error.to_string())
}

/// Derives the built-in settings. Nodes that were served before keep mode Active: they may have no other proxy.
pub(super) fn decide(found: Found, mode: BuiltinMode) -> Record {
    let shadow = mode == BuiltinMode::Shadow && !found.served_before;
    let mut record = translate(found);
    if shadow {
        record.settings.mode = Some(ProxyMode::Shadow);
        record.explanation += " Mode Shadow: --builtin-mode of the controller.";
    }
    record
}

fn translate(found: Found) -> Record {
    let by_node = || detection(LocalDetectionMode::NodeCidr);
    if found.served_before {
        let explanation =
            "Nodes were served by an earlier version, which kept no record: they keep its settings. Make a \
            ProxyProfile to change them."
                .to_owned();
        return Record { settings: by_node(), origin: Origin::EarlierVersion, explanation, problem: None };
    }
    let problem = match found.kube_proxy {
        Some(Ok(kube_proxy)) => return taken_over(kube_proxy),
        Some(Err(problem)) => Some(format!(
            "The ConfigMap {}/{} could not be taken over: {problem}.",
            kube_proxy::NAMESPACE,
            kube_proxy::CONFIG_MAP
        )),
        None => None,
    };
    let (settings, origin, explanation) = match found.pods.outside {
        Some((node, address)) => (
            detection(LocalDetectionMode::None),
            Origin::Pods,
            format!(
                "No configuration of kube-proxy is known, and the ready endpoint {address} on node {node} is outside of \
                 the Node's pod CIDRs, so these say nothing about pods. No connection counts as one of a local pod: \
                 none to a ClusterIP is masqueraded, as with a kube-proxy without clusterCIDR. Name the pods' networks \
                 or interfaces in a ProxyProfile (localDetection)."
            ),
        ),
        None => (
            by_node(),
            Origin::Defaults,
            format!(
                "No configuration of kube-proxy is known. Local pods are recognised by their Node's pod CIDRs: {}.",
                match found.pods.inside {
                    0 => "there was no pod yet that could confirm or contradict it".to_owned(),
                    pods => format!("all {pods} ready endpoints that were there are inside of them"),
                }
            ),
        ),
    };
    Record { settings, origin, explanation, problem }
}

fn detection(mode: LocalDetectionMode) -> ProxySettings {
    let detection = LocalDetection { mode, ..LocalDetection::default() };
    ProxySettings { local_detection: Some(detection), ..ProxySettings::default() }
}

fn taken_over(from: KubeProxy) -> Record {
    let backend = match from.backend {
        Backend::IpTables => "iptables",
        Backend::Ipvs => "ipvs",
        Backend::NfTables => "nftables",
    };
    let mut explanation = format!(
        "Taken over from the ConfigMap {}/{} (mode {backend}).",
        kube_proxy::NAMESPACE,
        kube_proxy::CONFIG_MAP
    );
    for note in &from.notes {
        explanation.push(' ');
        explanation += note;
    }
    Record { settings: from.settings, origin: Origin::KubeProxy, explanation, problem: None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(data: &serde_json::Value) -> ConfigMap {
        serde_json::from_value(json!({"data": data})).unwrap()
    }

    /// A node with the CIDR 10.244.77.0/24, and ready endpoints on it.
    fn pods(addresses: &[&str]) -> PodsSeen {
        let mut seen = PodsSeen::default();
        seen.add_node(
            &serde_json::from_value(json!({
                "metadata": {"name": "n"}, "spec": {"podCIDRs": ["10.244.77.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
            }))
            .unwrap(),
        );
        let endpoint = |address: &&str| json!({"addresses": [address], "nodeName": "n"});
        let mut endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
        endpoints.push(json!({"addresses": ["10.9.9.9"], "nodeName": "n", "conditions": {"ready": false}}));
        endpoints.push(json!({"addresses": ["10.9.9.8"], "nodeName": "unknown"}));
        endpoints.push(json!({"addresses": ["10.9.9.7"]}));
        seen.add_slice(
            &serde_json::from_value(json!({
                "metadata": {"name": "s", "namespace": "d", "labels": {"kubernetes.io/service-name": "s"}},
                "addressType": "IPv4", "ports": [], "endpoints": endpoints,
            }))
            .unwrap(),
        );
        seen
    }

    fn mode(record: &Record) -> LocalDetectionMode {
        record.settings.local_detection.as_ref().unwrap().mode
    }

    #[test]
    fn kube_proxy_s_configuration_comes_first() {
        let config = "clusterCIDR: 10.244.0.0/16\niptables: {masqueradeAll: true}";
        let kube_proxy = Some(read(&map(&json!({"config.conf": config}))));
        let record = decide(
            Found { kube_proxy, pods: pods(&["10.9.0.1"]), served_before: false },
            BuiltinMode::Active,
        );
        assert_eq!((record.origin, mode(&record)), (Origin::KubeProxy, LocalDetectionMode::ClusterCidr));
        assert_eq!(record.settings.masquerade_all, Some(true));
        assert!(record.explanation.contains("mode iptables"), "{}", record.explanation);
        assert_eq!(record.problem, None);
    }

    #[test]
    fn invalid_configuration_is_a_problem_and_ignored() {
        for data in [json!({}), json!({"config.conf": "{"}), json!({"kubeconfig": "apiVersion: v1"})] {
            let kube_proxy = Some(read(&map(&data)));
            let record = decide(Found { kube_proxy, ..Found::default() }, BuiltinMode::Active);
            assert_eq!(
                (record.origin, mode(&record)),
                (Origin::Defaults, LocalDetectionMode::NodeCidr),
                "{data}"
            );
            assert!(record.problem.unwrap().contains("kube-system/kube-proxy"), "{data}");
        }
    }

    #[test]
    fn without_a_configuration_the_pods_decide() {
        for (addresses, origin, expected, part) in [
            (&[][..], Origin::Defaults, LocalDetectionMode::NodeCidr, "no pod yet"),
            (&["192.0.2.1"], Origin::Defaults, LocalDetectionMode::NodeCidr, "no pod yet"),
            (&["10.244.77.9"], Origin::Defaults, LocalDetectionMode::NodeCidr, "all 1 ready"),
            (
                &["10.244.77.9", "10.244.3.11"],
                Origin::Pods,
                LocalDetectionMode::None,
                "10.244.3.11 on node n",
            ),
        ] {
            let record = decide(Found { pods: pods(addresses), ..Found::default() }, BuiltinMode::Active);
            assert_eq!((record.origin, mode(&record)), (origin, expected), "{addresses:?}");
            assert!(record.explanation.contains(part), "{}", record.explanation);
        }
    }

    #[test]
    fn nodes_served_before_keep_their_settings() {
        let kube_proxy = Some(read(&map(&json!({"config.conf": "clusterCIDR: 10.244.0.0/16"}))));
        let record =
            decide(Found { served_before: true, kube_proxy, pods: PodsSeen::default() }, BuiltinMode::Active);
        assert_eq!((record.origin, mode(&record)), (Origin::EarlierVersion, LocalDetectionMode::NodeCidr));
    }

    #[test]
    fn shadow_only_for_nodes_never_served() {
        let decided = |served_before| {
            decide(Found { served_before, ..Found::default() }, BuiltinMode::Shadow).settings.mode
        };
        assert_eq!((decided(false), decided(true)), (Some(ProxyMode::Shadow), None));
        assert_eq!(decide(Found::default(), BuiltinMode::Active).settings.mode, None);
    }
}
