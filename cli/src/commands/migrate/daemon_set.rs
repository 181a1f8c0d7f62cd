//! Changes of kube-proxy's DaemonSet, and their exact inverse. Pure.
//!
//! A required node affinity keeps kube-proxy off labelled nodes. With update strategy OnDelete the change of the template
//! restarts no Pod on other nodes. Restoring the template restarts none either, because their Pods have it.

use serde_json::{Value, json};

use super::steps::{LABEL, SWITCHTOWER};

/// Pointers of the fields that the migration changes.
const STRATEGY: &str = "/spec/updateStrategy";
const AFFINITY: &str = "/spec/template/spec/affinity";
/// Required terms, below an affinity.
const TERMS: &str = "/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";

/// Requirement that keeps kube-proxy off nodes that only Switchtower serves.
fn requirement() -> Value {
    json!({"key": LABEL, "operator": "NotIn", "values": [SWITCHTOWER]})
}

/// Returns the object without fields that the API server sets, for the record.
pub(super) fn original(object: &Value) -> Value {
    let mut kept = object.clone();
    if let Some(fields) = kept.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = kept["metadata"].as_object_mut() {
        for field in
            ["managedFields", "resourceVersion", "uid", "creationTimestamp", "generation", "selfLink"]
        {
            metadata.remove(field);
        }
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("deprecated.daemonset.template.generation");
        }
    }
    kept
}

/// Returns whether the object keeps kube-proxy off labelled nodes.
pub(super) fn avoids(object: &Value) -> bool {
    let terms = object.pointer(&format!("{AFFINITY}{TERMS}")).and_then(Value::as_array);
    let has = |term: &Value| {
        is_empty(term) || term["matchExpressions"].as_array().is_some_and(|all| all.contains(&requirement()))
    };
    terms.is_some_and(|terms| !terms.is_empty() && terms.iter().all(has))
}

/// Returns whether a term has no requirement: it matches no node.
fn is_empty(term: &Value) -> bool {
    let none = |field: &str| term[field].as_array().is_none_or(Vec::is_empty);
    none("matchExpressions") && none("matchFields")
}

/// Returns the affinity with the requirement in every term: a node needs to match one of them.
fn avoiding(affinity: Option<&Value>) -> Value {
    let mut affinity = affinity.filter(|value| value.is_object()).cloned().unwrap_or_else(|| json!({}));
    let terms = affinity.pointer(TERMS).and_then(Value::as_array).filter(|terms| !terms.is_empty()).cloned();
    let terms: Vec<Value> = match terms {
        None => vec![json!({"matchExpressions": [requirement()]})],
        Some(terms) => terms.into_iter().map(with_requirement).collect(),
    };
    affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
        json!({"nodeSelectorTerms": terms});
    affinity
}

fn with_requirement(mut term: Value) -> Value {
    if !is_empty(&term) {
        let mut expressions = term["matchExpressions"].as_array().cloned().unwrap_or_default();
        if !expressions.contains(&requirement()) {
            expressions.push(requirement());
        }
        term["matchExpressions"] = Value::Array(expressions);
    }
    term
}

/// Returns the JSON patch that keeps kube-proxy off labelled nodes. It fails if the object has changed since.
pub(super) fn avoid_patch(object: &Value) -> Value {
    json!([
        unchanged(object),
        {"op": "add", "path": STRATEGY, "value": {"type": "OnDelete"}},
        {"op": "add", "path": AFFINITY, "value": avoiding(object.pointer(AFFINITY))},
    ])
}

/// Returns whether the fields that the migration changes are those of the record.
pub(super) fn is_restored(original: &Value, object: &Value) -> bool {
    [STRATEGY, AFFINITY].iter().all(|path| original.pointer(path) == object.pointer(path))
}

/// Returns the JSON patch that restores the fields of the record. It fails if the object has changed since.
pub(super) fn restore_patch(original: &Value, object: &Value) -> Value {
    let mut patch = vec![unchanged(object)];
    for path in [STRATEGY, AFFINITY] {
        match (original.pointer(path), object.pointer(path)) {
            (Some(value), _) => patch.push(json!({"op": "add", "path": path, "value": value})),
            (None, Some(_)) => patch.push(json!({"op": "remove", "path": path})),
            (None, None) => {}
        }
    }
    Value::Array(patch)
}

fn unchanged(object: &Value) -> Value {
    json!({"op": "test", "path": "/metadata/resourceVersion", "value": object["metadata"]["resourceVersion"]})
}

/// Returns the Job that removes kube-proxy's rules from a node, with kube-proxy's own image and program: it knows every
/// table and chain that any of its modes creates.
pub(super) fn cleanup_job(object: &Value, node: &str) -> Value {
    let container = &object["spec"]["template"]["spec"]["containers"][0];
    let program = container["command"][0].as_str().unwrap_or("/usr/local/bin/kube-proxy");
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": job_name(node), "namespace": object["metadata"]["namespace"],
            "labels": {"app": "kube-proxy-cleanup"}, "annotations": {"switchtower.dev/node": node},
        },
        "spec": {"backoffLimit": 4, "template": {
            "metadata": {"labels": {"app": "kube-proxy-cleanup"}},
            "spec": {
                "nodeName": node, "hostNetwork": true, "restartPolicy": "Never",
                "automountServiceAccountToken": false, "tolerations": [{"operator": "Exists"}],
                "imagePullSecrets": object.pointer("/spec/template/spec/imagePullSecrets").cloned().unwrap_or(json!([])),
                "containers": [{
                    "name": "cleanup", "image": container["image"], "command": [program, "--cleanup"],
                    "securityContext": {"privileged": true},
                    "volumeMounts": [
                        {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
                        {"name": "modules", "mountPath": "/lib/modules", "readOnly": true},
                    ],
                }],
                "volumes": [
                    {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
                    {"name": "modules", "hostPath": {"path": "/lib/modules"}},
                ],
            },
        }},
    })
}

/// Returns the name of a node's Job; node names may be longer than names of Jobs.
pub(super) fn job_name(node: &str) -> String {
    // FNV-1a: stable across versions, so that a continued migration finds the Job.
    let hash = node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("kube-proxy-cleanup-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(affinity: &Value, strategy: &Value) -> Value {
        let mut object = json!({
            "metadata": {"name": "kube-proxy", "namespace": "kube-system", "resourceVersion": "7", "uid": "u",
                "annotations": {"deprecated.daemonset.template.generation": "1", "kept": "yes"}},
            "spec": {"updateStrategy": strategy, "template": {"spec": {"containers": [
                {"image": "kube-proxy:v1", "command": ["/usr/local/bin/kube-proxy", "--config=x"]}]}}},
            "status": {"numberReady": 3},
        });
        if !affinity.is_null() {
            object["spec"]["template"]["spec"]["affinity"] = affinity.clone();
        }
        object
    }

    /// Applies the operations that the patches consist of.
    fn patched(object: &Value, patch: &Value) -> Value {
        let mut object = object.clone();
        for step in patch.as_array().unwrap() {
            let path = step["path"].as_str().unwrap();
            let (parent, key) = path.rsplit_once('/').unwrap();
            match step["op"].as_str().unwrap() {
                "test" => assert_eq!(object.pointer(path), Some(&step["value"])),
                "add" => object.pointer_mut(parent).unwrap()[key] = step["value"].clone(),
                _ => drop(object.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key)),
            }
        }
        object
    }

    #[test]
    fn affinity_avoids_labelled_nodes_and_is_restored_exactly() {
        let zone = json!({"key": "zone", "operator": "In", "values": ["a"]});
        let required = |terms: Value| {
            json!({"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {}}],
        }, "podAffinity": {}})
        };
        let rolling = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}});
        for (affinity, terms) in [
            (Value::Null, 1),
            (json!({"podAffinity": {}}), 1),
            (required(json!([])), 1),
            (required(json!([{"matchExpressions": [zone]}, {"matchFields": [zone]}])), 2),
        ] {
            let before = object(&affinity, &rolling);
            assert!(!avoids(&before));
            let record = original(&before);
            assert_eq!(
                record["metadata"],
                json!({"name": "kube-proxy", "namespace": "kube-system", "annotations": {"kept": "yes"}})
            );
            let after = patched(&before, &avoid_patch(&before));
            assert!(avoids(&after), "{after:#}");
            assert_eq!(
                after.pointer(&format!("{AFFINITY}{TERMS}")).unwrap().as_array().unwrap().len(),
                terms
            );
            assert_eq!(after["spec"]["updateStrategy"], json!({"type": "OnDelete"}));
            assert_eq!(patched(&after, &avoid_patch(&after)), after, "repeated after an interruption");
            assert_eq!(patched(&after, &restore_patch(&record, &after)), before, "restored");
            assert!(is_restored(&record, &before) && !is_restored(&record, &after));
        }
    }

    #[test]
    fn empty_term_still_matches_no_node() {
        let terms = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{}]}}});
        let before = object(&terms, &json!({}));
        let after = patched(&before, &avoid_patch(&before));
        assert_eq!(after.pointer(AFFINITY), Some(&terms));
        assert!(avoids(&after));
    }

    #[test]
    fn cleanup_runs_the_image_of_kube_proxy() {
        let job = cleanup_job(&object(&Value::Null, &json!({})), "alpha");
        let container = &job["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], "kube-proxy:v1");
        assert_eq!(container["command"], json!(["/usr/local/bin/kube-proxy", "--cleanup"]));
        let long = "n".repeat(253);
        assert!(job_name(&long).len() <= 63 && job_name(&long) != job_name("alpha"));
    }
}
