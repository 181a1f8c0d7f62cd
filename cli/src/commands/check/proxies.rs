//! Detection of other service proxies from API objects. A program without an API object, such as a kube-proxy under
//! systemd, cannot be detected here; the agents detect its rules.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, Node, Pod, PodSpec};
use kube::api::DynamicObject;
use switchtower_admin_api::codes;

use super::Check;
use crate::output::names;

/// Ports of the controller (agents, admin API, metrics) and of the agents (probes, metrics, health).
const PORTS: [i32; 6] = [9443, 9444, 9445, 9446, 10249, 10256];

/// Objects that may belong to another service proxy.
#[derive(Debug, Default)]
pub(super) struct Surroundings {
    pub(super) daemon_sets: Vec<DaemonSet>,
    /// Static Pods with a label of kube-proxy.
    pub(super) pods: Vec<Pod>,
    pub(super) kube_proxy_config: Option<ConfigMap>,
    pub(super) cilium: Option<ConfigMap>,
    pub(super) antrea: Option<ConfigMap>,
    pub(super) felix: Option<DynamicObject>,
}

pub(super) fn full_name(namespace: Option<&str>, name: Option<&str>) -> String {
    format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default())
}

fn spec(object: &DaemonSet) -> Option<&PodSpec> {
    object.spec.as_ref()?.template.spec.as_ref()
}

fn containers(object: &DaemonSet) -> impl Iterator<Item = &Container> {
    spec(object).into_iter().flat_map(|spec| &spec.containers)
}

/// Returns the image name without registry, path and tag.
fn image_name(container: &Container) -> &str {
    let image = container.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    last.split([':', '@']).next().unwrap_or_default()
}

/// Returns whether a DaemonSet runs kube-proxy on Linux.
pub(in crate::commands) fn is_kube_proxy(object: &DaemonSet) -> bool {
    let labels = object.metadata.labels.as_ref();
    let labelled = ["k8s-app", "app", "component", "app.kubernetes.io/name"]
        .iter()
        .any(|key| labels.and_then(|labels| labels.get(*key)).is_some_and(|value| value == "kube-proxy"));
    let runs = |container: &Container| {
        let image = image_name(container);
        image == "kube-proxy" || image.starts_with("kube-proxy-") || image.ends_with("-kube-proxy")
    };
    let name = object.metadata.name.as_deref().unwrap_or_default();
    // Windows nodes keep their kube-proxy.
    !is_for_windows(object) && (labelled || name == "kube-proxy" || containers(object).any(runs))
}

fn is_for_windows(object: &DaemonSet) -> bool {
    let selector = spec(object).and_then(|spec| spec.node_selector.as_ref());
    selector.is_some_and(|selector| selector.get("kubernetes.io/os").is_some_and(|os| os == "windows"))
}

/// Checks whether kube-proxy runs.
pub(super) fn kube_proxy(found: &Surroundings, nodes: &[Node]) -> Vec<Check> {
    let mut checks = Vec::new();
    let sets: Vec<String> = found
        .daemon_sets
        .iter()
        .filter(|object| is_kube_proxy(object))
        .map(|object| full_name(object.metadata.namespace.as_deref(), object.metadata.name.as_deref()))
        .collect();
    if !sets.is_empty() {
        let what = format!("kube-proxy runs as DaemonSet {}", names(&sets, sets.len(), 3));
        checks.push(Check::warning(codes::KUBE_PROXY_RUNS, what));
    }
    let mirrored: Vec<String> = found
        .pods
        .iter()
        .filter(|pod| {
            let annotations = pod.metadata.annotations.as_ref();
            annotations.is_some_and(|all| all.contains_key("kubernetes.io/config.mirror"))
        })
        .filter_map(|pod| pod.metadata.name.clone())
        .collect();
    if !mirrored.is_empty() {
        let what = format!("kube-proxy runs as static Pods: {}", names(&mirrored, mirrored.len(), 3));
        checks.push(Check::warning(codes::KUBE_PROXY_ON_HOST, what));
    }
    let built_in: Vec<String> = nodes
        .iter()
        .filter(|node| {
            let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
            let version = info.map(|info| info.kubelet_version.as_str()).unwrap_or_default();
            version.contains("+k3s") || version.contains("+rke2")
        })
        .filter_map(|node| node.metadata.name.clone())
        .collect();
    if !built_in.is_empty() && mirrored.is_empty() {
        let what = format!(
            "k3s and RKE2 run kube-proxy unless disable-kube-proxy is set, which the API does not show: {}",
            names(&built_in, built_in.len(), 5)
        );
        checks.push(Check::warning(codes::KUBE_PROXY_ON_HOST, what));
    }
    if checks.is_empty() {
        checks.push(match found.kube_proxy_config {
            Some(_) => Check::warning(
                codes::KUBE_PROXY_ON_HOST,
                "ConfigMap kube-system/kube-proxy exists and no DaemonSet uses it: kube-proxy may run as a host service, \
                 or may have been removed incompletely",
            ),
            None => Check::passed(
                "no DaemonSet kube-system/kube-proxy, and no other sign of kube-proxy in the API; a kube-proxy that runs as \
                 a host service is visible only on the node (pgrep -a kube-proxy), and as NotExclusive in the rows after \
                 the installation",
            ),
        });
    }
    checks
}

/// Checks for CNI plugins that implement Services.
pub(super) fn plugins(found: &Surroundings) -> Vec<Check> {
    let data = |map: &Option<ConfigMap>, key: &str| {
        map.as_ref().and_then(|map| map.data.as_ref()?.get(key).cloned()).unwrap_or_default()
    };
    let mut serving = Vec::new();
    // Releases before 1.14 use "strict" and "probe".
    let replacement = data(&found.cilium, "kube-proxy-replacement");
    if ["true", "strict", "probe"].contains(&replacement.as_str()) {
        serving.push(format!(
            "Cilium (ConfigMap kube-system/cilium-config: kube-proxy-replacement {replacement})"
        ));
    }
    let antrea = data(&found.antrea, "antrea-agent.conf");
    let is_set =
        |line: &str| line.trim().strip_prefix("proxyAll:").is_some_and(|value| value.trim() == "true");
    if antrea.lines().any(is_set) {
        serving.push("Antrea (ConfigMap kube-system/antrea-config: proxyAll true)".to_owned());
    }
    let bpf = found.felix.as_ref().and_then(|felix| felix.data.get("spec")?.get("bpfEnabled")?.as_bool());
    if bpf == Some(true) {
        serving.push("Calico (FelixConfiguration default: bpfEnabled true)".to_owned());
    }
    for object in &found.daemon_sets {
        let named = object.metadata.name.as_deref().unwrap_or_default();
        let proxies = |container: &Container| {
            let words = container.args.iter().chain(&container.command).flatten();
            words.into_iter().any(|word| word == "--run-service-proxy=true" || word == "--run-service-proxy")
        };
        if named == "ovnkube-node" || (image_of(object, "kube-router") && containers(object).any(proxies)) {
            serving
                .push(format!("DaemonSet {}", full_name(object.metadata.namespace.as_deref(), Some(named))));
        }
    }
    if serving.is_empty() {
        return Vec::new();
    }
    vec![Check::failed(codes::OTHER_PROXY, format!("Services are served by {}", serving.join("; ")))]
}

fn image_of(object: &DaemonSet, name: &str) -> bool {
    containers(object).any(|container| image_name(container) == name)
}

/// Checks for DaemonSets that use Switchtower's ports, except for kube-proxy.
pub(super) fn ports(found: &Surroundings, own_namespace: &str) -> Check {
    let mut taken = Vec::new();
    for object in &found.daemon_sets {
        let namespace = object.metadata.namespace.as_deref();
        if namespace == Some(own_namespace) || is_kube_proxy(object) || is_for_windows(object) {
            continue;
        }
        let host = spec(object).and_then(|spec| spec.host_network).unwrap_or(false);
        for port in containers(object).flat_map(|container| container.ports.iter().flatten()) {
            let number = port.host_port.or_else(|| host.then_some(port.container_port));
            if let Some(number) = number.filter(|number| PORTS.contains(number)) {
                let name = full_name(namespace, object.metadata.name.as_deref());
                taken.push(format!("{number} by DaemonSet {name}"));
            }
        }
    }
    if taken.is_empty() {
        return Check::passed(
            "no DaemonSet declares the ports 9443 to 9446, 10249 or 10256; undeclared ports cannot be checked",
        );
    }
    Check::failed(codes::PORT_TAKEN, format!("host ports are in use: {}", names(&taken, taken.len(), 5)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::codes_of;
    use super::*;

    fn daemon_set(namespace: &str, name: &str, labels: &Value, pod: &Value) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"namespace": namespace, "name": name, "labels": labels},
            "spec": {"selector": {}, "template": {"spec": pod}},
        }))
        .unwrap()
    }

    fn image(image: &str) -> Value {
        json!({"containers": [{"name": "main", "image": image}]})
    }

    fn node(kubelet: &str) -> Node {
        let info = json!({
            "architecture": "", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": kubelet, "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "",
        });
        serde_json::from_value(json!({"metadata": {"name": "n"}, "status": {"nodeInfo": info}})).unwrap()
    }

    fn map(key: &str, value: &str) -> Option<ConfigMap> {
        Some(serde_json::from_value(json!({"data": {key: value}})).unwrap())
    }

    #[test]
    fn kube_proxy_is_found_by_name_label_or_image() {
        let none = json!({});
        for (found, expected) in [
            (daemon_set("kube-system", "kube-proxy", &none, &image("x")), true),
            (daemon_set("kube-system", "proxy", &json!({"k8s-app": "kube-proxy"}), &image("x")), true),
            (daemon_set("infra", "svc", &none, &image("registry.k8s.io/kube-proxy:v1.36.3")), true),
            (daemon_set("infra", "svc", &none, &image("r:5000/hardened-kube-proxy@sha256:0")), true),
            (daemon_set("infra", "kube-router", &none, &image("kube-router:2")), false),
            (
                daemon_set(
                    "kube-system",
                    "kube-proxy-windows",
                    &json!({"k8s-app": "kube-proxy"}),
                    &json!({"containers": [], "nodeSelector": {"kubernetes.io/os": "windows"}}),
                ),
                false,
            ),
        ] {
            let name = found.metadata.name.clone();
            let found = Surroundings { daemon_sets: vec![found], ..Surroundings::default() };
            let code = expected.then_some("ST0402");
            assert_eq!(codes_of(&kube_proxy(&found, &[])), [code], "{name:?}");
        }
    }

    #[test]
    fn kube_proxy_without_daemon_set_is_found() {
        let none = Surroundings::default();
        assert_eq!(codes_of(&kube_proxy(&none, &[node("v1.36.3")])), [None]);
        for version in ["v1.36.3+k3s1", "v1.36.3+rke2r1"] {
            assert_eq!(codes_of(&kube_proxy(&none, &[node(version)])), [Some("ST0415")], "{version}");
        }
        let left_over = Surroundings { kube_proxy_config: map("config.conf", ""), ..Surroundings::default() };
        assert_eq!(codes_of(&kube_proxy(&left_over, &[])), [Some("ST0415")]);
        let pod = serde_json::from_value(json!({"metadata": {
            "name": "kube-proxy-n", "annotations": {"kubernetes.io/config.mirror": "1"},
        }}));
        let mirrored = Surroundings { pods: vec![pod.unwrap()], ..Surroundings::default() };
        let checks = kube_proxy(&mirrored, &[node("v1.36.3+rke2r1")]);
        assert_eq!(codes_of(&checks), [Some("ST0415")], "reported once: {checks:?}");
    }

    #[test]
    fn plugins_serving_services_found() {
        let felix = |on: bool| -> Option<DynamicObject> {
            Some(serde_json::from_value(json!({"metadata": {}, "spec": {"bpfEnabled": on}})).unwrap())
        };
        let router = |args: &Value| {
            let pod = json!({"containers": [{"name": "r", "image": "cloudnativelabs/kube-router:v2", "args": args}]});
            vec![daemon_set("kube-system", "kube-router", &json!({}), &pod)]
        };
        let none = Surroundings::default;
        for (found, serves) in [
            (none(), false),
            (Surroundings { cilium: map("kube-proxy-replacement", "true"), ..none() }, true),
            (Surroundings { cilium: map("kube-proxy-replacement", "false"), ..none() }, false),
            (
                Surroundings {
                    antrea: map("antrea-agent.conf", "antreaProxy:\n  proxyAll: true\n"),
                    ..none()
                },
                true,
            ),
            (
                Surroundings {
                    antrea: map("antrea-agent.conf", "antreaProxy:\n#  proxyAll: true\n"),
                    ..none()
                },
                false,
            ),
            (Surroundings { felix: felix(true), ..none() }, true),
            (Surroundings { felix: felix(false), ..none() }, false),
            (Surroundings { daemon_sets: router(&json!(["--run-service-proxy=true"])), ..none() }, true),
            (Surroundings { daemon_sets: router(&json!(["--run-service-proxy=false"])), ..none() }, false),
        ] {
            assert_eq!(codes_of(&plugins(&found)) == [Some("ST0410")], serves, "{found:?}");
        }
    }

    #[test]
    fn ports_in_use_are_reported() {
        let with = |namespace: &str, host_network: bool, port: &Value| {
            let container = json!({"name": "main", "image": "x", "ports": [port]});
            let pod = json!({"hostNetwork": host_network, "containers": [container]});
            let daemon_sets = vec![daemon_set(namespace, "other", &json!({}), &pod)];
            codes_of(&[ports(&Surroundings { daemon_sets, ..Surroundings::default() }, "switchtower-system")])
        };
        let port = |number: i32| json!({"containerPort": number});
        assert_eq!(with("a", true, &port(10256)), [Some("ST0412")]);
        assert_eq!(with("a", false, &port(10256)), [None], "not the node's port");
        assert_eq!(with("a", false, &json!({"containerPort": 80, "hostPort": 9443})), [Some("ST0412")]);
        assert_eq!(with("switchtower-system", true, &port(10256)), [None]);
        assert_eq!(with("a", true, &port(9100)), [None]);
    }
}
