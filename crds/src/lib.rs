//! API types of the group `switchtower.dev`, version `v1alpha1`.
//!
//! The CRDs in `yaml/` are printed from these types by the program `crdgen`; a test keeps them fresh.

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

/// All CRDs of the group, in the order in which they are installed, with the file name of each.
pub fn all() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![
        ("proxystatuses.yaml", ProxyStatus::crd()),
        ("proxyprofiles.yaml", ProxyProfile::crd()),
        ("proxyrollouts.yaml", ProxyRollout::crd()),
    ]
}

/// A definition could not be written as YAML.
#[derive(Debug, thiserror::Error)]
#[error("writing the CRD as YAML: {0}")]
pub struct YamlError(String);

/// The YAML of a CRD as it is committed.
///
/// # Errors
/// The definition cannot be serialised.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, YamlError> {
    let yaml = serde_saphyr::to_string(definition).map_err(|error| YamlError(error.to_string()))?;
    Ok(format!("# Generated from crds/src by `cargo run -p switchtower-crds --bin crdgen`.\n{yaml}"))
}
