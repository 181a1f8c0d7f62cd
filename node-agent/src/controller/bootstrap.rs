//! Addresses and credentials of controllers: flags, the bootstrap directory, peers from Welcome.
//!
//! Every attempt to connect reads the files again, so that a rotated CA or token and a moved controller need no restart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// Maximum number of addresses.
const ADDRESS_LIMIT: usize = 64;
/// Maximum length of host:port.
const ADDRESS_LENGTH: usize = 300;
/// Maximum size of a file in bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// Name of the token in errors.
const TOKEN: &str = "the token";

/// Missing or invalid bootstrap input.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// A file cannot be read.
    #[error("read {what} from {path}: {source}")]
    Read {
        /// "the CA", "the token".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// The CA file has no certificate.
    #[error("{path} holds no PEM certificate; it must be the controller's CA (one, or two during rotation)")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// No CA file is set.
    #[error("no CA: pass --ca-file, or --bootstrap-dir with a file `ca.crt`")]
    NoCa,
    /// No controller's address is known.
    #[error("no controller address: pass --controller, or --bootstrap-dir with a file `controllers`")]
    NoController,
    /// The list of controllers in the bootstrap directory is empty.
    #[error("{path} lists no controller; it must hold one host:port per line")]
    NoAddress {
        /// The file.
        path: PathBuf,
    },
    /// The token file is empty.
    #[error("the token file {path} is empty")]
    EmptyToken {
        /// The file.
        path: PathBuf,
    },
}

impl BootstrapError {
    /// Returns the CamelCase reason.
    #[must_use]
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Read { what: TOKEN, .. } | Self::EmptyToken { .. } => "TokenMissing",
            Self::Read { source, .. } if source.kind() != std::io::ErrorKind::NotFound => "BootstrapInvalid",
            Self::Read { .. } | Self::NoCa | Self::NoController => "BootstrapMissing",
            Self::NoCertificate { .. } | Self::NoAddress { .. } => "BootstrapInvalid",
        }
    }
}

/// Sources of addresses and credentials.
#[derive(Debug, Clone)]
pub struct Controllers {
    /// Addresses of the command line: `https://host:port` or `host:port`.
    pub flags: Vec<String>,
    /// A directory with `ca.crt` and `controllers`.
    pub bootstrap: Option<PathBuf>,
    /// CA from the command line.
    pub(crate) ca_file: Option<PathBuf>,
    /// The token.
    pub token_file: PathBuf,
    /// State directory, which keeps the peers.
    pub state: Option<PathBuf>,
    /// Peers of the last Welcome.
    peers: Vec<String>,
    /// Latest addresses of resolved names.
    resolved: BTreeMap<String, Vec<SocketAddr>>,
}

impl Controllers {
    /// Creates sources without peers.
    pub fn new(
        flags: Vec<String>,
        bootstrap: Option<PathBuf>,
        ca_file: Option<PathBuf>,
        token_file: PathBuf,
        state: Option<PathBuf>,
    ) -> Self {
        Controllers {
            flags,
            bootstrap,
            ca_file,
            token_file,
            state,
            peers: Vec::new(),
            resolved: BTreeMap::new(),
        }
    }

    /// Returns `host:port` of all known controllers, the most trusted source first: flags, file, Welcome, disk.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn addresses(&self) -> Result<Vec<String>, BootstrapError> {
        let lines = |path: PathBuf| -> Vec<String> {
            read(&path, "addresses").map(|text| text.lines().map(str::to_owned).collect()).unwrap_or_default()
        };
        let bootstrap =
            self.bootstrap.as_ref().map(|path| lines(path.join("controllers"))).unwrap_or_default();
        let remembered = self.state.as_ref().map(|path| lines(path.join("controllers"))).unwrap_or_default();
        let mut addresses: Vec<String> = Vec::new();
        for address in self.flags.iter().chain(&bootstrap).chain(&self.peers).chain(&remembered) {
            if let Some(address) = normalize(address)
                && !addresses.contains(&address)
                && addresses.len() < ADDRESS_LIMIT
            {
                addresses.push(address);
            }
        }
        if !addresses.is_empty() {
            return Ok(addresses);
        }
        let listed =
            self.bootstrap.as_ref().map(|path| path.join("controllers")).filter(|path| path.exists());
        Err(listed.map_or(BootstrapError::NoController, |path| BootstrapError::NoAddress { path }))
    }

    /// Records the addresses of a `host:port` of [`Controllers::addresses`].
    pub(crate) fn resolved(&mut self, controller: &str, addresses: &[SocketAddr]) {
        self.resolved.insert(controller.to_owned(), addresses.to_vec());
    }

    /// Returns the sorted addresses of all known controllers, without names that were never resolved.
    #[must_use]
    pub(crate) fn known_addresses(&self) -> Vec<SocketAddr> {
        let controllers = self.addresses().unwrap_or_default();
        let known = controllers.iter().flat_map(|controller| match controller.parse() {
            Ok(address) => vec![address],
            Err(_) => self.resolved.get(controller).cloned().unwrap_or_default(),
        });
        known.collect::<BTreeSet<SocketAddr>>().into_iter().collect()
    }

    /// Records the peers from Welcome. Returns their file and its content if they are new.
    pub(crate) fn remember(&mut self, peers: &[String]) -> Option<(PathBuf, Vec<u8>)> {
        let peers: Vec<String> =
            peers.iter().filter_map(|peer| normalize(peer)).take(ADDRESS_LIMIT).collect();
        if peers.is_empty() || peers == self.peers {
            return None;
        }
        self.peers = peers;
        let content = self.peers.join("\n") + "\n";
        Some((self.state.as_ref()?.join("controllers"), content.into_bytes()))
    }

    /// Returns the CA certificates: one, or two during a rotation.
    ///
    /// # Errors
    /// No file is set, it cannot be read, or holds no certificate.
    pub(crate) fn ca(&self) -> Result<Vec<CertificateDer<'static>>, BootstrapError> {
        let path = match (&self.ca_file, &self.bootstrap) {
            (Some(path), _) => path.clone(),
            (None, Some(directory)) => directory.join("ca.crt"),
            (None, None) => return Err(BootstrapError::NoCa),
        };
        let text = read(&path, "the CA")?;
        let certificates: Vec<_> =
            CertificateDer::pem_slice_iter(text.as_bytes()).filter_map(Result::ok).collect();
        if certificates.is_empty() { Err(BootstrapError::NoCertificate { path }) } else { Ok(certificates) }
    }

    /// Returns the token.
    ///
    /// # Errors
    /// The file cannot be read or is empty.
    pub(crate) fn token(&self) -> Result<String, BootstrapError> {
        let token = read(&self.token_file, TOKEN)?.trim().to_owned();
        if token.is_empty() {
            Err(BootstrapError::EmptyToken { path: self.token_file.clone() })
        } else {
            Ok(token)
        }
    }
}

fn read(path: &Path, what: &'static str) -> Result<String, BootstrapError> {
    let failed = |source| BootstrapError::Read { what, path: path.to_path_buf(), source };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > FILE_LIMIT {
        return Err(failed(std::io::Error::other(format!("it has {size} bytes"))));
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// Returns `host:port` without scheme and slash; `None` if it is not a valid address with a port.
fn normalize(address: &str) -> Option<String> {
    let address = address.trim();
    let address = address.strip_prefix("https://").unwrap_or(address).trim_end_matches('/');
    let (host, port) = address.rsplit_once(':')?;
    let good = !host.is_empty()
        && address.len() <= ADDRESS_LENGTH
        && port.parse::<u16>().is_ok_and(|port| port != 0)
        && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']'));
    good.then(|| address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_ordered_and_unique() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("controllers"), "b:9443\n# nothing\n\n[2001:db8::1]:9443\n")
            .unwrap();
        let state = directory.path().join("state");
        let flags = vec!["https://a:9443/".to_owned(), "no-port".to_owned()];
        let bootstrap = Some(directory.path().to_path_buf());
        let mut controllers = Controllers::new(flags, bootstrap, None, "token".into(), Some(state.clone()));
        let (path, content) = controllers.remember(&["c:9443".into(), "b:9443".into()]).unwrap();
        crate::storage::files::replace(&path, &content).unwrap();
        assert_eq!(controllers.addresses().unwrap(), ["a:9443", "b:9443", "[2001:db8::1]:9443", "c:9443"]);

        let again = Controllers::new(Vec::new(), None, None, "token".into(), Some(state));
        assert_eq!(again.addresses().unwrap(), ["c:9443", "b:9443"], "remembered on disk");
        let none = Controllers::new(Vec::new(), None, None, "token".into(), None);
        assert!(matches!(none.addresses(), Err(BootstrapError::NoController)));
    }

    #[test]
    fn bootstrap_faults_have_reasons() {
        let directory = tempfile::tempdir().unwrap();
        let (path, put) = (directory.path(), |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        });
        let controllers =
            Controllers::new(Vec::new(), Some(path.to_path_buf()), None, path.join("token"), None);
        assert_eq!(controllers.addresses().unwrap_err().reason(), "BootstrapMissing");
        assert_eq!(controllers.ca().unwrap_err().reason(), "BootstrapMissing");
        assert_eq!(controllers.token().unwrap_err().reason(), "TokenMissing");
        for garbage in ["", "\u{1}\u{2} no address\n"] {
            put("controllers", garbage);
            put("ca.crt", garbage);
            put("token", "");
            assert_eq!(controllers.addresses().unwrap_err().reason(), "BootstrapInvalid", "{garbage:?}");
            assert_eq!(controllers.ca().unwrap_err().reason(), "BootstrapInvalid", "{garbage:?}");
            assert_eq!(controllers.token().unwrap_err().reason(), "TokenMissing");
        }
    }
}
