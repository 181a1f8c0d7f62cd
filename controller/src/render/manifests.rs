//! Reads manifests from files, with the same result as the watches.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::ingest::Ingested;
use crate::watch::Watched;

/// Errors of reading manifests.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the system.
        #[source]
        source: std::io::Error,
    },
    /// A document is neither YAML nor JSON.
    #[error("{path} is not valid YAML or JSON: {message}")]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Message of the parser.
        message: String,
    },
    /// An object does not match the schema of its kind.
    #[error("{path}: {object} cannot be decoded")]
    Object {
        /// Path of the file.
        path: PathBuf,
        /// Kind and name.
        object: String,
        /// Error of the decoder.
        #[source]
        source: serde_json::Error,
    },
}

/// Reads a file, the .yaml, .yml and .json files of a directory, or standard input (`-`). Ignores other kinds.
///
/// # Errors
/// A file cannot be read, parsed or decoded.
pub(super) fn read(from: &Path) -> Result<Vec<Ingested>, ManifestError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ManifestError::Read { path, source }
    };
    let mut found = Vec::new();
    if from == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(failed(from))?;
        parse(from, &text, &mut found)?;
    } else if from.is_dir() {
        let entries = std::fs::read_dir(from).map_err(failed(from))?;
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| {
            path.extension().is_some_and(|kind| kind == "yaml" || kind == "yml" || kind == "json")
        });
        paths.sort();
        for path in paths {
            let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
            parse(&path, &text, &mut found)?;
        }
    } else {
        let text = std::fs::read_to_string(from).map_err(failed(from))?;
        parse(from, &text, &mut found)?;
    }
    Ok(found)
}

fn parse(path: &Path, text: &str, found: &mut Vec<Ingested>) -> Result<(), ManifestError> {
    // Try JSON first: it is also YAML, but its own parser is faster and stricter.
    let documents = match serde_json::from_str::<Value>(text) {
        Ok(document) => vec![document],
        Err(_) => serde_saphyr::from_multiple::<Value>(text)
            .map_err(|error| ManifestError::Syntax { path: path.to_owned(), message: error.to_string() })?,
    };
    documents.into_iter().try_for_each(|document| take(path, document, found))
}

fn take(path: &Path, mut object: Value, found: &mut Vec<Ingested>) -> Result<(), ManifestError> {
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (version, kind) = (text("apiVersion"), text("kind"));
    if let Some(Value::Array(items)) =
        object.get_mut("items").map(Value::take).filter(|_| kind.ends_with("List"))
    {
        // Items of a typed list have no kind.
        let item_kind = kind.trim_end_matches("List");
        for mut item in items {
            if let (Value::Object(fields), false) = (&mut item, item_kind.is_empty()) {
                fields.entry("kind").or_insert_with(|| item_kind.into());
                fields.entry("apiVersion").or_insert_with(|| version.as_str().into());
            }
            take(path, item, found)?;
        }
        return Ok(());
    }
    match (version.as_str(), kind.as_str()) {
        ("v1", "Service") => found.push(decode::<Service>(path, object)?),
        ("discovery.k8s.io/v1", "EndpointSlice") => found.push(decode::<EndpointSlice>(path, object)?),
        ("v1", "Node") => found.push(decode::<Node>(path, object)?),
        ("networking.k8s.io/v1", "ServiceCIDR") => found.push(decode::<ServiceCIDR>(path, object)?),
        _ => {}
    }
    Ok(())
}

/// Decodes an object. Without a namespace it is in `default`, as with kubectl.
fn decode<K: Watched + DeserializeOwned>(path: &Path, mut object: Value) -> Result<Ingested, ManifestError> {
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let description = format!("{} {name:?}", K::kind(&()));
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.entry("namespace").or_insert_with(|| "default".into());
    }
    let decoded: K = serde_json::from_value(object).map_err(|source| ManifestError::Object {
        path: path.to_owned(),
        object: description,
        source,
    })?;
    Ok(decoded.ingest())
}

#[cfg(test)]
pub(super) fn from_text(text: &str) -> Result<Vec<Ingested>, ManifestError> {
    let mut found = Vec::new();
    parse(Path::new("text"), text, &mut found)?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::Fact;
    use switchtower_core::model::Input;

    fn names(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        parse(Path::new("test.yaml"), text, &mut found).unwrap();
        let name = |ingested: Ingested| match ingested.fact {
            Fact::Input(Input::Service(service)) => format!("{}/{}", service.key.namespace, service.key.name),
            Fact::Node(node, _) => node.name.to_string(),
            other => format!("{other:?}"),
        };
        found.into_iter().map(name).collect()
    }

    #[test]
    fn documents_lists_and_other_kinds() {
        let yaml = "
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {clusterIP: 10.96.0.1}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: passed-over}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}}
---
apiVersion: v1
kind: ServiceList
items:
- metadata: {name: b, namespace: shop}
  spec: {clusterIP: 10.96.0.2}
";
        assert_eq!(names(yaml), ["default/a", "n1", "shop/b"]);
        assert_eq!(names(r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2"}}"#), ["n2"]);
        assert!(names("").is_empty());
    }

    #[test]
    fn errors_name_the_file_and_the_object() {
        let mut found = Vec::new();
        let error = parse(Path::new("x.yaml"), "a: [", &mut found).unwrap_err();
        assert!(error.to_string().starts_with("x.yaml is not valid YAML or JSON"), "{error}");
        let text = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"ports":1}}"#;
        let error = parse(Path::new("x.json"), text, &mut found).unwrap_err();
        assert_eq!(error.to_string(), "x.json: Service \"a\" cannot be decoded");
    }
}
