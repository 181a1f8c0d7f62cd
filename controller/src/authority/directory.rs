//! The CA in the directory of --tls-dir. Operators rotate it: the files are read again every minute, and `ca.crt` may
//! hold further certificates after that of `ca.key`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;

use super::{Authority, AuthorityError, SIGNER, generate};
use crate::errors::Chain;
use crate::sync::publish;

/// Interval between two reads.
const INTERVAL: Duration = Duration::from_secs(60);

/// Reads the CA, or generates it.
///
/// # Errors
/// A file cannot be read or written, or its content is not usable.
pub fn read_or_create(directory: &Path) -> Result<Authority, AuthorityError> {
    let (certificate, key) = (directory.join(SIGNER.0), directory.join(SIGNER.1));
    if certificate.exists() || key.exists() {
        return read(directory);
    }
    let made = generate()?;
    std::fs::create_dir_all(directory).map_err(file_error(directory))?;
    write_private(&key, &made.key).map_err(file_error(&key))?;
    std::fs::write(&certificate, &made.certificate).map_err(file_error(&certificate))?;
    Ok(Authority::new(made))
}

fn read(directory: &Path) -> Result<Authority, AuthorityError> {
    for name in [SIGNER.0, SIGNER.1] {
        let path = directory.join(name);
        std::fs::metadata(&path).map_err(file_error(&path))?;
    }
    let place = directory.display().to_string();
    Authority::parse(&place, |name| std::fs::read_to_string(directory.join(name)).ok())
}

/// Reads the directory again and again. Files that are not usable change nothing.
pub async fn follow(directory: PathBuf, sender: watch::Sender<Authority>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        match read(&directory) {
            Ok(authority) => publish(&sender, authority),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "failed to read the CA; the one that was read before stays in use");
            }
        }
    }
}

fn file_error(path: &Path) -> impl Fn(std::io::Error) -> AuthorityError + use<> {
    let path = path.to_owned();
    move |source| AuthorityError::File { path: path.clone(), source }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_gets_its_ca_once() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tls");
        let first = read_or_create(&path).unwrap();
        let mode = std::fs::metadata(path.join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(read_or_create(&path).unwrap(), first);
        std::fs::remove_file(path.join("ca.key")).unwrap();
        let error = read_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("ca.key"), "a certificate without its key is not replaced: {error}");
    }

    #[tokio::test(start_paused = true)]
    async fn files_are_read_again_and_garbage_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let first = read_or_create(directory.path()).unwrap();
        let (sender, mut seen) = watch::channel(first.clone());
        tokio::spawn(follow(directory.path().to_owned(), sender));
        std::fs::write(directory.path().join("ca.crt"), "garbage").unwrap();
        assert!(tokio::time::timeout(3 * INTERVAL, seen.changed()).await.is_err());
        let other = generate().unwrap();
        let bundle = format!("{}{}", other.certificate, first.signer.certificate);
        std::fs::write(directory.path().join("ca.crt"), &bundle).unwrap();
        std::fs::write(directory.path().join("ca.key"), &other.key).unwrap();
        seen.changed().await.unwrap();
        assert_eq!(seen.borrow().bundle(), bundle);
    }
}
