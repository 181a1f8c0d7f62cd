//! State on disk: the lock of the state directory, the snapshot of the committed view, the running trial.

pub mod files;
pub(crate) mod snapshot;
pub(crate) mod state_lock;
pub(crate) mod trial_file;
