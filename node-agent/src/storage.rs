//! State on disk: the lock of the state directory, the snapshot of the committed view, the running trial.

pub mod files;
pub mod snapshot;
pub mod state_lock;
pub mod trial_file;
