//! API types of the group `switchtower.dev`, version `v1alpha1`.
//!
//! The program `crdgen` generates the CRDs in `yaml/` from these types; a test fails if they are out of date.

pub mod builtin;
pub mod kube_proxy;
mod proxy_profile;
mod proxy_rollout;
mod proxy_status;
mod settings;
mod strategy;

pub use proxy_profile::*;
pub use proxy_rollout::*;
pub use proxy_status::*;
pub use settings::*;
pub use strategy::*;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// Returns all CRDs of the group with their file names, in installation order.
pub fn all() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![
        ("proxystatuses.yaml", ProxyStatus::crd()),
        ("proxyprofiles.yaml", ProxyProfile::crd()),
        ("proxyrollouts.yaml", ProxyRollout::crd()),
    ]
}

/// A CRD could not be serialised as YAML.
#[derive(Debug, thiserror::Error)]
#[error("serialise the CRD as YAML: {0}")]
pub struct YamlError(String);

/// Returns the YAML of a CRD as committed in `yaml/`.
///
/// # Errors
/// Returns an error if serialisation fails.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, YamlError> {
    let yaml = serde_saphyr::to_string(definition).map_err(|error| YamlError(error.to_string()))?;
    Ok(format!("# Generated from crds/src by `cargo run -p switchtower-crds --bin crdgen`.\n{yaml}"))
}
