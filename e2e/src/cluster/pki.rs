//! The cluster's own certificate authority, its certificates, and the tokens of its components.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::layout::{API_SERVER_VIP, Layout};

/// Users that get a token, with groups. The names are upstream's, to which its built-in roles are bound.
const COMPONENTS: [(&str, &str, &str); 4] = [
    ("admin", "switchtower-cluster-admin", "system:masters"),
    ("kube-controller-manager", "system:kube-controller-manager", ""),
    ("kube-scheduler", "system:kube-scheduler", ""),
    ("kube-proxy", "system:kube-proxy", ""),
];

/// Writes all credentials into the folder: `ca.crt`, `apiserver.{crt,key}`, `kubelet-client.{crt,key}`,
/// `service-account.{key,pub}`, `tokens.csv`, and a kubeconfig for each component and node.
pub fn write(layout: &Layout) -> Result<()> {
    let dir = layout.pki();
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).context("closing the folder of keys")?;
    let ca = authority()?;
    put(&dir.join("ca.crt"), &ca.pem())?;
    let mut names = vec![
        "localhost".to_owned(),
        "kubernetes".to_owned(),
        "kubernetes.default".to_owned(),
        "kubernetes.default.svc".to_owned(),
        "kubernetes.default.svc.cluster.local".to_owned(),
        "127.0.0.1".to_owned(),
        API_SERVER_VIP.to_owned(),
    ];
    names.push(layout.hub_ip().to_string());
    names.push(layout.hub_ip6().to_string());
    let usage = ExtendedKeyUsagePurpose::ServerAuth;
    leaf(&dir, "apiserver", &ca, Leaf { user: "kube-apiserver", group: "", names: &names, usage })?;
    let (user, usage) = ("kube-apiserver-kubelet-client", ExtendedKeyUsagePurpose::ClientAuth);
    leaf(&dir, "kubelet-client", &ca, Leaf { user, group: "system:masters", names: &[], usage })?;
    let key = KeyPair::generate().context("making the key of ServiceAccount tokens")?;
    put(&dir.join("service-account.key"), &key.serialize_pem())?;
    put(&dir.join("service-account.pub"), &key.public_key_pem())?;
    let mut tokens = String::new();
    for (component, user, group) in COMPONENTS {
        let token = token();
        tokens.push_str(&format!("{token},{user},{user},\"{group}\"\n"));
        put(&dir.join(format!("{component}.kubeconfig")), &kubeconfig(layout, &ca.pem(), &token))?;
    }
    for node in layout.node_names() {
        let token = token();
        tokens.push_str(&format!("{token},system:node:{node},{node},\"system:nodes\"\n"));
        put(&dir.join(format!("{node}.kubeconfig")), &kubeconfig(layout, &ca.pem(), &token))?;
    }
    put(&dir.join("tokens.csv"), &tokens)
}

/// Certificate of an authority unknown to the cluster, PEM.
pub(super) fn foreign_authority() -> Result<String> {
    Ok(authority()?.pem())
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "switchtower-cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().context("making the authority's key")?;
    CertifiedIssuer::self_signed(params, key).context("signing the authority's certificate")
}

/// Contents of a certificate. Servers have names, clients have a group.
struct Leaf<'a> {
    user: &'a str,
    group: &'a str,
    names: &'a [String],
    usage: ExtendedKeyUsagePurpose,
}

/// Writes a certificate and its key to two files with this stem.
fn leaf(dir: &Path, file: &str, ca: &CertifiedIssuer<'_, KeyPair>, leaf: Leaf<'_>) -> Result<()> {
    let Leaf { user, group, names, usage } = leaf;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, user);
    if !group.is_empty() {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    for name in names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(name.as_str().try_into().with_context(|| format!("the name {name}"))?),
        });
    }
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate().with_context(|| format!("making the key of {file}"))?;
    let certificate =
        params.signed_by(&key, ca).with_context(|| format!("signing the certificate of {file}"))?;
    put(&dir.join(format!("{file}.crt")), &certificate.pem())?;
    put(&dir.join(format!("{file}.key")), &key.serialize_pem())
}

fn token() -> String {
    format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>())
}

fn kubeconfig(layout: &Layout, ca: &str, token: &str) -> String {
    // JSON is valid YAML.
    let value = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": {
            "server": layout.api_server(),
            "certificate-authority-data": base64(ca.as_bytes()),
        }}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}],
        "current-context": "cluster",
    });
    format!("{value:#}\n")
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0_u32, |word, byte| (word << 8) | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for position in 0..4 {
            let index = (word >> (18 - 6 * position)) & 63;
            let letter = ALPHABET.get(index as usize).copied().unwrap_or(b'=');
            text.push(if position <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

fn put(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("closing {} to others", path.display()))
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
