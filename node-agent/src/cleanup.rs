//! Removes the agent's nftables tables and state files from a node, nothing else.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context as _;

use crate::controller::certificate::{CERTIFICATE_FILE, KEY_FILE};
use crate::storage::files;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::state_lock::{LockError, StateLock};
use crate::storage::trial_file::TrialFile;

/// Removal, or a dry run that only prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Remove,
    DryRun,
}

impl Mode {
    fn verb(self) -> &'static str {
        match self {
            Mode::Remove => "remove",
            Mode::DryRun => "would remove",
        }
    }
}

/// Removes tables and state files, or lists them. Keeps everything else: other tables, conntrack entries,
/// sysctls, foreign files in the directory.
///
/// # Errors
/// An agent is running, or something cannot be removed.
pub(crate) fn run(state: &Path, mode: Mode, out: &mut dyn Write) -> anyhow::Result<()> {
    // A running agent would restore its tables within milliseconds.
    let lock = if state.exists() && mode == Mode::Remove {
        match StateLock::take(state) {
            Ok(lock) => Some(lock),
            Err(error @ LockError::Held { .. }) => {
                return Err(anyhow::Error::new(error).context("stop the node agent before the cleanup"));
            }
            // Without a lock there may still be tables to remove; files that cannot be removed cause an error below.
            Err(error @ LockError::Io { .. }) => {
                tracing::warn!(%error, "cannot determine whether an agent is running");
                None
            }
        }
    } else {
        None
    };
    tables(mode, out)?;
    state_files(state, mode, out)?;
    drop(lock);
    Ok(())
}

fn tables(mode: Mode, out: &mut dyn Write) -> anyhow::Result<()> {
    let tables = crate::kernel::nft::inspect().context("read our nftables tables")?;
    for table in &tables {
        let (family, chains, elements) = (table.family, table.chains.len(), table.elements.len());
        let name = crate::kernel::nft::TABLE;
        writeln!(out, "{} table {family} {name}: {chains} chains, {elements} elements", mode.verb())?;
    }
    if mode == Mode::Remove && !crate::kernel::nft::cleanup().context("remove our nftables tables")? {
        writeln!(out, "this network namespace has no table {}", crate::kernel::nft::TABLE)?;
    }
    Ok(())
}

fn state_files(state: &Path, mode: Mode, out: &mut dyn Write) -> anyhow::Result<()> {
    let kept = [
        SnapshotFile::path_in(state),
        TrialFile::new(state).path().to_path_buf(),
        state.join("controllers"),
        state.join(KEY_FILE),
        state.join(CERTIFICATE_FILE),
        state.join("lock"),
    ];
    let temporary: Vec<_> = kept.iter().map(|path| files::temporary(path)).collect();
    for path in kept.iter().chain(&temporary) {
        if path.symlink_metadata().is_err() {
            continue;
        }
        writeln!(out, "{} {}", mode.verb(), path.display())?;
        if mode == Mode::Remove {
            files::remove(path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    if mode == Mode::DryRun {
        return Ok(());
    }
    match std::fs::remove_dir(state) {
        // In a pod it is a mount; and it may contain foreign files.
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
            ) =>
        {
            tracing::warn!(directory = %state.display(), %error, "cannot remove the empty state directory");
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_files_removed() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let names = [
            "view.snapshot",
            "view.new",
            "trial",
            "trial.new",
            "controllers",
            "controllers.new",
            "node-key.der",
            "node-key.new",
            "node-certificate.der",
            "lock",
        ];
        for name in names.iter().chain(&["foreign"]) {
            std::fs::write(state.join(name), "").unwrap();
        }
        let mut out = Vec::new();
        state_files(&state, Mode::DryRun, &mut out).unwrap();
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), names.len() + 1, "a dry run removes nothing");
        assert_eq!(String::from_utf8(out).unwrap().lines().count(), names.len());
        state_files(&state, Mode::Remove, &mut Vec::new()).unwrap();
        let left: Vec<_> =
            std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["foreign"]);
        std::fs::remove_file(state.join("foreign")).unwrap();
        state_files(&state, Mode::Remove, &mut Vec::new()).unwrap();
        assert!(!state.exists());
        state_files(&state, Mode::Remove, &mut Vec::new()).unwrap();
    }
}
