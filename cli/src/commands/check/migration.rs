//! Checks before a migration from kube-proxy, in addition to those before the installation.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use serde::Deserialize;
use switchtower_admin_api::codes;
use switchtower_crds::ProxyProfile;
use switchtower_crds::kube_proxy;

use super::proxies::{full_name, is_kube_proxy};
use super::{Check, pre};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::names;

/// Labels and annotations of programs that revert changes of an object.
const MANAGERS: [(&str, &str); 7] = [
    ("argocd.argoproj.io/instance", "Argo CD"),
    ("argocd.argoproj.io/tracking-id", "Argo CD"),
    ("kustomize.toolkit.fluxcd.io/name", "Flux"),
    ("helm.toolkit.fluxcd.io/name", "Flux"),
    ("fleet.cattle.io/bundle-id", "Fleet"),
    ("objectset.rio.cattle.io/id", "the add-on controller of k3s or RKE2"),
    ("addonmanager.kubernetes.io/mode", "the add-on manager of the control plane"),
];

pub(super) async fn run(cluster: &Cluster, own: &[&str]) -> Result<Vec<Check>, CliError> {
    let mut checks = pre::run(cluster).await?;
    let sets = cluster.daemon_sets().await?;
    checks.extend(daemon_sets(&sets));
    let config = cluster.find(kube_proxy::NAMESPACE, kube_proxy::CONFIG_MAP).await?;
    checks.extend(config.as_ref().and_then(ipvs));
    checks.extend(profiles(&cluster.profiles().await?, own));
    checks.extend(addresses(&cluster.nodes().await?));
    Ok(checks)
}

/// Checks that there is one DaemonSet, and that nothing reverts changes of it.
fn daemon_sets(all: &[DaemonSet]) -> Vec<Check> {
    let found: Vec<&DaemonSet> = all.iter().filter(|object| is_kube_proxy(object)).collect();
    let name =
        |object: &DaemonSet| full_name(object.metadata.namespace.as_deref(), object.metadata.name.as_deref());
    let object = match found[..] {
        [object] => object,
        [] => {
            let what = "kube-proxy has no DaemonSet, so that migrate cannot move it off single nodes";
            return vec![Check::failed(codes::KUBE_PROXY_ON_HOST, what)];
        }
        _ => {
            let all: Vec<String> = found.iter().map(|object| name(object)).collect();
            let what = format!("kube-proxy has several DaemonSets: {}", names(&all, all.len(), 3));
            return vec![Check::failed(codes::KUBE_PROXY_ON_HOST, what)];
        }
    };
    let marks = object.metadata.labels.iter().chain(&object.metadata.annotations).flatten();
    let managed = |(key, value): (&String, &String)| {
        let (_, manager) = MANAGERS.into_iter().find(|(known, _)| known == key)?;
        // The add-on manager does not revert objects with EnsureExists.
        (value != "EnsureExists").then_some(manager)
    };
    marks
        .into_iter()
        .find_map(managed)
        .map(|manager| {
            let what = format!("{manager} manages DaemonSet {} and reverts changes of it", name(object));
            Check::failed(codes::KUBE_PROXY_MANAGED, what)
        })
        .into_iter()
        .collect()
}

/// Relevant part of a KubeProxyConfiguration.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Configuration {
    mode: String,
    ipvs: Ipvs,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Ipvs {
    scheduler: String,
}

/// Reports an IPVS scheduler other than its default.
fn ipvs(map: &ConfigMap) -> Option<Check> {
    let text = map.data.as_ref()?.get(kube_proxy::CONFIG_KEY)?;
    let Configuration { mode, ipvs } = serde_saphyr::from_str(text).ok()?;
    let special = mode == "ipvs" && !ipvs.scheduler.is_empty() && ipvs.scheduler != "rr";
    special.then(|| {
        let what = format!("kube-proxy distributes connections with the IPVS scheduler {}", ipvs.scheduler);
        Check::warning(codes::IPVS_SCHEDULER, what)
    })
}

/// The profile of the migration replaces the settings of other profiles on the nodes that move.
fn profiles(all: &[ProxyProfile], own: &[&str]) -> Option<Check> {
    let name = |profile: &ProxyProfile| profile.metadata.name.clone().unwrap_or_default();
    let others: Vec<String> = all.iter().map(name).filter(|name| !own.contains(&name.as_str())).collect();
    (!others.is_empty()).then(|| {
        let what = format!("other ProxyProfiles exist: {}", names(&others, others.len(), 3));
        Check::failed(codes::MIGRATION_PROFILES, what)
    })
}

/// Reports nodes whose first address is IPv6: their NodePorts and controller addresses deserve a test of their own.
fn addresses(nodes: &[Node]) -> Option<Check> {
    let is_ipv6_first = |node: &&Node| {
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let mut internal = addresses.filter(|address| address.type_ == "InternalIP");
        internal.next().is_some_and(|address| address.address.contains(':'))
    };
    let ipv6: Vec<String> =
        nodes.iter().filter(is_ipv6_first).filter_map(|node| node.metadata.name.clone()).collect();
    (!ipv6.is_empty()).then(|| {
        Check::passed(format!("IPv6 is the first address family of {}", names(&ipv6, ipv6.len(), 5)))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Verdict, codes_of};
    use super::*;

    fn daemon_set(metadata: &Value) -> DaemonSet {
        let mut object = json!({"metadata": {"name": "kube-proxy", "namespace": "kube-system"},
            "spec": {"selector": {}, "template": {"spec": {"containers": []}}}});
        for (key, value) in metadata.as_object().unwrap() {
            object["metadata"][key] = value.clone();
        }
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn exactly_one_unmanaged_daemon_set_is_required() {
        let plain = || daemon_set(&json!({}));
        assert_eq!(daemon_sets(&[plain()]), Vec::new());
        assert_eq!(codes_of(&daemon_sets(&[])), [Some("ST0415")]);
        assert_eq!(
            codes_of(&daemon_sets(&[plain(), daemon_set(&json!({"name": "kube-proxy"}))])),
            [Some("ST0415")]
        );
        let mode = |mode: &str| json!({"labels": {"addonmanager.kubernetes.io/mode": mode}});
        for (metadata, managed) in [
            (json!({"annotations": {"argocd.argoproj.io/tracking-id": "x"}}), true),
            (json!({"labels": {"kustomize.toolkit.fluxcd.io/name": "x"}}), true),
            (mode("Reconcile"), true),
            (mode("EnsureExists"), false),
        ] {
            let found = daemon_sets(&[daemon_set(&metadata)]);
            assert_eq!(found.iter().any(|check| check.verdict == Verdict::Failed), managed, "{metadata}");
        }
    }

    #[test]
    fn schedulers_of_ipvs_have_no_counterpart() {
        let found =
            |text: &str| ipvs(&serde_json::from_value(json!({"data": {"config.conf": text}})).unwrap());
        assert!(found("mode: ipvs\nipvs: {scheduler: lc}").is_some());
        for text in
            ["mode: ipvs\nipvs: {scheduler: rr}", "mode: ipvs", "mode: nftables\nipvs: {scheduler: lc}", "{"]
        {
            assert!(found(text).is_none(), "{text}");
        }
    }

    #[test]
    fn other_profiles_prevent_the_migration() {
        let named = |name: &str| ProxyProfile::new(name, switchtower_crds::ProxyProfileSpec::default());
        assert!(profiles(&[named("own")], &["own"]).is_none());
        assert!(profiles(&[named("edge")], &["own"]).is_some());
    }
}
