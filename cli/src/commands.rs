//! Commands. Each reads its inputs, evaluates them in a pure function, and returns a value and a text.

pub(crate) mod bundle;
pub(crate) mod check;
pub(crate) mod codes;
pub(crate) mod compare;
pub(crate) mod completion;
pub(crate) mod dashboard;
pub(crate) mod diff;
pub(crate) mod explain;
pub(crate) mod migrate;
pub(crate) mod release_held;
pub(crate) mod rollout;
pub(crate) mod rules;
pub(crate) mod status;
pub(crate) mod trace;
pub(crate) mod wait;
