//! Where controllers are and whom to trust: flags, the bootstrap directory, what Welcome told.
//!
//! Files are read anew for every attempt to connect, so that a rotated CA or token and a moved controller are
//! found without a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// Most addresses that are kept.
const ADDRESS_LIMIT: usize = 64;
/// Longest host:port.
const ADDRESS_LENGTH: usize = 300;
/// Largest file that is read.
const FILE_LIMIT: u64 = 1 << 20;

/// What the token file holds, in errors.
const TOKEN: &str = "the token";

/// Why there is nothing to connect with.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
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
    #[error("no CA is known: pass --ca-file, or --bootstrap-dir with a ca.crt in it")]
    NoCa,
    /// No controller's address is known.
    #[error("no controller is known: pass --controller, or --bootstrap-dir with a file `controllers` in it")]
    NoController,
    /// The bootstrap directory has a list of controllers, and none in it.
    #[error("{path} names no controller; it must hold one host:port a line")]
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
    /// The reason as one CamelCase word.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Read { what: TOKEN, .. } | Self::EmptyToken { .. } => "TokenMissing",
            Self::Read { source, .. } if source.kind() != std::io::ErrorKind::NotFound => "BootstrapInvalid",
            Self::Read { .. } | Self::NoCa | Self::NoController => "BootstrapMissing",
            Self::NoCertificate { .. } | Self::NoAddress { .. } => "BootstrapInvalid",
        }
    }
}

/// The sources.
#[derive(Debug, Clone)]
pub struct Controllers {
    /// From the command line: `https://host:port` or `host:port`.
    pub flags: Vec<String>,
    /// A directory with `ca.crt` and `controllers`.
    pub bootstrap: Option<PathBuf>,
    /// CA from the command line.
    pub ca_file: Option<PathBuf>,
    /// The token.
    pub token_file: PathBuf,
    /// Where peers are remembered.
    pub state: Option<PathBuf>,
    /// Peers of the last Welcome.
    peers: Vec<String>,
    /// What names were last resolved to.
    resolved: BTreeMap<String, Vec<SocketAddr>>,
}

impl Controllers {
    /// Sources without peers yet.
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

    /// `host:port` of all known controllers in order of trust in the source: flag, file, Welcome, disk.
    ///
    /// # Errors
    /// None is known.
    pub fn addresses(&self) -> Result<Vec<String>, BootstrapError> {
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

    /// Remembers what a `host:port` of [`Controllers::addresses`] was resolved to.
    pub fn resolved(&mut self, controller: &str, addresses: &[SocketAddr]) {
        self.resolved.insert(controller.to_owned(), addresses.to_vec());
    }

    /// The addresses of all known controllers, sorted, as far as they need no name service or were resolved before.
    #[must_use]
    pub fn known_addresses(&self) -> Vec<SocketAddr> {
        let controllers = self.addresses().unwrap_or_default();
        let known = controllers.iter().flat_map(|controller| match controller.parse() {
            Ok(address) => vec![address],
            Err(_) => self.resolved.get(controller).cloned().unwrap_or_default(),
        });
        known.collect::<BTreeSet<SocketAddr>>().into_iter().collect()
    }

    /// Remembers the peers that a controller told. Returns the file to keep them in and its content if they are new.
    pub fn remember(&mut self, peers: &[String]) -> Option<(PathBuf, Vec<u8>)> {
        let peers: Vec<String> =
            peers.iter().filter_map(|peer| normalize(peer)).take(ADDRESS_LIMIT).collect();
        if peers.is_empty() || peers == self.peers {
            return None;
        }
        self.peers = peers;
        let content = self.peers.join("\n") + "\n";
        Some((self.state.as_ref()?.join("controllers"), content.into_bytes()))
    }

    /// The CA certificates: one, or two during a rotation.
    ///
    /// # Errors
    /// No file is set, it cannot be read, or holds no certificate.
    pub fn ca(&self) -> Result<Vec<CertificateDer<'static>>, BootstrapError> {
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

    /// The token.
    ///
    /// # Errors
    /// The file cannot be read or is empty.
    pub fn token(&self) -> Result<String, BootstrapError> {
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

/// `host:port` without scheme and slash; `None` if there is no port or it cannot be an address.
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
    fn addresses_come_in_order_and_once() {
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
    fn what_is_wrong_with_the_bootstrap_directory_has_a_word() {
        let directory = tempfile::tempdir().unwrap();
        let (path, put) = (directory.path(), |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        });
        let controllers =
            Controllers::new(Vec::new(), Some(path.to_path_buf()), None, path.join("token"), None);
        assert_eq!(controllers.addresses().unwrap_err().word(), "BootstrapMissing");
        assert_eq!(controllers.ca().unwrap_err().word(), "BootstrapMissing");
        assert_eq!(controllers.token().unwrap_err().word(), "TokenMissing");
        for garbage in ["", "\u{1}\u{2} no address\n"] {
            put("controllers", garbage);
            put("ca.crt", garbage);
            put("token", "");
            assert_eq!(controllers.addresses().unwrap_err().word(), "BootstrapInvalid", "{garbage:?}");
            assert_eq!(controllers.ca().unwrap_err().word(), "BootstrapInvalid", "{garbage:?}");
            assert_eq!(controllers.token().unwrap_err().word(), "TokenMissing");
        }
    }
}
