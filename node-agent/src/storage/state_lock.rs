//! Lock of the state directory: two agents on one node would revert each other's changes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Lock, held until dropped or until the process exits.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: File,
}

/// Failure to take the lock.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another process holds it.
    #[error("another node agent (process {holder}) runs on this node with the state directory {directory}")]
    Held {
        /// The directory.
        directory: PathBuf,
        /// Process id of the holder in its own PID namespace.
        holder: String,
    },
    /// The file cannot be opened or locked.
    #[error("lock {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

impl StateLock {
    /// Takes the lock of `directory`, which is created if it is absent.
    ///
    /// # Errors
    /// Another process holds it, or the directory cannot be written.
    pub(crate) fn take(directory: &Path) -> Result<Self, LockError> {
        let path = directory.join("lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        crate::storage::files::create_directory(directory).map_err(failed)?;
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Informational: it may be empty.
                let _ = file.take(20).read_to_string(&mut holder);
                let (directory, holder) = (directory.to_path_buf(), holder.trim().to_owned());
                return Err(LockError::Held { directory, holder });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        // Informational: on a full disk it is missing.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(StateLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_is_exclusive() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let first = StateLock::take(&state).unwrap();
        match StateLock::take(&state) {
            Err(LockError::Held { holder, .. }) => assert_eq!(holder, std::process::id().to_string()),
            other => panic!("the lock is held, but: {other:?}"),
        }
        drop(first);
        assert!(StateLock::take(&state).is_ok());
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert!(matches!(StateLock::take(&directory.path().join("file/state")), Err(LockError::Io { .. })));
    }
}
