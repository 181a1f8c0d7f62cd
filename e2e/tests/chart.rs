//! The Helm charts: rendered, they are the same objects as those of kustomize; the API server accepts both, and wrong
//! values are rejected by the schema.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use switchtower_e2e::lab::control_plane::ControlPlane;
use switchtower_e2e::lab::programs;
use switchtower_e2e::lab::programs::repository as root;

const NAMESPACE: &str = "switchtower-system";

/// Runs helm without any of the user's settings.
fn helm(arguments: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(programs::tool("helm").unwrap());
    command.args(arguments).current_dir(root()).env("HOME", home.path());
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, home.path());
    }
    command.output().unwrap()
}

fn template(chart: &str, values: &[&str]) -> Output {
    let settings: Vec<String> = values.iter().map(|value| format!("--set={value}")).collect();
    let chart = format!("charts/{chart}");
    // The version of the API server, which helm cannot ask here.
    let mut arguments = vec!["template", "st", &chart, "--namespace", NAMESPACE, "--kube-version=v1.36.0"];
    arguments.extend(settings.iter().map(String::as_str));
    helm(&arguments)
}

/// Objects of a chart, rendered with `--set` values.
fn chart(chart: &str, values: &[&str]) -> Objects {
    Objects::parse(&output(&template(chart, values)))
}

fn output(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Objects by kind, namespace and name.
#[derive(Debug, PartialEq)]
struct Objects(BTreeMap<String, Value>);

impl Objects {
    fn parse(yaml: &str) -> Self {
        let mut objects = BTreeMap::new();
        for text in yaml.split("\n---\n").map(|text| text.trim_start_matches("---\n")) {
            let object: Value =
                serde_saphyr::from_str(text).map_err(|error| format!("{error}:\n{text}")).unwrap();
            if object.is_null() {
                continue;
            }
            let metadata = &object["metadata"];
            let key = format!("{} {}/{}", object["kind"], metadata["namespace"], metadata["name"]);
            assert!(objects.insert(key.clone(), object).is_none(), "{key} occurs twice");
        }
        Self(objects)
    }

    fn without(mut self, kind: &str) -> Self {
        let before = self.0.len();
        self.0.retain(|_, object| object["kind"] != kind);
        assert!(self.0.len() < before, "there is no {kind}");
        self
    }

    fn only(mut self, kind: &str) -> Self {
        self.0.retain(|_, object| object["kind"] == kind);
        assert!(!self.0.is_empty(), "there is no {kind}");
        self
    }

    /// Fails with the first object that differs.
    fn assert_equal(&self, other: &Self) {
        let names = |objects: &Self| objects.0.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other));
        for (name, object) in &self.0 {
            let difference = difference(object, &other.0[name]);
            assert!(difference.is_none(), "{name}{}", difference.unwrap_or_default());
        }
    }
}

/// Path and values of the first difference.
fn difference(one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(fields), Value::Object(others)) => {
            let names: BTreeSet<&String> = fields.keys().chain(others.keys()).collect();
            names.into_iter().find_map(|name| {
                let field =
                    |fields: &serde_json::Map<String, Value>| fields.get(name).cloned().unwrap_or_default();
                difference(&field(fields), &field(others)).map(|found| format!(".{name}{found}"))
            })
        }
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => {
            let mut pairs = items.iter().zip(others).enumerate();
            pairs.find_map(|(at, (one, other))| difference(one, other).map(|found| format!("[{at}]{found}")))
        }
        (one, other) => (one != other).then(|| format!(": {one} in the chart, {other} in kustomize")),
    }
}

/// Objects of kustomize for an overlay with these components and resources.
fn kustomize(resources: &[&str], components: &[&str]) -> Objects {
    let overlay = overlay(resources, components);
    Objects::parse(&kubectl_kustomize(overlay.path()))
}

fn overlay(resources: &[&str], components: &[&str]) -> tempfile::TempDir {
    // kustomize accepts only relative paths.
    let folder = tempfile::tempdir_in(root()).unwrap();
    let components: Vec<String> =
        components.iter().map(|component| format!("../manifests/components/{component}")).collect();
    let overlay = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": resources, "components": components,
    });
    fs::write(folder.path().join("kustomization.yaml"), overlay.to_string()).unwrap();
    folder
}

fn kubectl_kustomize(folder: &Path) -> String {
    let mut command = Command::new(programs::control_plane("kubectl").unwrap());
    output(&command.arg("kustomize").arg(folder).output().unwrap())
}

#[test]
fn default_chart_equals_manifests() {
    let wanted = kustomize(&["../manifests"], &[]).without("Namespace").without("CustomResourceDefinition");
    chart("switchtower", &["imageTag=dev"]).assert_equal(&wanted);
}

#[test]
fn chart_with_all_parts_equals_manifests_with_components() {
    let components = [
        "alerts",
        "conntrack-sysctls",
        "dashboards",
        "high-availability",
        "network-policy",
        "prometheus-operator",
    ];
    let wanted = kustomize(&["../manifests"], &components);
    let values = [
        "imageTag=dev",
        "alerts.enabled=true",
        "conntrackSysctls.enabled=true",
        "dashboards.enabled=true",
        "controller.replicas=3",
        "networkPolicy.enabled=true",
        "prometheusOperator.enabled=true",
    ];
    let wanted = wanted.without("Namespace").without("CustomResourceDefinition");
    chart("switchtower", &values).assert_equal(&wanted);
}

#[test]
fn kind_overlay_equals_chart_with_its_values() {
    let wanted = Objects::parse(&kubectl_kustomize(&root().join("examples/kind")));
    let values = [
        "imageTag=dev",
        "controller.replicas=1",
        "apiServer.host=kind-control-plane",
        "conntrackSysctls.enabled=true",
        "conntrackSysctls.extraArgs={--max-per-core=0}",
    ];
    chart("switchtower", &values)
        .assert_equal(&wanted.without("Namespace").without("CustomResourceDefinition"));
}

#[test]
fn shadow_mode_equals_its_overlay() {
    let wanted = Objects::parse(&kubectl_kustomize(&root().join("examples/shadow")));
    let wanted = wanted.without("Namespace").without("CustomResourceDefinition");
    chart("switchtower", &["imageTag=dev", "mode=shadow", "conntrackSysctls.enabled=true"])
        .assert_equal(&wanted);
    let arguments = |kind: &str, name: &str| {
        let object = &wanted.0[&format!("\"{kind}\" \"{NAMESPACE}\"/\"{name}\"")];
        object["spec"]["template"]["spec"]["containers"][0]["args"].clone()
    };
    let has = |arguments: Value, flag: &str| arguments.as_array().unwrap().contains(&json!(flag));
    assert!(has(arguments("Deployment", "switchtower-controller"), "--builtin-mode=shadow"));
    assert!(has(arguments("DaemonSet", "switchtower-node-agent"), "--initial-mode=shadow"));
}

#[test]
fn crd_chart_equals_generated_definitions() {
    let wanted = kustomize(&["../manifests"], &[]).only("CustomResourceDefinition");
    assert_eq!(wanted.0.len(), 3);
    chart("switchtower-crds", &["keep=false"]).assert_equal(&wanted);
    for (name, object) in chart("switchtower-crds", &[]).0 {
        assert_eq!(object["metadata"]["annotations"]["helm.sh/resource-policy"], "keep", "{name}");
    }
}

#[test]
fn chart_versions_equal_workspace_version() {
    let version = env!("CARGO_PKG_VERSION");
    for name in ["switchtower", "switchtower-crds"] {
        let file = root().join("charts").join(name).join("Chart.yaml");
        let chart: Value = serde_saphyr::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        assert_eq!(chart["version"], version, "{name}");
        assert_eq!(chart["appVersion"], format!("v{version}"), "{name}");
    }
    let rendered = chart("switchtower", &[]);
    let daemon_set = &rendered.0[&format!("\"DaemonSet\" \"{NAMESPACE}\"/\"switchtower-node-agent\"")];
    let image = &daemon_set["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(*image, format!("switchtower.dev/switchtower-node-agent:v{version}"));
}

#[test]
fn values_reach_the_objects() {
    let values = [
        "imageRegistry=registry.example:5000/st",
        "imagePullSecrets[0].name=pull",
        "apiServer.host=2001:db8::1",
        "apiServer.port=443",
        "controller.extraArgs={--lease-seconds=20}",
        "controller.extraEnv[0].name=OTEL_EXPORTER_OTLP_ENDPOINT",
        "controller.extraEnv[0].value=http://192.0.2.20:4317",
        "nodeAgent.nodeSelector.switchtower=yes",
        "nodeAgent.maxUnavailable=3",
        "prometheusOperator.enabled=true",
        "prometheusOperator.labels.release=prom",
    ];
    let rendered = chart("switchtower", &values);
    let object = |kind: &str, name: &str| &rendered.0[&format!("\"{kind}\" \"{NAMESPACE}\"/\"{name}\"")];
    let pod = &object("Deployment", "switchtower-controller")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(
        container["image"],
        format!("registry.example:5000/st/switchtower-controller:v{}", env!("CARGO_PKG_VERSION"))
    );
    assert!(container["args"].as_array().unwrap().contains(&json!("--lease-seconds=20")));
    let variable = json!({"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://192.0.2.20:4317"});
    assert!(container["env"].as_array().unwrap().contains(&variable));
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
    let agent = &object("DaemonSet", "switchtower-node-agent")["spec"];
    assert_eq!(agent["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 3);
    let selector = json!({"kubernetes.io/os": "linux", "switchtower": "yes"});
    assert_eq!(agent["template"]["spec"]["nodeSelector"], selector);
    let address = &object("ConfigMap", "switchtower-api-server")["data"];
    assert_eq!(*address, json!({"host": "2001:db8::1", "port": "443"}));
    assert_eq!(object("PodMonitor", "switchtower-node-agent")["metadata"]["labels"]["release"], "prom");
}

#[test]
fn wrong_values_are_rejected_by_the_schema() {
    let cases = [
        ("switchtower", "apiServer.port=70000", "maximum: got 70,000, want 65,535"),
        ("switchtower", "apiServer.host=https://192.0.2.1", "'https://192.0.2.1' does not match pattern"),
        ("switchtower", "controller.replicas=6", "maximum: got 6, want 5"),
        ("switchtower", "controler.replicas=2", "additional properties 'controler' not allowed"),
        (
            "switchtower",
            "imagePullPolicy=Sometimes",
            "value must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        ("switchtower", "nodeAgent.maxUnavailable=0%", "'0%' does not match pattern"),
        ("switchtower", "alerts.enabled=yes", "got string, want boolean"),
        ("switchtower", "mode=passive", "value must be one of 'active', 'shadow'"),
        ("switchtower-crds", "keep=always", "got string, want boolean"),
    ];
    for (chart, value, message) in cases {
        let result = template(chart, &[value]);
        let errors = String::from_utf8_lossy(&result.stderr);
        assert!(!result.status.success(), "{value} is accepted");
        assert!(errors.contains(message), "{value}: {errors}");
    }
}

/// Both ways to install, and each after the other: the objects of the chart are those of kustomize.
#[test]
fn api_server_accepts_charts_and_manifests() {
    let control_plane = ControlPlane::start().unwrap();
    let parts = ["alerts", "conntrack-sysctls", "dashboards", "high-availability", "network-policy"];
    let with_parts = overlay(&["../manifests"], &parts);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    control_plane.kubectl(&["create", "namespace", NAMESPACE]).unwrap();
    let crds = file("crds.yaml", &output(&template("switchtower-crds", &[])));
    control_plane.kubectl(&["apply", "--server-side", "-f", &crds]).unwrap();
    let dry_run = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict"];
    let values = [
        "imageTag=dev",
        "apiServer.host=192.0.2.10",
        "alerts.enabled=true",
        "conntrackSysctls.enabled=true",
        "dashboards.enabled=true",
        "controller.replicas=3",
        "networkPolicy.enabled=true",
    ];
    let objects = file("chart.yaml", &output(&template("switchtower", &values)));
    let manifests = file("manifests.yaml", &kubectl_kustomize(with_parts.path()));
    for (path, count) in [(objects, 21), (manifests, 24)] {
        let applied = control_plane.kubectl(&[&dry_run[..], &["-f", &path]].concat()).unwrap();
        assert!(
            applied.lines().all(|line| line.ends_with("serverside-applied (server dry run)")),
            "{applied}"
        );
        assert_eq!(applied.lines().count(), count, "{applied}");
    }
}
