//! `switchtower-controller import-config`: prints the ProxyProfile that is equivalent to a kube-proxy configuration.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use switchtower_crds::kube_proxy::{self, KubeProxyError};

use crate::cli::ImportConfigArgs;

/// Maximum size of the input in bytes: that of an object in the API.
const INPUT: u64 = 3 << 20;

/// Error of the command.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file cannot be read, or the output cannot be written.
    #[error("cannot read {path}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        #[source]
        source: std::io::Error,
    },
    /// The ConfigMap holds no configuration.
    #[error("the ConfigMap in {0} has no key config.conf")]
    NoKey(PathBuf),
    /// The configuration is invalid.
    #[error("cannot convert {path}")]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// Error in the configuration.
        #[source]
        source: KubeProxyError,
    },
    /// The profile cannot be printed.
    #[error("cannot print the ProxyProfile: {0}")]
    Output(String),
}

/// Prints the profile to standard output, with the fields that have no counterpart as comments.
///
/// # Errors
/// The input cannot be read or is not a configuration that kube-proxy accepts.
pub fn run(args: &ImportConfigArgs) -> Result<(), ImportError> {
    let path = &args.file;
    let text = read(path).map_err(|source| ImportError::Read { path: path.clone(), source })?;
    let text = configuration(&text).ok_or_else(|| ImportError::NoKey(path.clone()))?;
    let profile = convert(&text, &args.name).map_err(|error| match error {
        ConvertError::Invalid(source) => ImportError::Invalid { path: path.clone(), source },
        ConvertError::Output(error) => ImportError::Output(error),
    })?;
    std::io::stdout().write_all(profile.as_bytes()).map_err(|error| ImportError::Output(error.to_string()))
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().take(INPUT).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(path)?.take(INPUT).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[derive(Deserialize)]
struct ConfigMap {
    kind: String,
    #[serde(default)]
    data: std::collections::BTreeMap<String, String>,
}

/// Returns the configuration in a text: the text itself, or the value of a ConfigMap as kubeadm creates it.
fn configuration(text: &str) -> Option<String> {
    match serde_saphyr::from_str::<ConfigMap>(text) {
        Ok(mut map) if map.kind == "ConfigMap" => map.data.remove(kube_proxy::CONFIG_KEY),
        _ => Some(text.to_owned()),
    }
}

#[derive(Debug)]
enum ConvertError {
    Invalid(KubeProxyError),
    Output(String),
}

fn convert(text: &str, name: &str) -> Result<String, ConvertError> {
    let read = kube_proxy::parse(text).map_err(ConvertError::Invalid)?;
    let unconverted = kube_proxy::unconverted(text).map_err(ConvertError::Invalid)?;
    let mut notes = read.notes;
    if read.localhost_node_ports {
        notes.push("NodePorts on 127.0.0.1 (iptables.localhostNodePorts) are not served.".to_owned());
    }
    let mut out = String::new();
    for note in notes {
        out += &comment(&note);
    }
    if !unconverted.is_empty() {
        out += "# Without counterpart in a ProxyProfile:\n";
    }
    for field in unconverted {
        out += &comment(&format!("  {}: {} - {}", field.field, field.value, field.reason));
    }
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1",
        "kind": "ProxyProfile",
        "metadata": {"name": name},
        "spec": {"changeCause": "imported from kube-proxy", "settings": read.settings},
    });
    serde_saphyr::to_string(&profile)
        .map(|yaml| out + &yaml)
        .map_err(|error| ConvertError::Output(error.to_string()))
}

/// A comment of one line: values may contain line breaks.
fn comment(text: &str) -> String {
    format!("# {}\n", text.replace(char::is_control, " "))
}

#[cfg(test)]
mod tests {
    use switchtower_crds::{LocalDetectionMode, ProxyProfile};

    use super::*;

    const TEXT: &str = "kind: KubeProxyConfiguration\nmode: iptables\nclusterCIDR: 10.244.0.0/16\nbindAddress: 0.0.0.0\n\
        conntrack: {maxPerCore: 1000, tcpEstablishedTimeout: 1h}\nipvs: {scheduler: \"r\\nr\"}\n";

    #[test]
    fn profile_has_the_settings_and_lists_the_rest() {
        let printed = convert(TEXT, "all").unwrap();
        let comments: Vec<&str> = printed.lines().filter(|line| line.starts_with('#')).collect();
        let wanted = [
            "# NodePorts on 127.0.0.1 (iptables.localhostNodePorts) are not served.",
            "# Without counterpart in a ProxyProfile:",
            "#   bindAddress: \"0.0.0.0\" - the primary address family is that of the Node's first InternalIP",
            "#   ipvs.scheduler: \"r\\nr\" - nftables has no schedulers, timeouts or exclusions of IPVS",
        ];
        assert_eq!(comments, wanted);
        let profile: ProxyProfile = serde_saphyr::from_str(&printed).unwrap();
        assert_eq!(profile.metadata.name.as_deref(), Some("all"));
        let settings = profile.spec.settings;
        assert_eq!(settings, kube_proxy::parse(TEXT).unwrap().settings);
        assert_eq!(settings.local_detection.unwrap().mode, LocalDetectionMode::ClusterCidr);
        assert_eq!(settings.conntrack.unwrap().tcp_established_timeout_seconds, Some(3_600));
    }

    #[test]
    fn config_maps_are_unwrapped() {
        let map = json!({"kind": "ConfigMap", "data": {"config.conf": TEXT, "kubeconfig.conf": "x"}});
        assert_eq!(configuration(&map.to_string()).as_deref(), Some(TEXT));
        assert_eq!(configuration(TEXT).as_deref(), Some(TEXT));
        assert_eq!(configuration(&json!({"kind": "ConfigMap"}).to_string()), None);
        assert_eq!(configuration("").as_deref(), Some(""));
    }

    #[test]
    fn other_objects_are_errors() {
        for text in ["kind: Pod", "mode: userspace", "{"] {
            assert!(matches!(convert(text, "all"), Err(ConvertError::Invalid(_))), "{text}");
        }
    }
}
