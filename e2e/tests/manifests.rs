//! Rendered output of the kustomize components, on their own and in overlays as in their comments.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use switchtower_e2e::lab::programs;
use switchtower_e2e::lab::programs::repository as root;

/// Renders an overlay, written next to the manifests because kustomize only accepts relative paths.
fn rendered(overlay: &Value) -> Vec<Value> {
    let folder = tempfile::tempdir_in(root()).unwrap();
    fs::write(folder.path().join("kustomization.yaml"), overlay.to_string()).unwrap();
    let output = Command::new(programs::control_plane("kubectl").unwrap())
        .args(["kustomize", "--output=."])
        .arg(folder.path())
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let objects = fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.path());
    let objects = objects.filter(|path| !path.ends_with("kustomization.yaml"));
    objects.map(|path| serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap()).collect()
}

fn overlay(images: &Value, components: &[&str]) -> Value {
    let components: Vec<String> =
        components.iter().map(|component| format!("../manifests/components/{component}")).collect();
    json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": ["../manifests"], "components": components, "images": images,
    })
}

#[test]
fn example_overlay_renders() {
    let overlay = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": ["../examples/overlay"],
    });
    let objects = rendered(&overlay);
    let controller = named(&objects, "Deployment", "switchtower-controller");
    let image = &controller["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(*image, json!("registry.example/switchtower-controller:v0.1.0"));
    named(&objects, "ConfigMap", "switchtower-alert-rules");
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let wanted = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    objects.iter().find(wanted).ok_or_else(|| format!("no {kind} {name}")).unwrap()
}

#[test]
fn sysctl_container_has_the_agents_image() {
    let images = |objects: &[Value]| -> Vec<String> {
        let spec = &named(objects, "DaemonSet", "switchtower-node-agent")["spec"]["template"]["spec"];
        let of = |list: &str| spec[list][0]["image"].as_str().unwrap().to_owned();
        vec![of("containers"), of("initContainers")]
    };
    let plain = rendered(&overlay(&json!([]), &["conntrack-sysctls"]));
    assert_eq!(images(&plain), ["switchtower.dev/switchtower-node-agent:dev"; 2]);
    let private = "registry.example/st-agent";
    let renamed =
        json!([{"name": "switchtower.dev/switchtower-node-agent", "newName": private, "newTag": "v1"}]);
    let in_overlay = rendered(&overlay(&renamed, &["conntrack-sysctls"]));
    assert_eq!(images(&in_overlay), [format!("{private}:v1"), format!("{private}:v1")]);
    // A base as edited by `kustomize edit set image`, with the component added by another overlay.
    let base = tempfile::tempdir_in(root()).unwrap();
    fs::write(base.path().join("kustomization.yaml"), overlay(&renamed, &[]).to_string()).unwrap();
    let name = base.path().file_name().unwrap().to_str().unwrap();
    let mut above = overlay(&json!([]), &["conntrack-sysctls"]);
    above["resources"] = json!([format!("../{name}")]);
    assert_eq!(images(&rendered(&above)), [format!("{private}:v1"), format!("{private}:v1")]);
}

#[test]
fn every_object_of_a_component_has_the_namespace() {
    let components =
        ["alerts", "dashboards", "conntrack-sysctls", "high-availability", "prometheus-operator"];
    let objects = rendered(&overlay(&json!([]), &components));
    let cluster_wide = ["Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"];
    for object in &objects {
        let namespace = &object["metadata"]["namespace"];
        let kind = object["kind"].as_str().unwrap();
        let wanted = if cluster_wide.contains(&kind) { Value::Null } else { "switchtower-system".into() };
        assert_eq!(*namespace, wanted, "{kind} {}", object["metadata"]["name"]);
    }
    named(&objects, "ConfigMap", "switchtower-alert-rules");
    named(&objects, "ConfigMap", "switchtower-dashboards");
    assert_eq!(named(&objects, "Deployment", "switchtower-controller")["spec"]["replicas"], 3);
    named(&objects, "PodDisruptionBudget", "switchtower-controller");
    // Monitors select existing Pods and ports.
    for (name, kind) in [("switchtower-controller", "Deployment"), ("switchtower-node-agent", "DaemonSet")] {
        let monitor = named(&objects, "PodMonitor", name);
        let template = &named(&objects, kind, name)["spec"]["template"];
        let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
        for (label, value) in wanted {
            assert_eq!(template["metadata"]["labels"][label], *value);
        }
        let port = &monitor["spec"]["podMetricsEndpoints"][0]["port"];
        let ports = template["spec"]["containers"][0]["ports"].as_array().unwrap();
        assert!(ports.iter().any(|known| known["name"] == *port), "{name} has no port {port}");
    }
}

#[test]
fn prometheus_rule_is_the_alert_rules() {
    let components = root().join("manifests/components");
    let rules = fs::read_to_string(components.join("alerts/rules.yaml")).unwrap();
    let file = components.join("prometheus-operator/prometheusrule.yaml");
    let object = fs::read_to_string(&file).unwrap();
    let (head, _) = object.split_once("spec:\n").unwrap();
    let groups = &rules[rules.find("groups:").unwrap()..];
    let indented = |line: &str| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") };
    let wanted = format!("{head}spec:\n{}", groups.lines().map(indented).collect::<String>());
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        fs::write(&file, &wanted).unwrap();
        return;
    }
    let hint = "run SWITCHTOWER_UPDATE=1 cargo test -p switchtower-e2e --test manifests";
    assert!(object == wanted, "{} is stale: {hint}", file.display());
}

#[test]
fn controller_of_a_dead_node_moves_within_30_seconds() {
    let objects = rendered(&overlay(&json!([]), &[]));
    let controller = named(&objects, "Deployment", "switchtower-controller");
    let tolerations = controller["spec"]["template"]["spec"]["tolerations"].as_array().unwrap();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let mine = tolerations.iter().find(|known| known["key"] == key && known["effect"] == "NoExecute");
        let seconds = mine.and_then(|known| known["tolerationSeconds"].as_u64());
        assert!(seconds.is_some_and(|seconds| (10..=20).contains(&seconds)), "{key}: {seconds:?}");
    }
}

#[test]
fn replicas_are_updated_one_at_a_time_on_separate_nodes() {
    let objects = rendered(&overlay(&json!([]), &[]));
    let spec = &named(&objects, "Deployment", "switchtower-controller")["spec"];
    assert_eq!(spec["replicas"], 2);
    assert_eq!(spec["strategy"]["rollingUpdate"], json!({"maxSurge": 0, "maxUnavailable": 1}));
    let labels = &spec["selector"]["matchLabels"];
    let rule = "/template/spec/affinity/podAntiAffinity/requiredDuringSchedulingIgnoredDuringExecution/0";
    let rule = spec.pointer(rule).unwrap();
    assert_eq!(rule["topologyKey"], "kubernetes.io/hostname");
    assert_eq!(rule["labelSelector"]["matchLabels"], *labels);
    let budget = &named(&objects, "PodDisruptionBudget", "switchtower-controller")["spec"];
    assert_eq!((&budget["maxUnavailable"], &budget["selector"]["matchLabels"]), (&json!(1), labels));
}

#[test]
fn dashboards_choose_nodes_by_name() {
    let path = Path::new("manifests/components/dashboards/node.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(root().join(path)).unwrap()).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let shown: Vec<&str> = variables
        .iter()
        .filter(|variable| variable["type"] == "query" && variable["hide"] != 2)
        .filter_map(|variable| variable["name"].as_str())
        .collect();
    assert_eq!(shown, ["node"]);
}
